"""Costs so large that they would take the digits of the others, and forbidden pairs.

Centred by its means, a table that holds a cost of 1e12 leaves four digits behind the point of all
others. Instead, each table takes the potentials a, b of its own transport problem, at an epsilon
that is small beside its largest cost, as offsets: C - (a + b) is near 0 wherever a plan that meets
the marginals has mass, whether it avoids the largest costs or has to pay them. a and b are rounded
to multiples of a power of two, so that their sums are exact, and no digit of C is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multialign.ops import register_batched_vmap
from multialign.transport.elimination import Scope
from multialign.transport.forms.choose import make_form
from multialign.transport.newton import newton
from multialign.transport.problem import Problem, along, unflatten_problem

__all__ = ["absorb", "is_extreme"]

# Costs up to this many epsilon leave the digits that others need.
_LARGEST_COST = 2.0**28
# Epsilon of a table's own problem, and the unit of its offsets, relative to its costs.
_COARSE = 2.0**-26
_TOLERANCE = 1e-3
_STEPS = 500


def is_extreme(costs: Sequence[Tensor], epsilon: Tensor) -> bool:
    """Return whether some cost is infinite or too large to be centred; True where nobody can tell.

    Args:
        costs: Tables `(E, B, ...)`.
        epsilon: `(B,)`.
    """
    if torch.compiler.is_compiling():
        return True
    if not epsilon.numel():
        return False
    largest = torch.stack([cost.detach().abs().amax() for cost in costs]).amax()
    try:
        return bool(largest > _LARGEST_COST * epsilon.detach().amin())
    except RuntimeError:  # under torch.func.vmap, which reads no values
        return True


def absorb(
    costs: Mapping[Scope, Tensor], marginals: Sequence[Tensor], epsilon: Tensor
) -> tuple[dict[Scope, Tensor], list[Tensor], Tensor, dict[Scope, Tensor]]:
    """Return costs without offsets, the offsets, the costs' deviation, and what is forbidden."""
    forbidden = {scope: cost == math.inf for scope, cost in costs.items()}
    scopes = [variable for scope in costs for variable in scope]
    parts = _offsets(
        [cost.detach() for cost in costs.values()],
        scopes,
        [nu.detach() for nu in marginals],
        epsilon.detach(),
    )
    *parts, deviation = parts
    offsets = [torch.zeros_like(nu) for nu in marginals]
    left: dict[Scope, Tensor] = {}
    for scope, cost in costs.items():
        own, parts = parts[: len(scope)], parts[len(scope) :]
        for p, part in zip(scope, own, strict=True):
            offsets[p] = offsets[p] + part
        # Infinity less a number is masked before, since its gradient would be NaN.
        finite = cost.masked_fill(forbidden[scope], 0.0)
        left[scope] = (finite - _sum(own, scope)).masked_fill(forbidden[scope], 0.0)
    return left, offsets, deviation, forbidden


def _sum(parts: Sequence[Tensor], scope: Scope) -> Tensor:
    """Return the sum of vectors `(B, K_p)` as a table."""
    total = along(parts[0], scope[0], scope)
    for part, p in zip(parts[1:], scope[1:], strict=True):
        total = total + along(part, p, scope)
    return total


@torch.library.custom_op(
    "multialign::cost_offsets",
    mutates_args=(),
    schema="(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon) -> Tensor[]",
)
def _offsets(
    costs: list[Tensor], scopes: list[int], marginals: list[Tensor], epsilon: Tensor
) -> list[Tensor]:
    """Return a vector `(B, K_p)` for each axis of each table, and the deviation `(B,)`.

    This is one operator, since it depends on the data whether a table is extreme.
    """
    problem = unflatten_problem(costs, scopes, marginals, epsilon, epsilon, forbids=True)
    offsets: list[Tensor] = []
    variance = torch.zeros_like(epsilon)
    for scope, cost in problem.costs.items():
        own = [marginals[p] for p in scope]
        parts = _table_offsets(cost, problem.forbidden[scope], own, epsilon)
        left = (cost - _sum(parts, scope)).masked_fill(problem.forbidden[scope], 0.0)
        weighted = left.square()
        for p, nu in zip(scope, own, strict=True):
            weighted = weighted * along(nu, p, scope)
        variance = variance + weighted.flatten(1).sum(1)
        offsets += parts
    return [*(part.clone() for part in offsets), variance.sqrt()]


def _table_offsets(
    cost: Tensor, forbidden: Tensor, marginals: Sequence[Tensor], epsilon: Tensor
) -> list[Tensor]:
    """Return a vector `(B, K_p)` for each axis: of extreme problems potentials, else means."""
    largest = cost.abs().flatten(1).amax(1)
    scope = tuple(range(len(marginals)))
    extreme = largest > _LARGEST_COST * epsilon
    parts = _means(cost, marginals)
    parts = [torch.where(extreme.unsqueeze(-1), 0.0, part) for part in parts]
    unit = torch.exp2(largest.log2().ceil())
    # After one round the costs that a plan uses are a few units; the next round has a smaller one.
    while bool((extreme & (unit > _LARGEST_COST * _COARSE * epsilon)).any()):
        unit = unit * _COARSE
        left = (cost - _sum(parts, scope)).masked_fill(forbidden, 0.0)
        problem = Problem(
            costs={scope: left},
            offsets=[],
            marginals=list(marginals),
            epsilon=torch.maximum(unit, epsilon),
            deviation=largest,
            batch=epsilon.shape,
            dtype=cost.dtype,
            forbidden={scope: forbidden} if bool(forbidden.any()) else {},
        )
        found = newton(problem, _TOLERANCE, _STEPS, False, "torch", "auto").potentials
        found = make_form(problem, cost.dtype, "torch").balance(found, torch.zeros_like(unit))
        scaled = found * (problem.epsilon / unit).unsqueeze(-1)
        rounded = scaled.round().nan_to_num(0.0, 0.0, 0.0) * unit.unsqueeze(-1)
        rounded = torch.where(extreme.unsqueeze(-1), rounded, 0.0)
        parts = [x + y for x, y in zip(parts, rounded.split(problem.sizes, -1), strict=True)]
    return parts


def _means(cost: Tensor, marginals: Sequence[Tensor]) -> list[Tensor]:
    """Return the means given each variable; all but the first have the total mean removed."""
    scope = tuple(range(len(marginals)))
    means = []
    for axis in scope:
        others = [other for other in scope if other != axis]
        weighted = cost
        for other in others:
            weighted = weighted * along(marginals[other], other, scope)
        means.append(weighted.sum([1 + other for other in others]))
    total = (means[0] * marginals[0]).sum(-1, keepdim=True)
    return [means[0], *(mean - total for mean in means[1:])]


@_offsets.register_fake
def _(
    costs: list[Tensor], scopes: list[int], marginals: list[Tensor], epsilon: Tensor
) -> list[Tensor]:
    return [*(torch.empty_like(marginals[p]) for p in scopes), torch.empty_like(epsilon)]


register_batched_vmap(_offsets)
