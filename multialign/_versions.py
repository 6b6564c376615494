"""What a bug report needs to say about the installation."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from multialign.ops._native import core_state

__all__ = ["show_versions"]


def show_versions() -> None:
    """Print the versions of multialign and of what it runs on, to paste into a bug report.

    Triton is looked up among the installed packages and never imported. The compiled core is told
    by its instruction set, or by the reason why it does not run.

    Example:
        >>> from multialign import show_versions
        >>> show_versions()  # doctest: +ELLIPSIS
        multialign: ...
        python: ...
        torch: ...
        CUDA: ...
        triton: ...
        compiled core: ...
        platform: ...
        device: ...
    """
    from multialign import __version__  # not at the top: multialign imports this module

    entries = {
        "multialign": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "not in this build of torch",
        "triton": _installed("triton"),
        "compiled core": core_state(),
        "platform": platform.platform(),
        "device": _device(),
    }
    print("\n".join(f"{name}: {value}" for name, value in entries.items()))


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    """Return the accelerator's name, or the processor's architecture and number of threads."""
    if torch.cuda.is_available():
        return ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
