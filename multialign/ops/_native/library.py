"""The compiled core, found beside this file and loaded where there is one."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["core_state", "instruction_set", "instruction_sets", "native_function"]

_PATH = Path(__file__).with_name("core.dll" if sys.platform == "win32" else "core.so")
# A machine that runs one of them runs those before it.
_SETS = ("baseline", "avx2", "avx512")


@cache
def _library() -> ctypes.CDLL | str:
    """Return the core, or the reason why there is none.

    Raises:
        OSError: MULTIALIGN_NATIVE_LIBRARY names a file that cannot be loaded.
    """
    if os.environ.get("MULTIALIGN_NATIVE") == "0":
        return "off (MULTIALIGN_NATIVE=0)"
    named = os.environ.get("MULTIALIGN_NATIVE_LIBRARY")
    if not named and not _PATH.exists():
        return "not built"
    try:
        library = ctypes.CDLL(named or str(_PATH))
        library.multialign_instruction_set.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        if named:
            raise OSError(f"MULTIALIGN_NATIVE_LIBRARY={named} cannot be loaded: {error}") from error
        return f"not loaded: {error}"
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of the core that run here, the best last; () without a core."""
    library = _library()
    if isinstance(library, str):
        return ()
    return _SETS[: _SETS.index(library.multialign_instruction_set().decode()) + 1]


@cache
def instruction_set() -> str | None:
    """Return the instruction set that is used: MULTIALIGN_NATIVE, or the best; None without a core.

    Raises:
        ValueError: MULTIALIGN_NATIVE is neither 0 nor an instruction set that runs here.
    """
    sets = instruction_sets()
    if not sets:
        return None
    name = os.environ.get("MULTIALIGN_NATIVE") or sets[-1]
    if name not in sets:
        raise ValueError(f"MULTIALIGN_NATIVE must be 0 or one of {', '.join(sets)}; got {name!r}")
    return name


def core_state() -> str:
    """Return the instruction set of the core that runs here, or why there is no core."""
    library = _library()
    return library if isinstance(library, str) else str(instruction_set())


@cache
def native_function(name: str, instruction_set_name: str | None = None) -> Any:
    """Return a function for the named instruction set, or the one used; None without a core."""
    library = _library()
    if isinstance(library, str):
        return None
    function = getattr(library, f"multialign_{name}_{instruction_set_name or instruction_set()}")
    function.restype = ctypes.c_int  # a number that nobody reads where nothing is returned
    return function
