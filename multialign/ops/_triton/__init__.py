"""The CUDA implementation: Triton kernels and their launchers, one family a file.

Imported only when chosen. The modules of `multialign.ops` define what the kernels compute.
"""

from multialign.ops._triton.gaussian import gaussian_form
from multialign.ops._triton.products import log_matmul, log_matmul_reduce
from multialign.ops._triton.rows import log_matvec, log_matvec_points
from multialign.ops._triton.small import fits_small, solve_small

__all__ = [
    "fits_small",
    "gaussian_form",
    "log_matmul",
    "log_matmul_reduce",
    "log_matvec",
    "log_matvec_points",
    "solve_small",
]
