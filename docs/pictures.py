"""The pictures of the losses and of the benchmark, as SVG for light and dark pages.

``python docs/pictures.py`` writes the README's pictures into ``docs/_static``; every build of the
documentation draws its own.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from multialign import (
    MultiMarginalSinkhornLoss,
    PrototypeAlignmentLoss,
    cosine_decoupling_loss,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "distribution_matching.csv"
TRANSPORT = RESULTS.with_name("transport.csv")
BLUE, ORANGE, GREEN, GREY = "#2a85c7", "#e69f00", "#1a9e77", "#888888"
STYLE = {
    "svg.hashsalt": "multialign",  # the same picture gives the same file
    "svg.fonttype": "path",
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def decoupling(axes: Axes) -> None:
    """Draw the unique features of some samples before and after gradient descent on the loss."""
    torch.manual_seed(0)
    angles = torch.linspace(0.25, 1.2, 5)
    common = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    unique = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    before = unique.detach().clone()
    for _ in range(400):
        (gradient,) = torch.autograd.grad(cosine_decoupling_loss([unique], [common]), unique)
        unique = torch.nn.functional.normalize(unique - 0.1 * gradient, dim=1)
        unique = unique.detach().requires_grad_()
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "lw": 1.3}
    for vector in before:
        axes.annotate(
            "", vector.tolist(), (0, 0), arrowprops={**arrow, "color": ORANGE, "alpha": 0.35}
        )
    axes.annotate("", (1.1, 0), (0, 0), arrowprops={**arrow, "color": BLUE, "lw": 2})
    axes.annotate("", (0, 1.1), (0, 0), arrowprops={**arrow, "color": ORANGE, "lw": 2})
    turn = torch.linspace(0.8, 1.4, 30)
    axes.plot(1.12 * turn.cos(), 1.12 * turn.sin(), c=GREY, lw=1)
    start, end = ([1.12 * math.cos(t), 1.12 * math.sin(t)] for t in (1.4, 1.45))
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1})
    axes.plot([0.14, 0.14, 0], [0, 0.14, 0.14], c=GREY, lw=1)
    axes.text(1.1, -0.16, "common", color=BLUE, ha="right")
    axes.text(-0.07, 0.62, "unique", color=ORANGE, ha="right", va="center", rotation=90)
    axes.set(xlim=(-0.3, 1.35), ylim=(-0.3, 1.35))


def ellipse(axes: Axes, mean: Tensor, covariance: Tensor, colour: str, **style: object) -> None:
    """Draw the ellipse of two standard deviations."""
    values, vectors = torch.linalg.eigh(covariance)
    angle = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
    width, height = (4 * values.flip(0).sqrt()).tolist()
    style = {"lw": 1.5, "fill": False, **style}
    axes.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, color=colour, **style))


def moments(axes: Axes) -> None:
    """Draw mean and spread of two clouds."""
    torch.manual_seed(1)
    first = torch.randn(60, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.5]]) + torch.tensor([-1.1, -0.5])
    second = torch.randn(60, 2) @ torch.tensor([[0.5, 0.0], [-0.5, 1.0]]) + torch.tensor([1.3, 0.7])
    for x, colour in ((first, BLUE), (second, ORANGE)):
        axes.scatter(*x.mT, s=5, c=colour, lw=0, alpha=0.5)
        ellipse(axes, x.mean(0), torch.cov(x.mT), colour)
    arrow = {"arrowstyle": "<|-|>", "color": GREY, "lw": 1.3}
    axes.annotate("", first.mean(0).tolist(), second.mean(0).tolist(), arrowprops=arrow)
    axes.set(xlim=(-4, 4), ylim=(-4, 4))


def mmd(axes: Axes) -> None:
    """Draw the witness function, the difference of the two clouds' kernel densities."""
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(100, 1)
    ring = torch.cat([angle.cos(), angle.sin()], 1) * 1.6 + 0.15 * torch.randn(100, 2)
    cloud = 1.1 * torch.randn(100, 2)
    line = torch.linspace(-3, 3, 120)
    grid = torch.cartesian_prod(line, line)

    def embedding(x: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(grid, x) ** 2) / (2 * 0.5**2)).mean(1).reshape(120, 120)

    witness = (embedding(ring) - embedding(cloud)).mT
    levels = torch.linspace(0.02, float(witness.abs().max()), 5)
    for sign, colour in ((1, BLUE), (-1, ORANGE)):
        axes.contourf(line, line, sign * witness, levels=levels, colors=[colour], alpha=0.18)
        axes.contour(line, line, sign * witness, levels=levels, colors=[colour], linewidths=0.4)
    for x, colour in ((ring, BLUE), (cloud, ORANGE)):
        axes.scatter(*x.mT, s=5, c=colour, lw=0)
    axes.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3))


def prototypes(axes: Axes) -> None:
    """Draw the mixtures of two clouds and the plan between their components."""
    torch.manual_seed(3)
    centres = torch.tensor([[-1.6, -1.2], [0.2, 1.6], [1.7, -0.9]])
    groups = torch.randint(3, (90,))
    first = centres[groups] + 0.32 * torch.randn(90, 2) + torch.tensor([-0.55, 0.45])
    second = centres[groups] * 0.85 + 0.32 * torch.randn(90, 2) + torch.tensor([0.55, -0.5])
    parts = PrototypeAlignmentLoss(3, covariance_type="full", epsilon=0.05).solve([first, second])
    for x, mixture, colour in zip((first, second), parts.mixtures, (BLUE, ORANGE), strict=True):
        axes.scatter(*x.mT, s=5, c=colour, lw=0, alpha=0.45)
        for mean, covariance in zip(mixture.means, mixture.covariances, strict=True):
            ellipse(axes, mean, covariance, colour)
    plan = parts.solution.pairwise_marginal(0, 1)
    starts, ends = (mixture.means for mixture in parts.mixtures)
    for (k, m), mass in zip(
        torch.cartesian_prod(*[torch.arange(3)] * 2), plan.flatten(), strict=True
    ):
        line = torch.stack([starts[k], ends[m]])
        axes.plot(*line.mT, c=GREY, lw=7 * float(mass), solid_capstyle="round")
    axes.set(xlim=(-3.4, 3.4), ylim=(-3.2, 3.6))


def sinkhorn(axes: Axes) -> None:
    """Draw three clouds, and for each point of the first the triple with most of its mass."""
    torch.manual_seed(2)
    base = 0.75 * torch.randn(26, 2)
    shifts = ((-1.7, -1.0), (1.7, -1.0), (0.0, 1.9))
    clouds = [base[torch.randperm(26)] + 0.1 * torch.randn(26, 2) + torch.tensor(s) for s in shifts]
    plan = MultiMarginalSinkhornLoss(epsilon=0.05).solve(clouds).plan()
    for k, table in enumerate(plan):
        m, n = divmod(int(table.argmax()), table.shape[1])
        corners = torch.stack([clouds[0][k], clouds[1][m], clouds[2][n], clouds[0][k]])
        axes.plot(*corners.mT, c=GREY, lw=0.6, alpha=0.7)
    for x, colour in zip(clouds, (BLUE, ORANGE, GREEN), strict=True):
        axes.scatter(*x.mT, s=11, c=colour, lw=0, zorder=3)
    axes.set(xlim=(-3.6, 3.6), ylim=(-3.0, 4.2))


PICTURES: Mapping[str, tuple[str, Callable[[Axes], None]]] = {
    "decoupling": ("CosineDecoupling", decoupling),
    "moments": ("GaussianMoment", moments),
    "mmd": ("MMD", mmd),
    "prototypes": ("PrototypeAlignment", prototypes),
    "sinkhorn": ("MultiMarginalSinkhorn", sinkhorn),
}


def bare(axes: Axes) -> None:
    """Remove ticks and spines."""
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def overview() -> Figure:
    """Return one picture of all losses."""
    figure = Figure(figsize=(9.6, 2.15), layout="constrained")
    for axes, (name, draw) in zip(figure.subplots(1, 5), PICTURES.values(), strict=True):
        draw(axes)
        bare(axes)
        axes.set_title(f"{name}Loss", fontsize=8.5, color=GREY)
    return figure


def single(draw: Callable[[Axes], None]) -> Figure:
    """Return the picture of one loss."""
    figure = Figure(figsize=(2.2, 2.2), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    bare(axes)
    return figure


def benchmark() -> Figure:
    """Return time and memory of MMD over the number of samples, from the recorded table."""
    with RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"].startswith("mmd")]
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, label in zip(
        panels, ("milliseconds", "peak_mib"), ("time (ms)", "peak memory (MiB)"), strict=True
    ):
        for provider, colour in (("multialign", BLUE), ("geomloss", ORANGE)):
            ours = [row for row in rows if row["provider"].startswith(provider)]
            sizes = [int(row["size"].split(",")[0].removeprefix("N = ")) for row in ours]
            heights = [float(row[column]) for row in ours]
            shown = [(n, h) for n, h in zip(sizes, heights, strict=True) if h > 0.1]
            name = ours[0]["provider"].split(" (")[0]
            axes.plot(*zip(*shown, strict=True), "o-", c=colour, ms=4, lw=1.5, label=name)
        axes.set(xscale="log", yscale="log", xlabel="samples in each of two clouds", ylabel=label)
    panels[0].legend(labelcolor=GREY)
    return figure


def transport_benchmark() -> Figure:
    """Return time and memory of transport over the number of atoms, from the recorded table."""
    with TRANSPORT.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, label in zip(
        panels, ("milliseconds", "peak_mib"), ("time (ms)", "peak memory (MiB)"), strict=True
    ):
        for provider, colour in (("multialign", BLUE), ("OTT-JAX", ORANGE)):
            points = []
            for row in rows:
                size = row["size"].removeprefix("complete, M = 3, ")
                wanted = row["case"].startswith(
                    ("three marginals, complete graph, float32", "float32")
                )
                if wanted and row["provider"].startswith(provider) and size.startswith("K = "):
                    points.append((int(size.removeprefix("K = ")), float(row[column])))
            shown = sorted(point for point in points if point[1] > 0.1)
            axes.plot(*zip(*shown, strict=True), "o-", c=colour, ms=4, lw=1.5, label=provider)
        axes.set(
            xscale="log", yscale="log", xlabel="atoms of each of three marginals", ylabel=label
        )
    panels[0].legend(labelcolor=GREY)
    return figure


def save(figure: Figure, path: Path, description: str = "") -> None:
    """Write a figure without background or date, so that equal figures give equal files."""
    metadata = {"Date": None, "Creator": None, "Description": description or None}
    figure.savefig(path, transparent=True, metadata=metadata)


def write_pictures(folder: Path) -> None:
    """Write the picture of each loss."""
    with mpl.rc_context(STYLE):
        for name, (_, draw) in PICTURES.items():
            save(single(draw), folder / f"{name}.svg")


def write_readme_pictures(folder: Path) -> None:
    """Write the README's pictures; those of benchmarks contain the hash of their table."""
    with mpl.rc_context(STYLE):
        save(overview(), folder / "overview.svg")
        for name, draw, table in (
            ("benchmark", benchmark, RESULTS),
            ("transport", transport_benchmark, TRANSPORT),
        ):
            digest = hashlib.sha256(table.read_bytes()).hexdigest()
            save(draw(), folder / f"{name}.svg", f"sha256 of the recorded table: {digest}")


if __name__ == "__main__":
    write_readme_pictures(ROOT / "docs" / "_static")
