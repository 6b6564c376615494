"""The compiled core for CPU tensors, in C; torch defines what it computes."""

from multialign.ops._native.library import instruction_set, native_function
from multialign.ops._native.transport import LEFT, fits, read_gradients, solve

__all__ = ["LEFT", "fits", "instruction_set", "native_function", "read_gradients", "solve"]
