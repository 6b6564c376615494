import pytest
import torch

from multialign import (
    diagnose,
    fit_gaussian_mixture,
    gaussian_moment_loss,
    mmd_loss,
)
from tests.losses import LOSSES


@pytest.fixture
def pair():
    return torch.randn(20, 3), torch.randn(12, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_found_in_good_data(pair, dtype):
    features = [x.to(dtype) for x in pair]
    assert diagnose(features).startswith("Nothing found")
    masked = torch.cat([features[1], features[1].new_full((2, 3), torch.nan)])
    mask = torch.tensor([True] * 12 + [False] * 2)
    assert diagnose([features[0], masked], [None, mask]).startswith("Nothing found")
    assert diagnose(torch.stack([features[1], features[1] + 0.5])).startswith("Nothing found")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_not_finite(pair, value, name):
    x, y = pair
    y[[2, 7], 1] = value
    found = diagnose([x, y])
    assert found.splitlines() == [
        "features[1]: not finite in 2 of 12 rows (2, 7), in features 1. Every loss is NaN or "
        "infinite."
    ]
    assert not LOSSES[name]([x[:12], y]).isfinite()


def test_a_batch_is_counted_row_by_row(pair):
    x = torch.randn(3, 8, 2)
    x[2, 5, 0] = torch.nan
    assert "features[0]: not finite in 1 of 24 rows (21)" in diagnose([x, torch.randn(3, 8, 2)])


@pytest.mark.parametrize("name", LOSSES)
def test_negative_weights(pair, name):
    x, y = pair[0][:12], pair[1]
    weight = torch.ones(12)
    weight[[0, 3]] = -1.0
    assert "weights[0]: negative or NaN at 2 of 12 rows (0, 3). Every loss is NaN." in diagnose(
        [x, y], [weight, None]
    )
    assert LOSSES[name]([x, y], [weight, None]).isnan()


def test_infinite_weights(pair):
    weight = torch.ones(12)
    weight[4] = torch.inf
    assert "weights[1]: infinite at 1 of 12 rows (4)" in diagnose(pair, [None, weight])
    assert mmd_loss(pair, [None, weight]).isnan()


def test_absent_and_few_samples(pair):
    found = diagnose(pair, [torch.zeros(20), torch.tensor([True] + [False] * 11)])
    assert "features[0]: no sample is present (weights of 0, or N = 0)" in found
    assert "features[1]: one sample alone" in found
    assert mmd_loss(pair, [torch.zeros(20), None]) == 0
    batch = torch.randn(3, 5, 2)
    mask = torch.tensor([[True] * 5, [False] * 5, [True, True, False, False, False]])
    found = diagnose([batch, batch + 1], [mask, None])
    assert "features[0]: no sample is present in 1 of 3 problems" in found
    assert "features[0]: fewer than 4 samples in 1 of 3 problems" in found


def test_constant_features(pair):
    x, y = pair
    y[:, 2] = 0.3
    assert "features[1]: constant in features 2. Their skewness is 0" in diagnose([x, y])
    assert fit_gaussian_mixture(y, 2, regularization=0).means.isnan().any()
    y[:] = y[:1]
    assert "features[1]: all 12 samples are equal" in diagnose([x, y])


def test_equal_samples(pair):
    x, y = pair
    x[7] = x[9] = x[2]
    found = diagnose([x, y], [torch.arange(20) != 0, None])
    assert "features[0]: 2 of 19 rows repeat an earlier one (7, 9)" in found
    assert "more than 17 components" in found
    with pytest.warns(UserWarning, match="18 distinct samples for 19 components"):
        fit_gaussian_mixture(x, 19, iterations=2)


def test_scales(pair):
    x, y = pair
    found = diagnose([x, 1e3 * y])
    assert "features[1] has a scale of" in found
    assert "mmd_loss with bandwidth=1.0 has no gradient" in found
    larger = gaussian_moment_loss([x, 1e3 * y], moments=["covariance"])
    # The fourth power, but for what x adds.
    torch.testing.assert_close(
        larger / gaussian_moment_loss([x, 1e4 * y], moments=["covariance"]),
        torch.tensor(1e-4),
        rtol=1e-3,
        atol=0,
    )
    assert "Scales are" in diagnose([1e-6 * x, 1e-6 * y])
    x[:, 1] *= 1e6
    assert "features[0]: feature 1 varies by" in diagnose([x, y])


def test_modalities_far_apart(pair):
    x, y = pair
    found = diagnose([x, y + 100])
    assert "features[0] and features[1] are 1.7e+02 apart" in found
    y = (y + 100).requires_grad_()
    (grad,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=1.0), y)
    centred = grad.sum(0)  # the pull on y as a whole
    assert centred.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=170.0), y)
    assert (grad.sum(0) > 1e-4).all()


def test_wrong_arguments_raise(pair):
    with pytest.raises(ValueError, match=r"features must be a sequence of at least 2"):
        diagnose([pair[0]])
    with pytest.raises(ValueError, match=r"weights\[0\] must have shape"):
        diagnose(pair, [torch.ones(3), None])
