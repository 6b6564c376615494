"""Unbalanced transport: marginals that are penalised, not fixed."""

import itertools
import math

import geomloss
import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.autograd import gradcheck, gradgradcheck

from multialign import (
    ConvergenceWarning,
    MultiMarginalSinkhornLoss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    squared_euclidean_cost,
)
from multialign.transport import hessian
from multialign.transport.forms import base
from multialign.transport.options import SolverOptions
from multialign.transport.prepare import make_problem
from multialign.transport.solver import solve_problem

# A warning of POT.
pytestmark = pytest.mark.filterwarnings("ignore:If reg_type = entropy:UserWarning")

GRAPHS = {
    "two": ((4, 5), [(0, 1)]),
    "complete": ((3, 4, 3), [(0, 1), (0, 2), (1, 2)]),
    "chain": ((3, 4, 3), [(0, 1), (1, 2)]),
    "cycle": ((2, 3, 2, 3), [(0, 1), (1, 2), (2, 3), (0, 3)]),
    "star": ((3, 2, 3, 2), [(0, 1), (0, 2), (0, 3)]),
    "complete, four": ((2, 3, 2, 3), list(itertools.combinations(range(4), 2))),
}


def problem(graph, batch=()):
    sizes, edges = GRAPHS[graph]
    costs = {(i, j): torch.rand(*batch, sizes[i], sizes[j]) for i, j in edges}
    return costs, [torch.rand(*batch, size) + 0.2 for size in sizes]


def solve(costs, marginals, epsilon, rho, form="auto", **options):
    options = {"tolerance": 1e-11, "max_iterations": 20_000, "method": "auto", **options}
    checked = make_problem(costs, marginals, epsilon, relaxation=rho)
    return solve_problem(checked, SolverOptions(backend="torch", **options), form=form)


def joint(costs, sizes):
    total = torch.zeros(sizes)
    for (i, j), cost in costs.items():
        total = total + cost.reshape([n if p in (i, j) else 1 for p, n in enumerate(sizes)])
    return total


def objective(plan, costs, marginals, epsilon, rho):
    """Return the primal objective, written out for the whole plan."""
    sizes = [len(nu) for nu in marginals]
    value = (plan * joint(costs, sizes)).sum()
    value = value + epsilon * (torch.xlogy(plan, plan).sum() - plan.sum() + 1)
    for p, nu in enumerate(marginals):
        if rho[p] is None:
            continue
        mass = plan.sum([q for q in range(len(sizes)) if q != p])
        value = value + rho[p] * (torch.xlogy(mass, mass / nu) - mass + nu).sum()
    return value


def minimise(costs, marginals, epsilon, rho):
    """Return the plan that minimises the objective, by a quasi-Newton method over its logarithm."""
    sizes = [len(nu) for nu in marginals]

    def loss(x):
        log_plan = torch.from_numpy(x).requires_grad_()
        value = objective(log_plan.exp().reshape(sizes), costs, marginals, epsilon, rho)
        (grad,) = torch.autograd.grad(value, log_plan)
        return value.item(), grad.numpy()

    start = np.full(math.prod(sizes), -math.log(math.prod(sizes)))
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-11}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).exp().reshape(sizes), found.fun


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
def test_plan_of_two_marginals_is_that_of_pot(rho, method):
    costs, marginals = problem("two")
    solution = solve(costs, marginals, 0.1, rho, method=method)
    assert solution.converged
    plan = ot.unbalanced.sinkhorn_unbalanced(
        *(nu.numpy() for nu in marginals), costs[0, 1].numpy(), 0.1, rho, reg_type="entropy",
        numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    torch.testing.assert_close(solution.plan(), torch.from_numpy(plan), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["vector", "table", "pairwise"])
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("rho", ["all", "one-sided", "different"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_matches_a_dense_minimiser(graph, rho, method, form):
    costs, marginals = problem(graph)
    count = len(marginals)
    each = {
        "all": [0.7] * count,
        "one-sided": [None, *[0.5] * (count - 1)],
        "different": [0.3 + p for p in range(count)],
    }[rho]
    solution = solve(costs, marginals, 0.3, each, form, method=method)
    assert solution.converged
    plan = solution.plan()
    if rho != "one-sided":
        expected, value = minimise(costs, marginals, 0.3, each)
        torch.testing.assert_close(plan, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(solution.value.item(), value, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(solution.value, objective(plan, costs, marginals, 0.3, each))
    for p, (nu, f) in enumerate(zip(marginals, solution.potentials)):
        wanted = nu if each[p] is None else nu * (-f / each[p]).exp()
        torch.testing.assert_close(solution.marginal(p), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("graph", ["two", "complete", "chain", "cycle"])
@pytest.mark.parametrize("hessian_kind", ["factored", "conjugate gradients"])
def test_larger_problems(graph, hessian_kind, monkeypatch):
    monkeypatch.setattr(base, "_DENSE_ATOMS", 0)
    if hessian_kind == "conjugate gradients":
        monkeypatch.setattr(hessian, "_FACTORED_ENTRIES", 0)
    costs, marginals = problem(graph)
    ours = solve(costs, marginals, 0.01, 0.5, "pairwise", tolerance=1e-9)
    other = solve(costs, marginals, 0.01, 0.5, "table", tolerance=1e-9)
    assert ours.converged
    torch.testing.assert_close(ours.plan(), other.plan(), rtol=0, atol=1e-8)


def test_tends_to_balanced_transport():
    costs, marginals = problem("complete")
    marginals = [nu / nu.sum() for nu in marginals]
    balanced = multi_marginal_sinkhorn(costs, marginals, 0.1, tolerance=1e-11)
    errors = []
    for rho in (1e2, 1e4, 1e6):
        solution = solve(costs, marginals, 0.1, rho)
        assert solution.converged
        errors.append((solution.plan() - balanced.plan()).abs().sum().item())
        assert abs(solution.value - balanced.value) < 10 / rho
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_tends_to_the_kernel():
    """Without penalties the plan minimises <T, C> + epsilon (sum T log T - sum T) alone."""
    costs, marginals = problem("two")
    solution = solve(costs, marginals, 0.5, 1e-7)
    torch.testing.assert_close(solution.plan(), (-costs[0, 1] / 0.5).exp(), rtol=1e-5, atol=1e-6)


def test_a_batch_is_its_problems():
    costs, marginals = problem("complete", batch=(3,))
    epsilon = torch.tensor([0.1, 0.3, 1.0])
    together = solve(costs, marginals, epsilon, [1.0, None, 0.2])
    assert together.converged.all()
    for b in range(3):
        one = {edge: cost[b] for edge, cost in costs.items()}
        alone = solve(one, [nu[b] for nu in marginals], epsilon[b], [1.0, None, 0.2])
        torch.testing.assert_close(together.value[b], alone.value)
        torch.testing.assert_close(together.plan()[b], alone.plan(), rtol=0, atol=1e-9)


def test_atoms_of_no_mass_and_forbidden_pairs():
    costs, marginals = problem("two")
    marginals[0][1] = 0
    costs[0, 1][2, 3] = math.inf
    solution = solve(costs, marginals, 0.1, 1.0)
    assert solution.converged
    plan = solution.plan()
    assert (plan[1] == 0).all()
    assert plan[2, 3] == 0
    kept = [0, 2, 3]
    blocked = costs[0, 1].clone()
    blocked[2, 3] = 1e3
    expected = ot.unbalanced.sinkhorn_unbalanced(
        marginals[0][kept].numpy(), marginals[1].numpy(), blocked[kept].numpy(), 0.1, 1.0,
        reg_type="entropy", method="sinkhorn_stabilized", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    torch.testing.assert_close(plan[kept], torch.from_numpy(expected), rtol=1e-5, atol=1e-8)


def test_hard_marginals_of_different_mass_do_not_converge():
    costs, marginals = problem("complete")
    with pytest.warns(ConvergenceWarning):
        solution = solve(costs, marginals, 0.1, [None, None, 1.0], max_iterations=200)
    assert not solution.converged
    balanced = [nu / nu.sum() for nu in marginals]
    assert solve(costs, balanced, 0.1, [None, None, 1.0]).converged


@pytest.mark.parametrize("form", ["vector", "pairwise"])
@pytest.mark.parametrize("rho", [0.7, [None, 0.7, 0.3]])
@pytest.mark.parametrize("name", ["value", "transport_cost", "potentials", "marginals"])
@pytest.mark.parametrize("graph", ["complete", "chain"])
def test_gradients(graph, name, rho, form):
    costs, marginals = problem(graph)
    inputs = [x.requires_grad_() for x in (*costs.values(), *marginals)]
    inputs.append(torch.tensor(0.5, requires_grad=True))

    def outputs(*tensors):
        one = dict(zip(costs, tensors))
        solution = solve(one, tensors[len(one) : -1], tensors[-1], rho, form, tolerance=1e-12)
        if name == "marginals":
            return tuple(solution.pairwise_marginal(i, j) for i, j in one)
        result = getattr(solution, name)
        return tuple(result) if isinstance(result, list) else result

    assert gradcheck(outputs, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("graph", ["two", "complete"])
def test_second_derivatives_of_the_value(graph):
    costs, marginals = problem(graph)
    inputs = [x.requires_grad_() for x in (*costs.values(), *marginals)]

    def value(*tensors):
        one = dict(zip(costs, tensors))
        return solve(one, tensors[len(one) :], 0.5, 0.8, tolerance=1e-12).value

    assert gradgradcheck(value, inputs, atol=1e-5, fast_mode=True)


# -- The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_loss_is_that_of_geomloss(rho):
    """Its cost is |x - y|^2 / 2, its epsilon blur^2, its rho reach^2."""
    x, y = torch.randn(30, 2), torch.randn(40, 2) + 0.5
    a, b = torch.rand(30), torch.rand(40)
    a, b = a / a.sum(), b / b.sum()
    epsilon = 0.4
    peer = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=math.sqrt(epsilon / 2), reach=math.sqrt(rho / 2), scaling=0.99,
        debias=False, backend="tensorized",
    )  # fmt: skip
    ours = multi_marginal_sinkhorn_loss(
        [x, y], [a, b], epsilon=epsilon, debias=False, marginal_relaxation=rho, tolerance=1e-10
    )
    torch.testing.assert_close(ours / 2, peer(a, x, b, y), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_plan_of_the_loss_is_that_of_pot(rho):
    x, y = torch.randn(6, 2), torch.randn(5, 2) + 0.5
    loss = MultiMarginalSinkhornLoss(
        epsilon=0.4, debias=False, marginal_relaxation=rho, tolerance=1e-11
    )
    plan = ot.unbalanced.sinkhorn_unbalanced(
        np.full(6, 1 / 6), np.full(5, 1 / 5), squared_euclidean_cost(x, y).numpy(), 0.4, rho,
        reg_type="kl", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    found = loss.solve([x, y]).plan()
    torch.testing.assert_close(found, torch.from_numpy(plan), rtol=1e-5, atol=1e-8)


@given(st.integers(0, 2**16), st.sampled_from(["complete", "chain", "star"]), st.integers(2, 4))
def test_splitting_a_sample_changes_nothing(seed, graph, count):
    generator = torch.Generator().manual_seed(seed)
    clouds = [torch.randn(4, 2, generator=generator) for _ in range(count)]
    weights = [torch.rand(4, generator=generator) + 0.1 for _ in range(count)]
    options = {
        "epsilon": 0.7, "graph": graph, "debias": False, "marginal_relaxation": 0.8,
        "tolerance": 1e-10,
    }  # fmt: skip
    whole = multi_marginal_sinkhorn_loss(clouds, weights, **options)
    share = torch.rand((), generator=generator)
    first = weights[0]
    parts = torch.cat([first[:1] * share, first[1:], first[:1] * (1 - share)])
    split = [torch.cat([clouds[0], clouds[0][:1]]), *clouds[1:]]
    again = multi_marginal_sinkhorn_loss(split, [parts, *weights[1:]], **options)
    torch.testing.assert_close(again, whole, rtol=1e-7, atol=1e-8)


def test_loss_takes_absent_samples_and_modalities():
    clouds = [torch.randn(5, 2) + m for m in range(3)]
    options = {"epsilon": 0.7, "debias": False, "marginal_relaxation": [1.0, None, 0.5]}
    expected = multi_marginal_sinkhorn_loss(clouds, **options)
    padded = [torch.cat([x, torch.full((2, 2), math.nan)]) for x in clouds]
    weights = [torch.tensor([1.0] * 5 + [0.0] * 2)] * 3
    torch.testing.assert_close(
        multi_marginal_sinkhorn_loss(padded, weights, **options), expected, rtol=1e-6, atol=1e-8
    )
    without = multi_marginal_sinkhorn_loss(clouds, [None, None, torch.zeros(5)], **options)
    two = multi_marginal_sinkhorn_loss(
        clouds[:2], **(options | {"marginal_relaxation": [1.0, None]})
    )
    torch.testing.assert_close(without, two, rtol=1e-5, atol=1e-6)


def test_outliers_are_left_behind():
    """A far sample costs at most what its mass is worth."""
    x = torch.randn(20, 2)
    y = torch.cat([x[:-1], torch.tensor([[1000.0, 0.0]])])
    options = {"epsilon": 0.1, "debias": False}
    assert multi_marginal_sinkhorn_loss([x, y], **options) > 1e4
    assert multi_marginal_sinkhorn_loss([x, y], marginal_relaxation=1.0, **options) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x, y = torch.randn(10, 3), torch.randn(12, 3)
    options = {"epsilon": 0.5, "debias": False, "marginal_relaxation": 1.0}
    expected = multi_marginal_sinkhorn_loss([x.to(dtype).double(), y.to(dtype).double()], **options)
    found = multi_marginal_sinkhorn_loss([x.to(dtype), y.to(dtype)], **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.transforms
def test_compile_and_vmap():
    clouds = [torch.randn(3, 6, 2) + m for m in range(2)]

    def loss(x, y):
        return multi_marginal_sinkhorn_loss(
            [x, y], epsilon=0.5, debias=False, marginal_relaxation=1.0, tolerance=1e-9
        )

    expected = torch.stack([loss(x, y) for x, y in zip(*clouds)])
    torch.testing.assert_close(torch.func.vmap(loss)(*clouds), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*(x[0] for x in clouds)), expected[0])


@pytest.mark.parametrize(
    ("rho", "error", "match"),
    [
        (0.0, ValueError, "marginal_relaxation must be a finite number > 0"),
        ([1.0], ValueError, "2 of these"),
        ([1.0, "x"], TypeError, r"marginal_relaxation\[1\]"),
        ("strong", TypeError, "marginal_relaxation must be a finite number > 0"),
    ],
)
def test_errors(rho, error, match):
    with pytest.raises(error, match=match):
        multi_marginal_sinkhorn(
            {(0, 1): torch.rand(2, 3)}, [torch.ones(2), torch.ones(3)], 0.1,
            marginal_relaxation=rho,
        )  # fmt: skip


def test_a_debiased_form_is_refused():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="marginal_relaxation needs debias=False"):
        multi_marginal_sinkhorn_loss([x, x], marginal_relaxation=1.0)
    with pytest.raises(ValueError, match="marginal_relaxation needs debias=False"):
        MultiMarginalSinkhornLoss(marginal_relaxation=1.0)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("cost", [math.inf, 1e12])
def test_an_atom_that_no_plan_can_reach_is_paid_for(method, cost):
    """As without it, and its mass times rho: the divergence of nothing from its mass."""
    rho, options = 0.7, {"method": method, "tolerance": 1e-9}
    reached = torch.rand(3, 2)
    a, b = torch.rand(3) + 0.2, (torch.rand(3) + 0.2).requires_grad_()
    table = torch.cat([reached, torch.full((3, 1), cost)], -1).requires_grad_()
    found = solve({(0, 1): table}, [a, b], 0.1, rho, **options)
    expected = solve({(0, 1): reached}, [a, b[:2]], 0.1, rho, **options)
    assert found.converged
    torch.testing.assert_close(found.value, expected.value + rho * b[2], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.plan()[:, :2], expected.plan(), rtol=1e-6, atol=1e-8)
    assert (found.plan()[:, 2] <= 1e-200).all()
    by_cost, by_mass = torch.autograd.grad(found.value, [table, b])
    assert (by_cost[:, 2] == 0).all()
    assert by_cost.isfinite().all()
    torch.testing.assert_close(by_mass[2], torch.tensor(rho))


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_a_plan_of_nothing(method):
    """Every cost is far above rho, or forbidden: the value is epsilon and all penalties."""
    for cost in (30.0, math.inf):
        costs = {pair: torch.full((2, 2), cost) for pair in [(0, 1), (1, 2)]}
        found = solve(costs, [torch.ones(2)] * 3, 1e-3, 1e-2, method=method)
        assert found.converged
        torch.testing.assert_close(found.value, torch.tensor(1e-3 + 3 * 2 * 1e-2))
