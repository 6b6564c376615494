"""Every loss under torch.compile, torch.func, inference mode and deterministic algorithms."""

import copy
import functools

import pytest
import torch

from multialign import (
    GaussianPrototypes,
    MultiMarginalSinkhornLoss,
    PrototypeAlignmentLoss,
    bures_wasserstein_cost,
    fit_gaussian_mixture,
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
        "mmd energy": False,
        "hsic": True,  # a part of "hsic normalized"
        "hsic median": True,
        "hsic unbiased": False,
        "hsic normalized": False,
        "matching": False,
        "matching chain": True,  # of two modalities, a complete graph
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


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The regular runs compile these in float32 too, and the long ones everything in every dtype.
COMPILED_IN_FLOAT32 = ("moments", "mmd median", "sinkhorn")


def _is_long(name, dtype):
    """Whether an entry is compiled in this dtype in the long runs alone."""
    if dtype == torch.float32:
        return name not in COMPILED_IN_FLOAT32
    return dtype != torch.float64 or COMPILED_LONG[name]


def _maybe_long(long, *values, id):
    return pytest.param(*values, marks=[pytest.mark.long] if long else [], id=id)


def _inputs(size, dtype=torch.float64, weighted=True):
    features = [f.to(dtype).requires_grad_() for f in clusters([size, size])]
    weight = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0, 1.0] + (size - 6) * [0.5]) if weighted else None
    return features, [None, weight]


def _assert_compiles_alike(module, compiled, features, weights, **tolerance):
    values = []
    for loss in (module, compiled):
        torch.manual_seed(0)
        value = loss(features, weights)
        values.append((value, torch.autograd.grad(value, features)))
    torch.testing.assert_close(values[0], values[1], **tolerance)


@pytest.mark.transforms
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        _maybe_long(_is_long(name, dtype), name, dtype, id=f"{name}-{dtype}")
        for name in VARIANTS
        for dtype in DTYPES
    ],
)
def test_compiles_without_a_break(name, dtype):
    torch.compiler.reset()  # numbers that differ from an earlier entry's would become symbols
    features, weights = _inputs(6, dtype)
    module = MODULES[name].sized(features).make().to(dtype)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {}
    if dtype != torch.float64:  # float32 inside; gradients in the dtype of the features
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps + 1e-4, "atol": 1e-3}
    _assert_compiles_alike(module, compiled, features, weights, **tolerance)


# Tracing sizes as symbols is slow: the regular runs do it for one loss of each kind of operator.
DYNAMIC = ("decoupling", "mmd bandwidths", "mmd random features", "sinkhorn biased")


@pytest.mark.transforms
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        _maybe_long(name not in DYNAMIC or not dynamic, name, dynamic, id=f"{name}-{dynamic}")
        for name in FUNCTIONS
        for dynamic in (True, None)
    ],
)
def test_a_last_batch_of_another_size(name, dynamic):
    torch.compiler.reset()
    module = FUNCTIONS[name].given(em_iterations=1).make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (9, 7):
        features, weights = _inputs(size, torch.float32)
        _assert_compiles_alike(module, compiled, features, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.transforms
@pytest.mark.parametrize(
    "name", [_maybe_long(name != "prototypes", name, id=name) for name in MODULES]
)
def test_two_calls_in_one_graph_of_dynamic_shapes(name):
    """What the first call makes a symbol of must be known in the second one."""
    torch.compiler.reset()
    features, weights = _inputs(7)
    module = MODULES[name].given(em_iterations=1).sized(features).make()

    def twice(features, weights):
        return module(features, weights) + module([2 * x for x in features], weights)

    state = copy.deepcopy(module.state_dict())
    values = []
    for call in (torch.compile(twice, fullgraph=True, backend="eager", dynamic=True), twice):
        module.load_state_dict(state)
        torch.manual_seed(0)
        values.append(call(features, weights))
    torch.testing.assert_close(*values)


SCALARS = {
    "moments": {"eps": [1e-6, 1e-4, 1e-2]},
    "mmd": {"bandwidth": [1.0, 2.0, 3.5]},
    "mmd bandwidths": {"bandwidth": [(0.5, 2.0), (0.75, 2.5), (1.0, 3.0)]},
    "mmd random features": {"bandwidth": [1.0, 2.0, 3.5]},
    "hsic": {"bandwidth": [1.0, 2.0, 3.5]},
    "matching": {"epsilon": [0.5, 1.0, 1.5], "tolerance": [1e-6, 1e-7, 1e-8]},
    "sinkhorn": {"epsilon": [0.5, 1.0, 1.5], "tolerance": [1e-6, 1e-7, 1e-8]},
    "prototypes": {
        "epsilon": [0.1, 0.2, 0.4],
        "transport_weight": [1.0, 0.5, 0.25],
        "prototype_weight": [1.0, 0.5, 0.25],
        "tolerance": [1e-6, 1e-7, 1e-8],
    },
}


@pytest.mark.transforms
@pytest.mark.parametrize(
    ("name", "option"),
    [
        _maybe_long("mmd" != name != "moments", name, option, id=f"{name}-{option}")
        for name, options in SCALARS.items()
        for option in options
    ],
)
def test_a_number_that_changes_between_calls(name, option):
    torch.compiler.reset()
    loss = FUNCTIONS[name].given(em_iterations=1)

    def call(features, weights, number):
        return loss.function(features, weights, **{**loss.options, option: number})

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    features, weights = _inputs(6)
    values = set()
    for number in SCALARS[name][option]:
        now, again = (functools.partial(f, number=number) for f in (call, compiled))
        _assert_compiles_alike(now, again, features, weights, rtol=1e-5, atol=1e-7)
        torch.manual_seed(0)
        values.add(float(now(features, weights).detach()))
    assert len(values) == len(SCALARS[name][option]) or option == "tolerance"


# Those of the other losses are long to trace.
EXPORTED = ("decoupling", "moments", "mmd", "hsic", "matching", "sinkhorn biased")


# Without `num_modalities` the prototypes' modules are made in the first call.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.transforms
@pytest.mark.parametrize(
    "name",
    [_maybe_long(name not in EXPORTED, name, id=name) for name in FUNCTIONS],
)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_exports(name, strict):
    torch.compiler.reset()
    module = FUNCTIONS[name].given(em_iterations=1).make()
    features, weights = _inputs(6)
    features = [x.detach() for x in features]
    program = torch.export.export(module, (features, weights), strict=strict)
    values = []
    for call in (program.module(), module):
        torch.manual_seed(0)
        values.append(call(features, weights))
    torch.testing.assert_close(*values)


def _solve(points):
    costs = {(0, 1): squared_euclidean_cost(*points)}
    return multi_marginal_sinkhorn(costs, [torch.ones(6, dtype=costs[0, 1].dtype)] * 2, 0.5)


PUBLIC = {
    "solver": lambda x: _solve(x).value,
    "transport cost": lambda x: _solve(x).transport_cost,
    "solution of clouds": lambda x: MultiMarginalSinkhornLoss().solve(x).value,
    "solution of prototypes": lambda x: PrototypeAlignmentLoss(2, em_iterations=1).solve(x).loss,
    "mixture": lambda x: fit_gaussian_mixture(
        x[0], 2, iterations=2, tolerance=0.0
    ).log_prob(x[0]).sum(),
    "prototypes": lambda x: GaussianPrototypes(2, em_iterations=2)(x[0]).posterior(x[0])[0, 0],
    "Bures-Wasserstein": lambda x: bures_wasserstein_cost(
        x[0], x[0].square(), x[1], x[1].square()
    ).sum(),
}  # fmt: skip


@pytest.mark.transforms
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        _maybe_long(dtype != torch.float32, name, dtype, id=f"{name}-{dtype}")
        for name in PUBLIC
        for dtype in DTYPES
    ],
)
def test_public_functions_compile(name, dtype):
    torch.compiler.reset()
    features, _ = _inputs(6, dtype)
    function = PUBLIC[name]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    # Where no gradient is asked for, another graph is traced.
    for points in (features, [x.detach() for x in features]):
        values = []
        for call in (function, compiled):
            torch.manual_seed(0)
            values.append(call(points))
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


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
