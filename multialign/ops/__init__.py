"""The primitives everything heavy stands on, with the backend chosen by the tensor in hand."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from multialign._validation import check_choice
from multialign.ops.batching import register_batched_vmap
from multialign.ops.gaussian import gaussian_form
from multialign.ops.products import LogProduct
from multialign.ops.reference import log, logsumexp

__all__ = [
    "Backend",
    "LogProduct",
    "choose_backend",
    "gaussian_form",
    "log",
    "logsumexp",
    "register_batched_vmap",
]

Backend = Literal["auto", "torch", "triton"]


def choose_backend(backend: Backend, tensor: Tensor) -> Literal["torch"]:
    """Return the backend that will work on `tensor`: a named one, or for "auto" the best there is.

    Raises:
        ValueError: The name is unknown.
        NotImplementedError: The named backend has no kernels yet.
    """
    check_choice("backend", backend, ("auto", "torch", "triton"))
    if backend == "triton":
        raise NotImplementedError(
            f'backend="triton" has no kernels in this version (tensor on {tensor.device}); '
            'use backend="torch" or "auto", which run on every device'
        )
    return "torch"
