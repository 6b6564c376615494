"""Gaussian mixtures fitted by expectation-maximisation, batched and differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multialign._distributed import ProcessGroup, Ranks
from multialign._validation import (
    Samples,
    check_alike,
    check_choice,
    check_count,
    check_positive,
    check_tensor,
    check_weights,
    full_precision,
    lift,
    pad_empty,
    reference_row,
    take_rows,
    weigh_samples,
)
from multialign.costs import squared_euclidean_cost
from multialign.ops import log, logsumexp

__all__ = ["GaussianMixture", "GaussianPrototypes", "fit_gaussian_mixture"]

CovarianceType = Literal["diag", "full", "tied", "spherical"]
Differentiate = Literal["unroll", "last", "none"]
Init = Literal["kmeans++", "random"]

COVARIANCE_TYPES = ("diag", "full", "tied", "spherical")
_COVARIANCE_SHAPES = {
    "diag": "(*batch, K, D)",
    "full": "(*batch, K, D, D)",
    "tied": "(*batch, D, D)",
    "spherical": "(*batch, K)",
}


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    r"""Mixture of K Gaussians in D dimensions, or a batch of independent ones.

    .. math:: p(x) = \sum_k \pi_k \, \mathcal{N}(x; \mu_k, \Sigma_k)

    Args:
        weights: :math:`\pi`, :math:`(*\text{batch}, K)`, non-negative with sum 1.
        means: :math:`\mu`, :math:`(*\text{batch}, K, D)`.
        covariances: :math:`\Sigma` in scikit-learn's shapes: "diag" :math:`(*\text{batch}, K, D)`,
            "full" :math:`(*\text{batch}, K, D, D)`, "tied" :math:`(*\text{batch}, D, D)`,
            "spherical" :math:`(*\text{batch}, K)`.
        covariance_type: Which of these `covariances` is.

    Raises:
        ValueError: Shapes, devices or the covariance type do not fit.
        TypeError: An argument is no floating-point tensor, or dtypes differ.

    References:
        Eq. 2-4 of :cite:t:`decalign:26`; :cite:t:`bishop:06`, Section 9.2.

    Example:
        >>> import torch
        >>> from multialign import GaussianMixture
        >>> mixture = GaussianMixture(
        ...     weights=torch.tensor([0.5, 0.5]),
        ...     means=torch.tensor([[0.0], [4.0]]),
        ...     covariances=torch.ones(2, 1),
        ... )
        >>> mixture.posterior(torch.tensor([[0.0], [2.0]]))
        tensor([[9.9966e-01, 3.3535e-04],
                [5.0000e-01, 5.0000e-01]])
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    covariance_type: CovarianceType = "diag"

    def __post_init__(self) -> None:
        check_choice("covariance_type", self.covariance_type, COVARIANCE_TYPES)
        means = check_tensor("means", self.means, "(*batch, K, D)", 2)
        check_tensor("weights", self.weights, "(*batch, K)", 1)
        check_tensor("covariances", self.covariances, _COVARIANCE_SHAPES[self.covariance_type], 1)
        check_alike("weights, means and covariances", [self.weights, means, self.covariances])
        *batch, count, dim = means.shape
        expected = {
            "diag": (*batch, count, dim),
            "full": (*batch, count, dim, dim),
            "tied": (*batch, dim, dim),
            "spherical": (*batch, count),
        }[self.covariance_type]
        if self.weights.shape != (*batch, count):
            raise ValueError(
                f"weights must have shape {(*batch, count)} for means of shape "
                f"{tuple(means.shape)}; got {tuple(self.weights.shape)}"
            )
        if self.covariances.shape != expected:
            raise ValueError(
                f"covariances must have shape {expected} for covariance_type="
                f'"{self.covariance_type}"; got {tuple(self.covariances.shape)}'
            )

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[-2]

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return the log-density of each row of `x` :math:`(*\text{batch}, N, D)`."""
        return logsumexp(self._log_joint(self._check(x)), -1)

    def posterior(self, x: Tensor) -> Tensor:
        r"""Return the probability of each component given each row: Eq. 3.

        Args:
            x: :math:`(*\text{batch}, N, D)`.

        Returns:
            :math:`(*\text{batch}, N, K)`; each row sums to 1.
        """
        return self._log_joint(self._check(x)).softmax(-1)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw `n` points, :math:`(*\text{batch}, n, D)`, without gradient."""
        check_count("n", n)
        *batch, count, dim = self.means.shape
        cumulative = self.weights.cumsum(-1)
        draws = torch.rand(*batch, n, generator=generator, device=cumulative.device)
        draws = draws.to(cumulative.dtype) * cumulative[..., -1:]
        component = torch.searchsorted(cumulative, draws, right=True).clamp_max(count - 1)
        noise = torch.randn(
            *batch, n, dim, generator=generator, device=draws.device, dtype=draws.dtype
        )
        index = component.unsqueeze(-1).expand(*batch, n, dim)
        means = self.means.gather(-2, index)
        covariances = self.component_covariances()
        if covariances.ndim == self.means.ndim:
            return means + covariances.gather(-2, index).sqrt() * noise
        factors = torch.linalg.cholesky_ex(covariances).L
        shaped = noise.unsqueeze(-3) @ factors.mT
        index = index.unsqueeze(-3)
        chosen: Tensor = shaped.gather(-3, index).squeeze(-3)
        return means + chosen

    def component_covariances(self) -> Tensor:
        r"""Return one covariance a component, as :func:`bures_wasserstein_cost` takes them.

        Returns:
            :math:`(*\text{batch}, K, D)` for "diag" and "spherical",
            :math:`(*\text{batch}, K, D, D)` for "full" and "tied".
        """
        if self.covariance_type == "spherical":
            return self.covariances.unsqueeze(-1).expand(self.means.shape)
        if self.covariance_type == "tied":
            return self.covariances.unsqueeze(-3).expand(*self.means.shape, self.means.shape[-1])
        return self.covariances

    def _check(self, x: Tensor) -> Tensor:
        x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
        check_alike("means and x", [self.means, x])
        if x.shape[:-2] != self.means.shape[:-2] or x.shape[-1] != self.means.shape[-1]:
            raise ValueError(
                f"x (*batch, N, D) must agree in batch and D with the means "
                f"{tuple(self.means.shape)}; got {tuple(x.shape)}"
            )
        return x

    def _log_joint(self, x: Tensor) -> Tensor:
        """Return log pi_k + log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`."""
        with full_precision(x):
            return log(self.weights).unsqueeze(-2) + self._log_normal(x)

    def _log_normal(self, x: Tensor) -> Tensor:
        """Return the log-densities of Eq. 4, `(*batch, N, K)`."""
        dim = x.shape[-1]
        if self.covariance_type == "spherical":
            deviation = self.covariances.sqrt().unsqueeze(-2)
            # Divided twice: the square of a variance may leave the range in the gradient.
            distance = squared_euclidean_cost(x, self.means) / deviation / deviation
            log_det = 2 * dim * deviation.log()
        elif self.covariance_type == "diag":
            deviation = x.unsqueeze(-2) - self.means.unsqueeze(-3)
            distance = (deviation / self.covariances.sqrt().unsqueeze(-3)).square().sum(-1)
            log_det = self.covariances.log().sum(-1).unsqueeze(-2)
        else:
            whitening, log_det = _whiten(self.covariances)
            if self.covariance_type == "tied":
                distance = squared_euclidean_cost(x @ whitening.mT, self.means @ whitening.mT)
                log_det = log_det[..., None, None]
            else:
                deviation = x.unsqueeze(-3) - self.means.unsqueeze(-2)
                distance = (deviation @ whitening.mT).square().sum(-1).mT
                log_det = log_det.unsqueeze(-2)
        return -0.5 * (dim * math.log(2 * math.pi) + log_det + distance)


def fit_gaussian_mixture(
    x: Tensor,
    num_components: int,
    *,
    covariance_type: CovarianceType = "diag",
    weights: Tensor | None = None,
    init: Init | GaussianMixture = "kmeans++",
    iterations: int = 100,
    tolerance: float = 1e-3,
    regularization: float = 1e-6,
    differentiate: Differentiate = "unroll",
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> GaussianMixture:
    r"""Fit a Gaussian mixture by expectation-maximisation.

    Each iteration computes the posteriors :math:`w^n(k)` of Eq. 3 and then

    .. math::
        \pi_k = \sum_n p_n w^n(k), \quad
        \mu_k = \frac{1}{\pi_k} \sum_n p_n w^n(k)\, x_n, \quad
        \Sigma_k = \frac{1}{\pi_k} \sum_n p_n w^n(k) (x_n - \mu_k)(x_n - \mu_k)^\top + \rho s^2 I

    with :math:`p` the sample weights divided by their sum, :math:`\rho` the `regularization` and
    :math:`s^2` the variance of the data averaged over features (1 if that is 0), so that scaling
    the data scales the mixture. A component that no sample belongs to keeps its parameters. All
    arguments scikit-learn knows mean what they mean there, except that scikit-learn adds
    :math:`\rho` without :math:`s^2`.

    Args:
        x: :math:`(*\text{batch}, N, D)`; batch entries are independent problems.
        num_components: K. It may exceed N; some components then share samples.
        covariance_type: "diag", "full", "tied" (one for all components) or "spherical".
        weights: None or :math:`(*\text{batch}, N)`, boolean or non-negative; 0 is absent.
        init: "kmeans++" and "random" choose K samples as means, with the variances of the data and
            equal weights; a :class:`GaussianMixture` is the state to start from.
        iterations: Largest number of iterations.
        tolerance: A problem stops once its mean log-likelihood changes by less; 0 runs all
            iterations and never reads a value back from the device.
        regularization: :math:`\rho`, dimensionless.
        differentiate: "unroll" differentiates through all iterations, "last" through the last
            alone (the state before it counts as constant), "none" not at all.
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, the mixture is that of all ranks' samples together. They stay on
            their ranks, but for the draw of initial means, which the first rank makes for all. An
            initial mixture must be the same on all ranks.

    Returns:
        The mixture, in the units of `x`.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.

    References:
        :cite:t:`dempster:77`; :cite:t:`arthur:07` for k-means++; Eq. 2-4 of
        :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import fit_gaussian_mixture
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> mixture = fit_gaussian_mixture(x, 2, generator=torch.Generator().manual_seed(0))
        >>> mixture.means.flatten().sort().values
        tensor([ 0.5000, 10.5000])
    """
    check_count("num_components", num_components)
    check_count("iterations", iterations)
    check_fit_options(covariance_type, regularization, differentiate)
    check_positive("tolerance", tolerance, zero=True)
    if not isinstance(init, GaussianMixture):
        check_choice("init", init, ("kmeans++", "random"))
    x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one feature; got {tuple(x.shape)}")
    if isinstance(init, GaussianMixture):
        _check_start(init, x, num_components, covariance_type)
    ranks = Ranks(process_group)
    batch = x.shape[:-2]
    features, checked = ranks.note([x], check_weights([weights], [x], batch))
    samples = Samples(*weigh_samples(features, checked, batch), weights is not None)

    grad = torch.is_grad_enabled() and differentiate != "none"
    with full_precision(x), torch.set_grad_enabled(grad):
        (x,), (mass,) = samples.features, samples.masses
        # In these units neither an offset nor the scale of the data costs digits or range. EM
        # commutes with both, so they are constants for the gradient.
        (origin,) = ranks.first_rows([reference_row(x, mass)], samples.present)
        (mass,), present = ranks.normalise([mass], samples.present)
        deviation = torch.where(mass.unsqueeze(-1) == 0, 0.0, x - origin)
        with torch.no_grad():
            (variance,) = variances([deviation], [mass], ranks)
            level = variance.mean(-1, keepdim=True)
            scale = torch.where(level == 0, 1.0, level).sqrt()
        x = deviation / scale
        (variance,) = variances([x], [mass], ranks)
        floor = variance_floor(variance, regularization)
        if isinstance(init, GaussianMixture):
            mixture = _standardise(init, origin, scale)
        else:

            def choose(samples: Samples) -> list[Tensor]:
                (x,), (mass,) = samples.features, samples.masses
                return [choose_rows(x, mass, num_components, init=init, generator=generator)]

            samples = Samples([x], [mass], present, samples.weighted)
            (means,) = draw_means(samples, [num_components], choose, ranks)
            mixture = start_mixture(means, variance, floor, covariance_type)
        if differentiate == "last":
            with torch.no_grad():
                mixture = _iterate(x, mass, mixture, iterations - 1, tolerance, floor, ranks)
            mixture, _ = _em_step(x, mass, mixture, floor, ranks)
        else:
            mixture = _iterate(x, mass, mixture, iterations, tolerance, floor, ranks)
        return _restore(mixture, origin, scale)


class GaussianPrototypes(nn.Module):
    r"""Gaussian mixture of whatever it is called with, remembered between calls if so wished.

    Without `momentum` each call fits a new mixture. With it, the module keeps a running mixture in
    its buffers: a call in training mode starts EM there, merges the result into it,

    .. math:: (1 - \text{momentum}) \; p_\text{running} + \text{momentum} \; p_\text{batch},

    component by component (each merged pair keeps its total weight, mean and covariance
    :cite:p:`cappe:09`), and returns the merged mixture; the running part carries no gradient. In
    eval mode the running mixture is returned unchanged.

    Called ``(x, weights=None)`` with `x` :math:`(*\text{batch}, N, D)`; returns a
    :class:`GaussianMixture`. See :func:`fit_gaussian_mixture` for the fit and its errors.

    Args:
        num_prototypes: K.
        covariance_type: "diag", "full", "tied" or "spherical".
        em_iterations: Iterations of each fit; all of them run.
        momentum: None, or the weight in (0, 1] of the newest batch.
        init: "kmeans++" or "random"; the start of a fit where there is no running mixture.
        regularization: Floor of the variances, relative to those of the data.
        differentiate: "unroll", "last" or "none".
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, each fit is that of all ranks' samples together.

    References:
        Eq. 2-4 of :cite:t:`decalign:26`; :cite:t:`cappe:09` for the running mixture.

    Example:
        >>> import torch
        >>> from multialign import GaussianPrototypes
        >>> prototypes = GaussianPrototypes(3, momentum=0.1)
        >>> prototypes(torch.randn(32, 4)).means.shape
        torch.Size([3, 4])
        >>> sorted(prototypes.state_dict())
        ['running_covariances', 'running_means', 'running_weights']
    """

    running_weights: Tensor | None
    running_means: Tensor | None
    running_covariances: Tensor | None

    def __init__(
        self,
        num_prototypes: int,
        *,
        covariance_type: CovarianceType = "diag",
        em_iterations: int = 10,
        momentum: float | None = None,
        init: Init = "kmeans++",
        regularization: float = 1e-6,
        differentiate: Differentiate = "unroll",
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_count("num_prototypes", num_prototypes)
        check_count("em_iterations", em_iterations)
        check_choice("init", init, ("kmeans++", "random"))
        check_fit_options(covariance_type, regularization, differentiate)
        check_momentum(momentum)
        self.num_prototypes = num_prototypes
        self.covariance_type = covariance_type
        self.em_iterations = em_iterations
        self.momentum = momentum
        self.init = init
        self.regularization = regularization
        self.differentiate = differentiate
        self.generator = generator
        self.process_group = process_group
        for name in ("running_weights", "running_means", "running_covariances"):
            self.register_buffer(name, None)

    @property
    def running(self) -> GaussianMixture | None:
        """The running mixture; None before the first call in training mode."""
        weights, means, covariances = (
            self.running_weights,
            self.running_means,
            self.running_covariances,
        )
        if weights is None or means is None or covariances is None:
            return None
        return GaussianMixture(
            weights=weights,
            means=means,
            covariances=covariances,
            covariance_type=self.covariance_type,
        )

    def forward(self, x: Tensor, weights: Tensor | None = None) -> GaussianMixture:
        """Return the mixture of the rows of `x`."""
        running = self.running
        if running is not None and not self.training:
            return running
        mixture = fit_gaussian_mixture(
            x,
            self.num_prototypes,
            covariance_type=self.covariance_type,
            weights=weights,
            init=self.init if running is None else running,
            iterations=self.em_iterations,
            tolerance=0.0,
            regularization=self.regularization,
            differentiate=self.differentiate,
            generator=self.generator,
            process_group=self.process_group,
        )
        present = None if weights is None else (weights != 0).any(-1)
        if self.process_group is not None:
            here = x.new_full(x.shape[:-2], x.shape[-2]) if present is None else present.to(x)
            present = Ranks(self.process_group).sum([here])[0] > 0
        return self.remember(mixture, present)

    def remember(self, mixture: GaussianMixture, present: Tensor | None = None) -> GaussianMixture:
        """Merge a batch's mixture into the running one and return the result.

        Args:
            mixture: The batch's mixture, fitted from the running one.
            present: None, or `(*batch)`: whether the batch held any sample; if not, the running
                mixture stays as it is.
        """
        if self.momentum is None or not self.training:
            return mixture
        running = self.running
        if running is not None:
            mixture = _merge(running, mixture, self.momentum, present)
        elif present is not None and not bool(present.all()):
            return mixture  # of no samples: nothing to start a later fit from
        self.running_weights = mixture.weights.detach().clone()
        self.running_means = mixture.means.detach().clone()
        self.running_covariances = mixture.covariances.detach().clone()
        return mixture

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"{self.num_prototypes}, covariance_type={self.covariance_type!r}, "
            f"em_iterations={self.em_iterations}, momentum={self.momentum}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The buffers' shapes are known from the first batch on, or from a checkpoint.
        for name in ("running_weights", "running_means", "running_covariances"):
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def choose_rows(
    x: Tensor, mass: Tensor, count: int, *, init: Init, generator: torch.Generator | None
) -> Tensor:
    """Return the indices `(*batch, count)` of samples to start from.

    "kmeans++" draws each with probability proportional to its weight times its squared distance
    to the nearest one chosen before; "random" draws without replacement while there are samples
    left. The draw goes by the samples' order along a random direction, so that it does not depend
    on the order of the batch.
    """
    with torch.no_grad():
        direction = torch.randn(x.shape[-1], generator=generator, device=x.device).to(x.dtype)
        order = (x @ direction).argsort(-1)
        x, mass = take_rows(x, order), mass.gather(-1, order)
        if init == "random":
            chosen = _draw_distinct(mass, count, generator)
        else:
            chosen = _draw_far(x, mass, count, generator)
        return order.gather(-1, chosen)


def _draw_far(x: Tensor, mass: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    *batch, rows, _ = x.shape
    draws = torch.rand(*batch, count, generator=generator, device=x.device).to(x.dtype)
    nearest = torch.ones_like(mass)
    chosen: list[Tensor] = []
    for k in range(count):
        chance = mass * nearest
        exhausted = chance.sum(-1, keepdim=True) == 0  # fewer distinct samples than components
        cumulative = torch.where(exhausted, mass, chance).cumsum(-1)
        draw = draws[..., k : k + 1] * cumulative[..., -1:]
        row = torch.searchsorted(cumulative, draw, right=True).clamp_max(rows - 1)
        chosen.append(row)
        distance = squared_euclidean_cost(x, take_rows(x, row)).squeeze(-1)
        nearest = distance if k == 0 else torch.minimum(nearest, distance)
    return torch.cat(chosen, -1)


def _draw_distinct(mass: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    # Exponential races: the order of arrival of clocks with rates `mass` is a weighted draw
    # without replacement. Absent samples never arrive.
    clocks = torch.rand(mass.shape, generator=generator, device=mass.device).to(mass.dtype)
    order = torch.where(mass > 0, -torch.log1p(-clocks) / mass, math.inf).argsort(-1)
    there = (mass > 0).sum(-1, keepdim=True).clamp_min(1)
    turns = torch.arange(count, device=mass.device).expand(*mass.shape[:-1], count)
    return order.gather(-1, turns % there)


def draw_means(
    samples: Samples,
    counts: Sequence[int],
    choose: Callable[[Samples], list[Tensor]],
    ranks: Ranks,
) -> list[Tensor]:
    """Return the rows `(*batch, K_m, D)` of M sets of samples that `choose` gives the indices of.

    `choose` is called with the samples of all ranks, and a row has gradient on its own rank.
    """

    def draw(features: list[Tensor], masses: list[Tensor], weighted: bool) -> list[Tensor]:
        return choose(pad_empty(Samples(features, masses, samples.present, weighted)))

    chosen = ranks.draw(samples.features, samples.masses, samples.weighted, counts, draw)
    padded = pad_empty(samples).features
    if ranks.group is None:
        return [take_rows(x, index) for x, index in zip(padded, chosen, strict=True)]
    rows = []
    for x, index, own in zip(padded, chosen, samples.features, strict=True):
        here = (index >= 0) & (index < own.shape[-2])
        taken = take_rows(x, index.clamp(0, x.shape[-2] - 1))
        rows.append(torch.where(here.unsqueeze(-1), taken, 0.0))
    return ranks.sum(rows)


def start_mixture(
    means: Tensor, variance: Tensor, floor: Tensor, covariance_type: CovarianceType
) -> GaussianMixture:
    """Return a mixture of the given means, with the data's variances and equal weights."""
    *batch, count, _ = means.shape
    variance = variance + floor
    if covariance_type == "diag":
        covariances = variance.expand_as(means)
    elif covariance_type == "spherical":
        covariances = variance.mean(-1).expand(*batch, count)
    elif covariance_type == "tied":
        covariances = torch.diag_embed(variance.squeeze(-2))
    else:
        covariances = torch.diag_embed(variance.expand_as(means))
    return GaussianMixture(
        weights=means.new_full((*batch, count), 1 / count),
        means=means,
        covariances=covariances,
        covariance_type=covariance_type,
    )


def variances(features: Sequence[Tensor], masses: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the weighted variance of each feature, `(*batch, 1, D)`, for M sets of samples."""
    weights = [mass.unsqueeze(-1) for mass in masses]
    means = ranks.sum(
        [(w * x).sum(-2, keepdim=True) for w, x in zip(weights, features, strict=True)]
    )
    return ranks.sum(
        [
            (w * (x - mean).square()).sum(-2, keepdim=True)
            for w, x, mean in zip(weights, features, means, strict=True)
        ]
    )


def variance_floor(variance: Tensor, regularization: float) -> Tensor:
    """Return what is added to variances, `(*batch, 1, 1)`, relative to those of the data."""
    level = variance.mean(-1, keepdim=True)
    return regularization * torch.where(level == 0, 1.0, level)


def _iterate(
    x: Tensor,
    mass: Tensor,
    mixture: GaussianMixture,
    iterations: int,
    tolerance: float,
    floor: Tensor,
    ranks: Ranks,
) -> GaussianMixture:
    """Run EM until every problem has converged; one that has is left alone."""
    done = torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device)
    previous: Tensor | None = None
    for _ in range(iterations):
        updated, likelihood = _em_step(x, mass, mixture, floor, ranks)
        if tolerance == 0:
            mixture = updated
            continue
        mixture = _where(done, mixture, updated)
        if previous is not None:
            # NaN never converges, and the result shows it: there is nothing to wait for.
            change = (likelihood - previous).abs()
            done = done | (change < tolerance) | change.isnan()
            if bool(done.all()):
                break
        previous = likelihood
    return mixture


def _em_step(
    x: Tensor, mass: Tensor, mixture: GaussianMixture, floor: Tensor, ranks: Ranks
) -> tuple[GaussianMixture, Tensor]:
    """Return the next mixture and the mean log-likelihood of this one.

    `floor` `(*batch, 1, 1)` is added to the variances. Deviations are taken from the new means:
    E x^2 - mu^2 would lose the variance of a narrow component to rounding.
    """
    log_joint = mixture._log_joint(x)
    responsibilities = mass.unsqueeze(-1) * log_joint.softmax(-1)
    with torch.no_grad():
        likelihood = (mass * log_joint.logsumexp(-1)).sum(-1)
    weights, means, likelihood = ranks.sum(
        [responsibilities.sum(-2), responsibilities.mT @ x, likelihood]
    )
    dead = weights <= torch.finfo(x.dtype).eps
    safe = torch.where(dead, 1.0, weights)
    means = torch.where(dead.unsqueeze(-1), mixture.means, means / safe.unsqueeze(-1))
    total = weights.sum(-1, keepdim=True)
    absent = total == 0
    weights = torch.where(absent, mixture.weights, weights / torch.where(absent, 1.0, total))

    if mixture.covariance_type in ("diag", "spherical"):
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        (scatter,) = ranks.sum([(responsibilities.unsqueeze(-1) * deviation.square()).sum(-3)])
        covariances = scatter / safe.unsqueeze(-1) + floor
        dead = dead.unsqueeze(-1)
        if mixture.covariance_type == "spherical":
            covariances, dead = covariances.mean(-1), dead.squeeze(-1)
    else:
        deviation = x.unsqueeze(-3) - means.unsqueeze(-2)
        scatter = (responsibilities.mT.unsqueeze(-1) * deviation).mT @ deviation
        if mixture.covariance_type == "tied":
            scatter = scatter.sum(-3)
        (scatter,) = ranks.sum([scatter])
        diagonal = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if mixture.covariance_type == "tied":
            covariances = scatter / torch.where(absent, 1.0, total).unsqueeze(-1)
            covariances = covariances + floor * diagonal
            dead = absent.unsqueeze(-1)
        else:
            covariances = scatter / safe[..., None, None] + floor.unsqueeze(-1) * diagonal
            dead = dead[..., None, None]
    updated = replace(
        mixture,
        weights=weights,
        means=means,
        covariances=torch.where(dead, mixture.covariances, covariances),
    )
    return updated, likelihood.detach()


def _merge(
    old: GaussianMixture, new: GaussianMixture, momentum: float, present: Tensor | None
) -> GaussianMixture:
    """Return (1 - momentum) old + momentum new, each pair of components merged into one.

    The merged component has the total weight, the mean and the covariance of the pair.
    """
    a, b = (1 - momentum) * old.weights, momentum * new.weights
    weights = a + b
    share = b / torch.where(weights == 0, 1.0, weights)
    step = new.means - old.means
    means = old.means + share.unsqueeze(-1) * step
    between = share * (1 - share)
    if old.covariance_type in ("diag", "spherical"):
        share, spread = share.unsqueeze(-1), between.unsqueeze(-1) * step.square()
        if old.covariance_type == "spherical":
            share, spread = share.squeeze(-1), spread.mean(-1)
    else:
        share = share[..., None, None]
        spread = between[..., None, None] * step.unsqueeze(-1) * step.unsqueeze(-2)
        if old.covariance_type == "tied":
            # The pooled covariance: each component's share of it goes by its weight.
            share = momentum * torch.ones_like(share[..., 0, :, :])
            spread = (weights[..., None, None] * spread).sum(-3)
    covariances = old.covariances + share * (new.covariances - old.covariances) + spread
    merged = replace(old, weights=weights, means=means, covariances=covariances)
    return merged if present is None else _where(present, merged, old)


def _where(condition: Tensor, yes: GaussianMixture, no: GaussianMixture) -> GaussianMixture:
    """Choose between two mixtures for each problem of the batch."""
    chosen: dict[str, Tensor] = {}
    for name in ("weights", "means", "covariances"):
        a, b = getattr(yes, name), getattr(no, name)
        shape = (*condition.shape, *[1] * (a.ndim - condition.ndim))
        chosen[name] = torch.where(condition.reshape(shape), a, b)
    return GaussianMixture(**chosen, covariance_type=yes.covariance_type)


def _standardise(mixture: GaussianMixture, origin: Tensor, scale: Tensor) -> GaussianMixture:
    """Express a mixture in the units (x - origin) / scale; both are `(*batch, 1, D or 1)`."""
    return replace(
        mixture,
        means=(mixture.means - origin) / scale,
        covariances=mixture.covariances / _square_like(scale, mixture),
    )


def _restore(mixture: GaussianMixture, origin: Tensor, scale: Tensor) -> GaussianMixture:
    """Undo `_standardise`."""
    return replace(
        mixture,
        means=origin + scale * mixture.means,
        covariances=_square_like(scale, mixture) * mixture.covariances,
    )


def _square_like(scale: Tensor, mixture: GaussianMixture) -> Tensor:
    """Return scale^2, `(*batch, 1, 1)`, in a shape that multiplies the covariances."""
    batch = scale.shape[:-2]
    return scale.square().reshape(*batch, *[1] * (mixture.covariances.ndim - len(batch)))


def _whiten(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return W with W S W^T = I, and log det S, for matrices S `(*, D, D)`.

    Factored in float64: in float32 a matrix of rank below D, plus its floor, may seem indefinite.
    """
    factor, info = torch.linalg.cholesky_ex(covariances.double())
    factor = torch.where((info == 0)[..., None, None], factor, math.nan)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return whitening.to(covariances.dtype), log_det.to(covariances.dtype)


def check_fit_options(covariance_type: str, regularization: float, differentiate: str) -> None:
    """Raise unless the options that every fit takes are valid."""
    check_choice("covariance_type", covariance_type, COVARIANCE_TYPES)
    check_positive("regularization", regularization)
    check_choice("differentiate", differentiate, ("unroll", "last", "none"))


def check_momentum(momentum: float | None) -> None:
    """Raise unless `momentum` is None or in (0, 1]."""
    if momentum is not None:
        check_positive("momentum", momentum)
        if momentum > 1:
            raise ValueError(f"momentum must be None or in (0, 1]; got {momentum}")


def _check_start(
    init: GaussianMixture, x: Tensor, num_components: int, covariance_type: CovarianceType
) -> None:
    if init.covariance_type != covariance_type:
        raise ValueError(
            f'init must be a mixture of covariance_type="{covariance_type}"; '
            f'got "{init.covariance_type}"'
        )
    expected = (*x.shape[:-2], num_components, x.shape[-1])
    if init.means.shape != expected:
        raise ValueError(f"init must have means of shape {expected}; got {tuple(init.means.shape)}")
    check_alike("x and the means of init", [x, init.means])
