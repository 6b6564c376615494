"""Which implementation of the primitives works on a tensor."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from multialign._validation import check_choice

__all__ = ["Backend", "choose_backend"]

Backend = Literal["auto", "torch", "triton"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Looked up once, without importing it.
_INSTALLED = find_spec("triton") is not None


def choose_backend(backend: Backend, tensor: Tensor) -> Literal["torch", "triton"]:
    """Return the backend that will work on `tensor`: a named one, or for "auto" the best there is.

    Triton is the best for CUDA tensors, where it is installed. With TRITON_INTERPRET=1 in the
    environment "triton", if named, runs on CPU tensors too.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run on this tensor.
    """
    check_choice("backend", backend, ("auto", "torch", "triton"))
    if backend == "torch":
        return "torch"
    runs = _INSTALLED and tensor.is_cuda and tensor.dtype in _DTYPES
    if backend == "auto":
        return "triton" if runs else "torch"
    if runs:
        return "triton"
    if not _INSTALLED:
        raise RuntimeError(
            'backend="triton" needs the package triton, which is not installed here; '
            'use backend="torch" or "auto"'
        )
    if tensor.dtype not in _DTYPES:
        raise RuntimeError(
            f'backend="triton" needs float16, bfloat16, float32 or float64; got {tensor.dtype}'
        )
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton"
    raise RuntimeError(
        f'backend="triton" needs a CUDA tensor (or a CPU tensor with TRITON_INTERPRET=1 in the '
        f'environment); got one on {tensor.device}; use backend="torch" or "auto"'
    )
