"""The build backend: scikit-build-core, with editable installs that are a path to the checkout.

Those of scikit-build-core import the checkout even where another copy comes first on `sys.path`,
as it does in another worktree and where mutmut changes the formulas.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scikit_build_core.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel that holds the path of this folder; `make native` builds the core in it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "multialign.pth")
        path.write_text(f"{Path.cwd()}\n", encoding="utf-8")
        settings = {
            **(config_settings or {}),
            "wheel.cmake": "false",
            "wheel.packages": [],
            f"wheel.force-include.{path}": path.name,
        }
        return build_wheel(wheel_directory, settings, metadata_directory)
