"""The compiled core, found beside this file and loaded where there is one."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["instruction_set", "native_function"]

_SUFFIXES = (".so", ".dylib", ".dll")


@cache
def _library() -> tuple[ctypes.CDLL, str] | None:
    """Return the core and the instruction set that this machine runs; None if there is none."""
    folder = Path(__file__).parent
    for path in (folder / f"core{suffix}" for suffix in _SUFFIXES):
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                library.multialign_instruction_set.restype = ctypes.c_char_p
                return library, library.multialign_instruction_set().decode()
            except OSError:
                return None
    return None


def instruction_set() -> str | None:
    """Return the instruction set of the core that runs here; None if there is no core."""
    found = _library()
    return None if found is None else found[1]


@cache
def native_function(name: str) -> Any:
    """Return a function of the core, for this machine's instruction set; None without a core."""
    found = _library()
    if found is None:
        return None
    library, suffix = found
    function = getattr(library, f"multialign_{name}_{suffix}")
    function.restype = None
    return function
