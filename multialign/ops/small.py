"""Whole transport problems, each small, in one call of the compiled core or one kernel launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

from multialign.ops import _native
from multialign.ops.backend import Implementation

__all__ = ["Solved", "fits_whole", "solve_small", "solve_whole", "whole_gradients"]


@dataclass(frozen=True)
class Solved:
    """The solution of a batch of whole problems, in float64."""

    numbers: Tensor
    """All results but `iterations`, one after another, each with the batch first."""
    iterations: Tensor
    """`(B,)`."""
    sizes: tuple[int, ...]
    """The number of atoms of each marginal."""
    has_blank: bool
    """Whether some marginal has no mass, so that its costs count nothing."""

    @property
    def scalars(self) -> Tensor:
        """Values, transport costs and errors, `(3 B,)`."""
        return self.numbers[: 3 * len(self.iterations)]

    @property
    def value(self) -> Tensor:
        """`(B,)`."""
        return self._part(0, ())

    @property
    def transport_cost(self) -> Tensor:
        """`(B,)`."""
        return self._part(1, ())

    @property
    def error(self) -> Tensor:
        """`(B,)`."""
        return self._part(2, ())

    @property
    def potentials(self) -> Tensor:
        """`(B, S)` in units of epsilon, of costs without the offsets."""
        return self._part(3, (sum(self.sizes),))

    @property
    def offsets(self) -> Tensor:
        """`(B, S)`: the parts of the costs that depend on one variable alone, in cost units."""
        return self._part(4, (sum(self.sizes),))

    @property
    def by_marginals(self) -> Tensor:
        """`(B, S)`: the gradient of `value` by marginals as they are given, not normalised."""
        return self._part(5, (sum(self.sizes),))

    @property
    def edges(self) -> list[tuple[int, ...]]:
        """All pairs i < j of variables."""
        return list(combinations(range(len(self.sizes)), 2))

    def pair(self, edge: tuple[int, ...]) -> Tensor:
        """Return the plan's marginal of a pair of variables i < j, `(B, K_i, K_j)`."""
        i, j = edge
        return self._part(6 + self.edges.index(edge), (self.sizes[i], self.sizes[j]))

    def _part(self, place: int, shape: tuple[int, ...]) -> Tensor:
        count = len(self.iterations)
        starts = _starts(self.sizes)
        return self.numbers[count * starts[place] : count * starts[place + 1]].view(count, *shape)


@lru_cache
def _starts(sizes: tuple[int, ...]) -> list[int]:
    """Return where each result of a problem starts among all of them."""
    pairs = [sizes[i] * sizes[j] for i, j in combinations(range(len(sizes)), 2)]
    return list(accumulate([1] * 3 + [sum(sizes)] * 3 + pairs, initial=0))


def solve_small(
    costs: Sequence[Tensor],
    scopes: Sequence[Sequence[int]],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    dtype: torch.dtype,
    backend: Implementation,
    *,
    rho: Mapping[int, Tensor] | None = None,
    by_sweeps: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Find the potentials of a batch of problems of few atoms each.

    Args:
        costs: Tables `(B, K_i, K_j)`, or one `(B, K_1, ..., K_M)`.
        scopes: The variables of each table.
        marginals: M tensors `(B, K_p)`, each of sum 1.
        epsilon: `(B,)`.
        tolerance: L1 error at which a problem is solved.
        max_iterations: Most iterations of one problem.
        dtype: The dtype to compute in.
        backend: The implementation.
        rho: Weights `(B,)` of the penalties, by variable; marginals are then taken as given.
        by_sweeps: Whether to sweep, without Newton steps.
        symmetric: As in `solve_whole`; only the compiled core heeds it.

    Returns:
        Potentials `(B, S)` in units of epsilon, float64, and iterations `(B,)`; or None if nothing
        here takes such problems.
    """
    sizes = [marginal.shape[-1] for marginal in marginals]
    if backend == "native":
        if not _native.fits(tuple(sizes), len(scopes[0]) > 2):
            return None
        potentials = epsilon.new_empty(len(epsilon), sum(sizes))
        error, status = torch.empty_like(epsilon), torch.empty_like(epsilon, dtype=torch.int64)
        iterations = torch.empty_like(status)
        _native.solve(
            {tuple(s): cost.contiguous() for s, cost in zip(scopes, costs, strict=True)},
            [marginal.contiguous() for marginal in marginals],
            epsilon.contiguous(),
            _native.Outputs(
                potentials=potentials.data_ptr(),
                error=error.data_ptr(),
                iterations=iterations.data_ptr(),
                status=status.data_ptr(),
            ),
            tolerance=tolerance,
            max_iterations=max_iterations,
            by_sweeps=by_sweeps,
            symmetric=symmetric,
            rho={p: one.contiguous() for p, one in (rho or {}).items()},
            prepared=True,
        )
        return (
            None
            if bool((status % _native.BLANK == _native.LEFT).any())
            else (potentials, iterations)
        )
    if backend != "triton" or rho or by_sweeps:
        return None
    from multialign.ops import _triton

    if not _triton.fits_small(sizes, len(epsilon), dtype):
        return None
    potentials, iterations, _ = _triton.solve_small(
        [cost.to(dtype) for cost in costs],
        scopes,
        [marginal.to(dtype) for marginal in marginals],
        epsilon.to(dtype),
        tolerance,
        max_iterations,
    )
    return potentials.double(), iterations


def fits_whole(sizes: Sequence[int], backend: Implementation) -> bool:
    """Return whether `solve_whole` takes problems of these sizes with costs of pairs."""
    return backend == "native" and _native.fits(tuple(sizes), False)


def solve_whole(
    costs: Mapping[tuple[int, ...], Tensor],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    *,
    by_sweeps: bool = False,
    symmetric: bool = False,
    candidate: Tensor | None = None,
) -> Solved | None:
    """Solve a batch of problems as a user gives them; None if one of them is left.

    Args:
        costs: Tables `(*batch, K_i, K_j)`, float32 or float64, contiguous.
        marginals: M tensors `(*batch, K_p)` of the same dtype, contiguous, not normalised.
        epsilon: `(*batch)`, float64, contiguous.
        tolerance: L1 error at which a problem is solved.
        max_iterations: Most iterations of one problem.
        by_sweeps: Whether to sweep, without Newton steps.
        symmetric: Whether variables of equal marginals get the same potential; costs are then those
            of one table, which is symmetric, for all pairs.
        candidate: Potentials `(B, S)` in cost units, taken where the dual is larger there.
    """
    count, sizes = epsilon.numel(), tuple([marginal.shape[-1] for marginal in marginals])
    starts = _starts(sizes)
    numbers = torch.empty(count * starts[-1], dtype=torch.float64)
    iterations, status = torch.empty((2, count), dtype=torch.int64).unbind(0)
    first = numbers.data_ptr()
    places = [first + 8 * count * start for start in starts]
    worst = _native.solve(
        costs,
        marginals,
        epsilon,
        _native.Outputs(
            value=places[0],
            transport_cost=places[1],
            error=places[2],
            potentials=places[3],
            offsets=places[4],
            marginal_gradient=places[5],
            pairs=places[6:-1],
            iterations=iterations.data_ptr(),
            status=status.data_ptr(),
        ),
        tolerance=tolerance,
        max_iterations=max_iterations,
        by_sweeps=by_sweeps,
        symmetric=symmetric,
        candidate=candidate,
    )
    if not worst:
        return Solved(numbers, iterations, sizes, False)
    solved = Solved(numbers, iterations, sizes, bool((status >= _native.BLANK).any()))
    status = status % _native.BLANK
    # What is not finite is the result for input that is not.
    left = (status == _native.LEFT) | ((status != 0) & solved.error.isfinite())
    return None if bool(left.any()) else solved


def whole_gradients(
    costs: Mapping[tuple[int, ...], Tensor],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    solved: Solved,
    by_transport_cost: Tensor | None,
    by_pairs: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """Return the gradients by costs, marginals `(B, S)` and epsilon, from a solution.

    `by_transport_cost` and `by_pairs`, float64 and contiguous, are the gradients by its results.
    None if a problem of the batch is left.
    """
    return _native.read_gradients(
        costs,
        marginals,
        epsilon,
        solved.potentials,
        solved.offsets,
        by_transport_cost,
        by_pairs,
    )
