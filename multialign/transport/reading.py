"""The sum and the marginals of a plan at given potentials, with gradients.

A small plan, or one of a full cost tensor, is built and summed. A larger one of pairwise costs is
read by elimination in operators of their own, which compute it again for their gradients rather
than keep its tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multialign.ops import logsumexp, register_batched_vmap
from multialign.transport.elimination import (
    Edge,
    Scope,
    axes_without,
    beliefs,
    check_entries,
    join,
    log_marginal,
)
from multialign.transport.plans import make_plan
from multialign.transport.problem import Problem, unflatten_problem

__all__ = ["log_total", "read_log_total", "read_marginals", "solve_hessian"]

# Added to the unit diagonal of the scaled Hessian: where the plan is a permutation up to rounding,
# potentials are not determined, and this keeps their gradient finite.
_DAMPING = 1e-13
# Conjugate gradients for a gradient stop at this relative residual, or after so many steps.
_RESIDUAL = 1e-12
_CONJUGATE_STEPS = 2000
# A log-weight of nothing, beside finite ones.
_NOWHERE = -1e30
# A plan this small is cheaper to build whole than to read by elimination.
_SMALL_ENTRIES = 2**14


def read_log_total(problem: Problem, potentials: Tensor) -> Tensor:
    """Return the logarithm of the sum of the plan, `(B,)`, at potentials in units of epsilon.

    These are such that it is 0, up to rounding; its gradient is not.
    """
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    if _is_whole(problem):
        return logsumexp(_joined(unaries, pairs, problem).flatten(1), 1)
    known = torch.zeros_like(problem.epsilon)
    total: Tensor = _LogTotal.apply(_flat(list(pairs)), known, *unaries, *pairs.values())
    return total


def log_total(problem: Problem, potentials: Tensor) -> Tensor:
    """Return the logarithm of the sum of the plan, `(B,)`, at any potentials; without gradient."""
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    if _is_whole(problem):
        return logsumexp(_joined(unaries, pairs, problem).flatten(1), 1)
    found: list[Tensor] = _marginals([*unaries, *pairs.values()], _flat(list(pairs)), [])
    return found[0]


def read_marginals(problem: Problem, potentials: Tensor, scopes: Sequence[Scope]) -> list[Tensor]:
    """Return marginals of the plan, `(B, *K_scope)` each, of one, two or all variables."""
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    everything = tuple(range(len(unaries)))
    if _is_whole(problem) or everything in scopes:
        plan = _joined(unaries, pairs, problem).exp()
        gone = [axes_without(scope, len(everything)) for scope in scopes]
        return [plan.sum(axes) if axes else plan for axes in gone]
    log_total, *tables = _Marginals.apply(
        _flat(list(pairs)), _flat(scopes), *unaries, *pairs.values()
    )
    # Not divided by its sum, the plan says by its gradient how the sum changes.
    total = log_total.exp()
    return [table * total.reshape(len(total), *[1] * (table.ndim - 1)) for table in tables]


def solve_hessian(problem: Problem, potentials: Tensor, right: Tensor) -> Tensor:
    """Solve H x = right, `(B, S)`, with H at these potentials; the gradient is that of `right`."""
    costs, scopes, marginals, *rest = problem.flatten()
    solution: Tensor = _Solve.apply(
        scopes, len(costs), right, *rest, potentials, *costs, *marginals
    )
    return solution


def _is_whole(problem: Problem) -> bool:
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    return entries <= _SMALL_ENTRIES or any(len(scope) > 2 for scope in problem.costs)


def _joined(unaries: Sequence[Tensor], pairs: dict[Scope, Tensor], problem: Problem) -> Tensor:
    check_entries(math.prod(problem.sizes) * problem.epsilon.numel())
    return join({**{(p,): x for p, x in enumerate(unaries)}, **pairs}, problem.sizes)


class _LogTotal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(edges: list[int], known: Tensor, *factors: Tensor) -> Tensor:
        return known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.edges = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, edges = ctx.saved_tensors, ctx.edges
        count = len(factors) - len(edges) // 2
        scopes = [p for p in range(count) for _ in (0, 1)] + edges
        # Operators have no derivative of their own: second derivatives are not taken.
        with torch.no_grad():
            tables = _marginals(list(factors), edges, scopes)
        shaped = [grad.reshape(len(grad), *[1] * (table.ndim - 1)) * table for table in tables[1:]]
        return None, None, *shaped


class _Marginals(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(edges: list[int], scopes: list[int], *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_marginals(list(factors), edges, scopes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.edges, ctx.scopes = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _marginals_backward(list(ctx.saved_tensors), ctx.edges, ctx.scopes, list(grads))
        return None, None, *found


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        scopes: list[int],
        count: int,
        right: Tensor,
        epsilon: Tensor,
        deviation: Tensor,
        potentials: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        costs = [tables[n] for n in range(count)]
        marginals = [tables[n] for n in range(count, len(tables))]
        result: Tensor = _solve_hessian(
            costs, scopes, marginals, epsilon, deviation, potentials, right
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scopes, ctx.count = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # H is symmetric.
        with torch.no_grad():
            solution = _Solve.forward(ctx.scopes, ctx.count, grad, *ctx.saved_tensors)
        return None, None, solution, *[None] * len(ctx.saved_tensors)


def _flat(scopes: Sequence[Scope]) -> list[int]:
    """Write scopes of one or two variables as pairs, one after another."""
    return [p for scope in scopes for p in (scope[0], scope[-1])]


def _unflat(numbers: Sequence[int]) -> list[Scope]:
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [(i,) if i == j else (i, j) for i, j in pairs]


@torch.library.custom_op(
    "multialign::plan_marginals",
    mutates_args=(),
    schema="(Tensor[] factors, int[] edges, int[] scopes) -> Tensor[]",
)
def _marginals(factors: list[Tensor], edges: list[int], scopes: list[int]) -> list[Tensor]:
    return [x.clone() for x in _read(factors, edges, scopes)]


@torch.library.custom_op(
    "multialign::plan_marginals_backward",
    mutates_args=(),
    schema="(Tensor[] factors, int[] edges, int[] scopes, Tensor[] grads) -> Tensor[]",
)
def _marginals_backward(
    factors: list[Tensor], edges: list[int], scopes: list[int], grads: list[Tensor]
) -> list[Tensor]:
    unaries, pairs = _parts(factors, edges)
    # The derivative by log-factors of a sum over the plan weighted by Phi, the sum of all grads, is
    # that of the marginals along Phi. Along an imaginary step this small it is exact: nothing is
    # subtracted (the complex-step method).
    largest = torch.stack([grad.abs().max() for grad in grads[1:]]).max()
    step = 1e-30 / torch.where(largest > 0, largest, 1.0)
    ways: dict[Scope, Tensor] = {(p,): torch.zeros_like(x) for p, x in enumerate(unaries)}
    ways |= {edge: torch.zeros_like(table) for edge, table in pairs.items()}
    for scope, grad in zip(_unflat(scopes), grads[1:], strict=True):
        ways[scope] = ways[scope] + grad if scope in ways else grad
    # Atoms of mass 0: an infinite real part would make the imaginary part NaN.
    far = [torch.where(x == -math.inf, _NOWHERE, x) for x in unaries]
    starts = [torch.complex(x, step * ways[(p,)]) for p, x in enumerate(far)]
    at = {scope: torch.zeros_like(way) for scope, way in ways.items() if len(scope) == 2}
    at |= pairs
    tables = {(s[0], s[-1]): torch.complex(x, step * ways[s]) for s, x in at.items()}
    found = beliefs(starts, tables, "edges")
    results = [found.marginals[p] for p in range(len(unaries))]
    results += [found.tables[edge] for edge in pairs]
    return [
        x.imag / step + grads[0].reshape(len(grads[0]), *[1] * (x.ndim - 1)) * x.real
        for x in results
    ]


@torch.library.custom_op(
    "multialign::solve_hessian",
    mutates_args=(),
    schema=(
        "(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon, Tensor deviation, "
        "Tensor potentials, Tensor right) -> Tensor"
    ),
)
def _solve_hessian(
    costs: Sequence[Tensor],
    scopes: list[int],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    potentials: Tensor,
    right: Tensor,
) -> Tensor:
    plan = make_plan(unflatten_problem(costs, scopes, marginals, epsilon, deviation), torch.float64)
    hessian = plan.evaluate(potentials, epsilon).hessian
    damping, tolerance = torch.full_like(epsilon, _DAMPING), torch.full_like(epsilon, _RESIDUAL)
    return hessian.solve(right, damping, tolerance, _CONJUGATE_STEPS)


@_marginals.register_fake
def _(factors: list[Tensor], edges: list[int], scopes: list[int]) -> list[Tensor]:
    batch = factors[0].shape[:1]
    shapes = [[factors[p].shape[1] for p in scope] for scope in _unflat(scopes)]
    return [factors[0].new_empty((*batch, *shape)) for shape in [[], *shapes]]


@_marginals_backward.register_fake
def _(
    factors: list[Tensor], edges: list[int], scopes: list[int], grads: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(x) for x in factors]


@_solve_hessian.register_fake
def _(
    costs: Sequence[Tensor],
    scopes: list[int],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    potentials: Tensor,
    right: Tensor,
) -> Tensor:
    return torch.empty_like(right)


for _operator in (_marginals, _marginals_backward, _solve_hessian):
    register_batched_vmap(_operator)


def _parts(factors: Sequence[Tensor], edges: list[int]) -> tuple[list[Tensor], dict[Edge, Tensor]]:
    count = len(factors) - len(edges) // 2
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return list(factors[:count]), dict(zip(pairs, factors[count:], strict=True))


def _read(factors: Sequence[Tensor], edges: list[int], scopes: list[int]) -> list[Tensor]:
    """Return the logarithm of the sum, and marginals divided by the sum."""
    unaries, pairs = _parts(factors, edges)
    if not scopes:
        return [log_marginal(unaries, pairs)]
    found = beliefs(unaries, pairs, "edges")
    results = [found.log_total]
    for scope in _unflat(scopes):
        if len(scope) == 1:
            results.append(found.marginals[scope[0]])
        elif scope in found.tables:
            results.append(found.tables[scope])
        else:
            joint = log_marginal(unaries, pairs, scope)
            results.append((joint - found.log_total[:, None, None]).exp())
    return results
