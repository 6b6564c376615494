"""The options of the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from multialign._validation import check_choice, check_count, check_positive
from multialign.ops import BACKENDS, Backend

__all__ = ["Method", "SolverOptions", "default_tolerance"]

Method = Literal["sinkhorn", "newton", "auto"]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """The options of :func:`multi_marginal_sinkhorn`, checked when made."""

    tolerance: float | None
    max_iterations: int
    method: Method
    backend: Backend

    def __post_init__(self) -> None:
        # Numbers of NumPy become Python's.
        if self.tolerance is not None:
            vars(self).update(tolerance=check_positive("tolerance", self.tolerance, zero=True))
        vars(self).update(max_iterations=check_count("max_iterations", self.max_iterations))
        check_choice("method", self.method, ("sinkhorn", "newton", "auto"))
        check_choice("backend", self.backend, BACKENDS)
        if self.tolerance == 0 and self.method == "newton":
            raise ValueError(
                "tolerance = 0 takes sweeps, since Newton steps read what they decide; "
                'expected method="auto" or "sinkhorn"; got method="newton"'
            )


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance for results of this dtype."""
    return 1e-6 if dtype == torch.float64 else 1e-4
