"""The permutation test of equal distributions."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from multialign import mmd_loss, mmd_test
from tests import reference


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


OPTIONS = [{"bandwidth": "median"}, {"bandwidth": (0.5, 2.0)}, {"kernel": "energy"}]
every_kernel = pytest.mark.parametrize("options", OPTIONS, ids=str)


@every_kernel
def test_the_statistic_is_the_biased_estimate(options):
    x, y = torch.randn(2, 13, 3), torch.randn(2, 9, 3) + 0.5
    result = mmd_test(x, y, permutations=5, **options)
    expected = torch.stack([mmd_loss([x[b], y[b]], **options) for b in range(2)])
    torch.testing.assert_close(result.statistic, expected)
    assert result.p_value.shape == (2,)


@every_kernel
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_p_value_counts_permutations(options, rows, monkeypatch):
    """Against a loop over permutations of the pooled samples, each with a kernel of its own."""
    monkeypatch.setattr("multialign.two_sample._BLOCK_ENTRIES", 20 * rows)
    x, y = torch.randn(12, 2), torch.randn(8, 2) + 0.4
    pooled = torch.cat([x, y])
    sigma = reference.median_distance([pooled.numpy()])
    options = {"bandwidth": sigma} if options.get("bandwidth") == "median" else options
    observed = mmd_loss([x, y], **options)
    draws = torch.rand(200, 20, generator=seeded(), dtype=torch.float64).argsort(-1)
    # Row `order` says from where each place is filled: its first 12 places stand for x.
    values = [mmd_loss([pooled[o < 12], pooled[o >= 12]], **options) for o in draws]
    expected = (1 + sum(value >= observed - 1e-14 for value in values)) / 201
    found = mmd_test(x, y, permutations=200, generator=seeded(), **options)
    torch.testing.assert_close(found.p_value, expected.double())


def rejections(shift, trials, **options):
    generator = seeded(3)
    x = torch.randn(trials, 15, 2, generator=generator)
    y = torch.randn(trials, 11, 2, generator=generator) + shift
    result = [mmd_test(a, b, permutations=99, generator=generator, **options) for a, b in zip(x, y)]
    return int(sum(r.p_value <= 0.05 for r in result))


@every_kernel
def test_its_level_is_5_percent_and_its_power_is_not(options):
    """Of 400 tests of equal distributions, as many reject as of 400 coins of 5 %."""
    low, high = binom.interval(0.999, 400, 0.05)
    assert low <= rejections(0.0, 400, **options) <= high
    assert rejections(1.0, 100, **options) > 70


def test_equal_samples_have_a_p_value_of_1():
    x = torch.randn(10, 3)
    for options in OPTIONS:
        assert mmd_test(x, x.clone(), permutations=50, **options).p_value == 1
        ones = torch.ones(6, 2)
        assert mmd_test(ones, ones[:4], permutations=50, **options).p_value == 1


def test_the_smallest_p_value_is_one_of_all_permutations():
    x = torch.randn(40, 2)
    assert mmd_test(x, x + 9, permutations=199).p_value == 1 / 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dtypes_and_samples_that_are_not_finite(dtype, bad):
    x, y = torch.randn(20, 2).to(dtype), torch.randn(20, 2).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for options in OPTIONS:
        result = mmd_test(x, y, permutations=20, generator=seeded(), **options)
        exact = mmd_test(x.double(), y.double(), permutations=20, generator=seeded(), **options)
        assert result.statistic.dtype == result.p_value.dtype == wide
        torch.testing.assert_close(result.statistic.double(), exact.statistic, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(result.p_value.double(), exact.p_value)
        y[3, 1] = bad
        result = mmd_test(x, y, permutations=20, **options)
        assert result.p_value.isnan()
        assert not result.statistic.isfinite()
        y[3, 1] = 0


def test_seeds_and_gradients():
    x, y = torch.randn(15, 2, requires_grad=True), torch.randn(15, 2) + 0.3
    results = [mmd_test(x, y, permutations=500, generator=seeded(s)) for s in (1, 1, 2)]
    assert results[0] == results[1]
    assert results[0].p_value != results[2].p_value
    assert not results[0].statistic.requires_grad
    before = torch.get_rng_state()
    mmd_test(x, y, permutations=5, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_errors():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match="permutations must be an integer >= 1; got 0"):
        mmd_test(x, x, permutations=0)
    with pytest.raises(ValueError, match="y must have at least one sample; got N = 0"):
        mmd_test(x, x[:0])
    with pytest.raises(ValueError, match="kernel must be one of"):
        mmd_test(x, x, kernel="laplace")
    with pytest.raises(MemoryError, match="take fewer permutations, or fewer samples"):
        mmd_test(x, x, permutations=2**26)
    assert mmd_test(x, x, permutations=np.int64(3)).p_value == 1
