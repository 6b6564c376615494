"""Figures: the confusion matrix, and the gap between two modalities before and after alignment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE

__all__ = ["confusion_matrix", "modality_gap"]

Array = NDArray[np.floating]

STYLE = {
    "font.family": "serif",
    "mathtext.fontset": "dejavuserif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.linewidth": 0.6,
    "savefig.dpi": 200,
}
# Told apart in grey and by the colour-blind.
COLOURS = ("#0072B2", "#E69F00")
SHOWN_PAIRS = 200


def confusion_matrix(
    targets: NDArray[np.int64], predictions: NDArray[np.int64], path: Path
) -> None:
    """Draw true against predicted classes, in per cent of each true class."""
    classes = np.union1d(targets, predictions)
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (np.searchsorted(classes, targets), np.searchsorted(classes, predictions)), 1)
    rates = 100 * counts / counts.sum(1, keepdims=True).clip(1)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.0), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(rates, cmap="Blues", vmin=0, vmax=100)
        for row, column in zip(*np.nonzero(rates), strict=True):
            rate = rates[row, column]
            axes.text(
                column,
                row,
                f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if rate > 50 else "black",
            )
        ticks = range(len(classes))
        axes.set(
            xticks=ticks,
            yticks=ticks,
            xticklabels=classes,
            yticklabels=classes,
            xlabel="predicted digit",
            ylabel="true digit",
        )
        accuracy = 100 * np.mean(targets == predictions)
        axes.set_title(f"DecAlign, test split, all seeds: accuracy {accuracy:.1f} %")
        bar = figure.colorbar(image, ax=axes, shrink=0.9)
        bar.set_label("% of the true class")
        bar.outline.set_linewidth(0.6)
        _save(figure, path)


def modality_gap(rows: Mapping[str, Mapping[str, Mapping[str, Array]]], path: Path) -> None:
    """Draw paired t-SNE maps of the first two modalities, lines joining the pairs.

    Each map is one t-SNE of both modalities together. The numbers under it are measured in the
    feature space, since distances in a map mean little: the distance between the modalities'
    centres over the spread around them, and the mean distance in a pair over that between samples
    that are no pair.

    Args:
        rows: For each kind of features and each stage, which becomes a column, the features
            `(N, D)` by modality.
        path: The PNG to write.
    """
    columns = list(dict.fromkeys(stage for stages in rows.values() for stage in stages))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(columns), 2.75 * len(rows) + 0.3), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for axes, stage in zip(grid[0], columns, strict=True):
            axes.set_title(stage)
        for row, (kind, stages) in zip(grid, rows.items(), strict=True):
            row[0].set_ylabel(kind)
            for axes, stage in zip(row, columns, strict=True):
                axes.set(xticks=[], yticks=[])
                if stage in stages:
                    names = list(stages[stage])[:2]
                    x, y = (stages[stage][name] for name in names)
                    _draw_pairs(axes, x[:SHOWN_PAIRS], y[:SHOWN_PAIRS], names)
                    axes.set_xlabel(
                        f"gap {centre_gap(x, y):.2f},  pair distance {pair_ratio(x, y):.2f}"
                    )
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        _save(figure, path)


def centre_gap(x: Array, y: Array) -> float:
    """Return the distance of the two centres over the root mean square distance from them."""
    spread = np.sqrt((x.var(0).sum() + y.var(0).sum()) / 2)
    return float(np.linalg.norm(x.mean(0) - y.mean(0)) / max(spread, 1e-12))


def pair_ratio(x: Array, y: Array) -> float:
    """Return the mean distance within a pair over that between samples of different pairs."""
    distances = np.linalg.norm(x[:, None] - y[None], axis=-1)
    count = len(x)
    within = np.trace(distances) / count
    across = (distances.sum() - np.trace(distances)) / max(count * (count - 1), 1)
    return float(within / max(across, 1e-12))


def _draw_pairs(axes: Axes, x: Array, y: Array, names: list[str]) -> None:
    points = np.concatenate([x, y])
    tsne = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0)
    first, second = np.split(tsne.fit_transform(points), 2)
    axes.add_collection(
        LineCollection(
            np.stack([first, second], 1), colors="0.6", linewidths=0.35, alpha=0.6, zorder=1
        )
    )
    for place, name, colour, marker in zip((first, second), names, COLOURS, "o^", strict=True):
        axes.scatter(*place.T, s=9, c=colour, marker=marker, linewidths=0, label=name, zorder=2)
    axes.margins(0.04)


def _save(figure: Figure, path: Path) -> None:
    """Write without pyplot, which would ask for a display and keep the figure."""
    FigureCanvasAgg(figure)
    figure.savefig(path)
