"""Files that are there whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

__all__ = ["Checkpoints", "replacing", "write_atomically"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to, in the same folder, which then takes the place of `path`.

    The name is always the same, so that what a killed process leaves there is written over by the
    next and does not pile up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    yield part
    # Otherwise a crash of the machine may keep the new name and lose what was written.
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text)


class Checkpoints(TorchCheckpointIO):
    """Checkpoints on a local disk, written whole or not at all, and read as data alone.

    Lightning writes one to the system's folder of temporary files and moves it from there, which is
    a copy, and may be cut off, where that is another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint; a file that holds anything but tensors and plain data is refused.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file is no checkpoint, is cut off, or names code.
        """
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is no whole checkpoint: {error}") from error
        if not isinstance(content, dict) or "state_dict" not in content:
            raise ValueError(f"{path} is no checkpoint of a training: it has no 'state_dict'")
        return content
