"""Whole transport problems, each small, in one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multialign.ops.backend import Implementation

__all__ = ["solve_small"]


def solve_small(
    costs: Sequence[Tensor],
    scopes: Sequence[Sequence[int]],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    dtype: torch.dtype,
    backend: Implementation,
) -> tuple[Tensor, Tensor] | None:
    """Solve a batch of problems of few atoms each.

    Args:
        costs: Tables `(B, K_i, K_j)`, or one `(B, K_1, ..., K_M)`.
        scopes: The variables of each table.
        marginals: M tensors `(B, K_p)`, each of sum 1.
        epsilon: `(B,)`.
        tolerance: L1 error at which a problem is solved.
        max_iterations: Most iterations of one problem.
        dtype: The dtype to compute in.
        backend: The implementation.

    Returns:
        Potentials `(B, S)` in units of epsilon, float64, and iterations `(B,)`; or None if no
        kernel takes such problems.
    """
    if backend != "triton":
        return None
    from multialign.ops import _triton

    sizes = [marginal.shape[-1] for marginal in marginals]
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
