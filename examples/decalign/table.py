"""The table: the full model and its ablations over several seeds, scored on held-out data."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm.auto import tqdm

from examples.decalign import figures
from examples.decalign.baseline import logistic_scores
from examples.decalign.cli import DecAlignCLI

__all__ = ["VARIANTS", "Run", "main", "train"]

# What each model adds to the arguments; the others are compared with the full one.
VARIANTS: dict[str, list[str]] = {
    "full": [],
    "no_mfd": ["--model.switches.mfd=false"],
    "no_hete": ["--model.switches.hete=false"],
    "no_homo": ["--model.switches.homo=false"],
    "no_proto_ot": ["--model.switches.proto_ot=false"],
    "no_sem": ["--model.switches.sem=false"],
    "no_mmd": ["--model.switches.mmd=false"],
}
KEY_MODULES = ["no_mfd", "no_hete", "no_homo"]
METRICS = ("accuracy", "weighted_f1")

Scores = dict[str, dict[str, list[float]]]
"""By name of the model and of the metric, one value a seed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, and what it makes of the test split."""

    variant: str
    seed: int
    scores: dict[str, float]
    targets: NDArray[np.int64]
    predictions: NDArray[np.int64]
    unique: dict[str, NDArray[np.float32]]
    """Pooled unique features of each modality, `(N, d_s)`."""
    common: dict[str, NDArray[np.float32]]
    """Pooled common features, likewise."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training to do."""

    variant: str
    seed: int
    args: list[str]
    checkpoint: Path | None
    """Where to save the trained model."""


def main(args: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the table and write everything to the output folder."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign table",
        description="Train and evaluate variants of the model over several seeds; write "
        "metrics.json, a checkpoint of the full model and figures.",
        epilog="Other arguments, such as --config FILE, go to every training as they go to `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--ablations", nargs="*", choices=[*VARIANTS][1:], default=KEY_MODULES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/decalign-digits"))
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="trainings at the same time"
    )
    options, shared = parser.parse_known_args(args)
    output, seeds = options.output, options.seeds
    output.mkdir(parents=True, exist_ok=True)

    # What is wrong with the arguments shows here, before any training.
    start = _configure(shared, seed=seeds[0])
    start.parser.save(start.config, output / "config.yaml", overwrite=True, skip_none=False)
    untrained = _evaluate(start, variant="untrained", seed=seeds[0])
    logistic = logistic_scores(start.datamodule)

    checkpoints = {("full", seeds[0]): output / "full.ckpt"}
    jobs = [
        Job(
            variant=variant,
            seed=seed,
            args=shared,
            checkpoint=checkpoints.get((variant, seed)),
        )
        for variant in ["full", *options.ablations]
        for seed in seeds
    ]
    runs = _train_all(jobs, options.workers)
    scores: Scores = {
        variant: {metric: [run.scores[metric] for run in group] for metric in METRICS}
        for variant, group in runs.items()
    }
    for name, values in logistic.items():
        # The fit has no seed: every training compares with the same one.
        scores[name] = {metric: [values[metric]] * len(seeds) for metric in METRICS}
    (output / "metrics.json").write_text(json.dumps(_summary(scores), indent=2) + "\n")
    print(_render(scores, seeds))
    _draw(runs, untrained, output)
    print(f"Written to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def train(job: Job) -> Run:
    """Train one model as `fit` would, and evaluate it on the test split."""
    cli = _configure([*job.args, *VARIANTS[job.variant]], seed=job.seed)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if job.checkpoint is not None:
        cli.trainer.save_checkpoint(job.checkpoint)
    return _evaluate(cli, variant=job.variant, seed=job.seed)


def _train_all(jobs: Sequence[Job], workers: int) -> dict[str, list[Run]]:
    """Return the runs of all jobs by variant, both in the jobs' order."""
    done = {}
    with tqdm(total=len(jobs), desc="Training", unit="model") as bar:
        for run in _runs(jobs, workers):
            bar.set_postfix_str(f"{run.variant}, seed {run.seed}: {run.scores['accuracy']:.3f}")
            bar.update()
            done[run.variant, run.seed] = run
    runs: dict[str, list[Run]] = {}
    for job in jobs:
        runs.setdefault(job.variant, []).append(done[job.variant, job.seed])
    return runs


def _runs(jobs: Sequence[Job], workers: int) -> Iterator[Run]:
    if workers == 1:
        yield from map(train, jobs)
        return
    # Processes, not threads: the model is too small for one training to fill two cores.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for future in as_completed([pool.submit(train, job) for job in jobs]):
            yield future.result()


def _configure(args: Sequence[str], *, seed: int) -> DecAlignCLI:
    """Return trainer, model and data for one training, silent and without files of its own."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = ["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"]
    return DecAlignCLI(
        [*args, f"--seed_everything={seed}", *(f"--trainer.{name}=false" for name in quiet)],
        run=False,
        save_config_callback=None,
    )


def _evaluate(cli: DecAlignCLI, *, variant: str, seed: int) -> Run:
    """Return what the model makes of the test split, as it is now."""
    [scores] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    outputs = cli.trainer.predict(cli.model, datamodule=cli.datamodule)
    [output] = outputs or []
    [batch] = cli.datamodule.predict_dataloader()
    names = list(cli.datamodule.modalities)
    return Run(
        variant=variant,
        seed=seed,
        scores={metric: float(scores[f"test/{metric}"]) for metric in METRICS},
        targets=batch.targets.numpy(),
        predictions=output.logits.argmax(-1).numpy(),
        unique={name: x.numpy() for name, x in zip(names, output.unique, strict=True)},
        common={name: x.numpy() for name, x in zip(names, output.common, strict=True)},
    )


def _draw(runs: Mapping[str, Sequence[Run]], untrained: Run, output: Path) -> None:
    """Draw the confusion matrix over all seeds and the modality gap of the first."""
    figures.confusion_matrix(
        np.concatenate([run.targets for run in runs["full"]]),
        np.concatenate([run.predictions for run in runs["full"]]),
        output / "confusion_matrix.png",
    )
    rows = {}
    for kind, ablation in {"unique": "no_hete", "common": "no_homo"}.items():
        stages = {"before training": untrained}
        if ablation in runs:
            stages["trained without alignment"] = runs[ablation][0]
        stages["trained with alignment"] = runs["full"][0]
        rows[f"{kind} features"] = {stage: getattr(run, kind) for stage, run in stages.items()}
    figures.modality_gap(rows, output / "modality_gap.png")


def _summary(scores: Scores) -> dict[str, dict[str, dict[str, float | list[float]]]]:
    """Return mean, sample standard deviation and values of each score."""
    return {
        name: {
            metric: {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": values,
            }
            for metric, values in metrics.items()
        }
        for name, metrics in scores.items()
    }


def _render(scores: Scores, seeds: Sequence[int]) -> str:
    """Return the table as text, in per cent."""
    lines = [f"{'test split':<16}{'accuracy':>14}{'weighted F1':>16}{'accuracy - full':>30}"]
    for name, metrics in scores.items():
        columns = "".join(f"{_spread(metrics[metric]):>16}" for metric in METRICS)
        lines.append(f"{name:<14}{columns}{_difference(metrics, scores['full']):>30}".rstrip())
    rule = "-" * max(map(len, lines))
    lines[1:1] = [rule]
    return "\n".join(
        [
            "",
            *lines,
            rule,
            f"Per cent; mean +- standard deviation over seeds {', '.join(map(str, seeds))}. "
            "In brackets the 95 % interval",
            "(Student's t) of the mean difference, seed by seed; * where it excludes 0. All are",
            "scored on the same test samples, so that the intervals tell how far the seed matters,",
            "not what other samples would give. The logistic regressions have no seed.",
            "",
        ]
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _difference(metrics: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> str:
    """Return the mean difference of accuracies with its interval."""
    pairs = zip(metrics["accuracy"], reference["accuracy"], strict=True)
    differences = [100 * (value - base) for value, base in pairs]
    mean = statistics.fmean(differences)
    if metrics is reference:
        return ""
    if len(differences) < 2:
        return f"{mean:+.2f}  "
    error = statistics.stdev(differences) / len(differences) ** 0.5
    margin = error * float(stats.t.ppf(0.975, len(differences) - 1))
    mark = "*" if abs(mean) > margin else " "
    return f"{mean:+.2f} [{mean - margin:+.2f}, {mean + margin:+.2f}] {mark}"
