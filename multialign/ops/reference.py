"""Logarithms and log-sum-exps that are safe where a mass is zero and its logarithm -inf."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["log", "logsumexp", "real"]


def log(x: Tensor) -> Tensor:
    """Return log x for x >= 0: -inf with gradient 0 at 0, where torch's gradient is infinite."""
    zero = x == 0
    return torch.where(zero, -math.inf, torch.where(zero, x.new_ones(()), x).log())


def real(x: Tensor) -> Tensor:
    """Return the real part; a tiny imaginary part carries a derivative (the complex step)."""
    return x.real if x.is_complex() else x


def logsumexp(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Return log sum exp x over `dim`.

    Where all entries are -inf it is -inf with gradient 0; the gradient of `torch.logsumexp` is NaN
    there, even when the result is masked out later.
    """
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not dims:
        return x
    top = real(x).detach().amax(dims, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = (x - top).exp_().sum(dims, keepdim=True)
    return (log(total) + top).squeeze(dims)
