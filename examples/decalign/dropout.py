"""Dropout that draws few random numbers.

A CPU draws numbers one after the other. With one draw for each entry, dropout takes a third of the
time of a training step. Here one draw of 64 bits serves four entries, so probabilities are
multiples of 2^-16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Dropout", "draw_bits", "keep_factors"]


class Dropout(nn.Dropout):
    """`nn.Dropout`, with few draws on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, in training with random entries set to zero and the others scaled."""
        if x.device.type != "cpu":
            return functional.dropout(x, self.p, self.training)
        if not self.training or self.p == 0:
            return x
        return x * keep_factors(draw_bits(x.shape), self.p, x.dtype)


def draw_bits(shape: Sequence[int]) -> Tensor:
    """Return integers of 16 random bits."""
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[:count].view(shape)


def keep_factors(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return factors of mean 1 that are 0 with probability p."""
    dropped = round(p * 2**16)
    if dropped == 2**16:
        return torch.zeros(bits.shape, dtype=dtype)
    # Written as numbers, since converting booleans would take longer than the draws.
    factors = torch.ge(bits, dropped - 2**15, out=torch.empty(bits.shape, dtype=dtype))
    return factors.div_(1 - dropped / 2**16)
