"""What all launchers share: checks, dtypes, block sizes, and the launch itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "MULTIPROCESSORS",
    "block",
    "cdiv",
    "check_batched",
    "launch",
    "lifted",
    "matrix_precision",
]

# How many programs keep a card busy: an A100 has 108 multiprocessors, an H100 or H200 132. It is
# one number for all cards, so that results do not depend on the card.
MULTIPROCESSORS = 108

_WORKING_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def lifted(*tensors: Tensor) -> tuple[torch.dtype, Any]:
    """Return the dtype to compute in, as torch and as Triton name it."""
    for tensor in tensors:
        if tensor.dtype not in _WORKING_DTYPE:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WORKING_DTYPE)
            raise TypeError(f"the Triton kernels take {expected}; got {tensor.dtype}")
    dtypes = [_WORKING_DTYPE[tensor.dtype] for tensor in tensors]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return dtype, _TRITON_DTYPE[dtype]


def matrix_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of `tl.dot`: three TF32 products make one of float32 accuracy.

    It is always named, so that neither torch's global TF32 settings nor Triton's default matter.
    """
    return "ieee" if dtype == torch.float64 else "tf32x3"


def block(size: int, largest: int, smallest: int = 16) -> int:
    """Return the power of two that covers `size`, within bounds."""
    return max(smallest, min(largest, 1 << max(0, size - 1).bit_length()))


def check_batched(**tensors: tuple[Tensor, Sequence[int | None]]) -> None:
    """Raise unless each tensor has its shape (None: any size) and all share a device."""
    device = None
    for name, (tensor, shape) in tensors.items():
        fits = tensor.ndim == len(shape) and all(
            wanted is None or size == wanted
            for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            expected = tuple("any" if wanted is None else wanted for wanted in shape)
            raise ValueError(f"{name} must have shape {expected}; got {tuple(tensor.shape)}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, as the others are; got {tensor.device}")


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run `programs` programs of `kernel` on the device of its first argument.

    The grid has one dimension, since the other two hold at most 65535.
    """
    if programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)


def cdiv(size: int, step: int) -> int:
    """Return size / step rounded up."""
    return int(triton.cdiv(size, step))
