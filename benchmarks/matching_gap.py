"""The matching gap, HSIC and the energy distance beside what one would use without them.

The matching gap stands beside the same formula put together from other public names, and beside
InfoNCE over all pairs of views; the energy distance beside geomloss; HSIC beside its definition.

``python -m benchmarks.matching_gap`` takes some minutes on one core.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import geomloss
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks import harness
from benchmarks.harness import Row
from multialign import (
    hsic_loss,
    matching_gap_loss,
    mmd_loss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    squared_euclidean_cost,
)

Loss = Callable[[list[Tensor]], Tensor]

GEOMLOSS = f"geomloss {importlib.metadata.version('geomloss')} (tensorized)"
REPETITIONS = 9


def views(modalities: int, count: int, dim: int = 64, noise: float = 1.0) -> list[Tensor]:
    """Return views of the same samples, each with noise of its own, on the unit sphere."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, dim, generator=generator)
    noisy = (base + noise * torch.randn(count, dim, generator=generator) for _ in range(modalities))
    return [normalize(x, dim=1).requires_grad_() for x in noisy]


def step(loss: Loss, x: list[Tensor]) -> Tensor:
    """Run forward and backward; return the loss."""
    value = loss(x)
    torch.autograd.grad(value, x)
    return value.detach()


def gap(x: list[Tensor], epsilon: float, graph: str) -> Tensor:
    """Return the matching gap."""
    return matching_gap_loss(x, epsilon=epsilon, graph=graph)


def edges(graph: str, count: int) -> list[tuple[int, int]]:
    """Return the pairs of views with a cost."""
    every = list(combinations(range(count), 2))
    return every if graph == "complete" else [(i, i + 1) for i in range(count - 1)]


def by_solver(x: list[Tensor], epsilon: float, graph: str) -> Tensor:
    """Return the gap from `multi_marginal_sinkhorn`, at the same tolerance."""
    count = len(x[0])
    costs = {(i, j): squared_euclidean_cost(x[i], x[j]) for i, j in edges(graph, len(x))}
    solution = multi_marginal_sinkhorn(costs, [x[0].new_ones(count)] * len(x), epsilon)
    matched = sum(cost.diagonal().mean() for cost in costs.values())
    return matched - epsilon * math.log(count) - solution.value


def by_divergence(x: list[Tensor], epsilon: float, graph: str) -> Tensor:
    """Return the gap from `multi_marginal_sinkhorn_loss`, at its own tolerance of 1e-6."""
    pairs = edges(graph, len(x))
    matched = sum((x[i] - x[j]).square().sum(1).mean() for i, j in pairs)
    optimum = multi_marginal_sinkhorn_loss(x, epsilon=epsilon, graph=graph, debias=False)
    return matched - epsilon * math.log(len(x[0])) - optimum


def info_nce(x: list[Tensor], epsilon: float, graph: str) -> Tensor:
    """Return InfoNCE over the same pairs of views, in both directions."""
    partners = torch.arange(len(x[0]))
    total = x[0].new_zeros(())
    for i, j in edges(graph, len(x)):
        scores = 2 / epsilon * x[i] @ x[j].mT
        total = total + cross_entropy(scores, partners) + cross_entropy(scores.mT, partners)
    return total


def prepare(loss: Loss, modalities: int, count: int) -> Callable[[], Tensor]:
    """Return a step, after one on fewer rows that loads all code."""
    step(loss, views(modalities, 200))
    return partial(step, loss, views(modalities, count))


def rows_of(
    case: str, size: str, losses: dict[str, Loss], x: list[Tensor], peaks: bool
) -> list[Row]:
    """Measure losses on the same features; the error is relative to the first one in float64."""
    exact = next(iter(losses.values()))([f.detach().double() for f in x]).item()
    times = harness.alternate(
        {name: partial(step, loss, x) for name, loss in losses.items()}, REPETITIONS
    )
    return [
        Row(
            case=case,
            size=size,
            provider=name,
            **harness.quantiles(times[name]),
            peak_mib=harness.peak_mib(prepare, loss, len(x), len(x[0])) if peaks else math.nan,
            error=math.nan if "InfoNCE" in name else abs(loss(x).item() - exact) / abs(exact),
        )
        for name, loss in losses.items()
    ]


def gap_rows() -> list[Row]:
    """Measure three views of 128 rows, and a chain of four views of 1,024."""
    rows = []
    providers = {
        "multialign": gap,
        "by multi_marginal_sinkhorn": by_solver,
        "by multi_marginal_sinkhorn_loss": by_divergence,
        "InfoNCE of all pairs": info_nce,
    }
    for temperature in (0.05, 0.1, 0.2, 0.5):
        losses = {
            name: partial(loss, epsilon=2 * temperature, graph="complete")
            for name, loss in providers.items()
        }
        size = f"M = 3, N = 128, D = 64, temperature {temperature}"
        rows += rows_of("matching gap, complete", size, losses, views(3, 128), False)
    chain = {
        name: partial(providers[name], epsilon=0.2, graph="chain")
        for name in ("multialign", "by multi_marginal_sinkhorn", "InfoNCE of all pairs")
    }
    size = "M = 4, N = 1024, D = 64, temperature 0.1"
    return rows + rows_of("matching gap, chain", size, chain, views(4, 1024), True)


def by_definition(x: list[Tensor]) -> Tensor:
    """Return HSIC as tr(KHLH) / N^2, of matrices that are held."""
    count = len(x[0])
    centre = torch.eye(count, dtype=x[0].dtype) - 1 / count
    k, h = (torch.exp(-torch.cdist(f, f).square() / 2) for f in x)
    return (k @ centre * (h @ centre).mT).sum() / count**2


def kernel_rows() -> list[Row]:
    """Measure HSIC and the energy distance of two sets."""
    rows = []
    for count in (200, 2000):
        size = f"N = {count}, D = 64"
        losses: dict[str, Loss] = {
            "multialign": lambda x: hsic_loss([x[0]], [x[1]], bandwidth=1.0),
            "tr(KHLH) / N^2 in torch": by_definition,
        }
        rows += rows_of("HSIC", size, losses, views(2, count), False)
        energy: dict[str, Loss] = {
            "multialign": lambda x: mmd_loss(x, kernel="energy"),
            GEOMLOSS: lambda x: 2 * geomloss.SamplesLoss("energy", backend="tensorized")(*x),
        }
        rows += rows_of("energy distance", size, energy, views(2, count), False)
    return rows


def main() -> None:
    """Measure, print the rows and write them."""
    torch.set_num_threads(1)
    rows = gap_rows() + kernel_rows()
    for row in rows:
        harness.show(row)
    harness.write("matching_gap", rows)


if __name__ == "__main__":
    main()
