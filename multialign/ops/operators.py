"""Operators that torch.compile and torch.func take as one step.

`torch.library.custom_op` would import torch's compiler when an operator is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "apply_function",
    "operator",
    "register_batched_vmap",
    "register_fake",
    "register_leading_vmap",
]

_LIBRARY = torch.library.Library("multialign", "FRAGMENT")


def operator(schema: str, key: str = "CompositeExplicitAutograd") -> Callable[[Any], Any]:
    """Decorate the implementation of an operator, which is returned in its place.

    Args:
        schema: Name, arguments and results.
        key: The dispatch key it is for; the default stands for every device.
    """
    _LIBRARY.define(schema)
    name = schema.split("(")[0]

    def register(implementation: Any) -> Any:
        _LIBRARY.impl(name, implementation, key)
        return getattr(torch.ops.multialign, name).default

    return register


def register_fake(function: Any) -> Callable[[Any], Any]:
    """Decorate what makes results of the right shapes for an operator."""
    register: Callable[[Any], Any] = torch.library.register_fake(
        function._schema.name, lib=_LIBRARY
    )
    return register


def _register_vmap(function: Any, rule: Any) -> None:
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(function._schema.name, rule, lib=_LIBRARY)


def register_batched_vmap(function: Any) -> None:
    """Make vmap of an operator one call with a larger batch.

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
        results = function(
            *[merge(argument, dim, size) for argument, dim in zip(arguments, in_dims, strict=True)]
        )
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        kind = type(results)
        return kind(x.unflatten(0, (size, -1)) for x in results), kind([0] * len(results))

    _register_vmap(function, rule)


def register_leading_vmap(function: Any) -> None:
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

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        pairs = zip(arguments, in_dims, strict=True)
        results = function(*[lead(argument, dim, info.batch_size) for argument, dim in pairs])
        return results, [0] * len(results)

    _register_vmap(function, rule)


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)`.

    torch's own inspects the signature of each call for defaults, which takes longer than a small
    fit. That serves torch.func's transforms alone, and a compiler. Where no argument requires a
    gradient, torch.compile calls `forward` itself, and gives it a context as first argument if the
    arguments are more than the parameters; and it takes no tensor twice.
    """
    if torch.compiler.is_compiling():
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return function.forward(*arguments)
        apart: list[Any] = []
        for x in arguments:
            twice = isinstance(x, Tensor) and any(x is other for other in apart)
            apart.append(x.view_as(x) if twice else x)
        return function.apply(*apart)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
