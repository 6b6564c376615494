import copy
import functools
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits, load_wine, make_swiss_roll
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch.autograd import gradcheck

from multialign import GaussianMixture, GaussianPrototypes, fit_gaussian_mixture
from multialign._distributed import ALONE
from multialign._draws import normal, uniform
from multialign.mixture import em, em_subspace
from tests import reference

TYPES = ("diag", "full", "tied", "spherical")


def random_mixture(count, dim, covariance_type, batch=()):
    shape = {
        "diag": (count, dim),
        "full": (count, dim, dim),
        "tied": (dim, dim),
        "spherical": (count,),
    }
    size = (*batch, *shape[covariance_type])
    covariances = torch.rand(size) + 0.5
    if covariance_type in ("full", "tied"):
        factor = torch.randn(size)
        covariances = factor @ factor.mT + torch.eye(dim)
    return GaussianMixture(
        weights=torch.rand(*batch, count).softmax(-1),
        means=2 * torch.randn(*batch, count, dim),
        covariances=covariances,
        covariance_type=covariance_type,
    )


def dense_covariances(mixture):
    covariances = mixture.component_covariances()
    return covariances if covariances.ndim > mixture.means.ndim else torch.diag_embed(covariances)


def to_sklearn(mixture):
    """Sklearn's mixture that starts where ours does."""
    precisions = mixture.covariances
    precisions = (
        precisions.inverse() if mixture.covariance_type in ("full", "tied") else 1 / precisions
    )
    return {
        "n_components": mixture.num_components,
        "covariance_type": mixture.covariance_type,
        "weights_init": mixture.weights.numpy(),
        "means_init": mixture.means.numpy(),
        "precisions_init": precisions.numpy(),
    }


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(("count", "dim"), [(1, 1), (3, 2), (4, 5)])
def test_density_and_posterior_match_scipy(covariance_type, count, dim):
    mixture = random_mixture(count, dim, covariance_type)
    x = torch.randn(20, dim)
    parameters = [t.numpy() for t in (mixture.weights, mixture.means, dense_covariances(mixture))]
    density = sum(w * multivariate_normal(m, c).pdf(x.numpy()) for w, m, c in zip(*parameters))
    torch.testing.assert_close(mixture.log_prob(x).exp().numpy(), density, rtol=1e-9, atol=1e-300)
    expected = reference.posterior(x.numpy(), *parameters)
    torch.testing.assert_close(mixture.posterior(x).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_sample_has_the_moments_of_the_mixture(covariance_type):
    mixture = random_mixture(3, 2, covariance_type)
    x = mixture.sample(200_000, generator=torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    deviation = mixture.means - mean
    covariance = torch.einsum("k,kij->ij", mixture.weights, dense_covariances(mixture))
    covariance = covariance + torch.einsum("k,ki,kj->ij", mixture.weights, deviation, deviation)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=3e-2)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_fit_follows_sklearn_step_by_step(covariance_type):
    x = random_mixture(3, 4, covariance_type).sample(300)
    start = random_mixture(3, 4, covariance_type)
    for steps in (1, 5, 40):
        # Ours is relative to the variance of the data, theirs absolute.
        floor = 1e-6 * float(x.var(0, correction=0).mean())
        theirs = SklearnMixture(**to_sklearn(start), max_iter=steps, tol=0.0, reg_covar=floor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.fit(x.numpy())
        ours = fit_gaussian_mixture(
            x, 3, covariance_type=covariance_type, init=start, iterations=steps, tolerance=0.0
        )
        torch.testing.assert_close(ours.weights.numpy(), theirs.weights_, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.means.numpy(), theirs.means_, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            ours.covariances.numpy(), theirs.covariances_, rtol=1e-6, atol=1e-9
        )


# In float64 the steps are those of sklearn, as the test above has it.
@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)]
)
def test_held_out_likelihood_is_that_of_sklearn(covariance_type, dtype):
    """On handwritten digits, from the same responsibilities."""
    digits = torch.tensor(load_digits().data)
    # Pixels that are nearly always blank have densities without bound, whoever fits them.
    digits = digits[:, digits.var(0) > 1.0]
    train, test = digits[::2], digits[1::2]
    responsibilities = (4 * torch.randn(len(train), 5)).softmax(-1)
    weights = responsibilities.mean(0)
    means = responsibilities.T @ train / responsibilities.sum(0).unsqueeze(-1)
    deviation = train - means.unsqueeze(1)
    floor = 1e-3 * train.var(0, correction=0).mean()
    full = torch.einsum("nk,kni,knj->kij", responsibilities, deviation, deviation)
    full = full / responsibilities.sum(0)[:, None, None] + floor * torch.eye(train.shape[1])
    diagonal = full.diagonal(dim1=-2, dim2=-1)
    start = GaussianMixture(
        weights=weights,
        means=means,
        covariances={
            "full": full,
            "tied": torch.einsum("k,kij->ij", weights, full),
            "diag": diagonal,
            "spherical": diagonal.mean(-1),
        }[covariance_type],
        covariance_type=covariance_type,
    )
    theirs = SklearnMixture(**to_sklearn(start), reg_covar=float(floor)).fit(train.numpy())
    fields = ("weights", "means", "covariances")
    ours = fit_gaussian_mixture(
        train.to(dtype),
        5,
        covariance_type=covariance_type,
        init=replace(start, **{name: getattr(start, name).to(dtype) for name in fields}),
        regularization=1e-3,
    )
    likelihood = ours.log_prob(test.to(dtype)).mean().item()
    assert likelihood == pytest.approx(theirs.score(test.numpy()), rel=1e-3)


def test_stops_where_sklearn_stops():
    x = random_mixture(2, 2, "diag").sample(200)
    start = random_mixture(2, 2, "diag")
    floor = 1e-6 * float(x.var(0, correction=0).mean())
    theirs = SklearnMixture(**to_sklearn(start), tol=1e-3, reg_covar=floor).fit(x.numpy())
    assert 1 < theirs.n_iter_ < 100
    ours = fit_gaussian_mixture(x, 2, init=start)
    torch.testing.assert_close(ours.means.numpy(), theirs.means_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_tells_what_sklearn_tells(covariance_type, dtype):
    x = random_mixture(3, 2, "diag").sample(200).to(dtype)
    start = random_mixture(3, 2, covariance_type)
    floor = 1e-6 * float(x.double().var(0, correction=0).mean())
    options = {"reg_covar": floor, "max_iter": 8, "tol": 3e-2}
    theirs = SklearnMixture(**to_sklearn(start), **options).fit(x.double().numpy())
    assert theirs.converged_
    for most, converged in ((8, True), (theirs.n_iter_ - 1, False)):
        ours = fit_gaussian_mixture(
            x,
            3,
            covariance_type=covariance_type,
            init=start.to(dtype),
            iterations=most,
            tolerance=3e-2,
        )
        assert ours.iterations == min(most, theirs.n_iter_)
        assert ours.converged == converged
        torch.testing.assert_close(ours.log_likelihood, ours.log_prob(x).mean())
    assert not ours.log_likelihood.requires_grad
    assert (start.iterations, start.converged, start.log_likelihood) == (None, None, None)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_each_problem_of_a_batch_tells_of_its_fit(covariance_type):
    x = torch.randn(3, 40, 2) * torch.tensor([1.0, 5.0, 1e-3])[:, None, None]
    weights = torch.rand(3, 40)
    start = random_mixture(2, 2, covariance_type, batch=(3,))
    options = {"covariance_type": covariance_type, "iterations": 60, "tolerance": 1e-2}
    mixture = fit_gaussian_mixture(x, 2, weights=weights, init=start, **options)
    assert mixture.converged.all()
    for b in range(3):
        one = GaussianMixture(
            weights=start.weights[b],
            means=start.means[b],
            covariances=start.covariances[b],
            covariance_type=covariance_type,
        )
        single = fit_gaussian_mixture(x[b], 2, weights=weights[b], init=one, **options)
        assert single.iterations == mixture.iterations[b]
        torch.testing.assert_close(single.log_likelihood, mixture.log_likelihood[b])
        expected = (single.log_prob(x[b]) * weights[b]).sum() / weights[b].sum()
        torch.testing.assert_close(single.log_likelihood, expected)


def test_with_tolerance_0_all_iterations_run():
    mixture = fit_gaussian_mixture(torch.randn(4, 9, 2), 2, iterations=7, tolerance=0.0)
    assert (mixture.iterations == 7).all()
    assert not mixture.converged.any()


def test_detach_and_to():
    x = torch.randn(20, 2, requires_grad=True)
    mixture = fit_gaussian_mixture(x, 2, covariance_type="full")
    detached = mixture.detach()
    for name in ("weights", "means", "covariances", "log_likelihood", "iterations", "converged"):
        assert torch.equal(getattr(detached, name), getattr(mixture, name))
        assert not getattr(detached, name).requires_grad
    assert mixture.means.requires_grad
    moved = mixture.to(torch.float32)
    assert moved.covariance_type == "full"
    assert {moved.weights.dtype, moved.means.dtype, moved.log_likelihood.dtype} == {torch.float32}
    assert (moved.iterations.dtype, moved.converged.dtype) == (torch.int64, torch.bool)
    moved.means.sum().backward()
    assert x.grad.any()
    other = mixture.to("meta")
    assert all(part.is_meta for part in (other.weights, other.means, other.iterations))
    by_hand = random_mixture(2, 2, "diag").to(torch.float32).detach()
    assert by_hand.iterations is None


@pytest.mark.parametrize("covariance_type", TYPES)
def test_no_regularization_as_in_sklearn(covariance_type):
    x, start = torch.randn(60, 3), random_mixture(2, 3, covariance_type)
    options = {"reg_covar": 0.0, "max_iter": 5, "tol": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = SklearnMixture(**to_sklearn(start), **options).fit(x.numpy())
    ours = fit_gaussian_mixture(
        x,
        2,
        covariance_type=covariance_type,
        init=start,
        iterations=5,
        tolerance=0.0,
        regularization=0,
    )
    torch.testing.assert_close(ours.means.numpy(), theirs.means_)
    torch.testing.assert_close(ours.covariances.numpy(), theirs.covariances_)
    with pytest.raises(ValueError, match="regularization must be a finite number >= 0; got -1"):
        fit_gaussian_mixture(x, 2, regularization=-1)


def test_without_regularization_a_singular_covariance_is_nan():
    x = torch.stack([torch.randn(9), torch.full((9,), 0.3)], -1)
    assert fit_gaussian_mixture(x, 2, regularization=0).means.isnan().all()


SWISS_ROLL = make_swiss_roll(1000, random_state=0)[0]


@pytest.mark.parametrize(
    ("data", "count", "covariance_type", "seeds"),
    [
        ("wine", 3, "full", 20),
        pytest.param("swiss roll", 20, "diag", 20, marks=pytest.mark.long),
        pytest.param("swiss roll", 20, "full", 20, marks=pytest.mark.long),
    ],
)
def test_fits_end_as_high_as_sklearns_from_its_own_start(data, count, covariance_type, seeds):
    wine = load_wine().data
    x = (wine - wine.mean(0)) / wine.std(0) if data == "wine" else SWISS_ROLL
    ours, theirs = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        fitted = fit_gaussian_mixture(
            torch.tensor(x), count, covariance_type=covariance_type, generator=generator
        )
        ours.append(fitted.log_likelihood)
        start = {"init_params": "k-means++", "random_state": seed}
        model = SklearnMixture(count, covariance_type=covariance_type, **start)
        theirs.append(model.fit(x).score(x))
    ours, theirs = torch.stack(ours), torch.tensor(theirs)
    error = (ours.var(correction=0) + theirs.var(correction=0)).div(seeds).sqrt()
    assert ours.mean() > theirs.mean() - 2 * error


@pytest.mark.parametrize("batch", [(), (2,)])
def test_greedy_seeds_leave_less_distance_than_plain_ones(batch):
    """The seeds of 20 equal clusters: drawn by distance alone, some clusters get none."""
    centres = 100 * torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0))
    x = (centres.repeat_interleave(10, 0) + torch.randn(*batch, 200, 2)).expand(*batch, 200, 2)
    misses = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        mixture = fit_gaussian_mixture(x, 20, iterations=1, tolerance=0.0, generator=generator)
        found = torch.cdist(centres.expand(*batch, 20, 2), mixture.means).amin(-1) < 30
        misses.append((~found).sum(-1).double().mean())
    assert torch.stack(misses).mean() < 0.5  # plain k-means++ misses more than two on average


FORWARD = [(kind, 9) for kind in TYPES] + [("full", 3)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize(("covariance_type", "rows"), FORWARD)
@pytest.mark.parametrize("differentiate", ["unroll", "last", "none"])
def test_forward_mode_derivatives_are_those_of_reverse_mode(covariance_type, rows, differentiate):
    x, direction = torch.randn(rows, 4), torch.randn(rows, 4)

    def fit(x):
        mixture = fit_gaussian_mixture(
            x,
            2,
            covariance_type=covariance_type,
            iterations=3,
            tolerance=0.0,
            differentiate=differentiate,
            generator=torch.Generator().manual_seed(3),
        )
        return torch.cat([part.flatten() for part in (mixture.means, mixture.covariances)])

    _, forward = torch.func.jvp(fit, (x,), (direction,))
    if differentiate == "none":
        assert not forward.any()
        return
    jacobian = torch.autograd.functional.jacobian(fit, x)
    torch.testing.assert_close(forward, (jacobian * direction).sum((-2, -1)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("covariance_type", "rows"), FORWARD)
def test_second_derivatives_are_right_or_refused_with_an_alternative(covariance_type, rows):
    def value(x, **options):
        mixture = fit_gaussian_mixture(
            x,
            2,
            covariance_type=covariance_type,
            iterations=2,
            tolerance=0.0,
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        return mixture.means.square().sum() + mixture.covariances.sum()

    x = torch.randn(rows, 4, requires_grad=True)
    refused = covariance_type in ("diag", "spherical") or rows < 4
    if refused:
        (grad,) = torch.autograd.grad(value(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"first derivatives only.* has them all"):
            grad.sum().backward()
    if not refused or covariance_type != "full":
        options = {"regularization": 1e-8} if refused else {}
        assert torch.autograd.gradgradcheck(lambda x: value(x, **options), (x,))


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_draws_do_not_depend_on_the_default_dtype(default):
    x = torch.randn(50, 2, dtype=torch.float32)
    rare = GaussianMixture(
        weights=torch.tensor([0.001, 0.999], dtype=torch.float32),
        means=torch.tensor([[0.0], [100.0]], dtype=torch.float32),
        covariances=torch.full((2, 1), 1e-4, dtype=torch.float32),
    )

    def draw():
        generator = torch.Generator().manual_seed(0)
        means = [
            fit_gaussian_mixture(x, 4, init=init, generator=generator).means
            for init in ("kmeans++", "random")
        ]
        return [*means, rare.sample(100_000, generator=generator)]

    expected = draw()
    torch.set_default_dtype(default)
    drawn = draw()
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected))
    share = (drawn[-1] < 50).double().mean().item()
    assert share == pytest.approx(0.001, abs=4 * (0.001 / 100_000) ** 0.5)


def test_a_cpu_generator_serves_data_elsewhere():
    """The meta device stands for a GPU: it has neither the CPU's numbers nor its generator."""
    mixture = random_mixture(2, 3, "diag").to("meta")
    generator = torch.Generator().manual_seed(0)
    assert mixture.sample(7, generator=generator).is_meta
    for draw in (normal, uniform):
        assert draw([2, 3], mixture.means, generator).is_meta
        numbers = draw([2, 3], torch.ones(1, dtype=torch.float32), generator)
        assert numbers.dtype == torch.float32


@pytest.mark.parametrize("covariance_type", TYPES)
def test_weights_count_as_repetitions(covariance_type):
    x, start = torch.randn(20, 3), random_mixture(2, 3, covariance_type)
    weights = torch.randint(0, 3, (20,))
    options = {"covariance_type": covariance_type, "init": start, "iterations": 5}
    ours = fit_gaussian_mixture(x, 2, weights=weights, **options)
    expected = fit_gaussian_mixture(x.repeat_interleave(weights, 0), 2, **options)
    torch.testing.assert_close(ours.means, expected.means)
    torch.testing.assert_close(ours.covariances, expected.covariances)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_batch_equals_loop(covariance_type):
    x, start = torch.randn(4, 30, 3), random_mixture(2, 3, covariance_type, batch=(4,))
    options = {"covariance_type": covariance_type, "iterations": 50, "tolerance": 1e-2}
    batched = fit_gaussian_mixture(x, 2, init=start, **options)
    for b in range(4):
        one = GaussianMixture(
            weights=start.weights[b],
            means=start.means[b],
            covariances=start.covariances[b],
            covariance_type=covariance_type,
        )
        single = fit_gaussian_mixture(x[b], 2, init=one, **options)
        torch.testing.assert_close(batched.means[b], single.means)
        torch.testing.assert_close(batched.covariances[b], single.covariances)


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("init", ["kmeans++", "random", "mixture"])
def test_gradients_through_all_steps(covariance_type, init):
    x = torch.randn(8, 2, requires_grad=True)
    start = random_mixture(2, 2, covariance_type)

    def fit(x):
        mixture = fit_gaussian_mixture(
            x,
            2,
            covariance_type=covariance_type,
            init=start if init == "mixture" else init,
            iterations=3,
            tolerance=0.0,
            generator=torch.Generator().manual_seed(3),
        )
        return mixture.weights, mixture.means, mixture.covariances, mixture.posterior(x)

    assert gradcheck(fit, (x,))


def test_last_differentiates_one_step_from_a_constant_state():
    x, weights = torch.randn(12, 2, requires_grad=True), torch.rand(12, requires_grad=True)
    start = random_mixture(2, 2, "diag")
    options = {"weights": weights, "tolerance": 0.0}
    last = fit_gaussian_mixture(x, 2, init=start, iterations=4, differentiate="last", **options)
    before = fit_gaussian_mixture(x, 2, init=start, iterations=3, differentiate="none", **options)
    one = fit_gaussian_mixture(x, 2, init=before, iterations=1, **options)
    torch.testing.assert_close(last.means, one.means)
    grads = torch.autograd.grad(last.means.square().sum(), (x, weights))
    expected = torch.autograd.grad(one.means.square().sum(), (x, weights))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_last_is_the_implicit_derivative_at_convergence(covariance_type):
    """Against the linear system of the implicit function theorem, and finite differences."""
    options = {"covariance_type": covariance_type, "regularization": 1e-3}
    # Overlapping clusters, where EM converges slowly and one step is far from the derivative.
    x = torch.randn(16, 2) + torch.tensor([[0.0, 0.0], [2.5, 1.0]]).repeat(8, 1)
    start = random_mixture(2, 2, covariance_type)

    def fit(x, init, **more):
        return fit_gaussian_mixture(x, 2, init=init, **options, **more)

    def flat(mixture):
        parts = (mixture.weights, mixture.means, mixture.covariances)
        return torch.cat([part.flatten() for part in parts])

    fixed = fit(x, start, iterations=5000, tolerance=1e-15, differentiate="none")
    shapes = [part.shape for part in (fixed.weights, fixed.means, fixed.covariances)]

    def step(theta, x):
        parts = theta.split([shape.numel() for shape in shapes])
        weights, means, covariances = (p.view(shape) for p, shape in zip(parts, shapes))
        mixture = GaussianMixture(
            weights=weights, means=means, covariances=covariances, covariance_type=covariance_type
        )
        return flat(fit(x, mixture, iterations=1, tolerance=0.0))

    theta = flat(fixed)
    torch.testing.assert_close(step(theta, x), theta, rtol=1e-7, atol=1e-8)
    direction = torch.randn_like(theta)
    by_theta, by_x = torch.autograd.functional.jacobian(step, (theta, x))
    adjoint = torch.linalg.solve(torch.eye(len(theta)) - by_theta.T, direction)
    expected = torch.einsum("p,pnd->nd", adjoint, by_x)

    x.requires_grad_()
    # What rounding lets it reach on every machine: else it is the derivative of its last step.
    last = fit(x, start, iterations=5000, tolerance=1e-12, differentiate="last")
    (grad,) = torch.autograd.grad(flat(last) @ direction, x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    (one,) = torch.autograd.grad(step(theta, x) @ direction, x)
    assert (one - expected).norm() > 0.02 * expected.norm()

    move = torch.randn_like(x)
    with torch.no_grad():
        ends = [
            flat(fit(x + h * move, fixed, iterations=5000, tolerance=1e-15)) for h in (-1e-5, 1e-5)
        ]
    slope = (ends[1] - ends[0]) @ direction / 2e-5
    torch.testing.assert_close((grad * move).sum(), slope, rtol=1e-3, atol=1e-4)


def test_none_carries_no_gradient():
    x = torch.randn(12, 2, requires_grad=True)
    assert not fit_gaussian_mixture(x, 2, differentiate="none").means.requires_grad
    with torch.no_grad():
        assert not fit_gaussian_mixture(x, 2).means.requires_grad
    assert fit_gaussian_mixture(x, 2).means.requires_grad


DEGENERATE = {
    "fewer samples than components": torch.tensor([[0.0, 1.0], [2.0, 3.0]]),
    "one sample": torch.tensor([[1.0, 2.0]]),
    "all equal": torch.full((6, 2), 0.1),
    "duplicates": torch.tensor([[0.0, 0.0]] * 28 + [[1.0, 1.0], [1.0, 2.0]]),
    "constant feature": torch.stack([torch.linspace(0, 1, 9), torch.full((9,), 0.3)], -1),
    "tiny": torch.linspace(-1, 1, 20).reshape(10, 2) ** 3 * 1e-18,
    "huge": torch.linspace(-1, 1, 20).reshape(10, 2) ** 3 * 1e18,
    "far away": torch.linspace(-1, 1, 20).reshape(10, 2) ** 3 + 1e4,
}


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_data(case, dtype, init, covariance_type):
    x = DEGENERATE[case].to(dtype, copy=True).requires_grad_()
    few = len(x.detach().unique(dim=0)) < 4
    with pytest.warns(UserWarning, match="distinct samples") if few else nullcontext():
        mixture = fit_gaussian_mixture(
            x, 4, covariance_type=covariance_type, init=init, iterations=10
        )
    outputs = (mixture.weights, mixture.means, mixture.covariances, mixture.posterior(x))
    assert all(output.isfinite().all() for output in outputs)
    torch.testing.assert_close(mixture.weights.sum(), torch.ones((), dtype=dtype))
    scale = x.detach().abs().max()
    (mixture.means.sum() / scale + (mixture.posterior(x)[:, 0]).sum()).backward()
    assert x.grad.isfinite().all()


def test_fewer_distinct_samples_than_components_are_worth_a_warning():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [2.0, 2.0]])
    with pytest.warns(UserWarning, match="3 distinct samples for 4 components"):
        fit_gaussian_mixture(x, 4)
    with pytest.warns(UserWarning, match="2 distinct samples for 3 components"):
        fit_gaussian_mixture(x, 3, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    batch = torch.stack([x, torch.randn(4, 2)])
    with pytest.warns(UserWarning, match="3 distinct samples for 4 components"):
        fit_gaussian_mixture(batch, 4)
    fit_gaussian_mixture(x, 3)
    fit_gaussian_mixture(x + 1e6, 3)
    fit_gaussian_mixture(x, 4, tolerance=0.0)  # no value is read


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_no_samples_at_all(init):
    mixture = fit_gaussian_mixture(torch.zeros(0, 3), 2, init=init)
    assert mixture.means.isfinite().all()
    with pytest.warns(UserWarning, match="0 distinct samples"):
        masked = fit_gaussian_mixture(
            torch.full((4, 3), torch.nan), 2, weights=torch.zeros(4), init=init
        )
    assert masked.means.isfinite().all()


def test_seeds_do_not_depend_on_the_order_of_the_batch():
    x, order = torch.randn(50, 3), torch.randperm(50)
    fits = [
        fit_gaussian_mixture(rows, 5, generator=torch.Generator().manual_seed(1))
        for rows in (x, x[order])
    ]
    torch.testing.assert_close(fits[0].means, fits[1].means)


def test_kmeans_plus_plus_finds_separated_clusters():
    centres = 100 * torch.eye(5)
    x = centres.repeat(20, 1) + 0.1 * torch.randn(100, 5)
    mixture = fit_gaussian_mixture(x, 5)
    nearest = torch.cdist(centres, mixture.means).amin(1)
    assert (nearest < 1).all()


def test_scaling_the_data_scales_the_mixture():
    x = torch.randn(40, 3)
    small, large = (
        fit_gaussian_mixture(s * x, 3, generator=torch.Generator().manual_seed(0))
        for s in (1.0, 1024.0)
    )
    torch.testing.assert_close(large.means, 1024.0 * small.means)
    torch.testing.assert_close(large.covariances, 1024.0**2 * small.covariances)


def test_nan_reaches_the_mixture():
    x = torch.randn(10, 2)
    x[3, 1] = torch.nan
    assert not fit_gaussian_mixture(x, 2).means.isfinite().all()
    for covariance_type in TYPES:
        mixture = fit_gaussian_mixture(x, 2, covariance_type=covariance_type)
        assert not mixture.log_prob(x).isfinite().all()


class TestPrototypes:
    def test_without_momentum_it_is_the_fit(self):
        x = torch.randn(30, 3)
        module = GaussianPrototypes(4, em_iterations=6, generator=torch.Generator().manual_seed(0))
        expected = fit_gaussian_mixture(
            x, 4, iterations=6, tolerance=0.0, generator=torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(module(x).means, expected.means)
        assert not module.state_dict()

    @pytest.mark.parametrize("covariance_type", TYPES)
    def test_merging_keeps_the_moments_of_the_pair(self, covariance_type):
        module = GaussianPrototypes(
            2, num_features=3, covariance_type=covariance_type, momentum=0.3, em_iterations=3
        )
        module(torch.randn(40, 3))
        old, x = module.running, torch.randn(30, 3) + 0.5
        new = fit_gaussian_mixture(
            x, 2, covariance_type=covariance_type, init=old, iterations=3, tolerance=0.0
        )
        merged = module(x)

        def overall(mixture):
            mean = mixture.weights @ mixture.means
            second = torch.einsum("k,ki,kj->ij", mixture.weights, mixture.means, mixture.means)
            return mean, second + torch.einsum(
                "k,kij->ij", mixture.weights, dense_covariances(mixture)
            )

        mean, second = (0.7 * a + 0.3 * b for a, b in zip(overall(old), overall(new)))
        torch.testing.assert_close(merged.weights.sum(), torch.tensor(1.0))
        torch.testing.assert_close(overall(merged)[0], mean)
        if covariance_type in ("full", "tied"):
            torch.testing.assert_close(overall(merged)[1], second)
        elif covariance_type == "diag":
            torch.testing.assert_close(overall(merged)[1].diagonal(), second.diagonal())
        else:
            torch.testing.assert_close(overall(merged)[1].trace(), second.trace())

    def test_eval_mode_returns_the_running_mixture(self):
        module = GaussianPrototypes(3, num_features=2, momentum=0.5)
        module(torch.randn(20, 2))
        before = copy.deepcopy(module.state_dict())
        module.eval()
        mixture = module(torch.randn(20, 2) + 5)
        torch.testing.assert_close(mixture.means, before["running_means"])
        torch.testing.assert_close(module.state_dict(), before)

    def test_gradient_reaches_the_batch_and_not_the_past(self):
        module = GaussianPrototypes(3, num_features=2, momentum=0.5)
        past = torch.randn(20, 2, requires_grad=True)
        module(past)
        x = torch.randn(20, 2, requires_grad=True)
        module(x).means.sum().backward()
        assert past.grad is None
        assert x.grad.abs().sum() > 0

    def test_state_dict_round_trip(self):
        module = GaussianPrototypes(3, num_features=2, momentum=0.5)
        module(torch.randn(20, 2))
        other = GaussianPrototypes(3, num_features=2, momentum=0.5)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other.eval()(torch.zeros(1, 2)).means, module.running_means)

    def test_an_empty_batch_leaves_the_running_mixture(self):
        module = GaussianPrototypes(2, num_features=2, momentum=0.5)
        absent = torch.zeros(8)
        module(torch.randn(8, 2), absent)
        assert module.num_batches_tracked == 0
        module(torch.randn(8, 2))
        before = copy.deepcopy(module.state_dict())
        module(torch.randn(8, 2), absent)
        torch.testing.assert_close(module.state_dict(), before)


def test_errors():
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="covariance_type must be one of .* got 'round'"):
        fit_gaussian_mixture(x, 2, covariance_type="round")
    with pytest.raises(ValueError, match="num_components must be an integer >= 1; got 0"):
        fit_gaussian_mixture(x, 0)
    with pytest.raises(TypeError, match="num_components must be an integer >= 1; got 2.0"):
        fit_gaussian_mixture(x, 2.0)
    with pytest.raises(
        ValueError, match="init must be one of 'kmeans\\+\\+', 'random'; got 'k-means'"
    ):
        fit_gaussian_mixture(x, 2, init="k-means")
    with pytest.raises(ValueError, match=r"init must have means of shape \(3, 2\); got \(2, 2\)"):
        fit_gaussian_mixture(x, 3, init=random_mixture(2, 2, "diag"))
    with pytest.raises(
        ValueError, match='init must be a mixture of covariance_type="diag"; got "full"'
    ):
        fit_gaussian_mixture(x, 2, init=random_mixture(2, 2, "full"))
    with pytest.raises(ValueError, match="weights\\[0\\] must have shape \\(5,\\); got \\(4,\\)"):
        fit_gaussian_mixture(x, 2, weights=torch.ones(4))
    with pytest.raises(
        ValueError, match='covariances must have shape \\(2, 3, 3\\) for covariance_type="full"'
    ):
        GaussianMixture(
            weights=torch.ones(2),
            means=torch.ones(2, 3),
            covariances=torch.ones(2, 3),
            covariance_type="full",
        )
    with pytest.raises(ValueError, match="must agree in batch and D with the means"):
        random_mixture(2, 3, "diag").log_prob(x)
    with pytest.raises(ValueError, match=r"momentum must be None or in \(0, 1\]; got 2.0"):
        GaussianPrototypes(3, momentum=2.0)


class TestFewerSamplesThanFeatures:
    """Full covariances are fitted in the space of the samples: as if in that of the features."""

    @pytest.fixture
    def in_all_dimensions(self, monkeypatch):
        def switch():
            plain = functools.partial(em.PlainEM, covariance_type="full", ranks=ALONE)
            monkeypatch.setattr(em, "SubspaceEM", plain)

        return switch

    @pytest.mark.parametrize(
        "options",
        [
            {"iterations": 1, "tolerance": 0.0},
            {"iterations": 2, "tolerance": 0.0},
            {"iterations": 6, "tolerance": 0.0, "regularization": 1e-2},
            {"iterations": 50, "tolerance": 1e-3},
            {"iterations": 50, "tolerance": 1e-3, "differentiate": "last"},
            {"iterations": 3, "tolerance": 0.0, "differentiate": "last"},
        ],
    )
    @pytest.mark.parametrize("start", ["kmeans++", "mixture"])
    def test_mixture_and_gradient_are_those_in_all_dimensions(
        self, options, start, in_all_dimensions
    ):
        x = torch.randn(2, 7, 9, requires_grad=True)
        weights = torch.rand(2, 7)
        weights[1, 2] = 0
        weights.requires_grad_()
        init = start
        if start == "mixture":
            init = random_mixture(3, 9, "full", (2,))
            # One that no sample belongs to.
            init = replace(init, means=init.means + 1e3 * torch.eye(3, 9))
            init.means[:, 1:] -= 1e3 * torch.eye(3, 9)[1:]

        def fit():
            mixture = fit_gaussian_mixture(
                x,
                3,
                covariance_type="full",
                weights=weights,
                init=init,
                generator=torch.Generator().manual_seed(0),
                **options,
            )
            parts = mixture.weights, mixture.means, mixture.covariances
            generator = torch.Generator().manual_seed(1)
            total = sum(
                (part * torch.randn(part.shape, generator=generator)).sum() for part in parts
            )
            return *parts, *torch.autograd.grad(total, (x, weights))

        in_subspace = fit()
        in_all_dimensions()
        for a, b in zip(in_subspace, fit(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    def test_gradcheck(self):
        x = torch.randn(4, 6, requires_grad=True)
        start = random_mixture(2, 6, "full")

        def fit(x):
            mixture = fit_gaussian_mixture(
                x,
                2,
                covariance_type="full",
                init=start,
                iterations=3,
                tolerance=0.0,
                regularization=0.1,
            )
            return mixture.weights, mixture.means, mixture.covariances

        assert gradcheck(fit, (x,))

    def test_second_derivatives_are_refused(self):
        x = torch.randn(4, 6, requires_grad=True)
        options = {"covariance_type": "full", "tolerance": 0.0}
        mixture = fit_gaussian_mixture(x, 2, iterations=3, **options)
        (grad,) = torch.autograd.grad(mixture.covariances.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="samples are fewer than features"):
            grad.square().sum().backward()

    def test_steps_are_taken_in_the_space_of_the_samples(self, monkeypatch):
        dimensions = []
        whiten = em_subspace.whiten

        def record(covariances):
            dimensions.append(covariances.shape[-1])
            return whiten(covariances)

        monkeypatch.setattr(em_subspace, "whiten", record)
        options = {"covariance_type": "full", "iterations": 4, "tolerance": 0.0}
        fit_gaussian_mixture(torch.randn(5, 40), 2, **options)
        assert dimensions == [5] * 3

    def test_samples_in_one_place_or_on_a_line(self):
        for x in (torch.ones(3, 5), torch.arange(3.0).unsqueeze(-1) * torch.ones(5)):
            x = x.double().requires_grad_()
            mixture = fit_gaussian_mixture(x, 2, covariance_type="full", tolerance=0.0)
            (grad,) = torch.autograd.grad(mixture.covariances.sum() + mixture.means.sum(), x)
            assert mixture.covariances.isfinite().all()
            assert grad.isfinite().all()
