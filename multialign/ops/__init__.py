"""The primitives everything heavy stands on, with the backend chosen by the tensor in hand."""

from multialign.ops.backend import Backend, Implementation, choose_backend
from multialign.ops.batching import register_batched_vmap
from multialign.ops.gaussian import gaussian_form
from multialign.ops.polar import nuclear_norms, nuclear_norms_backward
from multialign.ops.products import (
    LogProduct,
    StreamedProduct,
    log_matmul_reduce,
    log_matvec,
    log_product,
)
from multialign.ops.reference import log, logsumexp, real
from multialign.ops.small import solve_small

__all__ = [
    "Backend",
    "Implementation",
    "LogProduct",
    "StreamedProduct",
    "choose_backend",
    "gaussian_form",
    "log",
    "log_matmul_reduce",
    "log_matvec",
    "log_product",
    "logsumexp",
    "nuclear_norms",
    "nuclear_norms_backward",
    "real",
    "register_batched_vmap",
    "solve_small",
]
