"""Second derivatives through transport: those of the value are exact, all others raise."""

import itertools

import pytest
import torch
from torch.autograd import gradgradcheck

from multialign import (
    PrototypeAlignmentLoss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
)
from tests.forms import solve_in

GRAPHS = {
    "two": ((3, 4), [(0, 1)]),
    "complete": ((2, 3, 2), [(0, 1), (0, 2), (1, 2)]),
    "chain": ((2, 3, 2), [(0, 1), (1, 2)]),
    "cycle": ((2, 2, 3, 2), [(0, 1), (1, 2), (2, 3), (0, 3)]),
    "star": ((2, 2, 2, 2), [(0, 1), (0, 2), (0, 3)]),
    "complete, four": ((2, 2, 2, 2), list(itertools.combinations(range(4), 2))),
}


def hessian_product(function, x, direction, step=1e-5):
    """Return the derivative of the gradient along `direction`, by autograd and by differences."""

    def gradient(point, create_graph):
        point = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(point), point, create_graph=create_graph)
        return point, grad

    point, grad = gradient(x, True)
    (ours,) = torch.autograd.grad((grad * direction).sum(), point)
    ahead, behind = (gradient(x + s * direction, False)[1] for s in (step, -step))
    return ours, (ahead - behind) / (2 * step)


@pytest.mark.parametrize("form", ["vector", "table", "pairwise"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_value_by_gradgradcheck(graph, form):
    sizes, edges = GRAPHS[graph]
    inputs = [torch.rand(sizes[i], sizes[j], requires_grad=True) for i, j in edges]
    inputs += [(torch.rand(size) + 0.2).requires_grad_() for size in sizes]
    inputs.append(torch.tensor(0.7, requires_grad=True))

    def value(*tensors):
        costs = dict(zip(edges, tensors))
        return solve_in(form, costs, tensors[len(edges) : -1], tensors[-1], tolerance=1e-12).value

    assert gradgradcheck(value, inputs, atol=1e-5, fast_mode=True)


def test_value_of_a_full_cost_tensor_and_of_a_batch():
    marginals = [torch.rand(2, size) + 0.2 for size in (2, 3, 2)]

    def value(cost):
        return multi_marginal_sinkhorn(cost, marginals, 0.5, tolerance=1e-12).value.sum()

    ours, expected = hessian_product(value, torch.rand(2, 2, 3, 2), torch.randn(2, 2, 3, 2))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("graph", ["complete", "chain", "star", "cycle"])
@pytest.mark.parametrize("sizes", [(5, 4, 6), (30, 30, 30), (5, 5, 5, 5)])
def test_loss(sizes, graph, debias):
    others = [torch.randn(size, 2) + m for m, size in enumerate(sizes[1:], 1)]

    def loss(x):
        return multi_marginal_sinkhorn_loss(
            [x, *others], epsilon=2.0, graph=graph, debias=debias, tolerance=1e-12
        )

    x = torch.randn(sizes[0], 2)
    ours, expected = hessian_product(loss, x, torch.randn_like(x))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_weights_and_absent_samples():
    y, weights = torch.randn(6, 2), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])

    def loss(x):
        return multi_marginal_sinkhorn_loss([x, y], [weights, None], epsilon=1.0, tolerance=1e-12)

    x, direction = torch.randn(5, 2), torch.randn(5, 2)
    ours, expected = hessian_product(loss, x, direction)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert (ours[1] == 0).all()


@pytest.mark.parametrize("form", ["vector", "pairwise"])
@pytest.mark.parametrize("name", ["transport_cost", "potentials", "marginal", "plan"])
def test_all_other_results_raise(name, form):
    cost = torch.rand(3, 4, requires_grad=True)
    solution = solve_in(form, {(0, 1): cost}, [torch.ones(3), torch.ones(4)], 0.5)
    result = {
        "transport_cost": lambda: solution.transport_cost,
        "potentials": lambda: solution.potentials[0][0],
        "marginal": lambda: solution.marginal(0)[0],
        "plan": lambda: solution.plan()[0, 0],
    }[name]()
    (grad,) = torch.autograd.grad(result, cost, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only.*use value"):
        torch.autograd.grad(grad.square().sum(), cost)


def test_a_third_derivative_of_the_value_raises():
    cost = torch.rand(3, 4, requires_grad=True)
    value = multi_marginal_sinkhorn({(0, 1): cost}, [torch.ones(3), torch.ones(4)], 0.5).value
    (first,) = torch.autograd.grad(value, cost, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="first and second ones"):
        torch.autograd.grad(second.square().sum(), cost)


@pytest.mark.parametrize("objective", ["transport", "regularized"])
def test_prototypes(objective):
    """Of covariances that are tied, EM has derivatives of every order."""
    y = torch.randn(10, 2)

    def loss(x):
        module = PrototypeAlignmentLoss(
            2, covariance_type="tied", em_iterations=2, objective=objective, tolerance=1e-12,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return module([x, y])

    x = y + 0.5 * torch.randn(10, 2)
    if objective == "transport":
        with pytest.raises(RuntimeError, match='objective="regularized"'):
            hessian_product(loss, x, torch.randn_like(x))
    else:
        ours, expected = hessian_product(loss, x, torch.randn_like(x))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
