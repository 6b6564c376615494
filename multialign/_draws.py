"""Random numbers in the dtype and on the device of the data.

None depends on torch's default dtype or device. A generator draws on its own device, so that one on
the CPU serves data anywhere. Without one no `generator` is passed at all, since torch.compile with
dynamic shapes refuses even None.

A checkpoint keeps the state of torch's own generator for its recomputation. A generator given by
the user has moved on by then, and the gradient would be that of another draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["normal", "uniform"]


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers in [0, 1)."""
    return _draw(torch.rand, shape, like, generator)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers."""
    return _draw(torch.randn, shape, like, generator)


def _draw(
    function: Callable[..., Any],
    shape: Sequence[int],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    drawn: Tensor
    if generator is None:
        drawn = function(*shape, dtype=like.dtype, device=like.device)
        return drawn
    if torch._C._current_graph_task_id() != -1:  # in a backward pass
        raise RuntimeError(
            "a generator of your own cannot draw the same numbers again in the backward pass, as "
            "torch.utils.checkpoint asks it to. Give no generator, or call the loss outside of the "
            "function that is checkpointed"
        )
    drawn = function(*shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
