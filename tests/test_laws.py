"""Laws that hold for every loss, over random problems."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multialign import (
    CosineDecouplingLoss,
    GaussianMomentLoss,
    MMDLoss,
    MultiMarginalSinkhornLoss,
    PrototypeAlignmentLoss,
    cosine_decoupling_loss,
    gaussian_moment_loss,
    mmd_loss,
)


class Decoupling(CosineDecouplingLoss):
    """Decoupling of the features from a linear map of themselves, for the common harness."""

    def forward(self, features, weights=None):
        return super().forward(features, [2 * f.flip(-1) + 1 for f in features], weights)


def seeded(module):
    """Let a module draw the same numbers in every call."""
    module.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    return module


def prototypes(**options):
    """Prototypes whose seeds are drawn alike in every call."""
    return seeded(PrototypeAlignmentLoss(2, em_iterations=15, tolerance=1e-10, **options))


LOSSES = {
    "decoupling": Decoupling(),
    "moments": GaussianMomentLoss(),
    "mmd": MMDLoss(bandwidth=[0.5, 2.0]),
    "mmd median": MMDLoss(bandwidth="median"),
    "mmd unbiased": MMDLoss(estimator="unbiased"),
    "mmd random features": seeded(
        MMDLoss(bandwidth=[0.5, 2.0], estimator="random_features", num_features=16)
    ),
    "sinkhorn": MultiMarginalSinkhornLoss(tolerance=1e-10),
    "sinkhorn chain": MultiMarginalSinkhornLoss(tolerance=1e-10, graph="chain", epsilon=1.0),
    "prototypes": prototypes(),
    "prototypes plan": prototypes(matching="plan", objective="regularized"),
}
UNBATCHED = {name: loss for name, loss in LOSSES.items() if name != "decoupling"}

problems = st.tuples(st.lists(st.integers(3, 7), min_size=2, max_size=4), st.integers(0, 10**6))


def make(sizes, seed, paired=False, batch=()):
    """Two clusters far apart in each modality: one best mixture, whatever the seeds."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    sizes = [max(sizes)] * len(sizes) if paired else sizes
    features = []
    for n in sizes:
        centres = torch.where(torch.arange(n) % 2 == 0, 0.0, 30.0)[:, None]
        features.append((torch.randn(*batch, n, 2) + centres).requires_grad_())
    return features


def value_and_grads(loss, features, weights=None):
    value = loss(features, weights)
    return value, torch.autograd.grad(value, features, allow_unused=True)


@pytest.mark.parametrize("name", LOSSES)
@given(problems)
def test_permuting_samples_changes_nothing(name, problem):
    paired = name == "prototypes"
    features = make(*problem, paired=paired)
    order = torch.randperm(len(features[0]))
    orders = [order if paired else torch.randperm(len(f)) for f in features]
    torch.testing.assert_close(
        LOSSES[name]([f[o] for f, o in zip(features, orders)]), LOSSES[name](features)
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sinkhorn chain"])
@given(problems)
def test_permuting_modalities_changes_nothing(name, problem):
    features = make(*problem, paired=name == "prototypes")
    order = torch.randperm(len(features)).tolist()
    torch.testing.assert_close(LOSSES[name]([features[m] for m in order]), LOSSES[name](features))


@pytest.mark.parametrize("name", LOSSES)
@given(problems, st.sampled_from([torch.nan, torch.inf, 1e30, 0.0]))
def test_weight_zero_is_absence(name, problem, junk):
    features = make(*problem, paired=name == "prototypes")
    padded, weights = [], []
    for f in features:
        rows = torch.randint(0, 2, (2,)) + 1 if name != "prototypes" else torch.tensor([1, 2])
        before, after = (torch.full((int(r), 2), junk) for r in rows)
        padded.append(torch.cat([before, f, after]))
        weights.append(
            torch.cat([torch.zeros(len(before)), torch.ones(len(f)), torch.zeros(len(after))])
        )
        if torch.rand(()) < 0.5:
            weights[-1] = weights[-1].bool()
    value, grads = value_and_grads(LOSSES[name], features)
    padded_value = LOSSES[name](padded, weights)
    torch.testing.assert_close(padded_value, value)
    # Gradients by the rows that are there, and none elsewhere.
    padded_grads = torch.autograd.grad(padded_value, features)
    torch.testing.assert_close(padded_grads, grads, rtol=1e-5, atol=1e-6)
    leaves = [p.detach().requires_grad_() for p in padded]
    for grad, weight in zip(torch.autograd.grad(LOSSES[name](leaves, weights), leaves), weights):
        assert (grad[weight == 0] == 0).all()


@pytest.mark.parametrize("name", UNBATCHED)
@given(problems)
def test_batch_is_the_mean_of_its_problems(name, problem):
    features = make(*problem, paired=name == "prototypes", batch=(2,))
    singles = [LOSSES[name]([f[b] for f in features]) for b in range(2)]
    torch.testing.assert_close(LOSSES[name](features), torch.stack(singles).mean())


@pytest.mark.parametrize("name", [n for n in UNBATCHED if n != "sinkhorn chain"])
@given(problems)
def test_translating_everything_changes_nothing(name, problem):
    features = make(*problem, paired=name == "prototypes")
    moved = LOSSES[name]([f + 8.0 for f in features])
    torch.testing.assert_close(moved, LOSSES[name](features))


# The U-statistic, the median and the default epsilon depend on N itself.
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"mmd unbiased", "mmd median", "sinkhorn"}))
def test_weights_count_as_repetitions(name):
    features = make([6, 6, 6], 0)
    counts = [torch.tensor([1, 2, 3, 1, 1, 2])] * 3
    repeated = LOSSES[name]([f.repeat_interleave(c, 0) for f, c in zip(features, counts)])
    torch.testing.assert_close(LOSSES[name](features, counts), repeated)


@pytest.mark.parametrize("name", LOSSES)
def test_an_absent_modality_is_out(name):
    features = make([5, 5, 5], 1)
    leaves = [features[0], torch.full((5, 2), torch.nan, requires_grad=True), features[2]]
    value, grads = value_and_grads(LOSSES[name], leaves, [None, torch.zeros(5), None])
    assert value.isfinite()
    assert (grads[1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    pair = LOSSES[name](features[::2])
    if name.startswith(("moments", "mmd")):
        pair = pair / 3  # the normaliser keeps M: one pair of three is left
    if not name.startswith("prototypes") and name != "sinkhorn chain":
        torch.testing.assert_close(value, pair)


@pytest.mark.parametrize(
    ("name", "count"),
    # The U-statistic refuses N = 0.
    [(name, count) for name in LOSSES for count in (0, 4) if (name, count) != ("mmd unbiased", 0)],
)
def test_nothing_present_is_a_connected_zero(name, count):
    features = [torch.randn(count, 2, requires_grad=True) for _ in range(3)]
    value, grads = value_and_grads(LOSSES[name], features, [torch.zeros(count)] * 3)
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", LOSSES)
def test_stacked_tensor_is_a_sequence(name):
    features = torch.stack(make([4, 4, 4], 2)).detach()
    weights = torch.rand(3, 4)
    torch.testing.assert_close(
        LOSSES[name](features, weights), LOSSES[name](list(features), list(weights))
    )


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_and_global_state_are_left_alone(name):
    features = make([4, 4], 3)
    weights = [torch.rand(4), torch.tensor([1.0, 0.0, 1.0, 1.0])]
    before = [t.detach().clone() for t in (*features, *weights)]
    LOSSES[name](features, weights).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*features, *weights)))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float64
    with torch.no_grad():
        assert not LOSSES[name](features, weights).requires_grad
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", LOSSES)
def test_non_contiguous_input(name):
    features = make([5, 5], 4)
    strided = [torch.stack([f, f], -1)[..., 0].detach() for f in features]
    strided = [f.T.contiguous().T for f in strided]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(LOSSES[name](strided), LOSSES[name](features).detach())


@pytest.mark.parametrize(
    "module",
    [
        CosineDecouplingLoss(),
        GaussianMomentLoss(),
        MMDLoss(),
        MultiMarginalSinkhornLoss(),
        PrototypeAlignmentLoss(2, generator=None),
    ],
)
def test_modules_pickle_and_print(module):
    features = make([5, 5], 5)
    inputs = (features, features) if isinstance(module, CosineDecouplingLoss) else (features,)
    torch.manual_seed(0)
    expected = module(*inputs)
    copied = pickle.loads(pickle.dumps(module))
    torch.manual_seed(0)
    torch.testing.assert_close(copied(*inputs), expected)
    assert repr(module).startswith(type(module).__name__ + "(")
    assert repr(copied) == repr(module)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (CosineDecouplingLoss, cosine_decoupling_loss, {"form": "absolute", "reduction": "none"}),
        (
            GaussianMomentLoss,
            gaussian_moment_loss,
            {"moments": ("skewness",), "feature_reduction": "mean", "eps": 0.5},
        ),
        (MMDLoss, mmd_loss, {"bandwidth": (0.7, 3.0), "estimator": "unbiased"}),
        (
            MMDLoss,
            mmd_loss,
            {"bandwidth": 2.0, "estimator": "random_features", "num_features": 7},
        ),
    ],
)
def test_a_module_is_its_function_with_options(module, function, options):
    inputs = [make([5, 5], seed) for seed in (6, 7)][: 1 + (module is CosineDecouplingLoss)]
    weights = [torch.rand(5), None]
    for chosen in ({}, options):
        drawn = {}
        if chosen.get("estimator") == "random_features":
            drawn = {"generator": torch.Generator().manual_seed(1)}
        expected = function(*inputs, weights, **chosen, **drawn)
        if drawn:
            drawn = {"generator": torch.Generator().manual_seed(1)}
        loss = module(**chosen, **drawn)
        assert torch.equal(loss(*inputs, weights), expected)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(loss)
        wrong = {**options, name: "wrong"}
        with pytest.raises((TypeError, ValueError), match=name):
            module(**wrong)
    if options.get("estimator") == "unbiased":
        assert repr(loss) == "MMDLoss(bandwidth=(0.7, 3.0), estimator='unbiased')"


@pytest.mark.parametrize(
    ("loss", "module"), [(gaussian_moment_loss, GaussianMomentLoss), (mmd_loss, MMDLoss)]
)
def test_a_process_group_is_asked_for_its_samples(loss, module):
    features = make([5, 5], 8)
    with pytest.raises(ValueError, match="process_group needs torch.distributed"):
        loss(features, process_group=object())
    with pytest.raises(ValueError, match="process_group needs torch.distributed"):
        module(process_group=object())(features)
