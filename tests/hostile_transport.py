"""Hostile problems for the transport solver itself, and what has to hold for its solutions."""

import itertools
import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog

from multialign import ConvergenceWarning, TransportSolution, multi_marginal_sinkhorn
from tests.hostile import state_unchanged

COSTS = (
    *("uniform", "square", "constant", "zero", "unary", "huge entry", "integer", "scales"),
    *("huge entries", "forbidden", "forbidden and huge"),
)
MASSES = ("equal", "uniform", "zeros", "wide", "none", "one", "peaked")
# Up to so many entries the plan is written out and checked against the conditions of an optimum.
_DENSE = 4096


@dataclass
class Problem:
    """Arguments of the solver."""

    recipe: dict[str, Any]
    costs: dict[tuple[int, ...], torch.Tensor]
    marginals: list[torch.Tensor]
    epsilon: float | torch.Tensor
    relaxation: float | list[float | None] | None

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
    rho: float | list[float | None] | None = None
    if rng.random() < 0.4:
        # Beyond a million epsilon, a potential of the size of rho leaves few digits to the plan;
        # where costs are forbidden or huge, so does a potential that pays for what cannot be
        # reached, and the more so the more masses differ.
        extreme = "forbidden" in recipe["cost"] or "huge" in recipe["cost"]
        reach = 1e3 if extreme else 1e6
        most = recipe["unit"] * recipe["epsilon"] * reach
        drawn = [min(recipe["unit"] * 10.0 ** rng.randint(-6, 8), most) for _ in range(count)]
        numbers = [drawn[0], *(rng.choice([None, number]) for number in drawn[1:])]
        rho = rng.choice([numbers, drawn[0]])
        if rng.random() < 0.7:  # of equal mass, as hard constraints need it
            marginals = [
                (x / x.sum(-1, keepdim=True).clamp_min(1e-30)).detach().requires_grad_()
                for x in marginals
            ]
        if recipe["cost"] == "constant":  # a cost below 0 pays for any mass: it may be infinite
            costs = {scope: cost.detach().abs().requires_grad_() for scope, cost in costs.items()}
    if "forbidden" in recipe["cost"] and "peaked" in recipe["masses"]:
        rho = None
    recipe["relaxation"] = rho
    return Problem(recipe, costs, marginals, epsilon, rho)


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
            marginal_relaxation=problem.relaxation,
            method=problem.recipe["method"],
            max_iterations=200 if sweeps else 2000,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, problem.inputs))
    solvable = solution.value.isfinite() & solution.error.isfinite()
    if not bool(solvable.all()):
        assert not bool(solution.converged[~solvable].any())
        assert not bool(is_feasible(problem)[~solvable].any()), (
            f"value {solution.value}, error {solution.error}"
        )
        return solution
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
        potential = solution.potentials[p].detach().double()
        wanted, slack, rho = mass, 1e-4 * total, relaxation_of(problem, p)
        if problem.relaxation is None:
            wanted, slack = mass / torch.where(total == 0, 1.0, total), 0.0
        elif rho is not None:
            wanted = torch.where(mass == 0, 0.0, mass * (-potential / rho).exp())
            rounding = 10 * torch.finfo(marginal.dtype).eps
            readable = (rounding * potential.abs() / rho).nan_to_num(0.0, 0.0, 0.0) < 0.1
            total = total * readable.all(-1, keepdim=True)
            slack = slack + (wanted * rounding * potential.abs() / rho).nan_to_num(0.0).sum(
                -1, True
            )
        error = (solution.marginal(p).detach() - wanted).abs().sum(-1, keepdim=True)
        counted = solution.converged.unsqueeze(-1) & (total > 0)
        assert (error <= 2e-4 + slack)[counted].all(), f"marginal {p} of a converged solution"
        assert (potential.isfinite() | (mass == 0)).all(), f"potential {p}"
    for edge, cost in costs.items():
        table = solution.plan() if len(edge) > 2 else solution.pairwise_marginal(*edge)
        there = torch.stack([x.sum(-1) > 0 for x in marginals]).all(0)
        there = there.reshape(*there.shape, *[1] * len(edge))
        assert (table[(cost == math.inf) & there] <= 1e-200).all(), (
            f"mass at forbidden pairs {edge}"
        )
    values = torch.randn(*recipe_batch(problem), marginals[0].shape[-1], 2).to(table.dtype)
    applied = solution.apply(last, 0, values)
    torch.testing.assert_close(applied, results["pairwise marginal"].mT @ values)
    if math.prod(problem.recipe["sizes"]) <= _DENSE:
        check_optimum(problem, solution)
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
                if grad is not None and n < len(costs):
                    forbidden = problem.inputs[n] == math.inf
                    assert (grad[forbidden] == 0).all(), f"gradient of {name} at forbidden entries"
    return solution


def relaxation_of(problem: Problem, p: int) -> float | None:
    """Return rho of a marginal, None where it is hard."""
    rho = problem.relaxation
    return rho[p] if isinstance(rho, list) else rho


def recipe_batch(problem: Problem) -> tuple[int, ...]:
    """Return the batch shape."""
    return problem.recipe["batch"]


@torch.no_grad()
def is_feasible(problem: Problem) -> torch.Tensor:
    """Return whether a plan that uses allowed entries alone has the marginals, by a linear program.

    True where nothing is forbidden, and where the program would be large. With hard marginals
    beside it, a penalised atom without an allowed entry counts as infeasible: its potential is
    infinite, and the solver says that it has not converged.
    """
    sizes, batch = problem.recipe["sizes"], recipe_batch(problem)
    feasible = torch.ones(batch, dtype=torch.bool)
    if math.prod(sizes) > _DENSE:
        return feasible
    for index in itertools.product(*map(range, batch)):
        allowed = torch.ones(sizes, dtype=torch.bool)
        for scope, table in problem.costs.items():
            shape = [n if p in scope else 1 for p, n in enumerate(sizes)]
            allowed = allowed & (table[index] != math.inf).reshape(shape)
        rows, wanted = [], []
        hard = [relaxation_of(problem, p) is None for p in range(len(sizes))]
        for p, mass in enumerate(problem.marginals):
            dead = ~allowed.movedim(p, 0).flatten(1).any(1) & (mass[index] > 0)
            if any(hard) and bool(dead.any()):
                feasible[index] = False
            if hard[p]:
                total = mass[index].double().sum()
                # The program is solved to 1e-7: it does not see smaller masses.
                if bool((mass[index] < 1e-5 * total)[mass[index] > 0].any()):
                    feasible[index] = False
                wanted.append(mass[index].double() / total.clamp_min(1e-300))
                atoms = allowed.nonzero()[:, p]
                rows.append(torch.nn.functional.one_hot(atoms, sizes[p]).T)
        if problem.relaxation is not None and len(wanted) > 1:
            # Beside penalties, hard marginals are taken as given and need equal mass.
            totals = torch.stack(
                [
                    mass[index].double().sum()
                    for mass, is_hard in zip(problem.marginals, hard)
                    if is_hard
                ]
            )
            if bool(totals.max() - totals.min() > 1e-6 * totals.max()):
                feasible[index] = False
        count = int(allowed.sum())
        if rows and count:
            program = linprog(
                np.zeros(count), A_eq=torch.cat(rows).numpy(), b_eq=torch.cat(wanted).numpy()
            )
            feasible[index] &= program.status == 0
        elif rows:
            feasible[index] = False
    return feasible


@torch.no_grad()
def check_optimum(problem: Problem, solution: TransportSolution) -> None:
    """Check the plan against the conditions of an optimum, and the value against the plan.

    The problem is convex: a plan exp((sum of potentials - C) / epsilon) whose marginals are those
    asked for is its solution.
    """
    marginals = [x.double() for x in problem.marginals]
    epsilon = torch.as_tensor(problem.epsilon, dtype=torch.float64)
    epsilon = epsilon.expand(recipe_batch(problem))
    count, batch = len(marginals), len(recipe_batch(problem))

    def spread(x: torch.Tensor, scope: tuple[int, ...]) -> torch.Tensor:
        shape = [n if p in scope else 1 for p, n in enumerate(problem.recipe["sizes"])]
        return x.double().reshape(*x.shape[:batch], *shape)

    cost = sum(spread(table, scope) for scope, table in problem.costs.items())
    potentials = [f.double() for f in solution.potentials]
    level = epsilon.reshape(*epsilon.shape, *[1] * count)
    exponent = -cost
    for p, f in enumerate(potentials):
        exponent = exponent + spread(f, (p,))
    plan = solution.plan().double()
    axes = tuple(range(batch, batch + count))
    finite = cost.masked_fill(cost == math.inf, 0.0)
    size = sum(f.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1) for f in potentials)
    size = size + finite.abs().amax(axes)
    digits = torch.finfo(problem.marginals[0].dtype).eps
    rounding = 10 * count * digits * size / epsilon
    # What stands for the plan where a marginal has no mass at all is a convention.
    counted = solution.converged & torch.stack([x.sum(-1) > 0 for x in marginals]).all(0)
    ordinary = counted & (rounding < 1e-2)
    apart = ((exponent / level).exp() - plan).abs().sum(axes)
    mass = plan.sum(axes)
    assert (apart <= 1e-6 + (2 * rounding + 10 * digits) * mass)[ordinary].all(), (
        f"plan of potentials: {apart}"
    )

    entropy = torch.xlogy(plan, plan)
    parts = [plan * finite, level * entropy]
    if problem.relaxation is not None:
        parts += [-level * plan, level * torch.ones_like(plan) / plan[(0,) * batch].numel()]
    terms = [part.sum(axes) for part in parts]
    scale = sum(part.abs().sum(axes) for part in parts)
    for p, nu in enumerate(marginals):
        rho = relaxation_of(problem, p)
        if rho is None:
            continue
        own = plan.sum([axis for axis in axes if axis != batch + p])
        kept = torch.where(nu == 0, 1.0, nu)
        parts = [torch.xlogy(own, own / kept), -own, nu]
        terms.append(rho * sum(part.sum(-1) for part in parts))
        scale = scale + rho * sum(part.abs().sum(-1) for part in parts)
    # The value is that of the dual: from the plan's it differs by the error times potentials.
    slack = 1e-5 * scale + 2 * solution.error.double() * size + 10 * digits * epsilon * mass
    wrong = (sum(terms) - solution.value.double()).abs()
    assert (wrong <= slack)[counted].all(), f"value: {sum(terms)}, {solution.value}"


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
    if kind in ("huge entries", "forbidden and huge"):
        huge = 10.0 ** torch.randint(6, 16, shape, generator=rng)
        cost = torch.where(torch.rand(shape, generator=rng) < 0.3, huge, cost)
    if kind in ("forbidden", "forbidden and huge"):
        cost = torch.where(torch.rand(shape, generator=rng) < 0.2, math.inf, cost)
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
