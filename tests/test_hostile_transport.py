"""Inputs that break, or have broken, the transport solver. Random ones are in hostile_transport."""

import warnings
from functools import partial
from itertools import combinations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from multialign import (
    ConvergenceWarning,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    prototype_alignment_loss,
)
from tests import reference


def small_masses(seed=161):
    """Four marginals of two atoms, one of each with nearly nothing, at a small epsilon."""
    generator = torch.Generator().manual_seed(seed)
    costs = {
        edge: torch.rand(2, 2, generator=generator).requires_grad_()
        for edge in combinations(range(4), 2)
    }
    marginals = [torch.rand(2, generator=generator) + 0.1 for _ in range(4)]
    for marginal in marginals:
        marginal[0] *= 1e-9
    return costs, marginals


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_epsilon_underflows(relative, dtype):
    cost = torch.rand(6, 7, dtype=dtype, requires_grad=True)
    marginals = [torch.rand(n, dtype=dtype).requires_grad_() for n in (6, 7)]
    solution = multi_marginal_sinkhorn({(0, 1): cost}, marginals, relative)
    assert solution.converged
    assert solution.error <= (1e-4 if dtype == torch.float32 else 1e-6)
    for result in (solution.value, solution.transport_cost, *solution.potentials):
        assert result.isfinite().all()
        # Of the potentials by the costs it grows as 1 / epsilon.
        grads = torch.autograd.grad(result.sum(), (cost, *marginals), retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("norm", [1e-30, 1e-6, 1e6, 1e30])
def test_the_unit_of_cost_does_not_matter(norm):
    cost, marginals = torch.rand(5, 6), [torch.rand(5), torch.rand(6)]
    expected = multi_marginal_sinkhorn({(0, 1): cost}, marginals, 0.02)
    solution = multi_marginal_sinkhorn({(0, 1): norm * cost}, marginals, norm * 0.02)
    torch.testing.assert_close(solution.plan(), expected.plan(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(solution.value / norm, expected.value)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-5])
def test_a_tie_between_parts_of_equal_mass_is_solved(epsilon):
    # Half of the mass has its place in each column up to exp(-1 / epsilon): until potentials have
    # moved by 1 / epsilon the error stays 1/2, while the dual rises.
    cost = torch.tensor([[0.0, 2.0], [0.0, 3.0], [2.0, 0.0], [0.0, 3.0]])
    solution = multi_marginal_sinkhorn({(0, 1): cost}, [torch.ones(4), torch.ones(2)], epsilon)
    expected = reference.exact_transport(cost.numpy(), [torch.full((4,), 0.25), [0.5, 0.5]])
    torch.testing.assert_close(solution.transport_cost.item(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [161, 1, 2, 3])
def test_masses_near_nothing_do_not_stop_it(seed):
    solution = multi_marginal_sinkhorn(*small_masses(seed), 1e-6)
    assert solution.converged
    assert solution.iterations < 500


@pytest.mark.parametrize("relative", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize(("size", "count"), [(5, 2), (30, 2), (100, 2), (20, 3), (5, 4)])
def test_equal_weights_at_a_small_epsilon_take_few_steps(size, count, relative):
    """An assignment problem in the limit: the plan tends to a permutation."""
    points = [torch.rand(size, 2) for _ in range(count)]
    costs = {
        (i, j): torch.cdist(points[i], points[j]).square() for i, j in combinations(range(count), 2)
    }
    deviation = sum(cost.var() for cost in costs.values()).sqrt().item()
    marginals = [torch.ones(size)] * count
    solution = multi_marginal_sinkhorn(costs, marginals, relative * deviation)
    assert solution.converged
    assert solution.iterations < 150
    if count == 2:
        rows, columns = linear_sum_assignment(costs[0, 1].numpy())
        optimum = costs[0, 1].numpy()[rows, columns].mean()
        assert solution.transport_cost.item() == pytest.approx(optimum, rel=1e-2 * relative / 1e-4)


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("graph", ["complete", "chain"])
def test_a_far_atom_of_little_mass_takes_few_steps(graph, relative):
    """Its mass has to cross a cost of hundreds of deviations."""
    points = [torch.randn(20, 2) + 0.5 * m for m in range(3)]
    marginals = [torch.rand(20) + 0.1 for _ in range(3)]
    for x, nu in zip(points, marginals):
        x[0] += 50
        nu[0] *= 1e-9
    edges = [(0, 1), (1, 2)] + [(0, 2)] * (graph == "complete")
    costs = {(i, j): torch.cdist(points[i], points[j]).square() for i, j in edges}
    deviation = sum(cost.var() for cost in costs.values()).sqrt().item()
    solution = multi_marginal_sinkhorn(costs, marginals, relative * deviation)
    assert solution.converged
    assert solution.iterations < 500


@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
def test_an_unfinished_plan_is_finite_where_a_gradient_is_recorded():
    costs, marginals = small_masses()
    solution = multi_marginal_sinkhorn(costs, marginals, 1e-6, max_iterations=20)
    with torch.no_grad():
        assert solution.transport_cost.isfinite()
    assert solution.transport_cost.isfinite()


@pytest.mark.parametrize("edges", [[(0, 1)], [(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 2)]])
def test_plans_of_more_than_16384_entries_have_gradients(edges):
    count = 1 + max(j for _, j in edges)
    size = 150 if count == 2 else 30
    costs = {edge: torch.rand(size, size, requires_grad=True) for edge in edges}
    marginals = [torch.rand(size).requires_grad_() for _ in range(count)]
    solution = multi_marginal_sinkhorn(costs, marginals, 1.0)
    direction = torch.randn(size, size)
    (grad,) = torch.autograd.grad(solution.transport_cost, costs[(0, 1)])
    step = 1e-4
    moved = []
    for sign in (step, -step):
        changed = {**costs, (0, 1): costs[(0, 1)].detach() + sign * direction}
        moved.append(multi_marginal_sinkhorn(changed, marginals, 1.0).transport_cost.detach())
    slope = (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-7)


def test_absent_points_take_no_digits_from_others_far_from_the_origin():
    x = torch.randn(60, 190) / 1000 + 1000
    y = x + torch.randn(60, 190) / 1000
    kept = torch.zeros(60)
    kept[:2] = 1
    alone = multi_marginal_sinkhorn_loss([x[:2], y[:2]])
    torch.testing.assert_close(
        multi_marginal_sinkhorn_loss([x, y], [kept, kept]), alone, rtol=1e-9, atol=0
    )


def test_equal_clouds_without_diameter_have_divergence_0_in_float32():
    x = torch.ones(56, 8, dtype=torch.float32)
    assert multi_marginal_sinkhorn_loss([x, x, x]).abs() < 1e-7


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("sizes", [(2, 3), (9, 9, 9), (40, 3, 30), (12, 12, 12, 12)])
def test_no_problems_have_no_solutions(sizes, method):
    edges = combinations(range(len(sizes)), 2)
    costs = {(i, j): torch.rand(0, sizes[i], sizes[j], requires_grad=True) for i, j in edges}
    marginals = [torch.rand(0, n) for n in sizes]
    solution = multi_marginal_sinkhorn(costs, marginals, 0.5, method=method)
    assert solution.value.shape == solution.converged.shape == (0,)
    assert solution.pairwise_marginal(0, 1).shape == (0, *sizes[:2])
    assert [f.shape for f in solution.potentials] == [(0, n) for n in sizes]
    gradients = torch.autograd.grad(solution.transport_cost.sum(), list(costs.values()))
    assert all(grad.shape == cost.shape for grad, cost in zip(gradients, costs.values()))


@pytest.mark.parametrize(
    "loss",
    [
        multi_marginal_sinkhorn_loss,
        partial(multi_marginal_sinkhorn_loss, graph="chain"),
        partial(prototype_alignment_loss, num_prototypes=2),
        partial(prototype_alignment_loss, num_prototypes=2, covariance_type="full"),
    ],
)
def test_the_mean_over_no_problems_is_nan(loss):
    x = torch.randn(0, 5, 3, requires_grad=True)
    value = loss([x, x])
    assert value.isnan()  # as everywhere in torch
    assert torch.autograd.grad(value, x)[0].shape == x.shape


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_non_finite_input_ends_at_once(method, bad):
    """A cost of infinity forbids its pair instead: test_transport_extreme.py."""
    costs = {(0, 1): torch.rand(4, 5), (1, 2): torch.rand(5, 3)}
    costs[(0, 1)][1, 2] = bad
    marginals = [torch.ones(n) for n in (4, 5, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        solution = multi_marginal_sinkhorn(costs, marginals, 1e-6, method=method)
    assert not solution.value.isfinite()
    assert not solution.converged
    assert solution.iterations <= 5


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_zero_masses_equal_atoms_removed_with_their_gradients(method):
    costs = {(0, 1): torch.rand(4, 5), (1, 2): torch.rand(5, 3), (0, 2): torch.rand(4, 3)}
    kept = [torch.tensor([0, 2, 3]), torch.tensor([1, 2, 4]), torch.tensor([0, 2])]
    marginals = [torch.zeros(n).index_fill(0, k, 1.0) for n, k in zip((4, 5, 3), kept)]
    for (i, j), cost in costs.items():
        gone = (marginals[i] == 0).unsqueeze(-1) | (marginals[j] == 0)
        cost[gone] = torch.nan
    few = {(i, j): c[kept[i]][:, kept[j]].requires_grad_() for (i, j), c in costs.items()}
    for cost in costs.values():
        cost.requires_grad_()
    whole = multi_marginal_sinkhorn(costs, marginals, 0.1, method=method, tolerance=1e-10)
    part = multi_marginal_sinkhorn(
        few, [torch.ones(len(k)) for k in kept], 0.1, method=method, tolerance=1e-10
    )
    torch.testing.assert_close(whole.value, part.value)
    grads = torch.autograd.grad(whole.transport_cost, list(costs.values()))
    expected = torch.autograd.grad(part.transport_cost, list(few.values()))
    for (i, j), grad, wanted in zip(costs, grads, expected):
        torch.testing.assert_close(grad[kept[i]][:, kept[j]], wanted)
        assert grad.isfinite().all()
        assert torch.allclose(grad.sum(), wanted.sum())
