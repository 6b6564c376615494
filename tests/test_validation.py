"""What every loss does with arguments that are wrong, and with dtypes."""

import re
from functools import partial

import pytest
import torch

from multialign import (
    CosineDecouplingLoss,
    GaussianMixture,
    GaussianPrototypes,
    PrototypeAlignmentLoss,
    bures_wasserstein_cost,
    cosine_decoupling_loss,
    fit_gaussian_mixture,
    multi_marginal_sinkhorn,
    squared_euclidean_cost,
)
from tests.losses import LOSSES

COMPARING = [loss for loss in LOSSES.values() if loss.partner is None]
MODULES = [loss.make() for loss in COMPARING]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
X = torch.ones(4, 3, dtype=torch.float64)


@pytest.mark.parametrize("loss", COMPARING)
@pytest.mark.parametrize(
    ("error", "message", "features"),
    [
        (TypeError, "must be a sequence of at least 2 tensors .* got 3", 3),
        (TypeError, "must be a sequence .* got 'abc'", "abc"),
        (TypeError, r"one for each modality, .* got dict. Give list\(\w+.values\(\)\)", {"a": X}),
        (TypeError, "one for each modality, .* got generator", (x for x in [X, X])),
        (TypeError, "one for each modality, .* got ndarray", X.numpy()),
        (ValueError, r"must be a sequence .*\(\*batch, N, D\).* got 1", [X]),
        (ValueError, "got 1", X[None]),
        (TypeError, r"\[1\] must be a tensor \(\*batch, N, D\); got list", [X, [1.0]]),
        (TypeError, r"\[1\] must be floating point; got torch.int64", [X, X.long()]),
        (ValueError, r"\[0\] must have shape \(\*batch, N, D\); got \(3,\)", [X[0], X]),
        (ValueError, r"\[1\] must have shape \(N, 3\), .* got \(4, 2\)", [X, X[:, :2]]),
        (ValueError, r"\[1\] must have shape \(N, 3\), .* got \(1, 4, 3\)", [X, X[None]]),
        (ValueError, "at least one feature; got D = 0", [X[:, :0], X[:, :0]]),
        (
            TypeError,
            r"must share one dtype .* got torch.float64 for \[0\] and torch.float32 for \[1\]",
            [X, X.float()],
        ),
        (ValueError, r"must be on one device; got cpu for \[0\] and meta", [X, X.to("meta")]),
    ],
)
def test_features(loss, error, message, features):
    with pytest.raises(error, match=message):
        loss(features)


@pytest.mark.parametrize("loss", [*COMPARING, *MODULES])
def test_modalities_given_one_by_one(loss):
    """Two or three arguments in place of one list: the second would be the weights."""
    one = r"must be a sequence of .* one for each modality, .* got one tensor of shape \(4, 3\)"
    for arguments in [(X,), (X, X), (X, X[:, 0]), (X, [X])]:
        with pytest.raises(TypeError, match=rf"{one}.* into a list: \[a, b\]"):
            loss(*arguments)
    batches = X.expand(2, 4, 3)  # two modalities, if one did not know better
    for features, second in [([X, X], X), (batches, batches)]:
        shape = re.escape(str(tuple(second.shape)))
        with pytest.raises(TypeError, match=rf"got one tensor of shape {shape}. If .*\[a, b\]"):
            loss(features, second)
    with pytest.raises(TypeError, match="arguments"):
        loss(X, X, X)


@pytest.mark.parametrize("loss", [cosine_decoupling_loss, CosineDecouplingLoss()])
def test_unique_and_common_features_given_one_by_one(loss):
    with pytest.raises(TypeError, match=r"unique must be .* got one tensor .*\[a, b\]"):
        loss(X, X)
    with pytest.raises(TypeError, match=r"common must be .* got one tensor .*\[a, b\]"):
        loss([X, X], X)
    with pytest.raises(TypeError, match=r"unique must be .* got dict. Give list\(unique.values"):
        loss({"a": X}, {"a": X})
    with pytest.raises(TypeError, match="common"):
        loss([X, X])
    with pytest.raises(TypeError, match=r"weights must be .* stacked tensor of shape \(2, N\)"):
        loss([X, X], [X, X], X)


@every_loss
def test_stacked_weights(loss):
    """One tensor is M of them, also where batches make it look like features."""
    for batch in [(), (2,)] if loss.batches else [()]:
        x = torch.randn(2, *batch, 4, 3, dtype=torch.float64)
        weights = torch.rand(2, *batch, 4, dtype=torch.float64)
        losses = []
        for given in (weights, list(weights)):
            torch.manual_seed(0)
            losses.append(loss(x, given))
        torch.testing.assert_close(*losses, rtol=0, atol=0)


@every_loss
def test_features_given_to_the_constructor(loss):
    with pytest.raises((TypeError, ValueError), match=r"must be .* got (Tensor|tensor)|positional"):
        loss.module(X)


@every_loss
@pytest.mark.parametrize(
    ("error", "message", "weights"),
    [
        (TypeError, "weights must be None or a sequence of 2 tensors .* got 1.0", 1.0),
        (ValueError, "one entry for each of the 2 modalities; got 1", [None]),
        (TypeError, r"weights\[0\] must be a tensor or None; got list", [[1.0] * 4, None]),
        (
            ValueError,
            r"weights\[1\] must have shape \(4,\); got \(3,\)",
            [None, torch.ones(3)],
        ),
        (
            TypeError,
            r"weights\[0\] must be boolean or non-negative; got torch.complex",
            [torch.ones(4, dtype=torch.complex64), None],
        ),
        (
            ValueError,
            r"weights\[0\] must be on the features' device cpu; got meta",
            [torch.ones(4, device="meta"), None],
        ),
    ],
)
def test_weights(loss, error, message, weights):
    with pytest.raises(error, match=message):
        loss([X, X], weights)


def mixture(x, other=lambda t: t):
    return GaussianMixture(weights=other(x.new_ones(4) / 4), means=x, covariances=x)


def remembered(module, x, to):
    module(x)
    module._apply(lambda t: to(t) if t.is_floating_point() else t)
    module(x)


ALIGNMENT = partial(PrototypeAlignmentLoss, 2, momentum=0.5, num_features=3, num_modalities=2)
C, NU = torch.ones(4, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
MIXED = {
    "costs x": ("x and y", lambda to: squared_euclidean_cost(X, to(X))),
    "costs covariances": ("covariances_j", lambda to: bures_wasserstein_cost(X, X, X, to(X))),
    "costs means": ("means_j", lambda to: bures_wasserstein_cost(X, X, to(X), to(X))),
    "decoupling": (r"common\[0\]", lambda to: cosine_decoupling_loss([X], [to(X)])),
    "solver costs": (
        r"for costs\[\(0, 1\)\]",
        lambda to: multi_marginal_sinkhorn({(0, 1): to(C)}, [NU, NU], 1.0),
    ),
    "solver second costs": (
        r"for costs\[\(1, 2\)\]",
        lambda to: multi_marginal_sinkhorn({(0, 1): C, (1, 2): to(C)}, [NU] * 3, 1.0),
    ),
    "solver tensor": ("for costs and", lambda to: multi_marginal_sinkhorn(to(C), [NU, NU], 1.0)),
    "solver marginals": (
        r"for marginals\[1\]",
        lambda to: multi_marginal_sinkhorn({(0, 1): C}, [NU, to(NU)], 1.0),
    ),
    "mixture": ("for weights and .* for means", lambda to: mixture(X, to)),
    "mixture x": ("for means and .* for x", lambda to: mixture(X).log_prob(to(X))),
    "mixture posterior": ("for means and .* for x", lambda to: mixture(X).posterior(to(X))),
    "mixture init": (
        "for x and .* for the means",
        lambda to: fit_gaussian_mixture(X, 4, init=mixture(to(X), to)),
    ),
    "prototypes remembered": (
        "x must .* the prototypes remembered",
        lambda to: remembered(GaussianPrototypes(2, num_features=3, momentum=0.5), X, to),
    ),
    "alignment remembered": (
        r"features\[0\] must .* the prototypes remembered",
        lambda to: remembered(ALIGNMENT(), [X, X], to),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_devices_and_dtypes_are_named(case):
    expected, call = MIXED[case]
    with pytest.raises(ValueError, match="device.*meta") as caught:
        call(lambda t: t.to("meta"))
    assert re.search(expected, str(caught.value)), caught.value
    with pytest.raises(TypeError, match="dtype.*torch.float32") as caught:
        call(lambda t: t.float())
    assert re.search(expected, str(caught.value)), caught.value


def test_epsilon_and_weights_on_another_device_are_named():
    elsewhere = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="epsilon must be on the marginals' device cpu; got meta"):
        multi_marginal_sinkhorn({(0, 1): C}, [NU, NU], elsewhere[0])
    for call in (
        lambda: fit_gaussian_mixture(X, 2, weights=elsewhere),
        lambda: GaussianPrototypes(2)(X, elsewhere),
    ):
        with pytest.raises(ValueError, match="must be on the features' device cpu; got meta"):
            call()


@every_loss
@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_a_negative_or_nan_weight_shows_in_the_loss(loss, bad):
    x = [torch.randn(6, 3), torch.randn(6, 3)]
    weight = torch.ones(6)
    weight[2] = bad
    assert loss(x, [weight, None]).isnan()


@every_loss
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_feature_shows_in_the_loss(loss, bad):
    x = [torch.randn(6, 3), torch.randn(6, 3)]
    x[0][1, 2] = bad
    assert not loss(x).isfinite()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_dtype(loss, dtype):
    x = [torch.randn(8, 3).to(dtype).requires_grad_() for _ in range(3)]
    result = loss(x)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result.backward()
    assert all(f.grad.dtype == dtype and f.grad.isfinite().all() for f in x)


@every_loss
def test_half_precision_may_stand_beside_float32(loss):
    x = torch.randn(8, 3).half()
    assert loss([x, x.float()]).dtype == torch.float32


@every_loss
def test_float32_agrees_with_float64(loss):
    x = [torch.randn(12, 3).float() + m for m in range(3)]
    results = []
    for features in (x, [f.double() for f in x]):
        torch.manual_seed(0)
        results.append(loss(features).double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(loss, dtype):
    x = [torch.randn(8, 3).float() for _ in range(3)]
    torch.manual_seed(0)
    expected = loss(x)
    with torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(0)
        assert torch.equal(loss(x), expected)
