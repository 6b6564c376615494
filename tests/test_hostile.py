"""Inputs that broke other libraries, given to every loss they apply to.

Each test names what the loss has to do with them. Random ones are in test_hostile_laws.py.
"""

import math
from functools import partial

import pytest
import torch

from multialign import gaussian_moment_loss, mmd_loss, multi_marginal_sinkhorn_loss
from tests import reference
from tests.hostile import state_unchanged
from tests.losses import FUNCTIONS

# Sweeps alone stop early on such problems, with a warning: tests/hostile.py holds them to its laws.
LOSSES = {
    name: loss.given(em_iterations=5)
    for name, loss in FUNCTIONS.items()
    if name != "sinkhorn sweeps"
}


def those(law):
    """Walk over the losses of which this is true."""
    return pytest.mark.parametrize("name", [name for name in LOSSES if law(LOSSES[name])])


every_loss = those(lambda loss: True)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def evaluate(loss, features, weights=None):
    """Return the value and the gradient by each modality."""
    leaves = [x.detach().clone().requires_grad_() for x in features]
    value = loss(leaves, weights)
    return value, torch.autograd.grad(value, leaves)


def assert_finite(value, grads):
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


# One point, equal points


@those(lambda loss: loss.zero or loss.seeds)
@pytest.mark.parametrize("point", [[1.0], [1.0, 2.0], [0.0, 0.0]])
@every_dtype
def test_one_identical_point_costs_0_and_pulls_nowhere(name, point, dtype):
    x = torch.tensor([point], dtype=dtype)
    value, grads = evaluate(LOSSES[name], [x, x])
    # The plan between two prototypes each, all alike, is uniform: its entropy is log 4.
    regularized = LOSSES[name].options.get("objective") == "regularized"
    expected = torch.tensor(-0.1 * math.log(4) if regularized else 0.0, dtype=dtype)
    # A mixture of one point keeps its floor as variance.
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    assert all((grad.abs() <= 1e-5).all() for grad in grads)


@every_loss
@pytest.mark.parametrize("case", ["all equal", "equal clouds", "coincident", "duplicates", "zero"])
@every_dtype
def test_coincident_points_have_finite_gradients(name, case, dtype):
    x = torch.randn(6, 3, dtype=dtype)
    features = {
        "all equal": [x[:1].repeat(6, 1)] * 2,
        "equal clouds": [x, x],
        "coincident": [x, torch.cat([x[:3], x[3:] + 1])],
        "duplicates": [x[[0, 0, 0, 1, 1, 2]], x[[3, 3, 3, 3, 3, 4]]],
        "zero": [torch.zeros_like(x), x],
    }[case]
    assert_finite(*evaluate(LOSSES[name], features))


@those(lambda loss: loss.zero)
@pytest.mark.parametrize("modalities", [2, 6])
@every_dtype
def test_equal_clouds_far_from_the_origin_differ_by_nothing(name, modalities, dtype):
    x = torch.randn(7, 65, dtype=dtype) + 1e6
    value, grads = evaluate(LOSSES[name], [x] * modalities)
    scale = x.var(0).sum().item()
    assert abs(value.item()) <= 1e-5 * scale if "sinkhorn" in name else abs(value.item()) <= 1e-6
    assert all(grad.isfinite().all() for grad in grads)


def test_close_clouds_of_many_features_have_no_negative_divergence():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x, y = 0.01 * torch.randn(2, 50, 160, generator=generator, dtype=torch.float32)
        for loss in (multi_marginal_sinkhorn_loss, mmd_loss):
            assert loss([x, y]) >= -1e-6


# Offsets and scales


@those(lambda loss: loss.translates and not loss.seeds)
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_an_offset_changes_nothing(name, offset):
    loss = LOSSES[name]
    # Multiples of 1/8, which float32 holds at these offsets too.
    x = (8 * torch.randn(2, 30, 5)).round() / 8 + torch.tensor([0.0, 1.0]).view(2, 1, 1)
    expected, expected_grads = evaluate(loss, list(x.float()))
    value, grads = evaluate(loss, list((x + offset).float()))
    # float32 holds the difference of two means to 0.06 at 1e6, and moments compare means.
    rtol = 0.2 if name in ("moments", "moments mean") and abs(offset) > 1e5 else 1e-3
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads):
        bound = rtol * expected_grad.abs().max().item()
        torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=bound)


@pytest.mark.parametrize("count", [30, 700])
@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("mmd")])
@every_dtype
def test_padding_costs_no_digits_at_an_offset(name, count, dtype):
    x = ((8 * torch.randn(2, count, 17)).round() / 8).to(dtype)
    x[1] += 0.5
    expected = LOSSES[name](list(x + 1e5))
    padded = [torch.cat([y + 1e5, torch.full((3 * count, 17), torch.nan, dtype=dtype)]) for y in x]
    weight = (torch.arange(4 * count) < count).to(dtype)
    value = LOSSES[name](padded, [weight, weight])
    # Of many samples the median is that of every second, third ...
    rtol = 0.05 if name == "mmd median" and count > 100 else 1e-3
    torch.testing.assert_close(value, expected, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
@every_dtype
def test_the_divergence_scales_with_the_square_of_its_points(scale, dtype):
    x = [torch.randn(n, 3, dtype=dtype) for n in (8, 9, 10)]
    expected, expected_grads = evaluate(multi_marginal_sinkhorn_loss, x)
    value, grads = evaluate(multi_marginal_sinkhorn_loss, [scale * y for y in x])
    torch.testing.assert_close(value / scale / scale, expected, rtol=1e-3, atol=0)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad / scale, expected_grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("count", [40, 300])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e3, torch.float32), (1e16, torch.float32), (1e12, torch.float64)]
)
def test_a_kernel_is_1_on_its_diagonal_however_narrow(scale, count, dtype):
    x, y = scale * torch.randn(2, count, 129, dtype=dtype)
    # No two samples are near in units of the bandwidth: what is left is the diagonal.
    torch.testing.assert_close(mmd_loss([x, y], bandwidth=1.0).item(), 2 / count, rtol=1e-5, atol=0)
    unbiased = mmd_loss([x, y], bandwidth=1.0, estimator="unbiased")
    torch.testing.assert_close(unbiased.item(), 0.0, rtol=0, atol=1e-6)
    assert mmd_loss([x, x.clone()], bandwidth=1.0) == 0


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
@pytest.mark.parametrize("count", [20, 400])
@every_dtype
def test_a_bandwidth_may_be_what_has_no_square(scale, count, dtype):
    x, y = torch.randn(2, count, 5, dtype=dtype)
    for near, far in [(1.0, scale), ([1.0, 3.0], [scale, 3 * scale]), ("median", "median")]:
        expected, expected_grads = evaluate(partial(mmd_loss, bandwidth=near), [x, y])
        loss = partial(mmd_loss, bandwidth=far)
        value, grads = evaluate(loss, [scale * x, scale * y])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close([scale * grad for grad in grads], list(expected_grads))


@pytest.mark.parametrize("count", [20, 400])
@every_dtype
def test_a_median_of_equal_samples_is_0_and_not_its_rounding(count, dtype):
    # More than half of all pairs are equal, so that the bandwidth falls back to 1.
    x = torch.randn(1, 65, dtype=dtype).repeat(count, 1) + 1e3
    x[0] += 1
    y = x.clone()
    y[1] += 3
    value, grads = evaluate(partial(mmd_loss, bandwidth="median"), [x, y])
    expected, expected_grads = evaluate(mmd_loss, [x, y])
    torch.testing.assert_close((value, grads), (expected, expected_grads))


# Padding and absence


@those(lambda loss: not loss.seeds and not loss.paired)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
@every_dtype
def test_ragged_sets_padded_to_one_size_equal_the_loop(name, junk, dtype):
    loss, sizes = LOSSES[name], (10, 15, 20)
    features = [torch.randn(n, 4, dtype=dtype) + n / 10 for n in sizes]
    expected, expected_grads = evaluate(loss, features)
    padded = torch.full((3, 20, 4), junk, dtype=dtype)
    mask = torch.arange(20) < torch.tensor(sizes).unsqueeze(-1)
    padded[mask] = torch.cat(features)
    for weights in (mask, mask.to(dtype)):
        value, grads = evaluate(loss, list(padded), list(weights))
        torch.testing.assert_close(value, expected, rtol=2e-4, atol=1e-6)
        for n, grad, expected_grad in zip(sizes, grads, expected_grads):
            assert (grad[n:] == 0).all()
            torch.testing.assert_close(grad[:n], expected_grad, rtol=2e-3, atol=2e-4)


@every_loss
@pytest.mark.parametrize("absent", ["one modality", "all but one", "every modality", "one sample"])
@every_dtype
def test_what_is_missing_counts_0_and_keeps_the_graph(name, absent, dtype):
    features = [torch.randn(6, 3, dtype=dtype) for _ in range(3)]
    weights = torch.ones(3, 6, dtype=dtype)
    gone = {"one modality": [1], "all but one": [0, 2], "every modality": [0, 1, 2]}
    if absent == "one sample":
        weights[:, 2] = 0
        for x in features:
            x[2] = torch.nan
    for m in gone.get(absent, []):
        weights[m] = 0
        features[m][:] = torch.nan
    value, grads = evaluate(LOSSES[name], features, list(weights))
    assert_finite(value, grads)
    for weight, grad in zip(weights, grads):
        assert (grad[weight == 0] == 0).all()
    if absent == "every modality" or (absent == "all but one" and LOSSES[name].zero):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)


@those(lambda loss: loss.zero or loss.seeds)
def test_a_modality_alone_costs_0_whatever_its_squares(name):
    features = [torch.randn(5, 3).float(), 1e16 * torch.randn(4, 3).float() + 1e18]
    value, grads = evaluate(LOSSES[name], features, [torch.zeros(5), None])
    assert_finite(value, grads)
    if LOSSES[name].zero:
        assert value.abs() <= 1e-5 * 1e16**2  # of their variance


@pytest.mark.parametrize("moments", [["mean"], ["covariance"]])
def test_what_an_absent_modality_lacks_does_not_overflow(moments):
    features = [torch.randn(5, 3).float(), 1e12 * torch.randn(4, 3).float() + 1e22]
    value, grads = evaluate(
        partial(gaussian_moment_loss, moments=moments), features, [torch.zeros(5), None]
    )
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@every_loss
@every_dtype
def test_weights_are_normalised(name, dtype):
    features = [torch.randn(5, 3, dtype=dtype) for _ in range(2)]
    weights = [torch.rand(5, dtype=dtype) + 0.1 for _ in range(2)]
    expected = LOSSES[name](features, weights)
    for factor in (2.0**-40, 2.0**40):
        value = LOSSES[name](features, [factor * w for w in weights])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [3, 400])
@every_dtype
def test_pairs_beside_one_sample_of_nearly_all_the_weight_keep_their_digits(count, dtype):
    x, y = torch.randn(2, count, 2, dtype=dtype)
    w = torch.full((count,), 1e-4, dtype=dtype)
    w[1] = 1e4
    loss = LOSSES["mmd unbiased"]
    value, grads = evaluate(loss, [x, y], [w, None])
    wide = [x.double(), y.double()]
    expected = reference.mmd([t.numpy() for t in wide], [1.0], "unbiased", [w.numpy(), None])
    torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=1e-6)
    _, wide_grads = evaluate(loss, wide, [w.double(), None])
    for grad, wide_grad in zip(grads, wide_grads):
        torch.testing.assert_close(grad.double(), wide_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
@every_dtype
def test_skewness_has_the_gradients_of_any_unit(scale, dtype):
    x, y = torch.randn(2, 7, 3, dtype=dtype)
    w = torch.tensor([1e3, 1e-4, 1.0, 1e-2, 0.0, 1e-4, 1e-1], dtype=dtype)
    loss = partial(gaussian_moment_loss, moments=["skewness"], eps=0.0)
    expected, expected_grads = evaluate(loss, [x, y], [w, None])
    value, grads = evaluate(loss, [scale * x, scale * y], [w, None])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close([scale * grad for grad in grads], list(expected_grads))


@those(lambda loss: not loss.masks)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_mass_shows(name, bad):
    features = [torch.randn(5, 3) for _ in range(2)]
    weights = [torch.ones(5), torch.tensor([1.0, 1.0, bad, 1.0, 1.0])]
    assert not LOSSES[name](features, weights).isfinite()


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_a_non_finite_sample_shows(name, bad, dtype):
    features = [torch.randn(9, 3, dtype=dtype) for _ in range(3)]
    features[1][4, 2] = bad
    assert not LOSSES[name](features).isfinite()


# Few samples, many features


@every_loss
@pytest.mark.parametrize(("sizes", "dim"), [((1, 1), 1), ((1, 2), 3), ((2, 5), 65), ((3, 4), 1100)])
@every_dtype
def test_fewer_samples_than_features(name, sizes, dim, dtype):
    if LOSSES[name].paired:
        sizes = (max(sizes),) * len(sizes)
    if min(sizes) < LOSSES[name].least:
        with pytest.raises(ValueError, match=f"at least {LOSSES[name].least} samples"):
            LOSSES[name]([torch.randn(n, dim, dtype=dtype) for n in sizes])
        return
    if dim > 100 and name in ("prototypes full", "prototypes tied"):
        dim = 100
    assert_finite(*evaluate(LOSSES[name], [torch.randn(n, dim, dtype=dtype) for n in sizes]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -1e-20])
@those(lambda loss: loss.seeds or not loss.compares)
@every_dtype
def test_a_constant_feature_has_finite_gradients(name, value, dtype):
    features = [torch.randn(8, 3, dtype=dtype) for _ in range(2)]
    for x in features:
        x[:, 1] = value
    result, grads = evaluate(LOSSES[name], features)
    assert_finite(result, grads)
    if name == "moments":
        skew = gaussian_moment_loss(features, moments=["skewness"], eps=0.0)
        others = gaussian_moment_loss(
            [x[:, [0, 2]] for x in features], moments=["skewness"], eps=0.0
        )
        torch.testing.assert_close(skew, others, rtol=1e-4, atol=0)


# Sizes, layouts, gradients by some


@pytest.mark.parametrize("count", [1, 7, 129, 1000])
@pytest.mark.parametrize("dim", [1, 3, 65, 1100])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_every_size_and_layout_gives_the_same_kernel_sums(count, dim, layout):
    if count * dim > 2**17 and layout != "transposed":
        pytest.skip("one layout of the largest is enough")
    x = torch.randn(count, dim)
    y = torch.randn(7, dim) + 0.1
    sigma = dim**0.5
    expected = reference.mmd([x.numpy(), y.numpy()], [sigma], "biased")
    laid = {
        "contiguous": x.float(),
        "transposed": x.float().T.contiguous().T,
        "strided": torch.stack([x, x], -1).float()[..., 1],
    }[layout].requires_grad_()
    loss = mmd_loss([laid, y.float()], bandwidth=sigma)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    wide = x.clone().requires_grad_()
    mmd_loss([wide, y], bandwidth=sigma).backward()
    bound = 1e-4 * wide.grad.abs().max().item()
    torch.testing.assert_close(laid.grad.double(), wide.grad, rtol=1e-3, atol=bound)


@every_loss
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False,) * 3])
def test_a_gradient_by_some_modalities_alone(name, wanted):
    features = [torch.randn(5, 3) for _ in range(3)]
    _, expected = evaluate(LOSSES[name], features)
    leaves = [x.clone().requires_grad_(want) for x, want in zip(features, wanted)]
    value = LOSSES[name](leaves)
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.backward()
    for want, leaf, grad in zip(wanted, leaves, expected):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-8)


# Half precision


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e2])
def test_half_precision_is_finite_and_that_of_float32(name, dtype, scale):
    features = [(scale * torch.randn(8, 5)).to(dtype) for _ in range(2)]
    features[0][3] = 0.0
    value, grads = evaluate(LOSSES[name], features)
    expected, expected_grads = evaluate(LOSSES[name], [x.float() for x in features])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    for grad, expected_grad in zip(grads, expected_grads):
        assert grad.dtype == dtype
        # A cosine of tiny vectors has a gradient that float16 cannot hold.
        largest = expected_grad.abs().max().item()
        if LOSSES[name].partner is None and largest < torch.finfo(dtype).max:
            torch.testing.assert_close(grad, expected_grad.to(dtype))
        elif 4 * largest < torch.finfo(dtype).max:
            # Its features are given twice, and the sum of two gradients is rounded.
            number = torch.finfo(dtype)
            bound = number.eps * (largest + number.smallest_normal)
            torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=0.01, atol=bound)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_masks_of_minus_infinity(name, dtype):
    features = [torch.randn(6, 3).float() for _ in range(2)]
    features[1][4] = -math.inf
    weights = [None, torch.tensor([1, 1, 1, 1, 0, 1]).bool()]
    expected, expected_grads = evaluate(LOSSES[name], features, weights)
    leaves = [x.clone().requires_grad_() for x in features]
    with torch.autocast("cpu", dtype=dtype):
        value = LOSSES[name](leaves, weights)
    grads = torch.autograd.grad(value, leaves)
    assert_finite(value, grads)
    torch.testing.assert_close((value, grads), (expected, expected_grads))


# Global state


@every_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_is_left_alone(name, mode):
    features = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    with mode(), state_unchanged():
        value = LOSSES[name](features)
        assert value.requires_grad == torch.is_grad_enabled()
        # An exception on the way changes nothing either.
        with pytest.raises(TypeError, match="must share one dtype"):
            LOSSES[name]([features[0], features[1].float()])


@pytest.fixture
def reduced_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@every_loss
def test_reduced_precision_of_products_changes_nothing_on_a_cpu(name, reduced_precision):
    features = [torch.randn(40, 30) for _ in range(2)]
    with state_unchanged():
        value = LOSSES[name]([x.float() for x in features])
    # Random draws are others in another dtype.
    if not LOSSES[name].seeds and name != "mmd random features":
        torch.testing.assert_close(value.double(), LOSSES[name](features), rtol=1e-4, atol=1e-5)
