"""Means, deviations and paired intervals over seeds, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from examples.decalign.data import ModalityData
from examples.decalign.storage import write_atomically
from examples.decalign.targets import Target

__all__ = ["Scores", "describe", "difference", "published", "render", "spread", "summarise"]

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""For each model and metric, by name, one value for each seed."""

TITLES = {
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "mae": "MAE",
    "corr": "Corr",
    "acc2": "Acc-2",
    "f1": "F1",
    "acc2_nonzero": "Acc-2 (no 0)",
    "f1_nonzero": "F1 (no 0)",
    "acc3": "Acc-3",
    "acc7": "Acc-7",
}
# Metrics that are shown in their own units; the others are shown in per cent.
UNITS = {"mae": 1.0, "corr": 1.0, "loss": 1.0}


def summarise(scores: Scores) -> dict[str, Any]:
    """Return mean, sample standard deviation and values of each score."""
    return {
        name: {
            metric: {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": list(values),
            }
            for metric, values in metrics.items()
        }
        for name, metrics in scores.items()
    }


def describe(data: ModalityData, output: Path) -> None:
    """Write modalities and target of the data to `data.json`, for commands that read the runs."""
    text = json.dumps(
        {
            "published": data.published if _is_the_papers_task(data) else None,
            "modalities": list(data.modalities),
            "target": asdict(data.target),
        },
        indent=2,
    )
    write_atomically(output / "data.json", text + "\n")


def read_description(output: Path) -> tuple[str | None, Target]:
    """Return the data set's name among the published tables, and its target."""
    path = output / "data.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected the output of `table` or `ablate`; {path} is missing")
    described = json.loads(path.read_text())
    target = described["target"]
    for name in ("categories", "edges"):
        target[name] = tuple(target[name])
    return described["published"], Target(**target)


def published(name: str | None) -> dict[str, dict[str, float]]:
    """Return the paper's rows for a data set, by model and metric, with per cent as fractions."""
    if name is None:
        return {}
    table = read_published()[name]
    return {
        model: {
            metric: value * (1 if metric in UNITS else 0.01)
            for metric, value in zip(table["columns"], values, strict=True)
        }
        for model, values in table["rows"].items()
    }


def read_published() -> dict[str, Any]:
    """Return the paper's tables from the file."""
    return dict(yaml.safe_load((Path(__file__).parent / "published.yaml").read_text()))


def spread(metric: str, values: Sequence[float]) -> str:
    """Return mean and deviation as text."""
    scaled = [value * UNITS.get(metric, 100.0) for value in values]
    digits = 3 if metric in UNITS else 2
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    if len(scaled) < 2 or len(set(scaled)) == 1:
        return mean
    return f"{mean} +- {statistics.stdev(scaled):.{digits}f}"


def difference(metric: str, values: Sequence[float], reference: Sequence[float]) -> str:
    """Return the mean difference, seed by seed, with its 95 % interval (Student's t)."""
    unit, digits = (UNITS[metric], 3) if metric in UNITS else (100.0, 2)
    pairs = zip(values, reference, strict=True)
    differences = [unit * (value - base) for value, base in pairs]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    margin = error * float(stats.t.ppf(0.975, len(differences) - 1))
    mark = "*" if abs(mean) > margin else " "
    low, high = mean - margin, mean + margin
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {mark}"


def render(head: Sequence[str], rows: Sequence[Sequence[str]], notes: str = "") -> str:
    """Return a table as text, with the first column left-aligned and the others right-aligned."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join(["", lines[0], rule, *lines[1:], rule, notes, ""])


def _is_the_papers_task(data: ModalityData) -> bool:
    """Return whether the labels are those of the paper's tables."""
    labels = data.splits["test"].samples.targets
    return data.published == "iemocap" or (data.target.kind == "score" and len(labels.unique()) > 2)
