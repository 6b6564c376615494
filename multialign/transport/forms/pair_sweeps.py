"""Sweeps that set pairs of potentials in turn, on the plan's table of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["PairSweeps"]


class PairSweeps:
    """Sweeps over a plan that is multiplied in place."""

    def __init__(self, wanted: Sequence[Tensor], absent: Sequence[Tensor]) -> None:
        """Prepare for marginals `(B, K_p)`, up to a factor; `absent` marks atoms without mass."""
        self._wanted = [nu.unsqueeze(-1) for nu in wanted]
        # Whether there are any is read on the CPU alone: elsewhere reading takes longer than masks.
        some = absent[0].device.type != "cpu" or bool(torch.cat(list(absent), -1).any())
        self._absent = [mask.unsqueeze(-1) for mask in absent] if some else None

    def sweep(
        self,
        times: int,
        inner: int,
        joint: Callable[[int], Tensor],
        scale: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Return the changes of potentials, `(B, times, S)`; not finite where the plan underflows.

        Args:
            times: How many sweeps.
            inner: How often each pair of variables is set again in turn.
            joint: Returns the plan's marginal of variables p - 1 and p.
            scale: Multiplies the plan by factors `(B, K, 1)` of p, and of p - 1.
        """
        # Two factors of each variable a sweep: from its own visit, and from the visit to the next.
        ratios = [nu.new_ones(times, 2, *nu.shape) for nu in self._wanted]
        slots = [ratio.flatten(0, 1).unbind(0) for ratio in ratios]
        sums = [torch.empty_like(nu) for nu in self._wanted]

        def match(p: int, table: Tensor, other: Tensor, ratio: Tensor) -> None:
            torch.div(self._wanted[p], torch.bmm(table, other, out=sums[p]), out=ratio)
            if self._absent is not None:
                ratio.masked_fill_(self._absent[p], 1.0)

        for first in range(0, 2 * times, 2):
            for p in range(len(slots)):
                here, before, table = slots[p][first], slots[p - 1][first + 1], joint(p)
                turned = table.mT
                match(p, turned, before, here)
                for _ in range(inner):
                    match(p - 1, table, here, before)
                    match(p, turned, before, here)
                scale(p, here, before)
        changes = torch.cat(ratios, 3).log_().sum(1)
        return changes.squeeze(-1).transpose(0, 1).double()
