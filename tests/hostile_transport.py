"""Hostile problems for the transport solver itself, and what has to hold for its solutions."""

import itertools
import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from multialign import ConvergenceWarning, TransportSolution, multi_marginal_sinkhorn
from tests.hostile import state_unchanged

COSTS = ("uniform", "square", "constant", "zero", "unary", "huge entry", "integer", "scales")
MASSES = ("equal", "uniform", "zeros", "wide", "none", "one", "peaked")


@dataclass
class Problem:
    """Arguments of the solver."""

    recipe: dict[str, Any]
    costs: dict[tuple[int, ...], torch.Tensor]
    marginals: list[torch.Tensor]
    epsilon: float | torch.Tensor

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Everything that requires a gradient."""
        inputs = [*self.costs.values(), *self.marginals]
        return [*inputs, self.epsilon] if isinstance(self.epsilon, torch.Tensor) else inputs


def draw_problem(seed: int) -> Problem:
    """Draw the problem of a number."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = rng.choice([2, 2, 3, 3, 4, 5])
    limit = {2: 60, 3: 30, 4: 10, 5: 6}[count]
    recipe = {
        "seed": seed,
        "sizes": [rng.choice([1, 2, 3, rng.randint(1, limit)]) for _ in range(count)],
        "batch": rng.choice([(), (), (3,), (2, 1)]),
        "dtype": rng.choice([torch.float32, torch.float64]),
        "unit": 10.0 ** rng.choice([0, 0, rng.randint(-15, 15)]),
        "cost": rng.choice(COSTS),
        "graph": rng.choice(["complete", "chain", "star", "cycle", "one edge", "tensor"]),
        "masses": [rng.choice(MASSES) for _ in range(count)],
        "epsilon": 10.0 ** rng.choice([0, -1, -2, -3, -4, -6, 2, 6]),
        "method": rng.choice(["newton", "auto", "sinkhorn"]),
    }
    edges = _edges(recipe["graph"], count)
    costs = {
        edge: _cost(recipe, [recipe["sizes"][p] for p in edge], generator).requires_grad_()
        for edge in edges
    }
    marginals = [
        _masses(kind, (*recipe["batch"], size), generator).to(recipe["dtype"]).requires_grad_()
        for kind, size in zip(recipe["masses"], recipe["sizes"])
    ]
    epsilon = recipe["epsilon"] * recipe["unit"]
    if rng.random() < 0.3:
        epsilon = torch.full(recipe["batch"], epsilon, dtype=torch.float64).requires_grad_()
    return Problem(recipe, costs, marginals, epsilon)


def solve(problem: Problem) -> TransportSolution:
    """Check that the solution is finite and honest, and its gradients finite."""
    costs, marginals = problem.costs, problem.marginals
    sweeps = problem.recipe["method"] == "sinkhorn"
    before = [x.detach().clone() for x in problem.inputs]
    with state_unchanged(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = multi_marginal_sinkhorn(
            costs.get(tuple(range(len(marginals))), costs) if len(costs) == 1 else costs,
            marginals,
            problem.epsilon,
            method=problem.recipe["method"],
            max_iterations=200 if sweeps else 2000,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, problem.inputs))
    assert solution.value.isfinite().all(), f"value {solution.value}"
    assert solution.error.isfinite().all(), f"error {solution.error}"
    last = len(marginals) - 1
    results = {
        "value": solution.value,
        "transport cost": solution.transport_cost,
        "marginals": torch.cat([solution.marginal(p) for p in range(last + 1)], -1),
        "pairwise marginal": solution.pairwise_marginal(0, last),
    }
    for p, marginal in enumerate(marginals):
        mass = marginal.detach().double()
        total = mass.sum(-1, keepdim=True)
        wanted = mass / torch.where(total == 0, 1.0, total)
        error = (solution.marginal(p).detach() - wanted).abs().sum(-1)
        counted = solution.converged & (total.squeeze(-1) > 0)
        assert (error[counted] <= 2e-4).all(), f"marginal {p} of a converged solution"
        potential = solution.potentials[p].detach()
        assert (potential.isfinite() | (mass == 0)).all(), f"potential {p}"
    for name, result in results.items():
        assert result.isfinite().all(), f"{name}: {result}"
        grads = torch.autograd.grad(
            result.sum() if name == "value" else result.square().sum(),
            problem.inputs,
            allow_unused=True,
            retain_graph=True,
        )
        if problem.recipe["dtype"] == torch.float64:  # of float32, small masses leave the range
            for n, grad in enumerate(grads):
                assert grad is None or grad.isfinite().all(), f"gradient of {name} by input {n}"
    return solution


def _edges(graph: str, count: int) -> list[tuple[int, ...]]:
    chain = [(i, i + 1) for i in range(count - 1)]
    return {
        "complete": list(itertools.combinations(range(count), 2)),
        "chain": chain,
        "star": [(0, j) for j in range(1, count)],
        "cycle": [*chain, (0, count - 1)] if count > 2 else chain,
        "one edge": [(0, count - 1)],
        "tensor": [tuple(range(count))],
    }[graph]


def _cost(recipe: dict[str, Any], sizes: list[int], rng: torch.Generator) -> torch.Tensor:
    kind, shape = recipe["cost"], (*recipe["batch"], *sizes)
    cost = torch.rand(shape, generator=rng, dtype=torch.float64)
    if kind == "square":
        cost = 10 * cost.square()
    if kind == "constant":
        cost = torch.full_like(cost, -5.0)
    if kind == "zero":
        cost = torch.zeros_like(cost)
    if kind == "unary":
        cost = 50 * cost[..., :1].expand(shape).clone()
    if kind == "huge entry":
        cost.view(-1)[0] = 1e6
    if kind == "integer":
        cost = (3 * cost).round()
    if kind == "scales":
        cost = cost * 10.0 ** torch.randint(-6, 4, shape, generator=rng)
    return (recipe["unit"] * cost).to(recipe["dtype"])


def _masses(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    mass = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.01
    if kind == "equal":
        mass = torch.ones_like(mass)
    if kind == "zeros":
        mass = torch.where(torch.rand(shape, generator=rng) < 0.4, 0.0, mass)
    if kind == "wide":
        mass = mass * 10.0 ** -torch.randint(0, 30, shape, generator=rng)
    if kind == "none":
        mass = torch.zeros_like(mass)
    if kind == "one":
        mass[..., 1:] = 0.0
    if kind == "peaked":
        mass[..., 0] = 1e8
    return mass
