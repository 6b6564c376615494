"""Whole transport problems, each small, in one call of the compiled core or one kernel launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.ops import _native
from multialign.ops.backend import Implementation

__all__ = ["Solved", "fits_whole", "solve_small", "solve_whole", "whole_gradients"]


class Solved(NamedTuple):
    """The solution of a batch of whole problems, in float64."""

    potentials: Tensor
    """`(B, S)` in units of epsilon, of costs without the offsets."""
    iterations: Tensor
    """`(B,)`."""
    error: Tensor
    """`(B,)`."""
    offsets: Tensor
    """`(B, S)`: the parts of the costs that depend on one variable alone, in cost units."""
    value: Tensor
    """`(B,)`."""
    transport_cost: Tensor
    """`(B,)`."""
    by_marginals: Tensor
    """`(B, S)`: the gradient of `value` by marginals as they are given, not normalised."""
    pairs: list[Tensor]
    """The plan's marginals of all pairs of variables, `(B, K_i, K_j)` each."""
    has_blank: bool
    """Whether some marginal has no mass, so that its costs count nothing."""


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
            {
                "potentials": potentials,
                "error": error,
                "iterations": iterations,
                "status": status,
            },
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
    count = epsilon.numel()
    sizes = [marginal.shape[-1] for marginal in marginals]

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty((count, *shape), dtype=dtype)

    atoms = sum(sizes)
    solved = Solved(
        make(atoms), make(dtype=torch.int64), make(), make(atoms), make(), make(), make(atoms),
        [make(sizes[p], sizes[q]) for p, q in combinations(range(len(sizes)), 2)], False,
    )  # fmt: skip
    status = make(dtype=torch.int64)
    _native.solve(
        costs,
        marginals,
        epsilon,
        {
            "potentials": solved.potentials,
            "iterations": solved.iterations,
            "error": solved.error,
            "offsets": solved.offsets,
            "value": solved.value,
            "transport_cost": solved.transport_cost,
            "marginal_gradient": solved.by_marginals,
            "status": status,
        },
        solved.pairs,
        tolerance=tolerance,
        max_iterations=max_iterations,
        by_sweeps=by_sweeps,
        symmetric=symmetric,
        candidate=candidate,
    )
    if not status.any():
        return solved
    blank, status = status >= _native.BLANK, status % _native.BLANK
    # What is not finite is the result for input that is not.
    if bool(((status == _native.LEFT) | ((status != 0) & solved.error.isfinite())).any()):
        return None
    return solved._replace(has_blank=bool(blank.any()))


def whole_gradients(
    costs: Mapping[tuple[int, ...], Tensor],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    potentials: Tensor,
    offsets: Tensor,
    by_transport_cost: Tensor | None,
    by_pairs: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """Return the gradients by costs, marginals `(B, S)` and epsilon, from a solution.

    `by_transport_cost` and `by_pairs`, float64 and contiguous, are the gradients by its results.
    None if a problem of the batch is left.
    """
    return _native.read_gradients(
        costs, marginals, epsilon, potentials, offsets, by_transport_cost, by_pairs
    )
