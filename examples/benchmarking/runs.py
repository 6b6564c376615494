"""Runs of several trainings: each has a folder, is trained once, and is read from its folder."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from examples.benchmarking.cli import TrainingCLI

__all__ = ["Run", "default_workers", "make_runs", "parse_data", "train_all"]

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training with one seed, and the files in its folder."""

    name: str
    seed: int
    folder: Path
    args: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether all files that `fit` writes at its end exist."""
        files = ("metrics.json", "predictions.csv", "features.npz")
        return all((self.folder / file).is_file() for file in files)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The metrics of the test split."""
        return dict(json.loads((self.folder / "metrics.json").read_text()))

    @cached_property
    def predictions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Labels and predictions of the test split."""
        with (self.folder / "predictions.csv").open(newline="") as file:
            rows = [(float(row["label"]), float(row["prediction"])) for row in csv.DictReader(file)]
        labels, predicted = np.array(rows).T
        return labels, predicted

    def features(self, kind: str) -> dict[str, NDArray[np.float32]]:
        """Return pooled "unique" or "common" features by modality."""
        with np.load(self.folder / "features.npz") as file:
            return {
                name.removeprefix(f"{kind}/"): file[name]
                for name in file.files
                if name.startswith(f"{kind}/")
            }

    def train(self) -> Run:
        """Run `fit` without output; continue an interrupted run."""
        silence_lightning()
        TrainingCLI(
            [
                "fit",
                *self.args,
                *QUIET,
                f"--seed_everything={self.seed}",
                f"--trainer.default_root_dir={self.folder}",
            ]
        )
        return self


def make_runs(
    variants: dict[str, Sequence[str]], seeds: Sequence[int], output: Path, shared: Sequence[str]
) -> list[Run]:
    """Return a run for each variant and seed, with the shared and the variant's arguments."""
    return [
        Run(
            name=name,
            seed=seed,
            folder=output / name / f"seed_{seed}",
            args=(*shared, *extra),
        )
        for name, extra in variants.items()
        for seed in seeds
    ]


def train_all(runs: Sequence[Run], workers: int) -> dict[str, list[Run]]:
    """Train all runs that are not done, and return the runs by name."""
    with tqdm(total=len(runs), desc="Training", unit="model") as bar:
        for run in _trained(runs, workers):
            first, value = next((m, v) for m, v in run.scores.items() if m != "loss")
            bar.set_postfix_str(f"{run.name}, seed {run.seed}: {first} {value:.3f}")
            bar.update()
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def parse_data(shared: Sequence[str]) -> TrainingCLI:
    """Return the command line with the data that the arguments name; raise if they are wrong."""
    silence_lightning()
    return TrainingCLI(list(shared), run=False)


def silence_lightning() -> None:
    """Let Lightning log errors only."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _trained(runs: Sequence[Run], workers: int) -> Iterator[Run]:
    if workers == 1:
        for run in runs:
            yield run.train()
        return
    # One process on each core, since the model is too small for two threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(runs)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for future in as_completed([pool.submit(run.train) for run in runs]):
            yield future.result()


def default_workers() -> int:
    """Return one worker for each core, or a single one if there is a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1
