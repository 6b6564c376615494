"""Dropout that draws few random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Dropout", "dropout"]


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with entries set to zero in training."""
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set each entry to zero with probability p and scale the rest, as `functional.dropout` does.

    A CPU draws one random number after the other, for each entry by itself: a third of a training
    step. Here one draw of 64 bits serves four entries, hence p is rounded to a multiple of 2^-16.
    """
    if x.device.type != "cpu" or not 0 < p < 1:
        return functional.dropout(x, p, training)
    if not training:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    # Written as numbers at once: comparing to booleans and converting takes as long as drawing.
    factors = torch.ge(bits, dropped - 2**15, out=torch.empty(x.shape, dtype=x.dtype))
    return x * factors.div_(1 - dropped / 2**16)
