"""Newton's equation, solved in each of the forms it takes, against a dense matrix."""

from itertools import pairwise

import pytest
import torch

from multialign.transport import hessian
from multialign.transport.elimination import beliefs

# Variables 3 and more of the last two are leaves, of a triangle, and of another leaf.
GRAPHS = {
    "two": [(0, 1)],
    "chain": [(0, 1), (1, 2), (2, 3)],
    "star": [(0, 1), (0, 2), (0, 3)],
    "tree": [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)],
    "apart": [(0, 1), (2, 3)],
    "triangle": [(0, 1), (0, 2), (1, 2)],
    "triangle with leaves": [(0, 1), (0, 2), (1, 2), (1, 3), (3, 4), (0, 5)],
    "complete with a leaf": [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (2, 4)],
}
FORMS = ["conjugate gradients", "factored"]


def draw(edges, *, absent=True):
    """Return a plan's marginals and all its pairs, and what is known of it by elimination."""
    count = max(j for _, j in edges) + 1
    sizes = [(4, 6, 3, 5, 2, 4)[p] for p in range(count)]
    unaries = [torch.randn(2, size) for size in sizes]
    if absent:
        unaries[0][0, 1] = unaries[1][1, 2] = -torch.inf
    pairs = {(i, j): torch.randn(2, sizes[i], sizes[j]) for i, j in edges}
    known, whole = beliefs(unaries, pairs, "core"), beliefs(unaries, pairs, "all")
    masses = [whole.marginals[p] for p in range(count)]
    wanted = [m * (0.5 + torch.rand_like(m)) for m in masses]
    return known, whole, [nu / nu.sum(-1, keepdim=True) for nu in wanted]


def dense(whole):
    """Return H."""
    rows = []
    for p in range(len(whole.marginals)):
        tables = [
            whole.marginals[p].diag_embed() if p == q else whole.table(p, q)
            for q in range(len(whole.marginals))
        ]
        rows.append(torch.cat(tables, -1))
    return torch.cat(rows, -2)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    name, value = {
        "conjugate gradients": ("_FACTORED_ENTRIES", 0),
        "factored": ("_TRIAL_STEPS", 0),
    }[request.param]
    monkeypatch.setattr(hessian, name, value)


@pytest.mark.parametrize("graph", GRAPHS)
def test_solves_the_equation(graph, form):
    known, whole, wanted = draw(GRAPHS[graph])
    ours = hessian.pairwise_hessian(hessian.Scaling(wanted, torch.float64), known)
    # Differences of marginals, and what moves the constant in all potentials.
    right = torch.cat(wanted, -1) - whole.joined()
    for r in (right, right + 0.3 * whole.joined()):
        x = ours.solve(r, torch.full((2, 1), 1e-13), torch.full((2,), 1e-13), 500)
        image = (dense(whole) @ x.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(image, r, rtol=0, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_step_ascends_however_inexact(graph, steps, damping, monkeypatch):
    monkeypatch.setattr(hessian, "_FACTORED_ENTRIES", 0)
    for _ in range(10):
        known, whole, wanted = draw(GRAPHS[graph])
        ours = hessian.pairwise_hessian(hessian.Scaling(wanted, torch.float64), known)
        right = torch.cat(wanted, -1) - whole.joined()
        x = ours.solve(right, torch.full((2, 1), damping), torch.full((2,), 1e-13), steps)
        assert (torch.linalg.vecdot(x, right) > 0).all()


@pytest.mark.parametrize("graph", ["two", "tree", "triangle with leaves"])
def test_damping_shortens_a_step(graph):
    known, whole, wanted = draw(GRAPHS[graph])
    ours = hessian.pairwise_hessian(hessian.Scaling(wanted, torch.float64), known)
    right, exact = torch.cat(wanted, -1) - whole.joined(), torch.full((2,), 1e-13)
    rises = [
        torch.linalg.vecdot(ours.solve(right, torch.full((2, 1), d), exact, 500), right)
        for d in (1e-13, 0.01, 0.1, 1.0)
    ]
    for less, more in pairwise(rises):
        assert (more < less).all()
