"""Named argument checks.

Every message says which argument, what came and what is expected. No check reads a tensor's
values, so none makes a CUDA device synchronise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import SupportsIndex, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "MAX_ENTRIES",
    "check_alike",
    "check_choice",
    "check_count",
    "check_entries",
    "check_positive",
    "check_samples",
    "check_size",
    "check_tensor",
    "check_tensors",
    "check_weights",
    "full_precision",
    "is_integer",
    "lift",
]

# The largest table that is ever built: 2 GiB in float64.
MAX_ENTRIES = 2**28


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}; got {_describe(value)}")


def check_positive(name: str, value: object, *, zero: bool = False) -> float:
    """Return `value`, Python's or NumPy's, if it is finite and > 0, or >= 0 where `zero` is so."""
    expected = f"a finite number {'>=' if zero else '>'} 0"
    # The types of Python first: torch.compile does not know that they are registered as Real.
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be {expected}; got {_describe(value)}")
    # Comparisons, not math.isfinite: torch.compile may make the value a symbol.
    number = value if isinstance(value, (int, float)) else float(value)
    if not 0 <= number < math.inf or (number == 0 and not zero):
        raise ValueError(f"{name} must be {expected}; got {value}")
    return number


def check_count(name: str, value: object, *, minimum: int = 1) -> int:
    """Return `value`, an integer of Python or of another library, if it is at least `minimum`."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer >= {minimum}; got {_describe(value)}")
    count = operator.index(value)
    if count < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; got {count}")
    return count


def check_size(what: str, name: str, option: object, size: int) -> None:
    """Raise unless the option `name` is None or the size that `what` has."""
    if option is not None and check_count(name, option) != size:
        raise ValueError(f"{what} must have {name} = {option}; got {size}")


def is_integer(value: object) -> TypeGuard[SupportsIndex]:
    """Return whether `value` is an integer, Python's or another library's, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    if not hasattr(value, "__index__"):
        return False
    try:
        operator.index(value)
    except TypeError:  # an array of several entries, or of no integers
        return False
    return True


def check_entries(entries: int, alternative: str) -> None:
    """Raise before a table is built that would be larger than the bound."""
    if entries > MAX_ENTRIES:
        raise MemoryError(
            f"this needs a table of {entries} entries, {entries * 8 / 2**30:.1f} GiB in float64, "
            f"more than the bound of {MAX_ENTRIES * 8 / 2**30:.0f} GiB; {alternative}"
        )


def check_tensor(name: str, value: object, shape: str, min_dims: int) -> Tensor:
    """Return `value` if it is a floating-point tensor with at least `min_dims` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {_describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}")
    if value.ndim < min_dims:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    return value


def check_tensors(
    name: str, values: object, shape: str, min_dims: int, minimum: int
) -> list[Tensor]:
    """Return `values`, a sequence or a tensor stacked along its first dimension, as a list.

    Half-precision tensors come back in float32; after that all must share a dtype and a device.
    """
    expected = (
        f"a sequence of at least {minimum} tensors {shape}, one for each modality, "
        "or one stacked tensor"
    )
    if isinstance(values, Tensor):
        if values.ndim <= min_dims:
            raise TypeError(
                f"{name} must be {expected}; got one tensor of shape {tuple(values.shape)}. "
                "Put the tensors of all modalities into a list: [a, b]"
            )
        items: Sequence[object] = values.unbind(0)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        items = values
    else:
        hint = f". Give list({name}.values())" if isinstance(values, Mapping) else ""
        raise TypeError(f"{name} must be {expected}; got {_describe(values)}{hint}")
    if len(items) < minimum:
        raise ValueError(f"{name} must be {expected}; got {len(items)}")
    tensors = [check_tensor(f"{name}[{m}]", item, shape, min_dims) for m, item in enumerate(items)]
    tensors = [lift(tensor) for tensor in tensors]
    check_alike(name, tensors)
    return tensors


def check_alike(name: str, tensors: Sequence[Tensor], labels: Sequence[str] = ()) -> None:
    """Raise unless all `tensors` share one dtype and one device.

    `labels` say what each is; otherwise they are [0], [1] and so on.
    """
    labels = labels or [f"[{m}]" for m in range(len(tensors))]
    for label, tensor in zip(labels, tensors, strict=True):
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f"{name} must share one dtype (half precision counts as float32); "
                f"got {tensors[0].dtype} for {labels[0]} and {tensor.dtype} for {label}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name} must be on one device; "
                f"got {tensors[0].device} for {labels[0]} and {tensor.device} for {label}"
            )


def lift(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32 and all others as they are."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return the context in which autocast leaves our arithmetic alone."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def check_samples(
    features: object, weights: object, *, name: str = "features"
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return M >= 2 sample sets `(*batch, N_m, D)` of equal batch and D, and their weights.

    For the weights see `check_weights`.
    """
    tensors = check_tensors(name, features, "(*batch, N, D)", 2, 2)
    batch, dim = tensors[0].shape[:-2], tensors[0].shape[-1]
    for m, tensor in enumerate(tensors):
        if tensor.shape[:-2] != batch or tensor.shape[-1] != dim:
            raise ValueError(
                f"{name}[{m}] must have shape {_shape(batch, 'N', dim)}, "
                f"with batch and D of {name}[0]; got {tuple(tensor.shape)}"
            )
    if dim == 0:
        raise ValueError(f"{name} must have at least one feature; got D = 0")
    return tensors, check_weights(weights, tensors, batch)


def check_weights(
    weights: object, features: Sequence[Tensor], batch: Sequence[int]
) -> list[Tensor | None]:
    """Return M weights `(*batch, N_m)` in the features' dtype, or None where none were given.

    A negative weight becomes NaN: it shows in the result and costs no synchronisation.
    """
    if weights is None:
        return [None] * len(features)
    if isinstance(weights, Tensor):
        if weights.ndim != len(batch) + 2 or weights.shape[0] != len(features):
            raise TypeError(
                f"weights must be None, a sequence of {len(features)} tensors (or None), or one "
                f"stacked tensor of shape {_shape((len(features), *batch), 'N')}; got one tensor "
                f"of shape {tuple(weights.shape)}. If these are features, put those of all "
                "modalities into one list: [a, b]"
            )
        weights = weights.unbind(0)
    if not isinstance(weights, Sequence):
        raise TypeError(
            f"weights must be None or a sequence of {len(features)} tensors (or None); "
            f"got {_describe(weights)}"
        )
    if len(weights) != len(features):
        raise ValueError(
            f"weights must have one entry for each of the {len(features)} modalities; "
            f"got {len(weights)}"
        )
    checked: list[Tensor | None] = []
    for m, (weight, x) in enumerate(zip(weights, features, strict=True)):
        expected = (*batch, x.shape[len(batch)])
        if weight is None:
            checked.append(None)
            continue
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{m}] must be a tensor or None; got {_describe(weight)}")
        if weight.is_complex():
            raise TypeError(f"weights[{m}] must be boolean or non-negative; got {weight.dtype}")
        if weight.shape != expected:
            raise ValueError(f"weights[{m}] must have shape {expected}; got {tuple(weight.shape)}")
        if weight.device != x.device:
            raise ValueError(
                f"weights[{m}] must be on the features' device {x.device}; got {weight.device}"
            )
        checked.append(_non_negative(weight.to(x.dtype)))
    return checked


def _non_negative(weight: Tensor) -> Tensor:
    """Return `weight` with NaN for what is negative, and without gradient where it is 0."""
    blank = torch.where(weight == 0, weight.new_zeros(()), weight.new_full((), math.nan))
    return torch.where(weight > 0, weight, blank)


def _describe(value: object) -> str:
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__


def _shape(batch: Sequence[int], *rest: object) -> str:
    return "(" + ", ".join(str(size) for size in (*batch, *rest)) + ")"
