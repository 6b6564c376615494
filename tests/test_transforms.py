"""Every loss under torch.compile, torch.func, inference mode and deterministic algorithms."""

import copy

import pytest
import torch

from multialign import (
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    squared_euclidean_cost,
)
from tests.losses import FUNCTIONS, VARIANTS, clusters, each

# Two iterations make a loop. Those of full matrices are long to trace, and one is enough.
MODULES = {
    name: loss.given(em_iterations=1 if name in ("prototypes full", "prototypes tied") else 2)
    for name, loss in VARIANTS.items()
}
LOSSES = {name: loss.given(tolerance=1e-10) for name, loss in FUNCTIONS.items()}

every_module = pytest.mark.parametrize("name", MODULES)

# Whether an entry is compiled in the long runs alone: what is traced is another entry's trace.
COMPILED_LONG = each(
    {
        "decoupling": False,
        "moments": False,
        "moments mean": True,  # a part of "moments"
        "moments covariance": True,
        "moments skewness": True,
        "mmd": True,  # a part of "mmd bandwidths"
        "mmd bandwidths": False,
        "mmd median": False,
        "mmd unbiased": False,
        "mmd random features": False,
        "sinkhorn": False,
        "sinkhorn chain": True,  # of two modalities, a complete graph
        "sinkhorn biased": True,  # a part of "sinkhorn"
        "sinkhorn sweeps": False,
        "prototypes": False,
        "prototypes plan": True,  # the fit of "prototypes", the rest of "prototypes full"
        "prototypes full": False,
        "prototypes tied": True,  # the steps of "prototypes full"
        "prototypes spherical": True,  # the steps of "prototypes"
        "prototypes momentum": False,
    }
)


@pytest.mark.transforms
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if long else [])
        for name, long in COMPILED_LONG.items()
    ],
)
def test_compiles_without_a_break(name):
    torch.compiler.reset()  # numbers that differ from an earlier entry's would become symbols
    features = [f.requires_grad_() for f in clusters([6, 6])]
    module = MODULES[name].sized(features).make()
    weights = [None, torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0, 1.0])]
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    values = []
    for loss in (module, compiled):
        torch.manual_seed(0)
        value = loss(features, weights)
        values.append((value, torch.autograd.grad(value, features)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-8)


@pytest.mark.transforms
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_func_grad_and_vmap(name, weighted):
    loss = LOSSES[name]
    features = clusters([6, 6], batch=(3,))
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


@every_module
def test_deterministic_algorithms(name):
    features = [f.requires_grad_() for f in clusters([6, 6])]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            value = MODULES[name].sized(features).make()(features)
            results.append((value, *torch.autograd.grad(value, features)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_module
def test_inference_mode(name):
    features = clusters([6, 6])
    torch.manual_seed(0)
    expected = MODULES[name].sized(features).make()(features)
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(MODULES[name].sized(features).make()(features), expected)
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
