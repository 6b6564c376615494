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

from multialign.ops import operator, register_batched_vmap, register_fake
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
    try:
        largest = [torch.linalg.vector_norm(cost.detach(), math.inf) for cost in costs]
        # Read together: on an accelerator each reading waits.
        smallest, *sizes = torch.stack([epsilon.detach().min(), *largest]).tolist()
        return bool(max(sizes) > _LARGEST_COST * smallest)
    except RuntimeError:  # under torch.func.vmap, which reads no values
        return True


def absorb(
    costs: Mapping[Scope, Tensor], marginals: Sequence[Tensor], epsilon: Tensor
) -> tuple[dict[Scope, Tensor], list[Tensor], Tensor, dict[Scope, Tensor]]:
    """Return costs without offsets, the offsets, the costs' deviation, and what is forbidden."""
    forbidden = {scope: cost == math.inf for scope, cost in costs.items()}
    scopes = [variable for scope in costs for variable in scope]
    detached = [nu.detach() for nu in marginals]
    found = _potentials(
        [cost.detach() for cost in costs.values()], scopes, detached, epsilon.detach()
    )
    offsets = [torch.zeros_like(nu) for nu in marginals]
    left: dict[Scope, Tensor] = {}
    variance = torch.zeros_like(epsilon)
    for scope, cost in costs.items():
        extreme, *own = found[: 1 + len(scope)]
        found = found[1 + len(scope) :]
        # Infinity less a number is masked before, since its gradient would be NaN.
        finite = cost.masked_fill(forbidden[scope], 0.0)
        means = _means(finite, [detached[p] for p in scope])
        rows = extreme.unsqueeze(-1) > 0
        own = [torch.where(rows, x, mean) for x, mean in zip(own, means, strict=True)]
        left[scope] = (finite - _sum(own, scope)).masked_fill(forbidden[scope], 0.0)
        weighted = left[scope].detach().square()
        for p, part in zip(scope, own, strict=True):
            offsets[p] = offsets[p] + part
            weighted = weighted * along(detached[p], p, scope)
        variance = variance + weighted.flatten(1).sum(1)
    return left, offsets, variance.sqrt(), forbidden


def _sum(parts: Sequence[Tensor], scope: Scope) -> Tensor:
    """Return the sum of vectors `(B, K_p)` as a table."""
    total = along(parts[0], scope[0], scope)
    for part, p in zip(parts[1:], scope[1:], strict=True):
        total = total + along(part, p, scope)
    return total


@operator(
    "cost_potentials(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon) -> Tensor[]"
)
def _potentials(
    costs: list[Tensor], scopes: list[int], marginals: list[Tensor], epsilon: Tensor
) -> list[Tensor]:
    """Return for each table whether it is extreme, `(B,)`, and its rounded potentials `(B, K_p)`.

    This is one operator, since it depends on the data what has to be solved.
    """
    problem = unflatten_problem(costs, scopes, marginals, epsilon, epsilon, True, ())
    found = []
    for scope, cost in problem.costs.items():
        largest = cost.abs().flatten(1).amax(1)
        # What is not finite here has no potentials: NaN, and minus infinity.
        extreme = (largest > _LARGEST_COST * epsilon) & largest.isfinite()
        own = [marginals[p] for p in scope]
        found += [
            extreme.double(),
            *_rounded_potentials(cost, problem.forbidden[scope], own, epsilon, extreme),
        ]
    return found


def _rounded_potentials(
    cost: Tensor, forbidden: Tensor, marginals: Sequence[Tensor], epsilon: Tensor, extreme: Tensor
) -> list[Tensor]:
    """Return the potentials of a table's own problem, 0 where it is not extreme."""
    scope = tuple(range(len(marginals)))
    largest = cost.abs().flatten(1).amax(1)
    parts = [torch.zeros_like(nu) for nu in marginals]
    unit = torch.exp2(largest.log2().ceil())
    # After one round the costs that a plan uses are a few units; the next round has a smaller one.
    while bool((extreme & (unit > _LARGEST_COST * _COARSE * epsilon)).any()):
        unit = unit * _COARSE
        problem = Problem(
            costs={scope: (cost - _sum(parts, scope)).masked_fill(forbidden, 0.0)},
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
    """Return the means given each variable, less a share of the total mean."""
    scope = tuple(range(len(marginals)))
    means = []
    for axis in scope:
        others = [other for other in scope if other != axis]
        weighted = cost
        for other in others:
            weighted = weighted * along(marginals[other], other, scope)
        means.append(weighted.sum([1 + other for other in others]))
    total = (means[0] * marginals[0]).sum(-1, keepdim=True)
    share = total * ((len(means) - 1) / len(means))
    return [mean - share for mean in means]


@register_fake(_potentials)
def _(
    costs: list[Tensor], scopes: list[int], marginals: list[Tensor], epsilon: Tensor
) -> list[Tensor]:
    found, variables = [], iter(scopes)
    for cost in costs:
        found.append(torch.empty_like(epsilon))
        found += [torch.empty_like(marginals[next(variables)]) for _ in cost.shape[1:]]
    return found


register_batched_vmap(_potentials)
