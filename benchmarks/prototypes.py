"""Prototype alignment against plain torch, mixtures against scikit-learn: time, memory, error.

``python -m benchmarks.prototypes`` takes some minutes on one core.
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import combinations, permutations

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from multialign import (
    GaussianMixture,
    PrototypeAlignmentLoss,
    bures_wasserstein_cost,
    fit_gaussian_mixture,
    multi_marginal_sinkhorn,
    squared_euclidean_cost,
)

SKLEARN = f"scikit-learn {importlib.metadata.version('scikit-learn')}"
PLAIN = "plain torch"

# -- The loss in plain torch ----------------------------------------------------------------------


def plain_log_joint(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return log pi_k N(x_n; mu_k, v_k), `(N, K)`."""
    squares = (x[:, None] - means) ** 2 / variances
    log_density = -0.5 * (squares + variances.log() + math.log(2 * math.pi)).sum(-1)
    return weights.log() + log_density


def plain_fit(x: Tensor, k: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and variances after EM from evenly spaced rows."""
    weights, means, variances = initial_parameters(x, k)
    floor = 1e-6 * x.var(0, correction=0).mean()
    for _ in range(iterations):
        posterior = plain_log_joint(x, weights, means, variances).softmax(-1)
        mass = posterior.sum(0)
        weights = mass / len(x)
        means = posterior.T @ x / mass[:, None]
        squares = (x[:, None] - means) ** 2
        variances = (posterior[:, :, None] * squares).sum(0) / mass[:, None] + floor
    return weights, means, variances


def initial_parameters(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return equal weights, evenly spaced rows as means, and the variances of the data."""
    rows = torch.linspace(0, len(x) - 1, k).long()
    variance = x.var(0, correction=0)
    variance = variance + 1e-6 * variance.mean()
    return x.new_full((k,), 1 / k), x[rows], variance.expand(k, -1)


def plain_loss(x: list[Tensor], k: int, epsilon: float, scale: float) -> Tensor:
    """Return Eq. 9 for three modalities, with EM and 50 sweeps on the K x K x K kernel unrolled."""
    mixtures = [plain_fit(features, k, iterations=5) for features in x]

    def cost(i: int, j: int) -> Tensor:
        (_, means_i, variances_i), (_, means_j, variances_j) = mixtures[i], mixtures[j]
        between = ((means_i[:, None] - means_j) ** 2).sum(-1)
        return scale * (between + ((variances_i.sqrt()[:, None] - variances_j.sqrt()) ** 2).sum(-1))

    costs = cost(0, 1)[:, :, None] + cost(0, 2)[:, None, :] + cost(1, 2)[None, :, :]
    kernel = (-costs / epsilon).exp()
    a, b, c = (weights for weights, _, _ in mixtures)
    u, v, w = (torch.ones_like(weights) for weights, _, _ in mixtures)
    for _ in range(50):
        u = a / ((kernel * v[None, :, None] * w[None, None, :]).sum((1, 2)) + 1e-30)
        v = b / ((kernel * u[:, None, None] * w[None, None, :]).sum((0, 2)) + 1e-30)
        w = c / ((kernel * u[:, None, None] * v[None, :, None]).sum((0, 1)) + 1e-30)
    plan = kernel * u[:, None, None] * v[None, :, None] * w[None, None, :]
    total = (plan * costs).sum()

    for i, j in permutations(range(3), 2):
        posterior = plain_log_joint(x[i], *mixtures[i]).softmax(-1)
        distances = ((x[i][:, None] - mixtures[j][1]) ** 2).sum(-1)
        total = total + scale * (posterior * distances).sum(-1).mean() / 6
    return total


def exact_loss(x: list[Tensor], k: int, epsilon: float, scale: float) -> Tensor:
    """Return the formula of `plain_loss` in float64, with a converged plan."""
    x = [features.double() for features in x]
    mixtures = []
    for features in x:
        weights, means, covariances = initial_parameters(features, k)
        init = GaussianMixture(weights=weights, means=means, covariances=covariances)
        mixtures.append(fit_gaussian_mixture(features, k, init=init, iterations=5, tolerance=0.0))
    costs = {
        (i, j): scale
        * bures_wasserstein_cost(
            mixtures[i].means,
            mixtures[i].covariances,
            mixtures[j].means,
            mixtures[j].covariances,
        )
        for i, j in combinations(range(3), 2)
    }
    marginals = [mixture.weights for mixture in mixtures]
    total = multi_marginal_sinkhorn(costs, marginals, epsilon).transport_cost
    for i, j in permutations(range(3), 2):
        distances = squared_euclidean_cost(x[i], mixtures[j].means)
        posterior = mixtures[i].posterior(x[i])
        total = total + scale * (posterior * distances).sum(-1).mean() / 6
    return total


def step(loss: Callable[[list[Tensor]], Tensor], x: list[Tensor]) -> Tensor:
    """Run forward and backward; return the loss."""
    value = loss(x)
    torch.autograd.grad(value, x)
    return value.detach()


def loss_rows() -> list[Row]:
    """Measure a training step at the paper's size."""
    n, dim, k, epsilon = 32, 64, 7, 0.1
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, dim, generator=generator).requires_grad_() for _ in range(3)]
    rows = []
    for reduction, scale in (("mean", 1 / dim), ("sum", 1.0)):

        def ours(x: list[Tensor], reduction: str = reduction) -> Tensor:
            seeds = torch.Generator().manual_seed(0)
            return PrototypeAlignmentLoss(
                k,
                epsilon=epsilon,
                em_iterations=5,
                cost_reduction=reduction,
                generator=seeds,
            )(x)

        module = PrototypeAlignmentLoss(
            k, epsilon=epsilon, em_iterations=5, cost_reduction=reduction
        )
        plain = partial(plain_loss, k=k, epsilon=epsilon, scale=scale)
        times = harness.alternate(
            {"multialign": partial(step, module, x), PLAIN: partial(step, plain, x)},
            repetitions=101,
        )
        errors = {
            "multialign": ours(x).item() / ours([f.double() for f in x]).item() - 1,
            PLAIN: plain(x).item() / exact_loss(x, k, epsilon, scale).item() - 1,
        }
        rows += [
            Row(
                case=f"prototype alignment, costs a {reduction} over features, forward and "
                "backward; error against the same from the same start in float64, converged",
                size=f"M = 3, N = {n}, D = {dim}, K = {k}",
                provider=name,
                **harness.quantiles(times[name]),
                peak_mib=math.nan,
                error=abs(errors[name]),
            )
            for name in times
        ]
    return rows


# -- Mixtures -------------------------------------------------------------------------------------


def clusters(problems: int, n: int, dim: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return problems `(problems, n, dim)` of k clusters that overlap slightly."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(problems, k, dim, generator=generator, dtype=dtype)
    noise = torch.randn(problems, n, dim, generator=generator, dtype=dtype)
    return centres[:, torch.arange(n) % k] + noise


def initial_mixture(x: Tensor, k: int) -> GaussianMixture:
    """Return the start of both providers: the first rows as means, the variances of the data."""
    return GaussianMixture(
        weights=x.new_full((len(x), k), 1 / k),
        means=x[:, :k].clone(),
        covariances=x.var(1, correction=0, keepdim=True).expand(-1, k, -1).clone(),
    )


def multialign_fit(x: Tensor, init: GaussianMixture, iterations: int) -> GaussianMixture:
    """Fit all problems in one call."""
    k = init.num_components
    with torch.no_grad():
        return fit_gaussian_mixture(x, k, init=init, iterations=iterations, tolerance=0.0)


def sklearn_fit(x: Tensor, init: GaussianMixture, iterations: int) -> list[SklearnMixture]:
    """Fit one problem after the other."""
    models = []
    for b in range(len(x)):
        model = SklearnMixture(
            init.num_components,
            covariance_type="diag",
            max_iter=iterations,
            tol=0.0,
            weights_init=init.weights[b].numpy(),
            means_init=init.means[b].numpy(),
            precisions_init=1 / init.covariances[b].numpy(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            models.append(model.fit(x[b].numpy()))
    return models


def fit_rows() -> list[Row]:
    """Measure twenty steps of EM from the same start."""
    rows = []
    for problems, n, dim, k in ((1, 10_000, 64, 10), (64, 500, 64, 10), (64, 500, 8, 4)):
        for dtype in (torch.float64, torch.float32):
            x = clusters(problems, n, dim, k, dtype)
            init = initial_mixture(x, k)
            exact = multialign_fit(
                x.double(),
                GaussianMixture(
                    weights=init.weights.double(),
                    means=init.means.double(),
                    covariances=init.covariances.double(),
                ),
                20,
            )
            exact_mean = exact.log_prob(x.double()).mean().item()
            ours = multialign_fit(x, init, 20).log_prob(x).mean().item()
            theirs = [m.score(x[b].numpy()) for b, m in enumerate(sklearn_fit(x, init, 20))]
            log_likelihoods = {"multialign": ours, SKLEARN: sum(theirs) / problems}
            times = harness.alternate(
                {
                    "multialign": partial(multialign_fit, x, init, 20),
                    SKLEARN: partial(sklearn_fit, x, init, 20),
                },
                repetitions=7,
            )
            rows += [
                Row(
                    case="20 steps of EM, diagonal; error of the log-likelihood against float64",
                    size=f"{problems} x N = {n}, D = {dim}, K = {k}, {str(dtype)[6:]}",
                    provider=name,
                    **harness.quantiles(times[name]),
                    peak_mib=math.nan,
                    error=abs(log_likelihoods[name] / exact_mean - 1),
                )
                for name in times
            ]
    return rows


def multialign_gradient(x: Tensor, iterations: int) -> Tensor:
    """Differentiate the means through all EM steps with multialign."""
    init = initial_mixture(x.detach(), 10)
    mixture = fit_gaussian_mixture(x, 10, init=init, iterations=iterations, tolerance=0.0)
    return torch.autograd.grad(mixture.means.square().sum(), x)[0]


def plain_gradient(x: Tensor, iterations: int) -> Tensor:
    """Differentiate the means through all EM steps with autograd."""
    _, means, _ = plain_fit(x[0], 10, iterations)
    return torch.autograd.grad(means.square().sum(), x)[0]


def prepare_gradient(
    gradient: Callable[[Tensor, int], Tensor], iterations: int
) -> Callable[[], Tensor]:
    """Return a call of `gradient`, after one on a small problem that loads all code."""
    gradient(clusters(1, 100, 64, 10, torch.float32).requires_grad_(), 2)
    x = clusters(1, 10_000, 64, 10, torch.float32).requires_grad_()
    return partial(gradient, x, iterations)


def gradient_rows() -> list[Row]:
    """Measure time and memory of the derivative, for a growing number of EM steps."""
    rows = []
    for iterations in (5, 20, 80):
        providers = {"multialign": multialign_gradient, PLAIN: plain_gradient}
        if iterations > 20:
            del providers[PLAIN]  # it would take gigabytes of memory
        x = clusters(1, 10_000, 64, 10, torch.float32).requires_grad_()
        times = harness.alternate(
            {name: partial(gradient, x, iterations) for name, gradient in providers.items()},
            repetitions=3,
        )
        rows += [
            Row(
                case="gradient through EM, diagonal, forward and backward",
                size=f"N = 10000, D = 64, K = 10, {iterations} steps",
                provider=name,
                **harness.quantiles(times[name]),
                peak_mib=harness.peak_mib(prepare_gradient, gradient, iterations),
                error=math.nan,
            )
            for name, gradient in providers.items()
        ]
    return rows


def main() -> None:
    """Measure, print the rows and write them."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = loss_rows() + fit_rows() + gradient_rows()
    for row in rows:
        harness.show(row)
    harness.write("prototypes", rows)


if __name__ == "__main__":
    main()
