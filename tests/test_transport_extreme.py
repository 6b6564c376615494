"""Costs that forbid a pair, and costs so large that they would take the digits of the others."""

import math

import ot
import pytest
import torch

from multialign import ConvergenceWarning, multi_marginal_sinkhorn, multi_marginal_sinkhorn_loss
from tests.forms import solve_in

HUGE = [1e6, 1e8, 1e9, 1e12, 1e15, math.inf]
EDGES = [(0, 1), (0, 2), (1, 2)]


def masked(size, seed=0, share=0.3):
    """Return costs, and a mask that leaves every matching on the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(size, size, generator=generator)
    mask = torch.rand(size, size, generator=generator) < share
    return base, mask.fill_diagonal_(False)


def dense_sweeps(log_kernel, marginals, sweeps=3000):
    """Return the plan of a dense kernel given in logarithms, by plain sweeps."""
    count = len(marginals)
    for p in list(range(count)) * sweeps:
        others = [q for q in range(count) if q != p]
        shape = [-1 if q == p else 1 for q in range(count)]
        step = marginals[p].log() - log_kernel.logsumexp(others)
        log_kernel = log_kernel + step.reshape(shape)
    return log_kernel.exp()


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("seed", range(3))
def test_avoided_by_two_marginals(huge, method, seed):
    base, mask = masked(8, seed)
    nu = torch.full((8,), 1 / 8)
    cost = base.masked_fill(mask, 1e3)
    expected = ot.sinkhorn(
        nu.numpy(), nu.numpy(), cost.numpy(), 0.05, method="sinkhorn_log", numItermax=5000,
        stopThr=1e-12,
    )  # fmt: skip
    solution = multi_marginal_sinkhorn(
        {(0, 1): base.masked_fill(mask, huge)}, [nu, nu], 0.05, method=method, tolerance=1e-7
    )
    assert solution.converged
    torch.testing.assert_close(solution.plan(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    value = (expected * (base * ~mask).numpy()).sum()
    torch.testing.assert_close(solution.transport_cost.item(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["vector", "table", "pairwise"])
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("huge", HUGE)
def test_avoided_by_three_marginals(huge, tables, form):
    costs, masks = {}, {}
    for n, edge in enumerate(EDGES):
        base, mask = masked(5, seed=n, share=0.2)
        masks[edge] = mask if n < tables else torch.zeros_like(mask)
        costs[edge] = base.masked_fill(masks[edge], huge)
    marginals = [torch.full((5,), 1 / 5)] * 3
    solution = solve_in(form, costs, marginals, 0.1, tolerance=1e-8)
    assert solution.converged
    log_kernel = torch.zeros(5, 5, 5)
    for (i, j), cost in costs.items():
        table = (-cost / 0.1).masked_fill(masks[i, j], -math.inf)
        log_kernel = log_kernel + table.reshape([5 if p in (i, j) else 1 for p in range(3)])
    plan = dense_sweeps(log_kernel, marginals)
    torch.testing.assert_close(solution.plan(), plan, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("huge", HUGE[:-1])
def test_paid_where_it_cannot_be_avoided(huge, method):
    """0.4 of the mass has to cross; the plan is determined."""
    cost = torch.tensor([[0.1, huge], [huge, 0.3]])
    marginals = [torch.tensor([0.7, 0.3]), torch.tensor([0.3, 0.7])]
    solution = multi_marginal_sinkhorn({(0, 1): cost}, marginals, 0.05, method=method)
    assert solution.converged
    plan = torch.tensor([[0.3, 0.4], [0.0, 0.3]])
    torch.testing.assert_close(solution.plan(), plan, rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.transport_cost.item(), 0.4 * huge, rtol=1e-5, atol=0)
    torch.testing.assert_close(solution.value.item(), 0.4 * huge, rtol=1e-5, atol=0)


@pytest.mark.parametrize("huge", HUGE[:-1])
def test_a_whole_row_is_paid(huge):
    """A constant added to a row changes nothing but the value."""
    base, nu = torch.rand(4, 5), torch.rand(4) + 0.1
    marginals = [nu, torch.ones(5)]
    shift = torch.tensor([0.0, 0.0, huge, 0.0]).unsqueeze(-1)
    expected = multi_marginal_sinkhorn({(0, 1): base}, marginals, 0.1, tolerance=1e-9)
    solution = multi_marginal_sinkhorn({(0, 1): base + shift}, marginals, 0.1, tolerance=1e-7)
    assert solution.converged
    # The sum rounds the row's own costs.
    rounding = 2 * torch.finfo(torch.float64).eps * huge / 0.1
    atol = 1e-6 + rounding
    torch.testing.assert_close(solution.plan(), expected.plan(), rtol=0, atol=atol)
    paid = huge * (nu[2] / nu.sum()).item()
    torch.testing.assert_close(solution.value.item() / paid, 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_half_precision(dtype):
    base, mask = masked(6)
    cost = base.masked_fill(mask, math.inf).to(dtype)
    nu = torch.ones(6, dtype=dtype)
    solution = multi_marginal_sinkhorn({(0, 1): cost}, [nu, nu], 0.1)
    assert solution.converged
    assert (solution.plan()[mask] == 0).all()


@pytest.mark.parametrize("form", ["vector", "table", "pairwise"])
@pytest.mark.parametrize("huge", [1e12, math.inf])
def test_gradients(huge, form):
    base, mask = masked(5)
    nu = torch.rand(5) + 0.5
    results = []
    for big in (1e3, huge):
        cost = base.masked_fill(mask, big).requires_grad_()
        marginal = nu.clone().requires_grad_()
        epsilon = torch.tensor(0.1, requires_grad=True)
        solution = solve_in(form, {(0, 1): cost}, [marginal, nu.flip(0)], epsilon, tolerance=1e-9)
        total = solution.value + solution.transport_cost + solution.marginal(0)[1]
        total = total + solution.potentials[0][1] - solution.potentials[0][0]
        results.append(torch.autograd.grad(total, [cost, marginal, epsilon]))
        assert all(x.isfinite().all() for x in results[-1])
    assert (results[1][0][mask] == 0).all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
@pytest.mark.parametrize("form", ["auto", "pairwise"])
def test_what_no_plan_can_meet_leaves_the_rest_of_a_batch_alone(form):
    base, mask = masked(5)
    impossible = base.clone()
    impossible[0] = math.inf
    cost = torch.stack([base.masked_fill(mask, math.inf), impossible]).requires_grad_()
    nu = torch.ones(2, 5)
    solution = solve_in(form, {(0, 1): cost}, [nu, nu], 0.1, max_iterations=300)
    assert solution.converged.tolist() == [True, False]
    alone = solve_in(form, {(0, 1): cost[0].detach()}, [nu[0], nu[0]], 0.1)
    torch.testing.assert_close(solution.value[0], alone.value)
    (grad,) = torch.autograd.grad(solution.value[0] + solution.transport_cost[0], cost)
    assert grad[0].isfinite().all()
    assert (grad[0][mask] == 0).all()


def test_an_impossible_problem_warns():
    cost = torch.full((2, 2), math.inf)
    cost[0, 0] = cost[1, 0] = 0.0
    with pytest.warns(ConvergenceWarning):
        solution = multi_marginal_sinkhorn(
            {(0, 1): cost}, [torch.ones(2)] * 2, 0.1, max_iterations=100
        )
    assert not solution.converged


@pytest.mark.transforms
@pytest.mark.parametrize("extreme", [False, True])
def test_compile_and_vmap(extreme):
    base, mask = masked(5)
    costs = torch.stack([base + 10, base.T.masked_fill(mask, math.inf if extreme else 2.0)])
    nu = torch.rand(2, 5) + 0.5

    def value(cost, marginal):
        solution = multi_marginal_sinkhorn({(0, 1): cost}, [marginal, marginal.flip(0)], 0.1)
        return solution.value + solution.transport_cost

    expected = torch.stack([value(*pair) for pair in zip(costs, nu)])
    torch.testing.assert_close(torch.func.vmap(value)(costs, nu), expected, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    cost = costs[1].clone().requires_grad_()
    found, ours = compiled(cost, nu[1]), value(cost, nu[1])
    torch.testing.assert_close(found, expected[1], rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(x, cost)[0] for x in (found, ours)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_loss_takes_an_infinite_weighting_of_nothing():
    """A point of weight 0 may be anywhere, infinity included."""
    x, y = torch.randn(5, 2), torch.randn(6, 2)
    expected = multi_marginal_sinkhorn_loss([x, y], epsilon=0.5)
    padded = torch.cat([x, torch.full((1, 2), math.inf)])
    weights = [torch.tensor([1.0] * 5 + [0.0]), None]
    torch.testing.assert_close(
        multi_marginal_sinkhorn_loss([padded, y], weights, epsilon=0.5), expected
    )
