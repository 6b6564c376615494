"""torch.func.vmap for operators whose tensors all begin with one batch dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_function", "register_batched_vmap", "register_leading_vmap"]


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


def register_leading_vmap(name: str, library: torch.library.Library) -> None:
    """Make vmap of an operator one call with one more leading batch dimension.

    All tensor arguments and results, those in lists included, begin with any number of batch
    dimensions, the same in all.
    """

    def lead(argument: Any, dim: Any, size: int) -> Any:
        if isinstance(argument, (list, tuple)) and any(isinstance(x, Tensor) for x in argument):
            return [lead(x, d, size) for x, d in zip(argument, dim, strict=True)]
        if not isinstance(argument, Tensor):
            return argument
        return argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)

    namespace, short = name.split("::")

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        operator = getattr(getattr(torch.ops, namespace), short)
        pairs = zip(arguments, in_dims, strict=True)
        results = operator(*[lead(argument, dim, info.batch_size) for argument, dim in pairs])
        return results, [0] * len(results)

    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(name, rule, lib=library)


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)`.

    torch's own inspects the signature of each call for defaults, which takes longer than a small
    fit. That serves torch.func's transforms alone, and a compiler.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
