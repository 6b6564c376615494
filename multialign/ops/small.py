"""Whole transport problems in one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["solve_small"]


def solve_small(
    costs: Sequence[Tensor],
    scopes: Sequence[Sequence[int]],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    dtype: torch.dtype,
    backend: Literal["torch", "triton"],
) -> tuple[Tensor, Tensor] | None:
    """Solve problems of a few atoms each, side by side.

    Args:
        costs: Tables `(B, K_i, K_j)`, or one `(B, K_1, ..., K_M)`.
        scopes: The variables of each table.
        marginals: M tensors `(B, K_p)`, each of sum 1.
        epsilon: `(B,)`.
        tolerance: L1 error at which a problem is solved.
        max_iterations: Where it stops without.
        dtype: That of the arithmetic.
        backend: What works on these tensors.

    Returns:
        Potentials `(B, S)` in units of epsilon, float64, and iterations `(B,)`; None if there is
        no kernel for such problems.
    """
    if backend != "triton":
        return None
    from multialign.ops import _triton as kernels

    sizes = [marginal.shape[-1] for marginal in marginals]
    if not kernels.fits_small(sizes, len(epsilon), dtype):
        return None
    potentials, iterations, _ = kernels.solve_small(
        [cost.to(dtype) for cost in costs],
        scopes,
        [marginal.to(dtype) for marginal in marginals],
        epsilon.to(dtype),
        tolerance,
        max_iterations,
    )
    return potentials.double(), iterations
