"""Point clouds as a transport problem, whose cost is a sum over the edges of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from multialign._samples import Samples
from multialign._validation import check_choice, check_entries, check_positive, is_integer
from multialign.costs import squared_euclidean_cost

__all__ = [
    "Cost",
    "Costs",
    "Graph",
    "check_clouds",
    "cost_table",
    "cost_tables",
    "edges_of",
    "epsilon_of",
]

Cost = Literal["sqeuclidean"] | Callable[[Tensor, Tensor], Tensor]
Graph = Literal["complete", "chain", "star", "cycle"] | Sequence[tuple[int, int]]
Costs = Mapping[tuple[int, int], Tensor]

GRAPHS = ("complete", "chain", "star", "cycle")
# The default epsilon, in standard deviations of the costs; OTT takes the same.
_RELATIVE_EPSILON = 0.05


def check_clouds(epsilon: float | None, graph: Graph, cost: Cost) -> None:
    """Raise unless these are options of a loss between clouds."""
    if not callable(cost):
        check_choice("cost", cost, ("sqeuclidean",))
    if epsilon is not None:
        check_positive("epsilon", epsilon)
    if isinstance(graph, str):
        check_choice("graph", graph, GRAPHS)
    elif not isinstance(graph, Sequence) or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_integer, pair))
        for pair in graph
    ):
        raise ValueError(f"graph must be one of {GRAPHS} or a list of pairs (i, j); got {graph!r}")


def edges_of(graph: Graph, count: int) -> list[tuple[int, int]]:
    """Return the pairs i < j between which the cost acts."""
    if graph == "complete":
        return list(combinations(range(count), 2))
    if graph == "star":
        return [(0, j) for j in range(1, count)]
    if isinstance(graph, str):
        chain = [(i, i + 1) for i in range(count - 1)]
        return [*chain, (0, count - 1)] if graph == "cycle" and count > 2 else chain
    edges = [(int(min(pair)), int(max(pair))) for pair in graph]
    for edge in edges:
        if not 0 <= edge[0] < edge[1] < count:
            raise ValueError(
                f"graph must hold pairs of different modalities in 0..{count - 1}; got {edge}"
            )
    if len(set(edges)) < len(edges):
        raise ValueError(f"graph must hold each pair once; got {list(graph)}")
    return edges


def cost_tables(samples: Samples, edges: Sequence[tuple[int, int]], cost: Cost) -> Costs:
    """Return the costs between the clouds of each edge, `(*batch, N_i, N_j)`, in float64."""
    points = [x.double() for x in samples.features]
    for i, j in edges:
        check_entries(
            math.prod(points[i].shape[:-1]) * points[j].shape[-2],
            "draw fewer points of each cloud, or solve fewer problems at once",
        )
    return {(i, j): cost_table(cost, points[i], points[j]) for i, j in edges}


def cost_table(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """Return the costs between two clouds, `(*batch, N_i, N_j)`, in float64."""
    if isinstance(cost, str):
        # A point that is infinite becomes NaN: an infinite cost would forbid its pairs.
        return squared_euclidean_cost(x + 0 * x, y + 0 * y)
    table = cost(x, y)
    expected = (*x.shape[:-1], y.shape[-2])
    if not isinstance(table, Tensor) or table.shape != expected:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"cost must return a tensor of shape {expected}; got {got}")
    return table.double()


@torch.no_grad()
def epsilon_of(epsilon: float | None, samples: Samples, costs: Costs) -> Tensor:
    """Return epsilon `(*batch)` in float64."""
    first = samples.present[0].double()
    if epsilon is not None:
        return torch.full_like(first, check_positive("epsilon", epsilon))
    # Scaled so that equal weights count 1 each, a cloud counts by its size.
    counts = [mass.double() * (mass != 0).sum(-1, keepdim=True) for mass in samples.masses]
    pairs = {(i, j): counts[i].unsqueeze(-1) * counts[j].unsqueeze(-2) for i, j in costs}
    total = sum((pairs[e].sum((-2, -1)) for e in costs), torch.zeros_like(first))
    total = torch.where(total == 0, 1.0, total)
    mean = sum(((pairs[e] * c).sum((-2, -1)) for e, c in costs.items()), torch.zeros_like(first))
    mean = (mean / total)[..., None, None]
    squares = sum(
        ((pairs[e] * (c - mean).square()).sum((-2, -1)) for e, c in costs.items()),
        torch.zeros_like(first),
    )
    level = _RELATIVE_EPSILON * (squares / total).sqrt()
    # Costs that are all alike have one solution whatever epsilon is.
    fallback = _RELATIVE_EPSILON * mean.squeeze(-1).squeeze(-1)
    level = torch.where(level == 0, fallback, level)
    return torch.where(level == 0, 1.0, level)
