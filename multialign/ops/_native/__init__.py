"""The compiled core for CPU tensors, in C; torch defines what it computes."""

from multialign.ops._native.library import (
    core_state,
    instruction_set,
    instruction_sets,
    native_function,
)
from multialign.ops._native.transport import (
    BLANK,
    LEFT,
    Outputs,
    fits,
    read_gradients,
    solve,
)

__all__ = [
    "BLANK",
    "LEFT",
    "Outputs",
    "core_state",
    "fits",
    "instruction_set",
    "instruction_sets",
    "native_function",
    "read_gradients",
    "solve",
]
