"""The commands on the output of `table`, `ablate` and `sensitivity`: `figures` and `table1`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from examples.decalign import figures as drawing
from examples.decalign.commands import MODELS, MODULES
from examples.decalign.report import (
    TITLES,
    UNITS,
    published,
    read_description,
    read_published,
    render,
    spread,
)
from examples.decalign.runs import Run
from examples.decalign.targets import Target

__all__ = ["figures", "table1"]

# The columns of Table 1.
COLUMNS = {
    "mosi": ["mae", "acc2", "f1"],
    "mosei": ["mae", "acc2", "f1"],
    "iemocap": ["accuracy", "weighted_f1"],
    "sims": ["mae", "f1"],
}
# The two of the paper's columns that Figure 1 plots against each other.
BUBBLES = {
    "mosi": ("acc2", "f1"),
    "mosei": ("acc2", "f1"),
    "iemocap": ("accuracy", "weighted_f1"),
    "sims": ("acc3", "f1"),
}


def figures(args: Sequence[str] | None = None) -> None:
    """Draw the paper's figures from the runs in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign figures",
        description="Draw the figures that a folder has runs for: Figure 1 (Acc-2 against F1, with "
        "the paper's rows), 3 (confusion matrices), 4 (bars of each category and the modality gap "
        "under ablation), 5 (sensitivity).",
    )
    parser.add_argument("folder", type=Path, help="the output of table, ablate or sensitivity")
    folder = parser.parse_args(args).folder
    name, target = read_description(folder)
    runs = {
        path.name: [
            Run(name=path.name, seed=int(seed.name.removeprefix("seed_")), folder=seed)
            for seed in sorted(path.glob("seed_*"))
        ]
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    runs = {key: [run for run in group if run.done] for key, group in runs.items()}
    runs = {key: group for key, group in runs.items() if group}
    drawn = [
        ("figure_1.png", "rows of the paper", _bubbles(name, runs, folder)),
        ("figure_3.png", "runs of `table`", _confusion(target, runs, folder)),
        ("figure_4.png", "runs of `ablate`", _bars(target, runs, folder)),
        ("figure_4_gap.png", "runs of `ablate`", _gap(runs, folder)),
        ("figure_5.png", "runs of `sensitivity`", _heat(folder)),
    ]
    for file, source, done in drawn:
        print(f"{folder / file}" if done else f"{file}: there are no {source}")


def _bubbles(name: str | None, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    if name is None:
        return False
    x, y = BUBBLES[name]
    points = {
        f"{model}": (row[x], row[y], row.get("mae")) for model, row in published(name).items()
    }
    ours = {}
    for model in MODELS:
        if model in runs:
            keys = {m: _comparable_metric(name, m) for m in (x, y, "mae")}
            means = {
                m: float(np.mean([run.scores[key] for run in runs[model]]))
                for m, key in keys.items()
                if key in runs[model][0].scores
            }
            ours[model] = (means[x], means[y], means.get("mae"))
    drawing.bubbles(points, ours, (TITLES[x], TITLES[y]), folder / "figure_1.png")
    return True


def _comparable_metric(name: str, metric: str) -> str:
    """Return the name of our metric that is comparable with the paper's."""
    if name in ("mosi", "mosei") and metric in ("acc2", "f1"):
        return f"{metric}_nonzero"
    return metric


def _confusion(target: Target, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    models = [model for model in MODELS if model in runs]
    if not models:
        return False
    matrices = {}
    for model in models:
        labels, predicted = _categories(target, runs[model])
        matrices[model] = (labels, predicted)
    drawing.confusion_matrices(matrices, target.categories, folder / "figure_3.png")
    return True


def _bars(target: Target, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    rows = {name: runs[name] for name in MODULES if name in runs}
    if len(rows) < 2:
        return False
    scores = {
        name: [
            drawing.category_f1(*_categories(target, [run]), len(target.categories))
            for run in group
        ]
        for name, group in rows.items()
    }
    drawing.category_bars(scores, target.categories, folder / "figure_4.png")
    return True


def _gap(runs: Mapping[str, list[Run]], folder: Path) -> bool:
    stages = {
        "no alignment": "only_mfd",
        "homogeneous alone": "no_hete",
        "heterogeneous alone": "no_homo",
        "both": "decalign",
    }
    available = {stage: runs[name][0] for stage, name in stages.items() if name in runs}
    if len(available) < 2:
        return False
    rows = {
        f"{kind} features": {stage: run.features(kind) for stage, run in available.items()}
        for kind in ("unique", "common")
    }
    drawing.modality_gap(rows, folder / "figure_4_gap.png")
    return True


def _heat(folder: Path) -> bool:
    path = folder / "sensitivity.json"
    if not path.is_file():
        return False
    drawing.sensitivity(json.loads(path.read_text()), folder / "figure_5.png")
    return True


def _categories(target: Target, group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions of all runs, as indices of categories."""
    parts = [run.predictions for run in group]
    if target.kind == "class":
        labels, predicted = (np.concatenate(x).astype(int) for x in zip(*parts, strict=True))
    else:
        labels, predicted = (
            target.category(torch.from_numpy(np.concatenate(x))).numpy()
            for x in zip(*parts, strict=True)
        )
    return labels, predicted


def table1(args: Sequence[str] | None = None) -> None:
    """Print Table 1 from the output of `table` on its data sets."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign table1",
        description="Table 1: the paper's rows, and ours for data sets that `table` was run on.",
    )
    parser.add_argument("folders", nargs="*", type=Path, help="outputs of `table`")
    print(table_1(parser.parse_args(args).folders))


def table_1(folders: Sequence[Path]) -> str:
    """Return Table 1: the paper's rows, and ours for data sets that `table` was run on."""
    file = read_published()
    names = list(COLUMNS)
    ours: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for folder in folders:
        name, _ = read_description(folder)
        if name is None:
            raise ValueError(f"{folder} holds no data set of Table 1")
        summary = json.loads((folder / "metrics.json").read_text())
        ours[name] = {
            model: {metric: value["seeds"] for metric, value in metrics.items()}
            for model, metrics in summary.items()
            if model in MODELS
        }
    papers = {name: published(name) for name in names}
    for name, corrections in file["table_1"].items():
        for model, values in corrections.items():
            known = papers[name].setdefault(model, {})
            known |= {m: v * (1 if m in UNITS else 0.01) for m, v in values.items()}
    rows = []
    for model in papers["mosi"]:
        rows.append([f"{model} (paper)"])
        for name in names:
            known = papers[name].get(model, {})
            rows[-1] += [spread(m, [known[m]]) if m in known else "" for m in COLUMNS[name]]
    for model in MODELS:
        if any(model in models for models in ours.values()):
            rows.append([model])
            for name in names:
                scores = ours.get(name, {}).get(model, {})
                for metric in COLUMNS[name]:
                    values = scores.get(_comparable_metric(name, metric))
                    rows[-1].append("" if values is None else spread(metric, values))
    head = ["Table 1", *(f"{name} {TITLES[m]}" for name in names for m in COLUMNS[name])]
    return render(head, rows, "Acc-2 and F1 of MOSI and MOSEI without the samples of label 0.")
