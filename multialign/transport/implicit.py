"""What is read of a plan at given potentials, with gradients.

The solver ends at potentials x without gradient. At the optimum r(x; C, nu, epsilon) = nu - m = 0,
so by the implicit function theorem dx = H^-1 dr at fixed x, with H the matrix of the marginals
and pairwise marginals :cite:`luise:18,eisenberger:22`. Adding H^-1 (r - r.detach()) to x attaches
that gradient and leaves the value. The optimal value itself is stationary in x: its gradient is the
plan and the potentials, which need no solve, and the derivatives of these are its second ones.

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

from multialign.ops import (
    apply_function,
    logsumexp,
    operator,
    register_batched_vmap,
    register_fake,
)
from multialign.transport.dual import conjugate, relaxed_marginals
from multialign.transport.elimination import (
    Edge,
    Scope,
    axes_without,
    beliefs,
    check_table,
    join,
    log_marginal,
)
from multialign.transport.forms.choose import FormName, make_form
from multialign.transport.problem import Problem, unflatten_problem

__all__ = ["attach", "dual_value", "first_only", "log_total", "read_marginals"]

# Added to the unit diagonal of the scaled Hessian: where the plan is a permutation up to rounding,
# potentials are not determined, and this keeps their gradient finite.
_DAMPING = 1e-13
# Conjugate gradients for a gradient stop at this relative residual, or after so many steps.
_RESIDUAL = 1e-12
_CONJUGATE_STEPS = 2000
# The log-weight of an atom of mass 0 where an infinite one would make NaN.
_NOWHERE = -1e30
# A plan this small is cheaper to build whole than to read by elimination.
_SMALL_ENTRIES = 2**14


def log_total(problem: Problem, potentials: Tensor, form: FormName) -> Tensor:
    """Return the logarithm of the sum of the plan, `(B,)`, at potentials in units of epsilon.

    It has no gradient.
    """
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    if _is_whole(problem, form):
        return logsumexp(_joined(unaries, pairs, problem).flatten(1), 1)
    total: list[Tensor] = _marginals([*unaries, *pairs.values()], _flat(list(pairs)), [])
    return total[0]


def dual_value(problem: Problem, potentials: Tensor, form: FormName) -> Tensor:
    """Return epsilon D(x), `(B,)`, at the potentials x that maximise D (see dual.py).

    It has first and second derivatives.
    """
    costs, scopes, marginals, *rest = problem.flatten()
    forbids, relaxed = bool(problem.forbidden), list(problem.relaxed)
    value: Tensor = apply_function(
        _DualValue,
        form,
        forbids,
        relaxed,
        scopes,
        len(costs),
        potentials,
        *rest,
        *costs,
        *marginals,
    )
    return value


def attach(problem: Problem, potentials: Tensor, form: FormName) -> Tensor:
    """Return the optimal potentials with their gradient."""
    singles = [(p,) for p in range(len(problem.marginals))]
    found = torch.cat(read_marginals(problem, potentials, singles, form), -1)
    residual = torch.cat(relaxed_marginals(problem, potentials), -1) - found
    return potentials + _solve(problem, potentials, residual - residual.detach(), form)


def read_marginals(
    problem: Problem, potentials: Tensor, scopes: Sequence[Scope], form: FormName
) -> list[Tensor]:
    """Return marginals of the plan, `(B, *K_scope)` each, of one, two or all variables."""
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    everything = tuple(range(len(unaries)))
    if _is_whole(problem, form) or everything in scopes:
        plan = _joined(unaries, pairs, problem).exp()
        gone = [axes_without(scope, len(everything)) for scope in scopes]
        return [plan.sum(axes) if axes else plan for axes in gone]
    log_sum, *tables = apply_function(
        _Marginals, _flat(list(pairs)), _flat(scopes), *unaries, *pairs.values()
    )
    # The tables are divided by the plan's sum; the gradient of the sum is part of theirs.
    total = log_sum.exp()
    return [table * total.reshape(len(total), *[1] * (table.ndim - 1)) for table in tables]


def _read_tables(problem: Problem, potentials: Tensor, form: FormName) -> list[Tensor]:
    """Return the marginals of the plan over the variables of each cost table; without gradient."""
    unaries, pairs = problem.unaries(potentials), problem.pairs(problem.epsilon)
    if _is_whole(problem, form):
        return read_marginals(problem, potentials, problem.edges, form)
    edges = _flat(list(pairs))
    log_sum, *tables = _marginals([*unaries, *pairs.values()], edges, edges)
    if not problem.relaxed:
        return list(tables)
    return [table * log_sum.exp().view(-1, 1, 1) for table in tables]


def _solve(problem: Problem, potentials: Tensor, right: Tensor, form: FormName) -> Tensor:
    """Solve with minus the Hessian of D at these potentials; the gradient is that of `right`."""
    costs, scopes, marginals, *rest = problem.flatten()
    forbids, relaxed = bool(problem.forbidden), list(problem.relaxed)
    solution: Tensor = apply_function(
        _Solve,
        form,
        forbids,
        relaxed,
        scopes,
        len(costs),
        right,
        potentials,
        *rest,
        *costs,
        *marginals,
    )
    return solution


def _is_whole(problem: Problem, form: FormName) -> bool:
    """Return whether the plan is read as one table over all variables."""
    if any(len(scope) > 2 for scope in problem.costs):
        return True
    if form == "auto":
        return math.prod(problem.sizes) * problem.epsilon.numel() <= _SMALL_ENTRIES
    return form in ("vector", "table")


def _joined(unaries: Sequence[Tensor], pairs: dict[Scope, Tensor], problem: Problem) -> Tensor:
    check_table(math.prod(problem.sizes) * problem.epsilon.numel())
    return join({**{(p,): x for p, x in enumerate(unaries)}, **pairs}, problem.sizes)


class _DualValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        form: FormName,
        forbids: bool,
        relaxed: list[int],
        scopes: list[int],
        count: int,
        potentials: Tensor,
        epsilon: Tensor,
        deviation: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        marginals = list(tables[count:])
        problem = unflatten_problem([], [], marginals, epsilon, deviation, False, relaxed)
        terms = conjugate(problem, potentials) * torch.cat(problem.marginals, -1)
        return epsilon * (terms.sum(-1) - _excess(problem, potentials))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.how = inputs[:5]
        ctx.save_for_backward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        form, forbids, relaxed, scopes, count = ctx.how
        potentials, epsilon, deviation, *tables = ctx.saved_tensors
        problem = unflatten_problem(
            tables[:count], scopes, tables[count:], epsilon, deviation, forbids, relaxed
        )
        # A graph of the derivative is wanted; torch.compile makes none.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            potentials = attach(problem, potentials, form)
            plans = read_marginals(problem, potentials, problem.edges, form)
        else:
            plans = _read_tables(problem, potentials, form)
        by_costs = [grad.reshape(len(grad), *[1] * (p.ndim - 1)) * p for p in plans]
        by_marginals = (grad * epsilon).unsqueeze(-1) * conjugate(problem, potentials)
        costs = problem.costs.values()
        cost = sum((p * c).flatten(1).sum(-1) for p, c in zip(plans, costs, strict=True))
        inner = (potentials * torch.cat(relaxed_marginals(problem, potentials), -1)).sum(-1)
        by_epsilon = grad * (inner - cost / epsilon - _excess(problem, potentials))
        blocks = by_marginals.split(problem.sizes, -1)
        by_rho = [None] * bool(problem.relaxed)
        return *[None] * 6, by_epsilon, None, *by_costs, *blocks, *by_rho


def _excess(problem: Problem, potentials: Tensor) -> Tensor:
    """Return the mass of the optimal plan less 1, `(B,)`."""
    if not problem.relaxed:
        return torch.zeros_like(problem.epsilon)
    return relaxed_marginals(problem, potentials)[0].sum(-1) - 1


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
        factors = list(ctx.saved_tensors)
        with torch.no_grad():
            found = _marginals_backward(factors, ctx.edges, ctx.scopes, list(grads))
        if torch.is_grad_enabled():
            found = [first_only(derivative, *grads, *factors) for derivative in found]
        return None, None, *found


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        form: FormName,
        forbids: bool,
        relaxed: list[int],
        scopes: list[int],
        count: int,
        right: Tensor,
        potentials: Tensor,
        epsilon: Tensor,
        deviation: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        costs, marginals = list(tables[:count]), list(tables[count:])
        problem = costs, scopes, marginals, epsilon, deviation, forbids, relaxed
        solution: Tensor = _solve_hessian(*problem, potentials, right, form)
        return solution

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.how = inputs[:5]
        ctx.save_for_backward(*inputs[6:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The matrix is symmetric.
        saved = ctx.saved_tensors
        with torch.no_grad():
            solution = _Solve.forward(*ctx.how, grad, *saved)
        if torch.is_grad_enabled():
            solution = first_only(solution, grad, *saved)
        return *[None] * 5, solution, *[None] * len(saved)


class _FirstOnly(torch.autograd.Function):
    """A derivative that depends on `others` in a way that is not kept.

    Taken as a constant, it would make a second derivative wrong in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, *others: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "potentials, marginals and transport_cost of a TransportSolution have first "
            "derivatives only, and its value has first and second ones; use value, which is the "
            'objective="regularized" of prototype_alignment_loss'
        )


def first_only(derivative: Tensor, *others: Tensor) -> Tensor:
    """Return a derivative that depends on `others`; its own derivative raises."""
    guarded: Tensor = _FirstOnly.apply(derivative, *others)
    return guarded


def _flat(scopes: Sequence[Scope]) -> list[int]:
    """Write scopes of one or two variables as pairs, one after another."""
    return [p for scope in scopes for p in (scope[0], scope[-1])]


def _unflat(numbers: Sequence[int]) -> list[Scope]:
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [(i,) if i == j else (i, j) for i, j in pairs]


@operator("plan_marginals(Tensor[] factors, int[] edges, int[] scopes) -> Tensor[]")
def _marginals(factors: list[Tensor], edges: list[int], scopes: list[int]) -> list[Tensor]:
    return [x.clone() for x in _read(factors, edges, scopes)]


@operator(
    "plan_marginals_backward(Tensor[] factors, int[] edges, int[] scopes, "
    "Tensor[] grads) -> Tensor[]"
)
def _marginals_backward(
    factors: list[Tensor], edges: list[int], scopes: list[int], grads: list[Tensor]
) -> list[Tensor]:
    unaries, pairs = _parts(factors, edges)
    # With Phi the sum of all grads, the derivative by log-factors of the plan's sum weighted by Phi
    # is the derivative of the marginals in the direction Phi. An imaginary step this small gives it
    # exactly, since nothing is subtracted (the complex-step method).
    largest = torch.stack([grad.abs().max() for grad in grads[1:]]).max()
    step = 1e-30 / torch.where(largest > 0, largest, 1.0)
    direction: dict[Scope, Tensor] = {(p,): torch.zeros_like(x) for p, x in enumerate(unaries)}
    direction |= {edge: torch.zeros_like(table) for edge, table in pairs.items()}
    for scope, grad in zip(_unflat(scopes), grads[1:], strict=True):
        direction[scope] = direction[scope] + grad if scope in direction else grad
    # Atoms of mass 0: an infinite real part would make the imaginary part NaN.
    finite = [torch.where(x == -math.inf, _NOWHERE, x) for x in unaries]
    starts = [torch.complex(x, step * direction[(p,)]) for p, x in enumerate(finite)]
    start = {scope: torch.zeros_like(x) for scope, x in direction.items() if len(scope) == 2}
    start |= pairs
    tables = {(s[0], s[-1]): torch.complex(x, step * direction[s]) for s, x in start.items()}
    found = beliefs(starts, tables, "edges")
    results = [found.marginals[p] for p in range(len(unaries))]
    results += [found.tables[edge] for edge in pairs]
    return [
        x.imag / step + grads[0].reshape(len(grads[0]), *[1] * (x.ndim - 1)) * x.real
        for x in results
    ]


@operator(
    "solve_hessian(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon, "
    "Tensor deviation, "
    "bool forbids, int[] relaxed, Tensor potentials, Tensor right, str form) -> Tensor"
)
def _solve_hessian(
    costs: Sequence[Tensor],
    scopes: list[int],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    forbids: bool,
    relaxed: list[int],
    potentials: Tensor,
    right: Tensor,
    form: FormName,
) -> Tensor:
    problem = unflatten_problem(costs, scopes, marginals, epsilon, deviation, forbids, relaxed)
    if forbids:
        problem = problem.without_empty_masks()
    plan = make_form(problem, torch.float64, "torch", form)
    now = plan.at(epsilon).evaluate(potentials)
    _, _, total, diagonal = plan.dual.at(potentials, epsilon, now.log_total, now.marginals)
    damping = torch.full_like(epsilon, _DAMPING).unsqueeze(-1)
    if total is not None and diagonal is not None:
        right, damping = right / total, damping + diagonal
    tolerance = torch.full_like(epsilon, _RESIDUAL)
    return now.hessian.solve(right, damping, tolerance, _CONJUGATE_STEPS)


@register_fake(_marginals)
def _(factors: list[Tensor], edges: list[int], scopes: list[int]) -> list[Tensor]:
    batch = factors[0].shape[:1]
    shapes = [[factors[p].shape[1] for p in scope] for scope in _unflat(scopes)]
    return [factors[0].new_empty((*batch, *shape)) for shape in [[], *shapes]]


@register_fake(_marginals_backward)
def _(
    factors: list[Tensor], edges: list[int], scopes: list[int], grads: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(x) for x in factors]


@register_fake(_solve_hessian)
def _(
    costs: Sequence[Tensor],
    scopes: list[int],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    forbids: bool,
    relaxed: list[int],
    potentials: Tensor,
    right: Tensor,
    form: FormName,
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
