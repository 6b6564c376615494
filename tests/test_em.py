import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from multialign import GaussianMixture, fit_gaussian_mixture
from multialign.mixture.em_moments import SMALLEST_FLOOR, em_by_moments
from multialign.mixture.options import FitOptions
from multialign.mixture.parameters import Parameters, Standardised


def axis_aligned_em(x, mass, weights, means, variances, floor, *, spherical=False, **settings):
    options = FitOptions(
        covariance_type="spherical" if spherical else "diag",
        em_iterations=1,
        regularization=1e-2,
        differentiate="unroll",
        generator=None,
        process_group=None,
    )
    data = Standardised(x, mass, None, None, None, floor)
    start = Parameters(weights, means, variances[..., 0] if spherical else variances)
    mixture, moments, steps = em_by_moments(data, start, options, **settings)
    if spherical:
        mixture = mixture._replace(covariances=mixture.covariances.unsqueeze(-1).expand_as(means))
    return tuple(mixture), tuple(moments), steps


def problem(batch=3, n=9, k=3, dim=2, spherical=False):
    """Arguments of `axis_aligned_em`, each with gradient."""
    mass = torch.rand(batch, n) + 0.1
    variances = torch.rand(batch, k, dim) + 0.5
    if spherical:
        variances = variances[..., :1].expand(batch, k, dim).clone()
    arguments = (
        torch.randn(batch, n, dim),
        mass / mass.sum(-1, keepdim=True),
        torch.randn(batch, k).softmax(-1),
        torch.randn(batch, k, dim),
        variances,
        torch.full((batch, 1, 1), 1e-2),
    )
    return [argument.requires_grad_() for argument in arguments]


def by_differences(x, mass, weights, means, variances, floor, *, iterations, spherical=False):
    """The same as it is written in books, and the posterior moments."""

    def posterior():
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        squares = deviation.square() / variances.unsqueeze(-3) + variances.log().unsqueeze(-3)
        return mass.unsqueeze(-1) * (weights.log().unsqueeze(-2) - squares.sum(-1) / 2).softmax(-1)

    for _ in range(iterations):
        joint = posterior()
        weights = joint.sum(-2)
        means = joint.mT @ x / weights.unsqueeze(-1)
        squares = (x.unsqueeze(-2) - means.unsqueeze(-3)).square()
        variances = (joint.unsqueeze(-1) * squares).sum(-3) / weights.unsqueeze(-1) + floor
        if spherical:
            variances = variances.mean(-1, keepdim=True).expand_as(means)
    joint = posterior()
    centres = joint.mT @ x / joint.sum(-2).unsqueeze(-1)
    squares = (x.unsqueeze(-2) - centres.unsqueeze(-3)).square().sum(-1)
    return (weights, means, variances), (joint.sum(-2), centres, (joint * squares).sum(-2))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("block", [2**20, 1])
def test_equals_autograd_through_differences(spherical, iterations, block, monkeypatch):
    monkeypatch.setattr("multialign.mixture.em_moments._BLOCK_ENTRIES", block)
    inputs = problem(n=30, k=4, dim=5, spherical=spherical)
    options = {"iterations": iterations, "spherical": spherical}
    *ours, _ = axis_aligned_em(*inputs, posterior=True, **options)
    expected = by_differences(*inputs, **options)
    torch.testing.assert_close(tuple(ours), expected, rtol=1e-10, atol=1e-12)
    directions = [torch.randn_like(output) for part in expected for output in part]
    grads = [
        torch.autograd.grad(
            [o for part in outputs for o in part], inputs, directions, materialize_grads=True
        )
        for outputs in (ours, expected)
    ]
    if spherical:  # variances equal along the last dimension have one derivative
        grads = [[*g[:4], g[4].sum(-1), g[5]] for g in grads]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("posterior", [False, True])
def test_gradcheck(posterior):
    def fit(*inputs):
        parameters, moments, _ = axis_aligned_em(*inputs, iterations=3, posterior=posterior)
        return (*parameters, *moments) if posterior else parameters

    assert gradcheck(fit, problem())


def test_problems_stop_one_by_one():
    inputs = problem()
    options = {"iterations": 40, "tolerance": 1e-2}
    *_, steps = axis_aligned_em(*inputs, **options)
    assert len(steps.unique()) > 1
    assert (steps < 40).all()
    for b in range(3):
        one = [x[b : b + 1] for x in inputs]
        together = [x[b : b + 1] for x in axis_aligned_em(*inputs, **options)[0]]
        alone = axis_aligned_em(*one, iterations=int(steps[b]))[0]
        torch.testing.assert_close(together, list(alone))
    assert gradcheck(lambda *inputs: axis_aligned_em(*inputs, **options)[0], inputs)


def test_a_problem_without_samples_stays():
    inputs = problem()
    absent = torch.ones(3, 1)
    absent[1] = 0
    inputs[1] = (inputs[1].detach() * absent).requires_grad_()
    (weights, means, variances), moments, _ = axis_aligned_em(*inputs, iterations=3, posterior=True)
    for output, start in zip((weights, means, variances), inputs[2:5]):
        torch.testing.assert_close(output[1], start[1])
    assert (moments[0][1] == weights[1]).all()
    grads = torch.autograd.grad([weights, means, variances], inputs, [weights, means, variances])
    for grad, output in zip(grads[2:5], (weights, means, variances)):
        torch.testing.assert_close(grad[1], output[1].detach())
    assert (grads[0][1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_component_without_samples_stays():
    inputs = problem()
    with torch.no_grad():
        inputs[3][2, 1] = 200.0
    (weights, means, variances), _, _ = axis_aligned_em(*inputs, iterations=3)
    assert weights[2, 1] == 0
    torch.testing.assert_close(means[2, 1], inputs[3][2, 1])
    torch.testing.assert_close(variances[2, 1], inputs[4][2, 1])
    grads = torch.autograd.grad(means.sum() + variances.sum(), inputs)
    torch.testing.assert_close(grads[4][2, 1], torch.ones(2))
    assert all(grad.isfinite().all() for grad in grads)


def test_second_derivatives_are_refused():
    inputs = problem()
    means = axis_aligned_em(*inputs, iterations=2)[0][1]
    (grad,) = torch.autograd.grad(means.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def extended_precision(x, start, iterations, regularization):
    """EM by differences in numpy's longest floating-point numbers."""
    x, weights, means, variances = (np.asarray(a, np.longdouble) for a in (x, *start))
    floor = np.longdouble(regularization) * x.var(0).mean()
    for _ in range(iterations):
        deviation = x[:, None] - means
        joint = np.log(weights) - (deviation**2 / variances + np.log(variances)).sum(-1) / 2
        joint = np.exp(joint - joint.max(1, keepdims=True))
        joint /= joint.sum(1, keepdims=True)
        mass = joint.sum(0)
        weights, means = mass / len(x), joint.T @ x / mass[:, None]
        variances = (joint[:, :, None] * (x[:, None] - means) ** 2).sum(0) / mass[:, None] + floor
    return weights, means, variances


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("width", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_clusters_far_away_keep_their_digits(offset, width, dtype):
    centres = torch.randn(4, 8)[torch.arange(400) % 4]
    x = (centres + width * torch.randn(400, 8) + offset).to(dtype)
    start = GaussianMixture(
        weights=torch.full((4,), 0.25, dtype=dtype),
        means=x[:4].clone(),
        covariances=x.var(0, correction=0).expand(4, 8).clone(),
    )
    # The smallest floor that EM by moments takes; a smaller one is by differences.
    for regularization, rtol in ((1e-6, 1e-7), (SMALLEST_FLOOR, 1e-6), (1e-12, 1e-9)):
        mixture = fit_gaussian_mixture(
            x, 4, init=start, iterations=10, tolerance=0.0, regularization=regularization
        )
        exact = extended_precision(
            x.double().numpy(),
            [t.double().numpy() for t in (start.weights, start.means, start.covariances)],
            10,
            regularization,
        )
        eps = torch.finfo(dtype).eps
        ours = [t.double().numpy() for t in (mixture.weights, mixture.means, mixture.covariances)]
        np.testing.assert_allclose(ours[0], exact[0].astype(float), rtol=max(rtol, 4 * eps))
        np.testing.assert_allclose(ours[2], exact[2].astype(float), rtol=max(rtol, 4 * eps))
        # In deviations of the component, but for the rounding of the result itself.
        error = np.abs(ours[1] - exact[1]) - 2 * eps * np.abs(exact[1])
        assert (error < 1e-6 * np.sqrt(exact[2])).all()
