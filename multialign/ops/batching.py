"""torch.func.vmap for operators whose tensors all begin with one batch dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["register_batched_vmap"]


def register_batched_vmap(operator: Any) -> None:
    """Make vmap of `operator` one call with a larger batch.

    All tensor arguments, those in lists included, and all results must have the batch first.
    """

    def merge(argument: Any, dim: Any, size: int) -> Any:
        if isinstance(argument, (list, tuple)) and any(isinstance(x, Tensor) for x in argument):
            return [merge(x, d, size) for x, d in zip(argument, dim, strict=True)]
        if not isinstance(argument, Tensor):
            return argument
        if dim is None:
            argument = argument.expand(size, *argument.shape)
        else:
            argument = argument.movedim(dim, 0)
        return argument.flatten(0, 1)

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        results = operator(
            *[merge(argument, dim, size) for argument, dim in zip(arguments, in_dims, strict=True)]
        )
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        kind = type(results)
        return kind(x.unflatten(0, (size, -1)) for x in results), kind([0] * len(results))

    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        operator.register_vmap(rule)
