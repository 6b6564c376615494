"""Small problems solved by the compiled core in one call, from arguments to results.

A result takes its gradient from the core as well. Whatever the core does not know (potentials with
gradient, second derivatives, the dense plan) is read from the same potentials as that of any other
solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from multialign.ops import Solved, choose_backend, fits_whole, solve_whole, whole_gradients
from multialign.transport.elimination import Scope
from multialign.transport.implicit import first_only
from multialign.transport.options import SolverOptions, default_tolerance
from multialign.transport.prepare import Arguments, prepare
from multialign.transport.problem import Problem
from multialign.transport.sinkhorn import Iterate
from multialign.transport.solution import TransportSolution

__all__ = ["solve_directly"]


def solve_directly(
    arguments: Arguments,
    options: SolverOptions,
    dtype: torch.dtype,
    symmetric: bool = False,
    candidate: Sequence[Tensor] | None = None,
) -> TransportSolution | None:
    """Solve a problem; None if the core does not take it, or leaves a part of it unsolved.

    Args:
        arguments: The problem, checked.
        options: How to solve it.
        dtype: The dtype of the results.
        symmetric: Whether all variables have the same symmetric cost with each other. Where they
            have the same marginal too, they get the same potential.
        candidate: Potentials `(*batch, K_p)` in cost units, taken where the dual is larger there.
    """
    costs, marginals, epsilon, batch, rho = arguments
    sizes = [marginal.shape[-1] for marginal in marginals]
    if (
        torch.compiler.is_compiling()
        # One potential that stands for all converges in fewer sweeps.
        or (symmetric and options.method == "sinkhorn")
        or torch._C._are_functorch_transforms_active()
        or any(one is not None for one in rho)
        or any(len(scope) != 2 for scope in costs)
        or not fits_whole(sizes, choose_backend(options.backend, marginals[0]))
        or not batch.numel()
        or not all(type(x) in (Tensor, Parameter) for x in (*costs.values(), *marginals))
    ):
        return None

    def whole(x: Tensor, dims: int) -> Tensor:
        shape = (*batch, *x.shape[x.ndim - dims :])
        return (x if x.shape == shape else x.expand(shape)).contiguous()

    costs = {scope: whole(cost, 2) for scope, cost in costs.items()}
    marginals = [whole(marginal, 1) for marginal in marginals]
    epsilon = whole(epsilon, 0)
    tolerance = default_tolerance(dtype) if options.tolerance is None else options.tolerance
    other = None
    if candidate is not None:
        joined = torch.cat([f.detach().double() for f in candidate], -1)
        # An absent atom has no potential.
        other = joined.nan_to_num(neginf=0.0).reshape(batch.numel(), -1).contiguous()
    solved = solve_whole(
        costs,
        marginals,
        epsilon,
        tolerance,
        options.max_iterations,
        by_sweeps=options.method == "sinkhorn",
        symmetric=symmetric,
        candidate=other,
    )
    if solved is None:
        return None
    arguments = Arguments(costs, marginals, epsilon, batch, rho)
    return _DirectSolution(arguments, solved, tolerance, dtype)


class _DirectSolution(TransportSolution):
    """A solution of which most results are known."""

    def __init__(
        self, arguments: Arguments, solved: Solved, tolerance: float, dtype: torch.dtype
    ) -> None:
        self._arguments, self._solved, self._dtype = arguments, solved, dtype
        self._form, self._attached = "auto", None
        batch = arguments.batch
        self.iterations = solved.iterations.view(batch)
        value, _, error = solved.scalars.view(3, *batch).unbind(0)
        self.value, self.error = value.to(dtype), error.to(dtype)
        self._converged = error <= tolerance
        if self._is_recorded():
            self.value = _Value.apply(solved, self._edges, self.value, *self._inputs)

    @cached_property
    def _problem(self) -> Problem:  # type: ignore[override]
        # Whoever reads it first, it is kept for a reading with gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return prepare(self._arguments, self._dtype)

    @property
    def _fixed(self) -> Tensor:  # type: ignore[override]
        return self._solved.potentials

    @property
    def _inputs(self) -> list[Tensor]:
        return self._arguments.tensors()

    @property
    def _edges(self) -> list[Scope]:
        return list(self._arguments.costs)

    def _is_recorded(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self._inputs)

    @cached_property
    def _read(self) -> tuple[Tensor, ...]:
        """`transport_cost` `(B,)` and the marginals of all pairs, with their gradient."""
        found: tuple[Tensor, ...] = _Read.apply(self._solved, self._edges, *self._inputs)
        return found

    @property
    def transport_cost(self) -> Tensor:
        """As that of any solution."""
        recorded = self._is_recorded()
        return self._convert(self._read[0] if recorded else self._solved.transport_cost)

    def marginal(self, i: int) -> Tensor:
        """As that of any solution."""
        self._check_index("i", i)
        return self._pair(0, i).sum(-2) if i else self._pair(0, 1).sum(-1)

    def pairwise_marginal(self, i: int, j: int) -> Tensor:
        """As that of any solution."""
        self._check_index("i", i)
        self._check_index("j", j)
        if i == j:
            raise ValueError(f"i and j must differ; got {i} and {j}")
        return self._pair(i, j) if i < j else self._pair(j, i).mT

    def _pair(self, i: int, j: int) -> Tensor:
        place = self._solved.edges.index((i, j))
        return self._convert(
            self._read[1 + place] if self._is_recorded() else self._solved.pair((i, j))
        )

    def _convert(self, x: Tensor) -> Tensor:
        return x.view((*self._arguments.batch, *x.shape[1:])).to(self._dtype)

    def _with(self, problem: Problem, function: Callable[[Tensor], Tensor]) -> TransportSolution:
        other = TransportSolution.__new__(TransportSolution)
        other._form = self._form
        return self._fill(other, problem, function)


def _arguments(edges: Sequence[Scope], inputs: Sequence[Tensor]) -> Arguments:
    """Return arguments, given their tensors."""
    costs = dict(zip(edges, inputs, strict=False))
    marginals, epsilon = list(inputs[len(costs) : -1]), inputs[-1]
    return Arguments(costs, marginals, epsilon, epsilon.shape, [None] * len(marginals))


class _Value(torch.autograd.Function):
    """Gives `value` its gradient: the plan, the potentials and the entropy."""

    @staticmethod
    def forward(
        ctx: Any, solved: Solved, edges: list[Scope], value: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.solved, ctx.edges = solved, edges
        ctx.save_for_backward(*inputs)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        solved: Solved = ctx.solved
        edges, inputs = ctx.edges, ctx.saved_tensors
        if torch.is_grad_enabled():
            # One tensor may stand in several places.
            alias = [x.view_as(x) for x in inputs]
            value = _read_again(_arguments(edges, alias), solved).value
            recorded = [x for x in alias if x.requires_grad]
            made = iter(torch.autograd.grad(value, recorded, grad.double(), create_graph=True))
            return (None, None, None, *[next(made) if x.requires_grad else None for x in alias])
        weight = grad.double().reshape(-1, 1)
        wanted = ctx.needs_input_grad[3:]
        by_costs = [
            solved.pair(edge) * weight.unsqueeze(-1) if needed else None
            for edge, needed in zip(edges, wanted, strict=False)
        ]
        if solved.has_blank:
            masses = [x.reshape(len(weight), -1).sum(-1) for x in inputs[len(edges) : -1]]
            for (i, j), g in zip(edges, by_costs, strict=True):
                if g is not None:
                    g[(masses[i] == 0) | (masses[j] == 0)] = 0.0
        grads: list[Tensor | None] = [*by_costs, *[None] * (len(inputs) - len(edges))]
        if any(wanted[len(edges) : -1]):
            grads[len(edges) : -1] = (solved.by_marginals * weight).split(solved.sizes, -1)
        if wanted[-1]:
            entropy = (solved.value - solved.transport_cost) / inputs[-1].reshape(-1)
            grads[-1] = entropy * weight.squeeze(-1)
        return (None, None, None, *_shaped(grads, inputs))


class _Read(torch.autograd.Function):
    """Gives `transport_cost` and the marginals of pairs their gradients."""

    @staticmethod
    def forward(
        ctx: Any, solved: Solved, edges: list[Scope], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.solved, ctx.edges = solved, edges
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return (solved.transport_cost, *[solved.pair(edge) for edge in solved.edges])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        solved: Solved = ctx.solved
        inputs = ctx.saved_tensors
        arguments = _arguments(ctx.edges, inputs)
        with torch.no_grad():
            by_cost, *by_pairs = [None if g is None else g.contiguous() for g in grads]
            found = whole_gradients(
                arguments.costs, arguments.marginals, arguments.epsilon, solved, by_cost, by_pairs
            )
            if found is None:
                results = _gradients_again(arguments, solved, grads)
            else:
                by_costs, by_marginals, by_epsilon = found
                results = [*by_costs, *by_marginals.split(solved.sizes, -1), by_epsilon]
        shaped = _shaped(results, inputs)
        if torch.is_grad_enabled():
            others = [g for g in grads if g is not None]
            shaped = [None if g is None else first_only(g, *others, *inputs) for g in shaped]
        return (None, None, *shaped)


def _shaped(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients in the shapes and dtypes of the inputs."""
    return [
        None if g is None else g.reshape(x.shape).to(x.dtype)
        for g, x in zip(grads, inputs, strict=True)
    ]


def _read_again(arguments: Arguments, solved: Solved) -> TransportSolution:
    """Return the solution, at its potentials, as that of any problem."""
    problem = prepare(arguments, torch.float64)
    zeros = torch.zeros_like(problem.epsilon)
    return TransportSolution(problem, Iterate(solved.potentials, zeros.long(), zeros), 1.0)


@torch.enable_grad()
def _gradients_again(
    arguments: Arguments, solved: Solved, grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return gradients by all inputs where the core has left a problem."""
    again = arguments.map(lambda x: x.detach().requires_grad_())
    solution = _read_again(again, solved)
    pairs = [solution.pairwise_marginal(i, j) for i, j in solved.edges]
    results = [solution.transport_cost, *pairs]
    weighted = [(x, g.view_as(x)) for x, g in zip(results, grads, strict=True) if g is not None]
    inputs = again.tensors()
    outputs, weights = zip(*weighted, strict=True)
    found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
