"""Atomic writing of files: a killed process leaves the old or the new file, never a part."""

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
    """Yield a temporary path in the same folder, and then move that file to `path`.

    The temporary name is always the same, so the next write replaces the file of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    yield part
    # Without fsync, a crash of the machine may keep the new name and lose the content.
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as part:
        part.write_text(text)


class Checkpoints(TorchCheckpointIO):
    """Checkpoints on a local disk, written atomically, and read without running code.

    Lightning writes a checkpoint to the system's folder of temporary files and moves it. Between
    two disks a move is a copy, which may be cut off.
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
        """Return a checkpoint; refuse a file with anything but tensors and plain data.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a checkpoint, is cut off, or names code.
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
