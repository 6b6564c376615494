"""The files in a run's folder, and the state that an interrupted run needs to go on."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch import distributed

from examples.decalign.network import Output
from examples.decalign.storage import replacing, write_atomically

__all__ = ["EpochLog", "MetricsWriter", "PredictionWriter", "RandomState"]


class RandomState(Callback):
    """Saves the random state of every process in the checkpoint, and restores it."""

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all processes."""
        own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        return {"ranks": _gather(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts, since code before it may draw numbers too."""
        self._restored = state_dict["ranks"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of this process, once."""
        if self._restored is not None and trainer.world_size == len(self._restored):
            own = self._restored[trainer.global_rank]
            torch.set_rng_state(own["cpu"].cpu())
            if own["cuda"]:
                torch.cuda.set_rng_state_all([state.cpu() for state in own["cuda"]])
        self._restored = None


class EpochLog(Callback):
    """Writes a table of every epoch's losses and metrics, which is part of the checkpoint.

    Args:
        path: The CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows of the table."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of the table."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row for the epoch, and write the table."""
        numbers = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("train/", "val/"))
        }
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append({"epoch": trainer.current_epoch, "learning_rate": rate, **numbers})
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            _write_table(
                self.path, columns, [[row.get(c, "") for c in columns] for row in self.rows]
            )


class MetricsWriter(Callback):
    """Writes the metrics of the test split.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics."""
        metrics = {
            name.removeprefix("test/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        if trainer.is_global_zero:
            write_atomically(self.path, json.dumps(metrics, indent=2) + "\n")


class PredictionWriter(BasePredictionWriter):
    """Writes the prediction for each test sample, and its features.

    `predictions.csv` has a line for each sample: its id, label and prediction. `features.npz` has
    the pooled features, `unique/NAME` and `common/NAME` `(N, d_s)`, where the network has them.

    Args:
        folder: The folder of both files.
    """

    def __init__(self, folder: Path) -> None:
        write_interval: Literal["epoch"] = "epoch"
        super().__init__(write_interval)
        self.folder = folder

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Output],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collect the contiguous parts of all processes, and write the files."""
        target = pl_module.target
        own = {"prediction": target.predict(torch.cat([out.logits for out in predictions]))}
        for kind in ("unique", "common"):
            parts = [getattr(out, kind) for out in predictions]
            if parts[0] is not None:
                for name, features in zip(
                    pl_module.network.modalities, zip(*parts, strict=True), strict=True
                ):
                    own[f"{kind}/{name}"] = torch.cat(features)
        ranks = _gather({name: x.float().cpu().numpy() for name, x in own.items()})
        if not trainer.is_global_zero:
            return
        whole = {name: np.concatenate([rank[name] for rank in ranks]) for name in own}
        samples = trainer.datamodule.splits["test"]
        predicted = whole.pop("prediction")
        if target.kind == "class":
            predicted = predicted.astype(int)
        rows = zip(samples.ids, samples.samples.targets.tolist(), predicted.tolist(), strict=True)
        _write_table(self.folder / "predictions.csv", ["id", "label", "prediction"], rows)
        # numpy would append an ending to a file name, so it gets an open file.
        with replacing(self.folder / "features.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, **whole)


def _write_table(path: Path, columns: Sequence[str], rows: Any) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _gather(own: Any) -> list[Any]:
    """Return the objects of all processes, in the order of ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered
