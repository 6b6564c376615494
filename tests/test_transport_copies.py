"""Variables that are all alike, as in the self terms of a divergence, solved for one of them."""

import math
from itertools import combinations

import pytest
import torch

from multialign import multi_marginal_sinkhorn, multi_marginal_sinkhorn_loss
from multialign.transport import hessian
from multialign.transport.forms import base, copies
from multialign.transport.forms.choose import make_form
from multialign.transport.options import SolverOptions
from multialign.transport.prepare import make_problem
from multialign.transport.solver import solve_problem
from tests import reference


def draw(size, *, batch=2, absent=False):
    """Return a cost of mean 1, and masses."""
    x = torch.randn(batch, size, 3)
    cost = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    nu = torch.rand(batch, size) + 0.1
    if absent:
        nu[0, 1] = 0
    return cost / cost.mean(), nu


def problem(count, size, *, epsilon=0.3, absent=False):
    cost, nu = draw(size, absent=absent)
    costs = dict.fromkeys(combinations(range(count), 2), cost)
    return make_problem(costs, [nu] * count, epsilon)


def solve(found, *, symmetric=True, tolerance=1e-11, method="newton"):
    options = SolverOptions(
        tolerance=tolerance, max_iterations=5000, method=method, backend="torch"
    )
    return solve_problem(found, options, symmetric=symmetric)


@pytest.fixture(params=["factored", "conjugate gradients"])
def forced(request, monkeypatch):
    if request.param == "conjugate gradients":
        monkeypatch.setattr(base, "_DENSE_ATOMS", 0)
        monkeypatch.setattr(hessian, "_FACTORED_ENTRIES", 0)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_that_is_read_of_a_plan_is_that_of_the_dense_one(count, absent, plain):
    whole = problem(count, 5, epsilon=3.0, absent=absent)
    folded = whole.folded()
    form = make_form(folded, torch.float64, "torch") if plain else copies.Copies(folded, "torch")
    ours = form.at(whole.epsilon)
    x = 0.3 * torch.randn(2, 5)
    now = ours.evaluate(x)
    dense = make_form(whole, torch.float64, "torch").at(whole.epsilon).evaluate(x.repeat(1, count))
    torch.testing.assert_close(count * now.log_total, dense.log_total)
    torch.testing.assert_close(now.marginals, dense.marginals[:, :5])
    log_total, marginals = ours.marginals(x)
    torch.testing.assert_close(count * log_total, dense.log_total)
    torch.testing.assert_close(marginals, dense.marginals[:, :5])

    # What moves all copies alike, H has as much of for each.
    wanted = whole.marginals[0]
    right = wanted - now.marginals
    nothing = torch.full((2,), 1e-13)
    found = now.hessian.solve(right, nothing.unsqueeze(-1), nothing, 100)
    repeated = right.repeat(1, count)
    expected = dense.hessian.solve(repeated, nothing.unsqueeze(-1), nothing, 100)
    expected = expected.view(2, count, 5).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)

    step = 1e-6
    ahead, behind = (
        form.at(whole.epsilon / (1 + s)).marginals(x * (1 + s))[1] for s in (step, -step)
    )
    tangent = ours.tangent(x, now)
    torch.testing.assert_close(tangent, (behind - ahead) / (2 * step), rtol=0.01, atol=1e-5)

    swept, moved = ours.sweep(x, 2)
    by_hand = x
    for n in range(2):
        log_m = ours.marginals(by_hand)[1].log()
        change = torch.where(wanted == 0, 0.0, wanted.log() - log_m)
        torch.testing.assert_close(moved[:, n], (change.abs() * wanted).sum(-1))
        by_hand = by_hand + change / count
    torch.testing.assert_close(swept, by_hand)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_solution_is_that_of_all_variables(count, epsilon, method, forced):
    whole = problem(count, 6, epsilon=epsilon, absent=True)
    ours, other = solve(whole, method=method), solve(whole, symmetric=False)
    assert ours.converged.all()
    torch.testing.assert_close(ours.value, other.value, rtol=1e-9, atol=0)
    # Where the plan is nearly a permutation, only the sum of potentials is determined.
    torch.testing.assert_close(sum(ours.potentials), sum(other.potentials), rtol=1e-6, atol=1e-6)
    for p, f in enumerate(ours.potentials):
        torch.testing.assert_close(f, ours.potentials[0])
        found = (ours.marginal(p) - whole.marginals[p]).abs().sum(-1)
        torch.testing.assert_close(count * found, ours.error, rtol=1e-3, atol=1e-11)


def test_matches_the_dense_oracle():
    cost, nu = draw(7, batch=1)
    edges = [(0, 1), (0, 2), (1, 2)]
    solution = solve(make_problem(dict.fromkeys(edges, cost), [nu] * 3, 0.3))
    dense = reference.dense_cost(dict.fromkeys(edges, cost[0].numpy()), [7] * 3)
    plan = reference.transport_plan(dense, [(nu[0] / nu.sum()).numpy()] * 3, 0.3)
    value = reference.transport_value(plan, dense, 0.3)
    torch.testing.assert_close(solution.value.item(), value, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.plan()[0], torch.from_numpy(plan), rtol=1e-7, atol=1e-10)


def test_three_beyond_the_exponent_range_are_read_in_logarithms(monkeypatch):
    whole = problem(3, 8, epsilon=1e-4)
    used = []
    log_marginal = copies.log_marginal
    monkeypatch.setattr(copies, "log_marginal", lambda *a: used.append(1) or log_marginal(*a))
    ours, other = solve(whole, tolerance=1e-8), solve(whole, symmetric=False, tolerance=1e-8)
    assert used
    assert ours.converged.all()
    torch.testing.assert_close(ours.value, other.value, rtol=1e-8, atol=0)


def test_variables_that_are_not_alike_are_all_solved_for():
    whole = problem(3, 6)
    whole.marginals[1] = whole.marginals[1].flip(-1)
    ours, other = solve(whole), solve(whole, symmetric=False)
    assert ours.converged.all()
    torch.testing.assert_close(ours.value, other.value, rtol=1e-12, atol=0)
    assert (ours.marginal(1) - whole.marginals[1]).abs().sum() < 1e-10


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_divergence_takes_self_terms_of_one_variable(count, monkeypatch):
    """And with a cloud of several atoms absent, which makes the others no copies, it is right."""
    made = []
    create = copies.Copies.__init__
    monkeypatch.setattr(copies.Copies, "__init__", lambda *a: made.append(1) or create(*a))
    clouds = [torch.randn(5, 2) + m for m in range(count)]
    epsilon, edges = 0.7, list(combinations(range(count), 2))
    loss = multi_marginal_sinkhorn_loss(clouds, epsilon=epsilon, tolerance=1e-10, backend="torch")
    assert made

    def value(points):
        costs = {(i, j): torch.cdist(points[i], points[j]).square() for i, j in edges}
        nu = [torch.ones(5)] * count
        return multi_marginal_sinkhorn(costs, nu, epsilon, tolerance=1e-10).value

    selves = sum(value([x] * count) for x in clouds) / count
    torch.testing.assert_close(loss, value(clouds) - selves, rtol=1e-8, atol=0)

    weights = [torch.ones(5)] * count
    made.clear()
    weighted = multi_marginal_sinkhorn_loss(
        clouds, weights, epsilon=epsilon, tolerance=1e-10, backend="torch"
    )
    assert made
    torch.testing.assert_close(weighted, loss)
    extra = [*clouds, torch.randn(5, 2)], [*weights, torch.zeros(5)]
    without = multi_marginal_sinkhorn_loss(*extra, epsilon=epsilon, tolerance=1e-10)
    torch.testing.assert_close(without, loss, rtol=1e-8, atol=0)


def test_graphs_in_which_clouds_differ_are_solved_for_all(monkeypatch):
    monkeypatch.setattr(copies.Copies, "__init__", None)
    clouds = [torch.randn(5, 2) + m for m in range(4)]
    for graph in ("chain", "star", "cycle"):
        assert math.isfinite(multi_marginal_sinkhorn_loss(clouds, graph=graph).item())


def test_conjugate_gradients_that_were_slow_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(base, "_DENSE_ATOMS", 0)
    monkeypatch.setattr(hessian, "_TRIAL_STEPS", 1)
    tries = []
    iterate = hessian.AppliedHessian._iterate
    monkeypatch.setattr(
        hessian.AppliedHessian, "_iterate", lambda *a: tries.append(1) or iterate(*a)
    )
    x = torch.randn(3, 20, 3)
    costs = {(i, j): torch.cdist(x[i], x[j]).square() for i, j in [(0, 1), (0, 2), (1, 2)]}
    solution = multi_marginal_sinkhorn(
        costs, [torch.ones(20)] * 3, 0.05, tolerance=1e-9, backend="torch"
    )
    assert solution.converged
    assert len(tries) == 1 < solution.iterations
