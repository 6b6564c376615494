"""benchmarks/small_epsilon.py runs on a few problems, and the documentation makes its tables."""

import csv
import math
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from benchmarks.small_epsilon import Problem, grid, make_data, marginal_error
from multialign import multi_marginal_sinkhorn
from tests import reference

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.small_epsilon", folder, "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    with (folder / "small_epsilon.csv").open() as file:
        return list(csv.DictReader(file)), folder


def test_every_method_has_a_row_for_every_problem(rows):
    rows, _ = rows
    problems = list(grid(tiny=True))
    assert len(problems) == 55
    for provider in ("auto", "newton", "sinkhorn"):
        assert sum(row["provider"] == provider for row in rows) == len(problems)
    pairs = sum(problem.count == 2 for problem in problems)
    assert sum(row["provider"].startswith("POT") for row in rows) == 2 * pairs
    for row in rows:
        assert float(row["milliseconds"]) > 0
        assert (row["converged"] == "1") == (float(row["error"]) <= 1e-6), row


def test_auto_solves_what_any_provider_solves(rows):
    rows, _ = rows
    problem = ("graph", "marginals", "size", "weights", "points", "level")
    solved = {tuple(row[name] for name in problem) for row in rows if row["converged"] == "1"}
    ours = {
        tuple(row[name] for name in problem)
        for row in rows
        if row["converged"] == "1" and row["provider"] == "auto"
    }
    assert ours == solved


def test_peers_solve_the_easy_problems(rows):
    """So their input and the error of their potentials are in the right units."""
    rows, _ = rows
    peers = {row["provider"] for row in rows} - {"auto", "newton", "sinkhorn"}
    assert len(peers) == (5 if util.find_spec("ott") else 2)
    for peer in peers:
        easy = [row for row in rows if row["provider"] == peer and float(row["level"]) == 1]
        assert easy
        assert all(row["converged"] == "1" for row in easy), peer


def test_grid_covers_what_it_says():
    problems = list(grid())
    assert len(problems) == len(set(problems))
    assert {problem.count for problem in problems} == {2, 3, 4, 5}
    sizes = {n for problem in problems for n in problem.sizes}
    assert (min(sizes), max(sizes)) == (2, 200)
    for weights in ("equal", "random", "heavy", "tiny"):
        for points in ("plain", "outliers", "duplicates"):
            own = [p for p in problems if (p.weights, p.points) == (weights, points)]
            assert {round(math.log10(problem.level)) for problem in own} == set(range(-7, 1))


@pytest.mark.parametrize("graph", ["complete", "chain", "star", "cycle"])
def test_error_is_that_of_the_dense_plan(graph):
    data = make_data(Problem(graph, 4, (3, 1), "random", "duplicates", 0.1))
    solution = multi_marginal_sinkhorn(data.costs, data.marginals, data.epsilon, tolerance=1e-9)
    potentials = [f / data.epsilon for f in solution.potentials]
    assert marginal_error(data, potentials) < 1e-8
    potentials[1][0] += 0.3
    sizes = [len(nu) for nu in data.marginals]
    costs = {edge: cost.numpy() for edge, cost in data.costs.items()}
    plan = -reference.dense_cost(costs, sizes) / data.epsilon
    for p, f in enumerate(potentials):
        plan = plan + f.numpy().reshape([-1 if q == p else 1 for q in range(4)])
    plan = torch.from_numpy(plan).exp()
    expected = sum(
        (plan.sum([q for q in range(4) if q != p]) - nu).abs().sum()
        for p, nu in enumerate(data.marginals)
    )
    assert marginal_error(data, potentials) == pytest.approx(float(expected), rel=1e-9)


def test_documentation_makes_tables(rows, tmp_path):
    specification = util.spec_from_file_location("tables", ROOT / "docs" / "small_epsilon.py")
    tables = util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    tables.write_small_epsilon(tmp_path / "missing.csv", tmp_path / "missing.rst")
    assert "No run is recorded" in (tmp_path / "missing.rst").read_text()

    rows, folder = rows
    tables.write_small_epsilon(folder / "small_epsilon.csv", tmp_path / "tables.rst")
    text = (tmp_path / "tables.rst").read_text()
    assert len(list(grid())) == tables.GRID
    assert f"55 of the {tables.GRID:,} problems of the grid are recorded" in text
    assert "provider solves 55. " in text
    assert 'Of these, "auto" solves 55 (100.00 %)' in text
    for provider in {row["provider"] for row in rows} - {"auto", "newton", "sinkhorn"}:
        assert f"   * - {provider}\n" in text
    easy = [row for row in rows if row["provider"] == "auto" and row["level"] == "1e+00"]
    assert f"   * - epsilon / std 1e+00\n     - {len(easy)} of {len(easy)}; " in text
