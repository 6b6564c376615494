import pytest
import torch
from torch.autograd import gradcheck

from multialign import GaussianMomentLoss, gaussian_moment_loss
from tests import reference

MOMENTS = ("mean", "covariance", "skewness")


@pytest.mark.parametrize("sizes", [(1, 1), (40, 3), (5, 17, 40), (2, 3, 4, 5), (7, 7, 7, 7, 7)])
@pytest.mark.parametrize(
    "names", [MOMENTS, ("mean",), ("covariance",), ("skewness",), ("skewness", "mean")]
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_matches_oracle(sizes, names, reduction):
    features = [2 * torch.randn(n, 4) + m for m, n in enumerate(sizes)]
    weights = [torch.rand(n) for n in sizes]
    for given in (None, weights):
        loss = gaussian_moment_loss(features, given, moments=names, feature_reduction=reduction)
        expected = reference.gaussian_moment([x.numpy() for x in features], names, reduction, given)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("names", [MOMENTS, ("mean",), ("covariance",), ("skewness",)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients(names, reduction):
    features = [torch.randn(n, 3, requires_grad=True) for n in (4, 5, 6)]
    weight = torch.rand(4, requires_grad=True)

    def loss(x, y, z, w):
        return gaussian_moment_loss(
            [x, y, z], [w, None, None], moments=names, feature_reduction=reduction
        )

    assert gradcheck(loss, (*features, weight))


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_rows_change_nothing(weighted, monkeypatch):
    features = [torch.randn(2, n, 3) + m for m, n in enumerate((1, 7, 10))]
    weights = [torch.rand(2, n) for n in (1, 7, 10)]
    weights[2][0, :4] = 0
    inputs = [t.requires_grad_() for t in (features + weights if weighted else features)]
    results = []
    for _ in range(2):
        loss = gaussian_moment_loss(inputs[:3], inputs[3:] or None)
        results.append((loss, torch.autograd.grad(loss, inputs)))
        monkeypatch.setattr("multialign.moments._BLOCK_ENTRIES", 18)  # three rows of each problem
    torch.testing.assert_close(results[0], results[1])


def test_constant_feature_has_no_skewness_and_finite_gradient():
    x = torch.randn(8, 3).float()
    x[:, 1] = 0.1  # not exact in binary: a mean taken carelessly leaves a deviation
    x.requires_grad_()
    loss = gaussian_moment_loss([x, torch.zeros(1, 3).float()], moments=["skewness"])
    loss.backward()
    expected = reference.moments(x.detach().double().numpy()[:, [0, 2]])["skewness"]
    torch.testing.assert_close(loss.item(), (expected**2).sum() / 2, rtol=1e-4, atol=1e-6)
    assert (x.grad[:, 1] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 2)])
def test_few_samples(sizes):
    features = [torch.randn(n, 6, requires_grad=True) for n in sizes]
    loss = gaussian_moment_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in features)


def test_an_offset_costs_no_accuracy():
    features = [torch.randn(50, 3).float(), torch.randn(60, 3).float()]
    names = ["covariance", "skewness"]
    moved = gaussian_moment_loss([x + 2.0**13 for x in features], moments=names)
    # 2^13 leaves float32 features with an error of 5e-4 of their own
    torch.testing.assert_close(
        moved, gaussian_moment_loss(features, moments=names), rtol=1e-2, atol=0
    )


def test_duplicating_the_batch_changes_nothing():
    features = [torch.randn(5, 3), torch.randn(6, 3)]
    torch.testing.assert_close(
        gaussian_moment_loss([torch.cat([x, x]) for x in features]), gaussian_moment_loss(features)
    )


def test_zero_eps_is_finite_for_a_constant_feature():
    x = torch.ones(4, 2, requires_grad=True)
    gaussian_moment_loss([x, torch.randn(4, 2)], eps=0.0).backward()
    assert x.grad.isfinite().all()


def test_errors():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match="each of moments must be one of .* got 'kurtosis'"):
        GaussianMomentLoss(moments=["kurtosis"])
    with pytest.raises(ValueError, match="non-empty sequence"):
        GaussianMomentLoss(moments="mean")
    with pytest.raises(ValueError, match="feature_reduction must be one of"):
        gaussian_moment_loss([x, x], feature_reduction="max")
    with pytest.raises(ValueError, match="eps must be a finite number >= 0; got -1"):
        gaussian_moment_loss([x, x], eps=-1)


def test_zero_to_the_last_digit_at_equality():
    x = torch.randn(9, 4) + 1e3
    assert gaussian_moment_loss([x, x.clone(), x.clone()]) == 0


def test_mean_over_features_of_each_problem():
    features = [torch.randn(2, n, 3) for n in (4, 5)]
    options = {"feature_reduction": "mean"}
    singles = [gaussian_moment_loss([x[b] for x in features], **options) for b in range(2)]
    torch.testing.assert_close(
        gaussian_moment_loss(features, **options), torch.stack(singles).mean()
    )


def test_no_moments_is_an_error():
    with pytest.raises(ValueError, match="moments must be a non-empty sequence"):
        GaussianMomentLoss(moments=())
    with pytest.raises(ValueError, match="moments must be a non-empty sequence"):
        GaussianMomentLoss(moments={"mean"})


@pytest.mark.parametrize("names", [("mean",), ("covariance",), ("skewness",), MOMENTS])
def test_absent_rows_far_from_the_others_do_not_overflow(names):
    """Twice a feature's square leaves the range of float32, what is present does not."""
    x = torch.full((3, 2), 1e25).float()
    weights = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])]
    assert gaussian_moment_loss([x, x], weights, moments=names) == 0


def test_each_problem_has_modalities_of_its_own():
    features = [torch.randn(5, n, 3) + m for m, n in enumerate((4, 5, 6))]
    weights = [torch.rand(5, n) for n in (4, 5, 6)]
    weights[0][:4] = 0
    weights[1][2] = 0
    singles = [
        gaussian_moment_loss([x[b] for x in features], [w[b] for w in weights]) for b in range(5)
    ]
    torch.testing.assert_close(gaussian_moment_loss(features, weights), torch.stack(singles).mean())


@pytest.mark.parametrize("count", range(2, 12))
def test_zero_to_the_last_digit_for_any_number_of_modalities(count):
    x = torch.randn(2, 9, 4) + 1e3 * torch.rand(2, 1, 4)
    assert gaussian_moment_loss([x.clone() for _ in range(count)]) == 0


def test_the_table_of_a_covariance_has_a_bound(monkeypatch):
    features = [torch.randn(2, 3, count, 4) for count in (5, 6)]
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 4 * 4)
    assert gaussian_moment_loss(features).isfinite()
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 4 * 4 - 1)
    with pytest.raises(MemoryError, match='; leave "covariance" out of moments, or project the f'):
        gaussian_moment_loss(features)
    assert gaussian_moment_loss(features, moments=["mean", "skewness"]).isfinite()
