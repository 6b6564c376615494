"""The compiled core for CPU tensors, in C; torch defines what it computes."""

from multialign.ops._native.library import (
    core_state,
    instruction_set,
    instruction_sets,
    native_function,
)

__all__ = ["core_state", "instruction_set", "instruction_sets", "native_function"]
