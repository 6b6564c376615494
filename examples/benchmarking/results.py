"""The files of results in a run's folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import distributed

from examples.benchmarking.storage import replacing, write_atomically

__all__ = ["Results"]


class Results(BasePredictionWriter):
    """Writes what a model says about the test split.

    `metrics.json` has the metrics; `predictions.csv` a line for each sample: its id, label and
    prediction; `features.npz` the features that the model shows, such as `unique/NAME` `(N, d_s)`.

    Args:
        folder: The folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        interval: Literal["epoch"] = "epoch"
        super().__init__(interval)
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics of the command `validate`."""
        if trainer.state.fn == "validate":
            self._write_metrics(trainer, "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics."""
        self._write_metrics(trainer, "test/")

    def _write_metrics(self, trainer: Trainer, prefix: str) -> None:
        metrics = {
            name.removeprefix(prefix): round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix)
        }
        if not trainer.is_global_zero:
            return
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        if trainer.progress_bar_callback is not None:
            print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            print(f"Written: {self.folder}")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[dict[str, torch.Tensor]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collect the samples of all processes, and write the files."""
        own = {
            name: torch.cat([part[name] for part in predictions]).float().cpu().numpy()
            for name in predictions[0]
        }
        ranks: list[Any] = [own]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, own)
        if not trainer.is_global_zero:
            return
        samples = trainer.datamodule.splits["test"]
        # Process r of R has the samples r, r + R, and so on.
        rows = np.concatenate([np.arange(len(samples))[r :: len(ranks)] for r in range(len(ranks))])
        order = np.argsort(rows)
        whole = {name: np.concatenate([rank[name] for rank in ranks])[order] for name in own}
        predicted, labels = whole.pop("prediction").tolist(), samples.samples.targets.tolist()
        with (
            replacing(self.folder / "predictions.csv") as part,
            part.open("w", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["id", "label", "prediction"])
            for name, *numbers in zip(samples.ids, labels, predicted, strict=True):
                writer.writerow([name, *(f"{number:.6g}" for number in numbers)])
        # numpy would append an ending to a file name, so it gets an open file.
        with replacing(self.folder / "features.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, **whole)
