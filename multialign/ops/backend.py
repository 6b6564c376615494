"""The choice of the implementation that runs on a tensor."""

from __future__ import annotations

import os
import re
import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from multialign._validation import check_choice
from multialign.ops._native import instruction_set

__all__ = ["BACKENDS", "Backend", "Implementation", "choose_backend"]

Backend = Literal["auto", "torch", "native", "triton"]
"""What a user asks for."""
BACKENDS = ("auto", "torch", "native", "triton")
Implementation = Literal["torch", "native", "triton"]
"""What runs: a backend that is not "auto"."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The oldest triton that the kernels support; torch 2.10 brings it.
_OLDEST = (3, 6)


def _triton_version() -> str | None:
    """Return the version of triton, "" if it is unknown, None if triton is not installed."""
    if find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return ""


def _is_old(found: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", found)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < _OLDEST


# Read once, without importing triton.
_VERSION = _triton_version()
_HAS_CORE = instruction_set() is not None


@lru_cache
def _builds(device: torch.device) -> bool:
    """Return whether a kernel can be built for a device, which takes a C compiler; if not, warn."""
    from multialign.ops import _triton

    try:
        _triton.log_matvec(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device))
    except Exception as error:  # of whatever kind: triton, its compiler, the driver
        warnings.warn(
            f"no Triton kernel can be built for {device}, so torch computes everything there: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )
        return False
    return True


def choose_backend(backend: Backend, tensor: Tensor) -> Implementation:
    """Return what runs on `tensor`: the named backend, or for "auto" the fastest.

    That is Triton for CUDA tensors, where it is installed and new enough, and the compiled core for
    CPU tensors, where it is built; what the core does not take, torch does. With TRITON_INTERPRET=1
    in the environment, "triton" by name runs on CPU tensors too.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run on this tensor.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch"
    if backend in ("auto", "native") and tensor.device.type == "cpu":
        if _HAS_CORE:
            return "native"
        if backend == "auto":
            return "torch"
        raise RuntimeError(
            'backend="native" needs the compiled core, which was not built here; '
            'use backend="torch" or "auto"'
        )
    if backend == "native":
        raise RuntimeError(
            f'backend="native" needs CPU tensors; got one on {tensor.device}; '
            f'use backend="torch" or "auto"'
        )
    installed = _VERSION is not None and not _is_old(_VERSION)
    runs = installed and tensor.is_cuda and tensor.dtype in _DTYPES
    if backend == "auto":
        return "triton" if runs and _builds(tensor.device) else "torch"
    if runs:
        return "triton"
    if not installed:
        state = (
            "which is not installed here" if _VERSION is None else f"but {_VERSION} is installed"
        )
        raise RuntimeError(
            f'backend="triton" needs the package triton 3.6 or newer, {state}; '
            f'use backend="torch" or "auto"'
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
