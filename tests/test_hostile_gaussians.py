"""Inputs that broke other libraries: square roots of covariances, distances, and mixtures."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from multialign import bures_wasserstein_cost, fit_gaussian_mixture, squared_euclidean_cost
from tests import reference

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

# Square roots of matrices


def spd(*diagonal):
    return torch.diag(torch.tensor(diagonal))[None]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (spd(1.0, 1.0, 1.0), spd(1.0, 1.0, 1.0)),
        (spd(1.0, 1.0, 1.0), spd(2.0, 2.0, 2.0)),
        (spd(1.0, 1.0, 2.0), spd(1.0, 1.0, 1.0)),
    ],
)
def test_repeated_eigenvalues_have_first_and_second_derivatives(a, b):
    mean = torch.zeros(1, 3)

    def cost(a, b):
        # Only symmetric changes keep a covariance one.
        return bures_wasserstein_cost(mean, (a + a.mT) / 2, mean, (b + b.mT) / 2)

    inputs = (a.double().requires_grad_(), b.double().requires_grad_())
    assert gradcheck(cost, inputs, atol=1e-5)
    assert gradgradcheck(cost, inputs, atol=1e-4)


@pytest.mark.parametrize("case", ["zero", "129 of 128", "8 of 64", "constant"])
@every_dtype
def test_singular_covariances_have_real_costs_and_finite_gradients(case, dtype):
    count, dim = {"zero": (1, 4), "129 of 128": (129, 128), "8 of 64": (8, 64)}.get(case, (9, 5))
    x = torch.randn(count, dim)
    x = torch.zeros_like(x) if case == "zero" else x
    x = x[:1].expand_as(x) if case == "constant" else x
    covariance = torch.atleast_2d(torch.cov(x.T, correction=0))[None].to(dtype).requires_grad_()
    other = torch.eye(dim, dtype=dtype)[None].requires_grad_()
    mean = torch.zeros(1, dim, dtype=dtype)
    own = bures_wasserstein_cost(mean, covariance, mean, covariance)
    cost = bures_wasserstein_cost(mean, covariance, mean, other)
    grads = torch.autograd.grad((own + cost).sum(), (covariance, other))
    assert own.abs() <= 1e-5 * dim
    expected = reference.bures_wasserstein(
        mean[0].double().numpy(),
        covariance[0].detach().double().numpy(),
        mean[0].double().numpy(),
        other[0].detach().double().numpy(),
    )
    torch.testing.assert_close(cost.item(), float(expected), rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


@every_dtype
def test_a_cloud_is_at_distance_0_from_itself(dtype):
    for count, dim in ((5, 3), (300, 65)):
        x = 1e3 * torch.randn(count, dim, dtype=dtype)
        cost = squared_euclidean_cost(x, x)
        assert (cost.diagonal() == 0).all()
        assert (cost >= 0).all()


# Mixtures


@pytest.mark.parametrize("case", ["duplicates", "fewer than K", "equal", "one", "tiny", "offset"])
@pytest.mark.parametrize("kind", ["diag", "full", "tied", "spherical"])
@every_dtype
@pytest.mark.filterwarnings("ignore:. distinct samples for")
def test_a_mixture_of_few_distinct_points_is_finite(case, kind, dtype):
    x = {
        "duplicates": torch.tensor([0.0] * 25 + [1.0, 2.0, 3.0, 4.0, 5.0])[:, None],
        "fewer than K": torch.randn(2, 3),
        "equal": torch.full((10, 2), 0.3),
        "one": torch.randn(1, 4),
        "tiny": 1e-18 * torch.randn(20, 3),
        "offset": torch.randn(20, 3) + 1e6,
    }[case].to(dtype)
    x.requires_grad_()
    mixture = fit_gaussian_mixture(x, 4, covariance_type=kind)
    parameters = (mixture.weights, mixture.means, mixture.covariances)
    assert all(part.isfinite().all() for part in parameters)
    torch.testing.assert_close(mixture.weights.sum(), torch.ones((), dtype=dtype))
    covariances = mixture.component_covariances()
    variances = covariances.diagonal(dim1=-2, dim2=-1) if covariances.ndim == 3 else covariances
    assert (variances > 0).all()
    (grad,) = torch.autograd.grad(mixture.means.sum() + mixture.weights[0], x)
    assert grad.isfinite().all()


@every_dtype
def test_one_narrow_cluster_far_away_has_a_positive_variance(dtype):
    x = torch.cat([torch.full((50, 1), 1e4), 1e4 + 1e-2 * torch.arange(50.0)[:, None]]).to(dtype)
    for kind in ("diag", "full", "tied", "spherical"):
        mixture = fit_gaussian_mixture(x, 2, covariance_type=kind, regularization=1e-6)
        assert (mixture.component_covariances() > 0).all()
        assert mixture.log_prob(x).isfinite().all()
