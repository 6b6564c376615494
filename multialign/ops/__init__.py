"""The primitives everything heavy stands on, with the backend chosen by the tensor in hand."""

from multialign.ops.backend import Backend, choose_backend
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
