"""The primitives on which all losses are built; a tensor's device chooses their implementation."""

from multialign.ops.backend import Backend, Implementation, choose_backend
from multialign.ops.batching import register_batched_vmap
from multialign.ops.kernel_sums import energy_form, gaussian_form, gaussian_matvec
from multialign.ops.products import (
    LogProduct,
    StreamedProduct,
    log_matmul_reduce,
    log_matvec,
    log_product,
)
from multialign.ops.reference import log, logsumexp, real
from multialign.ops.small import solve_small
from multialign.ops.tangents import has_tangent

__all__ = [
    "Backend",
    "Implementation",
    "LogProduct",
    "StreamedProduct",
    "choose_backend",
    "energy_form",
    "gaussian_form",
    "gaussian_matvec",
    "has_tangent",
    "log",
    "log_matmul_reduce",
    "log_matvec",
    "log_product",
    "logsumexp",
    "real",
    "register_batched_vmap",
    "solve_small",
]
