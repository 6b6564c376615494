"""Modules as training tools use them: copied, averaged, saved, cast, set, given NumPy numbers."""

import copy
import inspect
import io
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import multialign
from multialign import GaussianPrototypes, PrototypeAlignmentLoss, fit_gaussian_mixture
from tests.losses import LOSSES, VARIANTS, Partnered, clusters
from tests.test_mixture import TYPES

every_entry = pytest.mark.parametrize("name", VARIANTS)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_type = pytest.mark.parametrize("covariance_type", TYPES)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])

X = [torch.randn(16, 5, generator=torch.Generator().manual_seed(m)).double() for m in range(3)]
SIZES = {"num_features": 5, "num_modalities": 3}


def made(name, features=X, **options):
    """Return the Module of an entry, in the dtype of the features."""
    return VARIANTS[name].sized(features).make(**options).to(features[0].dtype)


def loss_in(module):
    """Return the loss itself, where `made` has wrapped it."""
    return module.module if isinstance(module, Partnered) else module


def evaluate(module, features=X):
    """Return the loss, with the same random numbers in every call."""
    torch.manual_seed(0)
    return module(features)


def state_of(module):
    return copy.deepcopy(module.state_dict())


def assert_same_state(module, state):
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


# --- copies --------------------------------------------------------------------------------------


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@every_entry
def test_copies_share_the_process_group_and_pickles_drop_it(name, group):
    if not VARIANTS[name].takes("process_group"):
        pytest.skip("computes on one process")
    module = made(name, process_group=group)
    expected = evaluate(copy.deepcopy(module))
    for copied in (copy.copy(module), copy.deepcopy(module), copy.deepcopy([module])[0]):
        assert loss_in(copied).process_group is group
    with pytest.warns(UserWarning, match="process_group: after loading, set it again"):
        text = pickle.dumps(module)
    loaded = pickle.loads(text)
    assert loss_in(loaded).process_group is None
    loss_in(loaded).process_group = group
    torch.testing.assert_close(evaluate(loaded), expected)


@every_entry
def test_copies_are_apart(name):
    module = made(name)
    evaluate(module)
    state = state_of(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without a process group a pickle loses nothing
        others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    expected = evaluate(module)
    for other in others:
        assert_same_state(other, state)
        torch.testing.assert_close(evaluate(other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("last", [False, True])
@every_entry
@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
def test_averages(name, use_buffers, last):
    """With use_buffers, of the buffers too; without, they are those of the newest model."""
    model = nn.Module()
    parts = {"loss": made(name), "map": nn.Linear(5, 5), "norm": nn.BatchNorm1d(5)}
    for key in reversed(parts) if last else parts:
        setattr(model, key, parts[key])
    average = AveragedModel(model, use_buffers=use_buffers)
    states = []
    for step in range(3):
        evaluate(model.loss, [model.norm(model.map(x)) + step for x in X]).backward()
        average.update_parameters(model)
        states.append(state_of(model.loss))
    for key, value in average.module.loss.state_dict().items():
        seen = torch.stack([state[key] for state in states])
        if not use_buffers:
            assert torch.equal(value, seen[-1])
        elif value.is_floating_point():
            torch.testing.assert_close(value, seen.mean(0))
        else:
            assert value > 0
    assert evaluate(average.module.loss.eval()).isfinite()


def test_replicas_of_data_parallel_write_into_the_module():
    module = PrototypeAlignmentLoss(2, momentum=0.5, **SIZES)
    replica = module._replicate_for_data_parallel()
    replica.prototypes = module.prototypes._replicate_for_data_parallel()
    for key, model in module.prototypes._modules.items():
        replica.prototypes._modules[key] = model._replicate_for_data_parallel()
    evaluate(replica)
    assert all(model.num_batches_tracked == 1 for model in module.prototypes)


# --- checkpoints ---------------------------------------------------------------------------------


@every_entry
def test_states_round_trip_strictly(name):
    module = made(name)
    first = state_of(module)
    value = evaluate(module)
    evaluate(module)
    second = state_of(module)
    file = io.BytesIO()
    torch.save(second, file)
    file.seek(0)
    other = made(name)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other, second)
    torch.testing.assert_close(evaluate(other), evaluate(module), rtol=0, atol=0)
    # The state before the first batch too, as learning-rate finders restore it.
    module.load_state_dict(first)
    torch.testing.assert_close(evaluate(module), value, rtol=0, atol=0)


@every_entry
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_round_trip(name, tmp_path):
    module, other = made(name), made(name)
    evaluate(module)
    if not module.state_dict():
        return  # nothing to save
    dcp.save(module.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    assert_same_state(other, module.state_dict())


@every_entry
def test_loading_keeps_the_dtype_and_works_after_inference_mode(name):
    module = made(name)
    evaluate(module)
    state = module.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        other = made(name, [x.to(dtype) for x in X])
        with torch.inference_mode():
            evaluate(other, [x.to(dtype) for x in X])
        other.load_state_dict(state)
        expected = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        assert_same_state(other, expected)
        assert evaluate(other, [x.to(dtype) for x in X]).isfinite()


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (4, {}),
        (3, {"num_features": 6}),
        (3, {"num_modalities": 2}),
        *((3, {"covariance_type": kind}) for kind in TYPES if kind != "diag"),
    ],
)
def test_checkpoints_of_other_sizes_are_refused(count, options):
    state = PrototypeAlignmentLoss(3, momentum=0.1, **SIZES).state_dict()
    other = PrototypeAlignmentLoss(count, momentum=0.1, **{**SIZES, **options})
    match = "Unexpected key" if "num_modalities" in options else "size mismatch"
    with pytest.raises(RuntimeError, match=match):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*num_batches_tracked"):
        other.load_state_dict({})


# --- the running mixture -------------------------------------------------------------------------


@every_type
def test_buffers_before_and_after_the_first_batch(covariance_type):
    options = {"num_features": 5, "covariance_type": covariance_type}
    module = GaussianPrototypes(3, momentum=0.25, **options)
    identity = {
        "diag": torch.ones(3, 5),
        "full": torch.eye(5).expand(3, 5, 5),
        "tied": torch.eye(5)[None],
        "spherical": torch.ones(3),
    }[covariance_type]
    first = {
        "running_weights": torch.full((3,), 1 / 3),
        "running_means": torch.zeros(3, 5),
        "running_covariances": identity,
        "num_batches_tracked": torch.tensor(0),
    }
    assert list(module.state_dict()) == list(first)
    assert_same_state(module, first)
    places = [buffer.data_ptr() for buffer in module.buffers()]
    whole = GaussianPrototypes(3, momentum=1.0, **options)
    mixture, batch = evaluate(module, X[0]), evaluate(whole, X[0])
    assert places == [buffer.data_ptr() for buffer in module.buffers()]
    assert module.num_batches_tracked == 1
    # (1 - momentum) old + momentum batch, in the first and second moments of each component.
    weights = 0.75 / 3 + 0.25 * batch.weights
    torch.testing.assert_close(module.running_weights, weights)
    means = 0.25 * batch.weights.unsqueeze(-1) * batch.means / weights.unsqueeze(-1)
    torch.testing.assert_close(module.running_means, means)
    torch.testing.assert_close(mixture.means, means)
    module.reset_running_stats()
    assert_same_state(module, first)
    module.eval()
    # In eval mode too, a fit; and nothing is kept.
    torch.testing.assert_close(evaluate(module, X[0]).means, batch.means)
    assert_same_state(module, first)


def test_a_bad_first_batch_is_not_kept():
    module = PrototypeAlignmentLoss(2, momentum=0.5, **SIZES)
    state = state_of(module)
    assert not module([torch.full_like(x, torch.nan) for x in X]).isfinite()
    assert_same_state(module, state)
    assert module(X).isfinite()


def test_a_later_batch_spares_the_gradient_of_an_earlier_one():
    module = PrototypeAlignmentLoss(2, momentum=0.5, **SIZES)
    evaluate(module)
    state, grads = state_of(module), []
    for again in (False, True):
        module.load_state_dict(state)
        leaves = [x.clone().requires_grad_() for x in X]
        loss = evaluate(module, leaves)
        if again:
            evaluate(module)
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_components_without_samples_start_again_at_a_momentum_of_1():
    """Of weight 0, no later batch would find them."""
    module = GaussianPrototypes(3, num_features=5, momentum=1.0)
    module(X[0])
    for shift in (100.0, 0.0):
        mixture = module(X[0] + shift)
        assert (mixture.weights > 0.01).all()
        assert ((mixture.means - shift).abs() < 5).all()


def test_counters_are_read_only_where_something_else_wrote_them(monkeypatch):
    module = PrototypeAlignmentLoss(2, momentum=0.5, **SIZES)
    evaluate(module)
    evaluate(module)
    reads = []
    tolist = torch.Tensor.tolist

    def record(x):
        if x.shape == (3,) and x.dtype == torch.long:
            reads.append(id(x))
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", record)
    evaluate(module)
    evaluate(module.eval())
    assert not reads
    module.load_state_dict(state_of(module))
    evaluate(module)
    assert len(set(reads)) == 1  # of all three at once


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_with_momentum_is_refused(use_reentrant):
    module = PrototypeAlignmentLoss(2, momentum=0.5, **SIZES)
    leaf = X[0].clone().requires_grad_()
    loss = checkpoint(lambda x: module([x, *X[1:]]), leaf, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="cannot be repeated in the backward pass"):
        loss.backward()
    # In eval mode nothing changes, and it is right.
    module.eval()
    repeated = checkpoint(lambda x: module([x, *X[1:]]), leaf, use_reentrant=use_reentrant)
    grads = [torch.autograd.grad(loss, leaf)[0] for loss in (module([leaf, *X[1:]]),)]
    repeated.backward()
    torch.testing.assert_close(leaf.grad, *grads)


@pytest.mark.transforms
@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [
        # Tracing is slow: the other dtypes and sizes as symbols are for the long runs.
        pytest.param(dtype, dynamic, marks=[] if regular else pytest.mark.long)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for dynamic in (None, True)
        for regular in [dtype == torch.float64 and dynamic is None]
    ],
    ids=str,
)
def test_compiles_from_the_first_call_on(dtype, dynamic):
    torch.compiler.reset()
    features = [x.to(dtype) for x in clusters([8, 8])]
    module = PrototypeAlignmentLoss(
        2, momentum=0.5, num_features=2, num_modalities=2, em_iterations=1
    ).to(dtype)
    compiled = copy.deepcopy(module)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    bad = [torch.full_like(x, torch.nan) for x in features]
    last = [x[:6] for x in features]
    close = {"rtol": 1e-6, "atol": 1e-8}
    if dtype != torch.float64:
        close = {"rtol": 1e-4 + 4 * torch.finfo(dtype).eps, "atol": 1e-4}
    for batch in (bad, features, [x + 1 for x in features], last, bad):
        batch = [x.requires_grad_() for x in batch]
        values = [evaluate(loss, batch) for loss in (call, module)]
        torch.testing.assert_close(*values, equal_nan=True, **close)
        if values[0].isfinite():
            torch.testing.assert_close(*(torch.autograd.grad(v, batch) for v in values), **close)
        torch.testing.assert_close(compiled.state_dict(), module.state_dict(), **close)
    assert module.prototypes[0].num_batches_tracked == 3
    compiled.eval()
    torch.testing.assert_close(evaluate(call, features), evaluate(module.eval(), features), **close)


def test_what_a_running_mixture_needs_is_named():
    for count in (3, [3, 3, 3]):
        for given in ({}, {"num_features": 5}, {"num_modalities": 3}):
            with pytest.raises(ValueError, match="momentum needs num_features .*num_modalities"):
                PrototypeAlignmentLoss(count, momentum=0.1, **given)
    with pytest.raises(ValueError, match="momentum needs num_features"):
        GaussianPrototypes(3, momentum=0.1)
    module = PrototypeAlignmentLoss(2, momentum=0.1, **SIZES)
    with pytest.raises(
        ValueError, match=r"without batch dimensions, with momentum.*got \(2, 16, 5"
    ):
        module([x.expand(2, 16, 5) for x in X])
    with pytest.raises(ValueError, match="features must have num_modalities = 3; got 2"):
        module(X[:2])
    with pytest.raises(ValueError, match="features must have num_features = 5; got 4"):
        module([x[:, :4] for x in X])
    with pytest.raises(ValueError, match="x must have num_features = 5; got 4"):
        GaussianPrototypes(2, num_features=5)(X[0][:, :4])


# --- dtypes --------------------------------------------------------------------------------------


@every_entry
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_modules_in_every_dtype(name, dtype):
    """Cast as a whole, and given features of the same dtype."""
    features = [x.to(dtype) for x in X]
    module = VARIANTS[name].sized(features).make()
    evaluate(module)
    module.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mode in (True, False, True):
        leaves = [x.clone().requires_grad_() for x in features]
        value = evaluate(module.train(mode), leaves)
        value.backward()
        assert value.dtype == wide
        assert value.isfinite()
        assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in leaves)
    for buffer in module.buffers():
        assert buffer.dtype in (dtype, torch.long)
        assert buffer.isfinite().all()


@half
@every_type
def test_running_mixtures_in_half_precision(covariance_type, dtype):
    """Near those in float32; also of samples in a plane, whose covariances are nearly singular."""
    options = {"covariance_type": covariance_type, "num_features": 6, "num_modalities": 2}
    noise = [torch.randn(40, 6) for _ in range(2)]
    for thickness in (1.0, 1e-4):
        spread = torch.tensor([1.0, 1.0, *[thickness] * 4])
        turn = torch.linalg.qr(torch.randn(6, 6)).Q
        features = [(20 * (x[:, :1] > 0) + x * spread) @ turn for x in noise]
        features = [x.to(dtype) for x in features]
        low = PrototypeAlignmentLoss(2, momentum=0.5, **options).to(dtype)
        high = PrototypeAlignmentLoss(2, momentum=0.5, **options).float()
        for _ in range(6):
            values = [evaluate(module, features) for module in (low, high)]
            assert values[0].isfinite()
        if thickness == 1:
            torch.testing.assert_close(*values, rtol=0.05, atol=0)
        assert evaluate(low.eval(), features).isfinite()
        assert low.prototypes[0].running.log_prob(features[0]).isfinite().all()


def test_values_beyond_half_precision_are_its_largest():
    module = GaussianPrototypes(2, num_features=5, momentum=1.0).half()
    mixture = module(1e3 * X[0].half())
    assert (mixture.covariances > 65504).any()
    assert module.running_covariances.max() == 65504
    assert module.num_batches_tracked == 1


# --- options -------------------------------------------------------------------------------------

# For each option of a Module: another value, and one that is wrong.
OPTIONS = {
    "backend": ("torch", "other"),
    "bandwidth": (0.7, -1.0),
    "cost": (lambda x, y: torch.cdist(x, y), "other"),
    "cost_reduction": ("mean", "other"),
    "covariance_type": ("full", "other"),
    "debias": (False, None),  # any value is true or false
    "differentiate": ("none", "other"),
    "em_iterations": (1, 0),
    "eps": (0.5, -1.0),
    "epsilon": (3.0, 0.0),
    "estimator": ("unbiased", "other"),
    "feature_reduction": ("mean", "other"),
    "form": ("absolute", "other"),
    "generator": (torch.Generator().manual_seed(9), None),
    "graph": ("chain", "other"),
    "init": ("random", "other"),
    "marginal_relaxation": (1.0, -1.0),
    "kernel": ("energy", "other"),
    "matching": ("plan", "other"),
    "max_iterations": (1, 0),
    "method": ("sinkhorn", "other"),
    "moments": (("mean",), ("other",)),
    "momentum": (None, 2.0),
    "normalize": (True, "other"),
    "num_features": (5, 0),
    "num_modalities": (3, 4),
    "num_prototypes": (4, 0),
    "objective": ("regularized", "other"),
    "process_group": (None, object()),
    "prototype_weight": (0.3, -1.0),
    "reduction": ("sum", "other"),
    "regularization": (0.1, -1.0),
    "tolerance": (0.5, -1.0),
    "transport_weight": (0.3, -1.0),
}
# These need not change the loss.
SILENT = ("backend", "momentum", "num_features", "num_modalities", "process_group", "tolerance")
MODULES = {name: loss.module for name, loss in LOSSES.items()} | {"fit": GaussianPrototypes}
CASES = [(name, key) for name, cls in MODULES.items() for key in inspect.signature(cls).parameters]
every_option = pytest.mark.parametrize(("name", "key"), CASES)


def module_with(name, **options):
    """Return the Module of a loss, or GaussianPrototypes."""
    defaults = {"num_prototypes": 2} if name == "fit" else LOSSES[name].options
    return MODULES[name](**{**defaults, **options})


def value_and_gradients(module, features=X):
    leaves = [x.clone().requires_grad_() for x in features]
    torch.manual_seed(0)
    generator = getattr(module, "generator", None)
    if generator is not None:
        generator.manual_seed(3)
    if isinstance(module, GaussianPrototypes):
        value = module(leaves[0]).covariances.sum() + 0 * sum(x.sum() for x in leaves)
    elif isinstance(module, (multialign.CosineDecouplingLoss, multialign.HSICLoss)):
        value = module(leaves, [x.flip(-1) for x in leaves])
    else:
        value = module(leaves)
    return value, *torch.autograd.grad(value, leaves)


@every_option
@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
def test_an_option_set_counts_from_the_next_call_on(name, key):
    value, wrong = OPTIONS[key]
    # Only one estimator draws numbers.
    drawing = name == "mmd" and key in ("generator", "num_features")
    options = {"estimator": "random_features"} if drawing else {}
    if key == "marginal_relaxation":
        options = {"debias": False}
    if key == "max_iterations":  # few Newton steps solve so small a problem
        options = {"method": "sinkhorn"}
    module = module_with(name, **options)
    before = value_and_gradients(module)
    setattr(module, key, value)
    assert getattr(module, key) is value
    after = value_and_gradients(module)
    expected = value_and_gradients(module_with(name, **{**options, key: value}))
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    if key not in SILENT or drawing:
        assert any(not torch.equal(a, b) for a, b in zip(before, after))
    if wrong is None:
        return
    if key == "momentum":  # it has no running mixtures
        with pytest.raises(AttributeError, match="momentum cannot be turned on"):
            module.momentum = wrong
        return
    setattr(module, key, wrong)
    with pytest.raises((TypeError, ValueError), match=key):
        value_and_gradients(module)


@pytest.mark.parametrize("name", ["prototypes", "fit"])
def test_options_set_with_momentum(name):
    options = {"momentum": 0.5, **SIZES}
    if name == "fit":
        del options["num_modalities"]
    module = module_with(name, **options)
    value_and_gradients(module)
    fixed = ("num_prototypes", "num_features", "num_modalities", "covariance_type")
    for key in inspect.signature(MODULES[name]).parameters:
        if key in fixed:
            with pytest.raises(AttributeError, match=f"{key} fixes the shapes"):
                setattr(module, key, OPTIONS[key][0])
        elif OPTIONS[key][1] is not None:
            right = getattr(module, key)
            setattr(module, key, OPTIONS[key][1])
            with pytest.raises((TypeError, ValueError), match=key):
                value_and_gradients(module)
            setattr(module, key, right)
    state = state_of(module)
    module.momentum = None  # turned off: each call fits anew
    plain = module_with(name)
    torch.testing.assert_close(value_and_gradients(module), value_and_gradients(plain))
    assert_same_state(module, state)
    module.momentum = 1.0  # its buffers are still there
    module([x + 100 for x in X] if name == "prototypes" else X[0] + 100)
    assert all(value.mean() > 90 for key, value in module.state_dict().items() if "means" in key)
    for model in getattr(module, "prototypes", ()):
        model.em_iterations, model.regularization = 0, -1.0  # the loss has its own


# What a number may be; bool is none.
WHOLE = [np.int64, np.int32, np.uint8, lambda n: np.array(n), lambda n: torch.tensor(n)]
REAL = [np.float64, np.float32, np.float16, Fraction, lambda x: np.int64(2 * x)]
NUMBERS = {key: value for key, (value, _) in OPTIONS.items() if type(value) in (int, float)}


@pytest.mark.parametrize(("name", "key"), [case for case in CASES if case[1] in NUMBERS])
@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
def test_numbers_of_numpy_are_numbers(name, key):
    kinds = WHOLE if isinstance(NUMBERS[key], int) else REAL
    others = {"debias": False} if key == "marginal_relaxation" else {}
    for kind in kinds:
        given = kind(NUMBERS[key] if kinds is WHOLE else 0.5)
        plain = int(given) if kinds is WHOLE else float(given)
        results = [
            value_and_gradients(module_with(name, **others, **{key: x})) for x in (given, plain)
        ]
        torch.testing.assert_close(*results, rtol=0, atol=0)
    for wrong in (True, np.True_, "1", None, [1], np.ones(2), 1j, torch.ones(2)):
        optional = ("epsilon", "tolerance", "num_features", "num_modalities", "marginal_relaxation")
        if wrong is None and key in optional:
            continue  # it has a meaning there
        if key in ("num_prototypes", "bandwidth") and isinstance(wrong, list):
            continue  # several of them
        with pytest.raises((TypeError, ValueError), match=key):
            value_and_gradients(module_with(name, **others, **{key: wrong}))


def test_numbers_of_numpy_in_functions():
    x, generator = X[0], torch.Generator()
    options = {"tolerance": np.float32(0.125), "iterations": np.int64(2)}
    draws = []
    for count, n, epsilon, given in (
        (np.int64(3), np.uint8(4), np.float32(0.5), options),
        (3, 4, 0.5, {"tolerance": 0.125, "iterations": 2}),
    ):
        mixture = fit_gaussian_mixture(x, count, generator=generator.manual_seed(0), **given)
        costs = {(0, 1): multialign.squared_euclidean_cost(x, x)}
        solution = multialign.multi_marginal_sinkhorn(
            costs, [torch.ones(16)] * 2, epsilon, max_iterations=int(n) * 100
        )
        draws.append((mixture.sample(n, generator=generator), solution.value))
    torch.testing.assert_close(*draws, rtol=0, atol=0)
    pairs = [(np.int64(0), np.int64(2)), (1, 2)]
    torch.testing.assert_close(
        multialign.multi_marginal_sinkhorn_loss(X, graph=pairs),
        multialign.multi_marginal_sinkhorn_loss(X, graph=[(0, 2), (1, 2)]),
    )
    kinds = [multialign.mmd_loss(X, bandwidth=[number(0.5), 2]) for number in (np.float32, float)]
    torch.testing.assert_close(*kinds, rtol=0, atol=0)


@every_loss
def test_repr_shows_the_options_as_they_are(name):
    module = module_with(name)
    keys = {"decoupling": "form", "moments": "eps", "mmd": "bandwidth", "hsic": "bandwidth"}
    key = keys.get(name, "epsilon")
    setattr(module, key, 0.123)
    assert f"{key}=0.123" in repr(module) or f"{key}='0.123'" in repr(module)
