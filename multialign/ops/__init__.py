"""The primitives on which all losses are built; a tensor's device chooses their implementation."""

from multialign.ops.backend import BACKENDS, Backend, Implementation, choose_backend
from multialign.ops.devices import has_float64, multiplies_float64_fast
from multialign.ops.kernel_sums import energy_form, gaussian_form, gaussian_matvec
from multialign.ops.mixtures import AxesFit, FitSettings, core_fits, fit_axes, pair_terms
from multialign.ops.operators import (
    apply_function,
    operator,
    register_batched_vmap,
    register_fake,
)
from multialign.ops.products import (
    LogProduct,
    StreamedProduct,
    log_matmul_reduce,
    log_matvec,
    log_product,
)
from multialign.ops.reference import log, logsumexp, real
from multialign.ops.small import Solved, fits_whole, solve_small, solve_whole, whole_gradients
from multialign.ops.tangents import has_tangent

__all__ = [
    "BACKENDS",
    "AxesFit",
    "Backend",
    "FitSettings",
    "Implementation",
    "LogProduct",
    "Solved",
    "StreamedProduct",
    "apply_function",
    "choose_backend",
    "core_fits",
    "energy_form",
    "fit_axes",
    "fits_whole",
    "gaussian_form",
    "gaussian_matvec",
    "has_float64",
    "has_tangent",
    "log",
    "log_matmul_reduce",
    "log_matvec",
    "log_product",
    "logsumexp",
    "multiplies_float64_fast",
    "operator",
    "pair_terms",
    "real",
    "register_batched_vmap",
    "register_fake",
    "solve_small",
    "solve_whole",
    "whole_gradients",
]
