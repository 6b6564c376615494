"""Means, intervals and paired differences over seeds, the paper's rows, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from examples.benchmarking.model import MODELS
from examples.benchmarking.storage import write_atomically
from examples.decalign.data import ModalityData, Target
from examples.decalign.data.base import SPLITS

__all__ = [
    "COLUMNS",
    "TITLES",
    "Scores",
    "comparable_metric",
    "describe",
    "difference",
    "published",
    "read_description",
    "read_published",
    "render",
    "spread",
    "summarise",
    "table_1",
]

PUBLISHED = Path(__file__).parents[1] / "decalign" / "published.yaml"

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
    "acc5": "Acc-5",
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
            "published": _published_name(data),
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
    for name in ("categories", "edges", "limits"):
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
    return dict(yaml.safe_load(PUBLISHED.read_text()))


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


def _published_name(data: ModalityData) -> str | None:
    """Return the name in the paper's tables, if labels and split sizes are that data set's."""
    if data.published is None:
        return None
    sizes = read_published()["sizes"][data.published]
    score = data.target.kind == "score" or data.published == "iemocap"
    found = [len(data.splits[split]) for split in SPLITS]
    # Of IEMOCAP the test split is fixed; validation is cut off the training split in several ways.
    same = found[2] == sizes[2] and sum(found) == sum(sizes)
    return data.published if score and same else None


COLUMNS = {
    "mosi": ["mae", "acc2", "f1"],
    "mosei": ["mae", "acc2", "f1"],
    "iemocap": ["accuracy", "weighted_f1"],
    "sims": ["mae", "f1"],
}
"""The columns of Table 1."""


def comparable_metric(name: str | None, metric: str) -> str:
    """Return the name of our metric that is comparable with the paper's.

    The paper has one Acc-2 and one F1. On MOSI and MOSEI its released code leaves out the samples
    of label 0; MMSA's CH-SIMS counts all.
    """
    nonzero = name in ("mosi", "mosei") and metric in ("acc2", "f1")
    return f"{metric}_nonzero" if nonzero else metric


def table_1(folders: Sequence[Path]) -> str:
    """Return Table 1: the paper's rows, and ours for data sets that `table` was run on."""
    ours: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for folder in folders:
        name, _ = read_description(folder)
        if name is None:
            raise ValueError(f"{folder} holds no data set of Table 1")
        summary = json.loads((folder / "metrics.json").read_text())
        for model in MODELS:
            if model in summary:
                scores = {metric: value["seeds"] for metric, value in summary[model].items()}
                ours.setdefault(model, {})[name] = scores
    papers = {name: published(name) for name in COLUMNS}
    for name, corrections in read_published()["table_1"].items():
        for model, values in corrections.items():
            known = papers[name].setdefault(model, {})
            known |= {m: v * (1 if m in UNITS else 0.01) for m, v in values.items()}
    columns = [(name, metric) for name, metrics in COLUMNS.items() for metric in metrics]
    rows = []
    for model in papers["mosi"]:
        cells = [papers[name].get(model, {}).get(metric) for name, metric in columns]
        texts = [
            "" if x is None else spread(m, [x]) for (_, m), x in zip(columns, cells, strict=True)
        ]
        rows.append([f"{model} (paper)", *texts])
    for model, found in ours.items():
        rows.append([model])
        for name, metric in columns:
            values = found.get(name, {}).get(comparable_metric(name, metric))
            rows[-1].append("" if values is None else spread(metric, values))
    head = ["Table 1", *(f"{name} {TITLES[metric]}" for name, metric in columns)]
    return render(head, rows, "Acc-2 and F1 of MOSI and MOSEI without the samples of label 0.")
