"""Every loss under torch.compile, torch.func, inference mode and deterministic algorithms."""

import copy
from functools import partial

import pytest
import torch

from multialign import (
    CosineDecouplingLoss,
    GaussianMomentLoss,
    MMDLoss,
    MultiMarginalSinkhornLoss,
    PrototypeAlignmentLoss,
    cosine_decoupling_loss,
    gaussian_moment_loss,
    mmd_loss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    prototype_alignment_loss,
    squared_euclidean_cost,
)


class Decoupling(CosineDecouplingLoss):
    def forward(self, features, weights=None):
        return super().forward(features, [2 * f.flip(-1) + 1 for f in features], weights)


MODULES = {
    "decoupling": Decoupling(),
    "moments": GaussianMomentLoss(),
    "mmd": MMDLoss(bandwidth="median"),
    "mmd unbiased": MMDLoss(bandwidth=[0.5, 2.0], estimator="unbiased"),
    "random features": MMDLoss(estimator="random_features", num_features=16),
    "sinkhorn": MultiMarginalSinkhornLoss(),
    "sinkhorn chain": MultiMarginalSinkhornLoss(graph="chain", method="sinkhorn"),
    "prototypes": PrototypeAlignmentLoss(2, em_iterations=2),
    "prototypes full": PrototypeAlignmentLoss(
        2, em_iterations=1, covariance_type="full", matching="plan", objective="regularized"
    ),
    "prototypes momentum": PrototypeAlignmentLoss(2, em_iterations=1, momentum=0.5),
}


def decoupling(features, weights=None):
    return cosine_decoupling_loss(features, [2 * f.flip(-1) + 1 for f in features], weights)


FUNCTIONS = {
    "decoupling": decoupling,
    "moments": gaussian_moment_loss,
    "mmd": partial(mmd_loss, bandwidth=2.0),
    "sinkhorn": partial(multi_marginal_sinkhorn_loss, tolerance=1e-10),
    "prototypes": lambda features, weights=None: prototype_alignment_loss(
        features,
        weights,
        num_prototypes=2,
        tolerance=1e-10,
        # Drawn alike in every call, where vmap asks for one draw for all.
        generator=torch.Generator().manual_seed(0),
    ),
}


def make(batch=()):
    """Two clusters far apart: the same prototypes from any seeds."""
    centres = torch.tensor([0.0, 30.0, 0.0, 30.0, 0.0, 30.0]).unsqueeze(-1)
    return [torch.randn(*batch, 6, 2) + centres for _ in range(2)]


@pytest.mark.transforms
@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_break(name):
    module = copy.deepcopy(MODULES[name])
    features = [f.requires_grad_() for f in make()]
    weights = [None, torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0, 1.0])]
    if name == "prototypes momentum":
        module(features, weights)  # the running mixtures get their shapes from the first batch
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    values = []
    for loss in (module, compiled):
        torch.manual_seed(0)
        value = loss(features, weights)
        values.append((value, torch.autograd.grad(value, features)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-8)


@pytest.mark.transforms
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_func_grad_and_vmap(name, weighted):
    loss = FUNCTIONS[name]
    features = make(batch=(3,))
    weights = torch.rand(3, 6) + 0.5 if weighted else None

    def one(x, y, w):
        return loss([x, y], None if w is None else [w, None])

    in_dims = (0, 0, 0 if weighted else None)
    rows = [(*(f[b] for f in features), None if weights is None else weights[b]) for b in range(3)]
    expected, grads = [], []
    for row in rows:
        x = row[0].clone().requires_grad_()
        value = one(x, *row[1:])
        expected.append(value.detach())
        grads.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(torch.func.grad(one)(*rows[0]), grads[0])
    mapped = torch.func.vmap(one, in_dims, randomness="same")(*features, weights)
    torch.testing.assert_close(mapped, torch.stack(expected))
    mapped = torch.func.vmap(torch.func.grad(one), in_dims, randomness="same")(*features, weights)
    torch.testing.assert_close(mapped, torch.stack(grads))


@pytest.mark.transforms
def test_vmap_of_the_solver():
    costs, marginal = torch.rand(4, 3, 5), torch.rand(4, 3)

    def solve(cost, a):
        solution = multi_marginal_sinkhorn({(0, 1): cost}, [a, torch.ones(5)], 0.1)
        return solution.value, solution.transport_cost, solution.plan(), solution.iterations

    mapped = torch.func.vmap(solve)(costs, marginal)
    for b in range(4):
        torch.testing.assert_close(tuple(x[b] for x in mapped), solve(costs[b], marginal[b]))


@pytest.mark.parametrize("name", MODULES)
def test_deterministic_algorithms(name):
    features = [f.requires_grad_() for f in make()]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            value = copy.deepcopy(MODULES[name])(features)
            results.append((value, *torch.autograd.grad(value, features)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", MODULES)
def test_inference_mode(name):
    features = make()
    torch.manual_seed(0)
    expected = copy.deepcopy(MODULES[name])(features)
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(copy.deepcopy(MODULES[name])(features), expected)
        assert torch.is_inference_mode_enabled()


@pytest.mark.transforms
@pytest.mark.parametrize("name", ["divergence", "transport cost"])
def test_problems_read_by_elimination(name):
    """Too large for their plan to be built: what they read and solve are operators."""
    points = [torch.randn(2, 30, 3) for _ in range(3)]

    def divergence(x, y, z):
        return multi_marginal_sinkhorn_loss([x, y, z], epsilon=2.0, tolerance=1e-11)

    def transport_cost(x, y, z):
        pairs = {(0, 1): (x, y), (0, 2): (x, z), (1, 2): (y, z)}
        costs = {edge: squared_euclidean_cost(*pair) for edge, pair in pairs.items()}
        uniform = [torch.ones(30)] * 3
        solution = multi_marginal_sinkhorn(costs, uniform, 2.0, tolerance=1e-11)
        return solution.transport_cost

    function = divergence if name == "divergence" else transport_cost
    first = [x[0].clone().requires_grad_() for x in points]
    expected = torch.autograd.grad(function(*first), first)
    gradient = torch.func.grad(function, argnums=(0, 1, 2))
    torch.testing.assert_close(gradient(*[x[0] for x in points]), expected)
    torch.testing.assert_close(tuple(g[0] for g in torch.func.vmap(gradient)(*points)), expected)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*first), first), expected)
