"""The warning that a solver did not converge."""

from __future__ import annotations

import warnings

from torch import Tensor

__all__ = ["ConvergenceWarning", "warn_unless_converged"]


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped at its largest number of iterations."""


def warn_unless_converged(
    stopped: Tensor, error: Tensor, iterations: Tensor, tolerance: float
) -> None:
    """Warn if any problem has `stopped`; all tensors have one entry for each problem."""
    if bool(stopped.any()):
        warnings.warn(
            f"{int(stopped.sum())} of {stopped.numel()} transport problems did not reach "
            f"tolerance {tolerance:g} in {int(iterations[stopped].max())} iterations; "
            f"largest error {float(error[stopped].max()):.2g}",
            ConvergenceWarning,
            stacklevel=3,
        )
