"""The drawings of Figures 1, 3, 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix as skl_confusion
from sklearn.metrics import f1_score

__all__ = [
    "bubbles",
    "category_bars",
    "category_f1",
    "confusion_matrices",
    "modality_gap",
    "sensitivity",
]

Array = NDArray[np.floating]

STYLE = {
    "font.family": "serif",
    "mathtext.fontset": "dejavuserif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.linewidth": 0.6,
    "savefig.dpi": 200,
}
# The colours differ in greyscale and for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00")
SHOWN_PAIRS = 200


def confusion_matrices(
    models: Mapping[str, tuple[Array, Array]], categories: Sequence[str], path: Path
) -> None:
    """Draw the confusion matrix of each model, in per cent of each true category.

    Args:
        models: Labels and predictions by model, both as indices of `categories`.
        categories: The names of the categories.
        path: The PNG to write.
    """
    count = len(categories)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 3.6 * len(models), 4.0), layout="constrained")
        grid = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (model, (labels, predicted)) in zip(grid, models.items(), strict=True):
            counts = skl_confusion(labels, predicted, labels=range(count))
            rates = 100 * counts / counts.sum(1, keepdims=True).clip(1)
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
            axes.set(
                xticks=range(count),
                yticks=range(count),
                xticklabels=categories,
                yticklabels=categories,
                xlabel="predicted",
            )
            long = max(map(len, categories)) > 3
            axes.tick_params(axis="x", rotation=45 if long else 0)
            accuracy = 100 * np.mean(labels == predicted)
            axes.set_title(f"{model}: {accuracy:.1f} % correct")
        figure.suptitle("Predicted against true categories, test split, all seeds")
        grid[0].set_ylabel("true")
        bar = figure.colorbar(image, ax=grid, shrink=0.9)
        bar.set_label("% of the true category")
        bar.outline.set_linewidth(0.6)
        _save(figure, path)


def category_f1(labels: Array, predicted: Array, count: int) -> Array:
    """Return the F1 of each category; 0 for one that occurs in neither labels nor predictions."""
    return np.asarray(
        f1_score(labels, predicted, labels=range(count), average=None, zero_division=0)
    )


def category_bars(
    scores: Mapping[str, Sequence[Array]], categories: Sequence[str], path: Path
) -> None:
    """Draw each category's F1 under ablation: mean and deviation over seeds.

    Args:
        scores: For each model, an array of the categories' F1 for each seed.
        categories: The names of the categories.
        path: The PNG to write.
    """
    width = 0.8 / len(scores)
    places = np.arange(len(categories))
    shades = mpl.colormaps["viridis"](np.linspace(0.05, 0.9, len(scores)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(1.5 + 0.85 * len(categories), 6.4), 3.4), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(scores.items()):
            table = 100 * np.stack(values)
            axes.bar(
                places + (number - (len(scores) - 1) / 2) * width,
                table.mean(0),
                width,
                yerr=table.std(0, ddof=1) if len(table) > 1 else None,
                error_kw={"linewidth": 0.6},
                color=shades[number],
                label=name,
            )
        axes.set(xticks=places, xticklabels=categories, ylabel="F1 of the category, %")
        axes.set_xlabel("category")
        seeds = max(map(len, scores.values()))
        bars = f"mean and deviation over {seeds} seeds" if seeds > 1 else "one seed"
        axes.set_title(f"F1 of each category on the test split, {bars}")
        lowest = min(100 * np.stack(v).mean(0).min() for v in scores.values())
        axes.set_ylim(bottom=0)
        if lowest > 60:
            # The axis does not start at 0; its label says so.
            axes.set_ylim(np.floor(lowest / 10) * 10 - 5, 100)
            axes.set_ylabel("F1 of the category, % (axis cut)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="outside upper center", ncols=min(len(scores), 3), frameon=False, fontsize=8
        )
        _save(figure, path)


def bubbles(
    paper: Mapping[str, tuple[float, float, float | None]],
    ours: Mapping[str, tuple[float, float, float | None]],
    titles: tuple[str, str],
    data: str,
    path: Path,
) -> None:
    """Draw two metrics against each other; the larger a bubble, the smaller the model's MAE.

    Args:
        paper: The published rows: both metrics, and the mean absolute error or None.
        ours: The rows trained here, in the same form.
        titles: The names of the two metrics.
        data: The name of the data set.
        path: The PNG to write.
    """
    points = [
        (100 * x, 100 * y, error, name, colour)
        for rows, colour in ((paper, COLOURS[0]), (ours, COLOURS[1]))
        for name, (x, y, error) in rows.items()
    ]
    points.sort(key=lambda point: point[1])
    errors = [error for _, _, error, _, _ in points if error is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.subplots()
        for x, y, error, _, colour in points:
            share = 0.5 if error is None else (max(errors) - error) / max(np.ptp(errors), 1e-9)
            axes.scatter(
                x, y, s=30 + 220 * share, c=colour, alpha=0.6, linewidths=0.6, edgecolors="black"
            )
        for colour, label in zip(COLOURS, ("as published", "trained here"), strict=True):
            axes.scatter([], [], c=colour, label=label, linewidths=0.6, edgecolors="black")
        axes.margins(0.08)
        # The names are in a column, in the order of the points, each joined to its point by a line.
        for place, (x, y, _, name, _) in zip(
            np.linspace(0.02, 0.98, len(points)), points, strict=True
        ):
            axes.annotate(
                name,
                (x, y),
                xytext=(1.04, place),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops={
                    "arrowstyle": "-",
                    "linewidth": 0.4,
                    "color": "0.5",
                    "relpos": (0, 0.5),
                },
            )
        axes.set(xlabel=f"{titles[0]}, %", ylabel=f"{titles[1]}, %")
        axes.set_title(f"{data.upper()}, test split; larger bubbles have a smaller error")
        axes.legend(frameon=False, loc="upper left")
        _save(figure, path)


def sensitivity(result: Mapping[str, Any], path: Path) -> None:
    """Draw a score over the grid of alpha and beta, the mean over seeds.

    Args:
        result: The output of the command `sensitivity`.
        path: The PNG to write.
    """
    values = 100 * np.asarray(result["values"])
    means = values.mean(-1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(means, cmap="Blues", origin="lower")
        middle = (means.min() + means.max()) / 2
        for row, column in np.ndindex(means.shape):
            text = f"{means[row, column]:.1f}"
            if values.shape[-1] > 1:
                text += f"\n±{values[row, column].std(ddof=1):.1f}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if means[row, column] > middle else "black",
            )
        axes.set(
            xticks=range(len(result["betas"])),
            yticks=range(len(result["alphas"])),
            xticklabels=result["betas"],
            yticklabels=result["alphas"],
            xlabel=r"$\beta$ (homogeneous)",
            ylabel=r"$\alpha$ (heterogeneous)",
        )
        seeds = len(result["seeds"])
        axes.set_title(f"Sensitivity to the weights of alignment, {seeds} seed{'s' * (seeds > 1)}")
        bar = figure.colorbar(image, ax=axes, shrink=0.9)
        bar.set_label(f"{result['metric']}, %")
        bar.outline.set_linewidth(0.6)
        _save(figure, path)


def modality_gap(
    rows: Mapping[str, Mapping[str, Mapping[str, Array]]],
    path: Path,
    pair: Sequence[str] | None = None,
) -> None:
    """Draw t-SNE maps of two modalities, with lines between the pairs.

    Each map is one t-SNE of both modalities together. The two numbers under it are measured in the
    feature space, since distances in a map mean little: the distance between the modalities'
    centres divided by the spread around them, and the mean distance within pairs divided by that
    between samples of different pairs.

    Args:
        rows: The features `(N, D)` by modality, for each kind of features (a row) and each stage
            (a column).
        path: The PNG to write.
        pair: The two modalities; by default text and vision, as in the paper, or the first two.
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
                    known = list(stages[stage])
                    names = list(pair) if pair else _two_modalities(known)
                    if not set(names) <= set(known):
                        raise ValueError(f"pair must be among {known}; got {names}")
                    x, y = (stages[stage][name] for name in names)
                    _draw_pairs(axes, x[:SHOWN_PAIRS], y[:SHOWN_PAIRS], names)
                    axes.set_xlabel(
                        f"gap {centre_gap(x, y):.2f},  pair distance {pair_ratio(x, y):.2f}"
                    )
        figure.suptitle(
            f"t-SNE of {names[0]} and {names[1]}; a line joins the features of one test sample.\n"
            "gap: distance of the centres / spread; pair distance: within pairs / across pairs"
        )
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        _save(figure, path)


def centre_gap(x: Array, y: Array) -> float:
    """Return the distance of the centres divided by the root mean square distance from them."""
    spread = np.sqrt((x.var(0).sum() + y.var(0).sum()) / 2)
    return float(np.linalg.norm(x.mean(0) - y.mean(0)) / max(spread, 1e-12))


def pair_ratio(x: Array, y: Array) -> float:
    """Return the mean distance within pairs divided by that between samples of different pairs."""
    distances = np.linalg.norm(x[:, None] - y[None], axis=-1)
    count = len(x)
    within = np.trace(distances) / count
    across = (distances.sum() - np.trace(distances)) / max(count * (count - 1), 1)
    return float(within / max(across, 1e-12))


def _two_modalities(names: list[str]) -> list[str]:
    """Return language and vision, as in the paper, or the first two."""
    return ["text", "vision"] if {"text", "vision"} <= set(names) else names[:2]


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
    """Write a figure without pyplot, which would need a display and keep the figure."""
    FigureCanvasAgg(figure)
    figure.savefig(path)
