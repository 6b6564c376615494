"""Gaussian mixtures fitted by expectation-maximisation, batched and differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from multialign._distributed import ProcessGroup, Ranks
from multialign._validation import (
    Samples,
    check_alike,
    check_choice,
    check_count,
    check_entries,
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
from multialign.em import SMALLEST_FLOOR, axis_aligned_em
from multialign.ops import log, logsumexp

__all__ = ["GaussianMixture", "GaussianPrototypes", "fit_gaussian_mixture"]

CovarianceType = Literal["diag", "full", "tied", "spherical"]
Differentiate = Literal["unroll", "last", "none"]
Init = Literal["kmeans++", "random"]

_S = TypeVar("_S")

# Of a component in posteriors, relative to the data: rounding leaves a variance no less than that.
_SMALLEST_VARIANCE = 1e-10

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
        check_alike(
            "weights, means and covariances",
            [self.weights, means, self.covariances],
            ["weights", "means", "covariances"],
        )
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
        return component_covariances(parameters_of(self), self.covariance_type)

    def _check(self, x: Tensor) -> Tensor:
        x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
        check_alike("means and x", [self.means, x], ["means", "x"])
        if x.shape[:-2] != self.means.shape[:-2] or x.shape[-1] != self.means.shape[-1]:
            raise ValueError(
                f"x (*batch, N, D) must agree in batch and D with the means "
                f"{tuple(self.means.shape)}; got {tuple(x.shape)}"
            )
        return x

    def _log_joint(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return _log_joint(x, parameters_of(self), self.covariance_type)


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
    :math:`\rho` without :math:`s^2`. All arithmetic is in float64.

    For "diag" and "spherical" (with :math:`\rho \ge 10^{-7}`; below, differences replace moments)
    an iteration takes :math:`N K D` time and two matrix products, and the backward pass keeps the
    mixtures it went through alone, so that memory does not grow with :math:`N K` times the
    iterations; it has first derivatives only. So has "full" with :math:`N < D`, where an iteration
    works in the N dimensions that the samples span, in :math:`K N^3` time.

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
            alone, the state before it being constant, "none" not at all. A problem that converged
            to the `tolerance` is at a fixed point: there "last" adds the derivative of that state,
            which makes it the implicit derivative of the limit, whatever the way there.
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, the mixture is that of all ranks' samples together. They stay on
            their ranks, but for the draw of initial means, which the first rank makes for all. An
            initial mixture must be the same on all ranks.

    Returns:
        The mixture, in the units of `x`.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: With "full" or "tied", batch N K D is more than 2^28 entries.

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
    masses, present = ranks.normalise(samples.masses, samples.present)
    samples = samples._replace(masses=masses)

    grad = torch.is_grad_enabled() and differentiate != "none"
    with full_precision(x), torch.set_grad_enabled(grad):
        (data,) = standardise(samples, regularization, ranks)
        if isinstance(init, GaussianMixture):
            start = to_standard(parameters_of(init), data)
        else:

            def choose(samples: Samples) -> list[Tensor]:
                (x,), (mass,) = samples.features, samples.masses
                return [choose_rows(x, mass, num_components, init=init, generator=generator)]

            samples = Samples([data.x], [data.mass], present, samples.weighted)
            (means,) = draw_means(samples, [num_components], choose, ranks)
            start = start_parameters(means, data, covariance_type)
        fitted = fit_standard(
            data, start, covariance_type, iterations, tolerance, differentiate, ranks
        )
        return as_mixture(from_standard(fitted, data, x.dtype), covariance_type)


class GaussianPrototypes(nn.Module):
    r"""Gaussian mixture of whatever it is called with, remembered between calls if so wished.

    Without `momentum` each call fits a new mixture. With it, the module keeps a running mixture in
    its buffers: a call in training mode starts EM there, merges the result into it,

    .. math:: (1 - \text{momentum}) \; p_\text{running} + \text{momentum} \; p_\text{batch},

    component by component (each merged pair keeps its total weight, mean and covariance
    :cite:p:`cappe:09`), and returns the merged mixture; the running part carries no gradient. In
    eval mode the running mixture is returned unchanged. A batch whose mixture is not finite leaves
    the running one as it was.

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
        if running is not None:
            check_remembered("x", x, running)
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
        kept = Parameters(*(part.detach().clone() for part in parameters_of(mixture)))
        # A loss scaler skips the step of a batch that is not finite; here too it leaves no trace.
        batch_dims = mixture.weights.ndim - 1
        finite = torch.stack([x.isfinite().flatten(batch_dims).all(-1) for x in kept]).all(0)
        if running is not None:
            kept = _where(finite, kept, parameters_of(running))
        # The first batch of all, which a compiled graph cannot look at.
        elif not (torch.compiler.is_compiling() or bool(finite.all())):
            return mixture
        self.running_weights, self.running_means, self.running_covariances = kept
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
    *batch, rows, dim = x.shape
    draws = torch.rand(*batch, count, generator=generator, device=x.device).to(x.dtype).split(1, -1)
    first = mass.cumsum(-1)
    chance, cumulative = mass, first
    chosen: list[Tensor] = []
    for draw in draws:
        row = torch.searchsorted(cumulative, draw * cumulative[..., -1:], right=True)
        row = row.clamp_max(rows - 1)
        chosen.append(row)
        distance = (x - x.gather(-2, row.unsqueeze(-1).expand(*batch, 1, dim))).square().sum(-1)
        chance = mass * distance if chance is mass else torch.minimum(chance, mass * distance)
        cumulative = chance.cumsum(-1)
        # Where there are fewer distinct samples than components, any of them.
        cumulative = torch.where(cumulative[..., -1:] == 0, first, cumulative)
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


class Parameters(NamedTuple):
    """Weights, means and covariances, as a :class:`GaussianMixture` holds them, unchecked."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


def parameters_of(mixture: GaussianMixture) -> Parameters:
    """Return the parameters of a mixture."""
    return Parameters(mixture.weights, mixture.means, mixture.covariances)


def as_mixture(parameters: Parameters, covariance_type: CovarianceType) -> GaussianMixture:
    """Return the mixture that has these parameters."""
    weights, means, covariances = parameters
    return GaussianMixture(
        weights=weights, means=means, covariances=covariances, covariance_type=covariance_type
    )


def component_covariances(parameters: Parameters, covariance_type: CovarianceType) -> Tensor:
    """Return one covariance a component: :meth:`GaussianMixture.component_covariances`."""
    _, means, covariances = parameters
    if covariance_type == "spherical":
        return covariances.unsqueeze(-1).expand(means.shape)
    if covariance_type == "tied":
        return covariances.unsqueeze(-3).expand(*means.shape, means.shape[-1])
    return covariances


class Standardised(NamedTuple):
    """Samples in units (x - origin) / scale, in which neither offset nor scale cost digits.

    EM commutes with the change of units, so that origin and scale are constants for the gradient.
    """

    x: Tensor
    """`(*batch, N, D)`, float64, of mean variance 1 (0 if all samples are equal)."""
    mass: Tensor
    """`(*batch, N)`."""
    origin: Tensor
    """One of the samples, `(*batch, 1, D)`."""
    scale: Tensor
    """`(*batch, 1, 1)`."""
    variance: Tensor
    """Of each feature, `(*batch, 1, D)`."""
    floor: Tensor
    """What is added to variances, `(*batch, 1, 1)`: the regularization, with its gradient."""
    regularization: float


def standardise(samples: Samples, regularization: float, ranks: Ranks) -> list[Standardised]:
    """Return M sets of samples in their own units; their masses sum to 1 over all ranks."""
    features = [x.double() for x in samples.features]
    masses = [mass.double() for mass in samples.masses]
    origins = [reference_row(x, mass) for x, mass in zip(features, masses, strict=True)]
    if ranks.group is not None:
        here = torch.stack([(mass != 0).any(-1) for mass in masses])
        origins = ranks.first_rows(origins, here.double())
    deviations = [x - origin for x, origin in zip(features, origins, strict=True)]
    if samples.weighted:
        deviations = [
            torch.where(mass.unsqueeze(-1) == 0, 0.0, deviation)
            for mass, deviation in zip(masses, deviations, strict=True)
        ]
    rows = [mass.unsqueeze(-2) for mass in masses]
    means = ranks.sum([row @ d for row, d in zip(rows, deviations, strict=True)])
    variances = ranks.sum(
        [
            row @ (deviation - mean).square()
            for row, deviation, mean in zip(rows, deviations, means, strict=True)
        ]
    )
    standardised = []
    for deviation, mass, origin, variance in zip(
        deviations, masses, origins, variances, strict=True
    ):
        level = variance.mean(-1, keepdim=True)
        constant = level.detach()
        constant = torch.where(constant == 0, 1.0, constant)
        scale = constant.sqrt()
        floor = regularization * torch.where(level == 0, 1.0, level / constant)
        standardised.append(
            Standardised(
                deviation / scale, mass, origin, scale, variance / constant, floor, regularization
            )
        )
    return standardised


def to_standard(parameters: Parameters, data: Standardised) -> Parameters:
    """Express parameters in the units of the data."""
    weights, means, covariances = (part.double() for part in parameters)
    square = _like(data.scale.square(), covariances)
    return Parameters(weights, (means - data.origin) / data.scale, covariances / square)


def from_standard(parameters: Parameters, data: Standardised, dtype: torch.dtype) -> Parameters:
    """Undo `to_standard`."""
    weights, means, covariances = parameters
    square = _like(data.scale.square(), covariances)
    return Parameters(
        weights.to(dtype),
        torch.addcmul(data.origin, data.scale, means).to(dtype),
        (square * covariances).to(dtype),
    )


def _like(number: Tensor, covariances: Tensor) -> Tensor:
    """Return one number a problem, `(*batch, 1, 1)`, in a shape that multiplies the covariances."""
    batch = number.shape[:-2]
    return number.reshape(*batch, *[1] * (covariances.ndim - len(batch)))


def start_parameters(
    means: Tensor, data: Standardised, covariance_type: CovarianceType
) -> Parameters:
    """Return a mixture of the given means, with the data's variances and equal weights.

    For "full" it holds the diagonals of the covariances, with which EM may begin; see
    `with_matrices`.
    """
    *batch, count, _ = means.shape
    variance = data.variance + data.floor
    if covariance_type == "spherical":
        covariances = variance.mean(-1).expand(*batch, count)
    elif covariance_type == "tied":
        covariances = torch.diag_embed(variance.squeeze(-2))
    else:
        covariances = variance.expand_as(means)
    return Parameters(means.new_full((*batch, count), 1 / count), means, covariances)


def with_matrices(parameters: Parameters, covariance_type: CovarianceType) -> Parameters:
    """Return a mixture as it is held, where "full" may have come with diagonals."""
    _, means, covariances = parameters
    if covariance_type == "full" and covariances.ndim == means.ndim:
        return parameters._replace(covariances=torch.diag_embed(covariances))
    return parameters


def fit_standard(
    data: Standardised,
    start: Parameters,
    covariance_type: CovarianceType,
    iterations: int,
    tolerance: float,
    differentiate: Differentiate,
    ranks: Ranks,
) -> Parameters:
    """Run EM on standardised samples; "none" is the caller's to see to."""
    if differentiate != "last":
        return _iterate(data, start, covariance_type, iterations, tolerance, ranks)[0]
    with torch.no_grad():
        before, taken, done = _iterate(
            data, start, covariance_type, iterations - 1, tolerance, ranks
        )
    after, _, _ = _iterate(data, before, covariance_type, 1, 0.0, ranks)
    if tolerance == 0:
        return after
    # At a fixed point t = F(t, x) the derivative is that of F by x and, through t, itself: a
    # geometric series, whose terms fall as fast as EM converged. Each round adds one.
    for _ in range(taken):
        moved = []
        for fixed, step in zip(before, after, strict=True):
            converged = done.reshape(*done.shape, *[1] * (step.ndim - done.ndim))
            moved.append(fixed + torch.where(converged, step - step.detach(), 0.0))
        after, _, _ = _iterate(data, Parameters(*moved), covariance_type, 1, 0.0, ranks)
    return after


def _iterate(
    data: Standardised,
    start: Parameters,
    covariance_type: CovarianceType,
    iterations: int,
    tolerance: float,
    ranks: Ranks,
) -> tuple[Parameters, int, Tensor]:
    """Return the state after EM, the largest number of steps, and which problems converged.

    Tolerance 0 does not look whether any did.
    """
    if _axes_alone(covariance_type, data.regularization):
        updated, _, steps = _axis_aligned(
            data, start, data.floor, covariance_type, iterations, tolerance, False, ranks
        )
        if tolerance == 0:
            return updated, iterations, steps < 0
        return updated, int(steps.max()), steps < iterations
    if iterations == 0:
        start = with_matrices(start, covariance_type)
        return start, 0, torch.zeros(data.x.shape[:-2], dtype=torch.bool, device=data.x.device)
    way = _steps(data, start, covariance_type, ranks)
    state, count, done = _walk(way, data, iterations, tolerance, ranks)
    return way.mixture(state), count, done


def _axes_alone(covariance_type: CovarianceType, regularization: float) -> bool:
    """Return whether EM by moments is meant for this: it is faster, and exact to the floor."""
    return covariance_type in ("diag", "spherical") and regularization >= SMALLEST_FLOOR


class PosteriorMoments(NamedTuple):
    """What each component holds of the samples, in expectation over their posteriors."""

    weights: Tensor
    """Mass, `(*batch, K)`, of sum 1; of no meaning without samples."""
    means: Tensor
    """Mean, `(*batch, K, D)`."""
    scatters: Tensor
    """Mass times the mean squared distance from the mean, `(*batch, K)`."""


def _axis_aligned(
    data: Standardised,
    state: Parameters,
    floor: Tensor,
    covariance_type: CovarianceType,
    iterations: int,
    tolerance: float,
    posterior: bool,
    ranks: Ranks,
) -> tuple[Parameters, PosteriorMoments, Tensor]:
    """Run EM by moments, whatever the batch: see :func:`axis_aligned_em`."""
    weights, means, covariances = state
    spherical = covariance_type == "spherical"
    if spherical:
        covariances = covariances.unsqueeze(-1).expand_as(means)
    batch = means.shape[:-2]
    flat = len(batch) != 1
    problem = [data.x, data.mass, weights, means, covariances, floor]
    if flat:
        problem = [part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in problem]
    fitted, held, steps = axis_aligned_em(
        *problem,
        iterations=iterations,
        tolerance=tolerance,
        spherical=spherical,
        posterior=posterior,
        group=ranks.group,
    )
    parts = [*fitted, *held, steps]
    if flat:
        parts = [part.reshape((*batch, *part.shape[1:])) for part in parts]
    weights, means, covariances = parts[:3]
    if spherical:
        covariances = covariances[..., 0]
    return Parameters(weights, means, covariances), PosteriorMoments(*parts[3:6]), parts[6]


class _Steps(Protocol[_S]):
    """EM as E-steps, each but the first after the M-step of the one before."""

    def begin(self) -> tuple[_S, Tensor]:
        """Return the first E-step, and log pi_k + log N(x_n) under the mixture it is of."""

    def step(self, state: _S) -> tuple[_S, Tensor]:
        """Return the same one step on."""

    def mixture(self, state: _S) -> Parameters:
        """Return the mixture of the M-step to come."""

    def end(self, state: _S) -> tuple[Parameters, Tensor]:
        """Return that mixture, and the joint probabilities `(*batch, N, K)` under it."""


class _Expected(NamedTuple):
    """An E-step."""

    joint: Tensor
    """The mass of each sample times its posteriors, `(*batch, N, K)`."""
    mixture: Parameters
    """What it is of: a component that no sample belongs to stays as it is there."""


class _Plain:
    """Steps of EM as they stand in the books."""

    def __init__(
        self, data: Standardised, start: Parameters, covariance_type: CovarianceType, ranks: Ranks
    ) -> None:
        self._data, self._start, self._ranks = data, start, ranks
        self._type: CovarianceType = covariance_type

    def begin(self) -> tuple[_Expected, Tensor]:
        log_joint = _log_joint(self._data.x, self._start, self._type)
        mixture = with_matrices(self._start, self._type)
        return _Expected(_joint(self._data, log_joint), mixture), log_joint

    def step(self, state: _Expected) -> tuple[_Expected, Tensor]:
        mixture = self.mixture(state)
        log_joint = _log_joint(self._data.x, mixture, self._type)
        return _Expected(_joint(self._data, log_joint), mixture), log_joint

    def mixture(self, state: _Expected) -> Parameters:
        return _maximise(self._data, state.joint, state.mixture, self._type, self._ranks)

    def end(self, state: _Expected) -> tuple[Parameters, Tensor]:
        after, _ = self.step(state)
        return after.mixture, after.joint


def _joint(data: Standardised, log_joint: Tensor) -> Tensor:
    return data.mass.unsqueeze(-1) * log_joint.softmax(-1)


def _maximise(
    data: Standardised,
    joint: Tensor,
    kept: Parameters,
    covariance_type: CovarianceType,
    ranks: Ranks,
) -> Parameters:
    """Return the mixture of an M-step, with components of `kept` where no sample belongs to one.

    Deviations are taken from the new means: E x^2 - mu^2 would lose the variance of a narrow
    component to rounding.
    """
    x, floor = data.x, data.floor
    _check_deviations(x, kept.means)
    weights, means = ranks.sum([joint.sum(-2), joint.mT @ x])
    dead = weights <= torch.finfo(x.dtype).eps
    safe = torch.where(dead, 1.0, weights)
    means = torch.where(dead.unsqueeze(-1), kept.means, means / safe.unsqueeze(-1))
    absent = weights.sum(-1, keepdim=True) == 0
    weights = torch.where(absent, kept.weights, weights)

    if covariance_type in ("diag", "spherical"):
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        (scatter,) = ranks.sum([(joint.unsqueeze(-1) * deviation.square()).sum(-3)])
        covariances = scatter / safe.unsqueeze(-1) + floor
        dead = dead.unsqueeze(-1)
        if covariance_type == "spherical":
            covariances, dead = covariances.mean(-1), dead.squeeze(-1)
    else:
        deviation = x.unsqueeze(-3) - means.unsqueeze(-2)
        shares = joint / safe.unsqueeze(-2) if covariance_type == "full" else joint
        scatter = _scatter(shares, deviation)
        if covariance_type == "tied":
            scatter = scatter.sum(-3)
        (scatter,) = ranks.sum([scatter])
        diagonal = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if covariance_type == "tied":
            covariances, dead = scatter + floor * diagonal, absent.unsqueeze(-1)
        else:
            covariances = scatter + floor.unsqueeze(-1) * diagonal
            dead = dead[..., None, None]
    covariances = torch.where(dead, kept.covariances, covariances)
    return Parameters(weights, means, covariances)


def _scatter(shares: Tensor, deviation: Tensor) -> Tensor:
    """Return sum_n s_nk d_kn d_kn^T, `(*batch, K, D, D)`, of deviations `(*batch, K, N, D)`."""
    return (shares.mT.unsqueeze(-1) * deviation).mT @ deviation


def _check_deviations(x: Tensor, means: Tensor) -> None:
    """Raise before there are too many deviations of all samples from all means."""
    check_entries(
        means.numel() * x.shape[-2],
        'use covariance_type="diag" or "spherical" with the default regularization, which need no '
        "such table, fewer samples, or projected features",
    )


class _Shared(NamedTuple):
    """An E-step, of a mixture that is known by the shares of the samples in its components."""

    joint: Tensor
    """The mass of each sample times its posteriors, `(*batch, N, K)`."""
    weights: Tensor
    """Of the mixture, `(*batch, K)`."""
    shares: Tensor
    """Their means are these weighted means of the samples, `(*batch, N, K)`, and so their
    covariances, plus the floor; 0 for components that are those EM began with."""


class _Narrow:
    """Steps of EM for full covariances of N < D samples, in the N dimensions that they span.

    Across these dimensions the covariances of an M-step equal their floor, and samples and means
    agree. So densities differ from those in N dimensions by one constant, and a step takes K N^3
    operations instead of K N D^2 + K D^3. A component that no sample has belonged to yet has the
    densities of the first E-step.
    """

    def __init__(self, data: Standardised, start: Parameters) -> None:
        _check_deviations(data.x, start.means)
        self._data, self._start = data, with_matrices(start, "full")
        self._first = _log_density(data.x, start, "full")
        self._basis = torch.linalg.qr(data.x.detach().mT).Q
        self._narrow = data.x.detach() @ self._basis
        dim, across = data.x.shape[-1], data.x.shape[-1] - self._basis.shape[-1]
        self._constant = -0.5 * (dim * math.log(2 * math.pi) + across * data.floor.log())

    def begin(self) -> tuple[_Shared, Tensor]:
        weights = self._start.weights
        log_joint = log(weights).unsqueeze(-2) + self._first
        joint = _joint(self._data, log_joint)
        return _Shared(joint, weights, torch.zeros_like(joint)), log_joint

    def step(self, state: _Shared) -> tuple[_Shared, Tensor]:
        weights, shares, untouched = self._maximise(state)
        density, _, _ = _NarrowDensity.apply(
            self._data.x, shares, self._data.floor, self._narrow, self._basis
        )
        density = torch.where(untouched, self._first, density + self._constant)
        log_joint = log(weights).unsqueeze(-2) + density
        return _Shared(_joint(self._data, log_joint), weights, shares), log_joint

    def mixture(self, state: _Shared) -> Parameters:
        weights, shares, untouched = self._maximise(state)
        there = untouched.mT
        means = torch.where(there, self._start.means, shares.mT @ self._data.x)
        deviation = self._data.x.unsqueeze(-3) - means.unsqueeze(-2)
        scatter = _scatter(shares, deviation)
        diagonal = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        covariances = scatter + self._data.floor.unsqueeze(-1) * diagonal
        covariances = torch.where(there.unsqueeze(-1), self._start.covariances, covariances)
        return Parameters(weights, means, covariances)

    def end(self, state: _Shared) -> tuple[Parameters, Tensor]:
        return self.mixture(state), self.step(state)[0].joint

    def _maximise(self, state: _Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, shares, and which components are untouched, `(*batch, 1, K)`."""
        weights = state.joint.sum(-2, keepdim=True)
        dead = weights <= torch.finfo(weights.dtype).eps
        shares = torch.where(dead, state.shares, state.joint / torch.where(dead, 1.0, weights))
        weights = torch.where((weights == 0).all(-1), state.weights, weights.squeeze(-2))
        return weights, shares, (shares == 0).all(-2, keepdim=True)


class _NarrowDensity(torch.autograd.Function):
    """Log-densities of samples, but for a constant, under Gaussians made of shares of them.

    They are functions of the Gram matrix of the samples alone, which a change of a sample across
    the space of all changes in second order only. So the basis of that space is a constant for the
    first derivative; the second would be wrong in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, shares: Tensor, floor: Tensor, narrow: Tensor, basis: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        deviation = narrow.unsqueeze(-3) - (shares.mT @ narrow).unsqueeze(-2)
        covariances = _scatter(shares, deviation)
        covariances.diagonal(dim1=-2, dim2=-1).add_(floor)
        whitening, log_det = _whiten(covariances)
        distance = (deviation @ whitening.mT).square().sum(-1)
        return -0.5 * (distance + log_det.unsqueeze(-1)).mT, deviation, whitening

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:2], *inputs[3:], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        derivative = _NarrowDerivative.apply if torch.is_grad_enabled() else _narrow_derivative
        return *derivative(grad, *ctx.saved_tensors), None, None


def _narrow_derivative(
    grad: Tensor,
    shares: Tensor,
    narrow: Tensor,
    basis: Tensor,
    deviation: Tensor,
    whitening: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by samples, shares and floor."""
    share = shares.mT.unsqueeze(-1)
    grad = -0.5 * grad.mT.unsqueeze(-1)
    solved = deviation @ whitening.mT @ whitening
    weighted = grad * solved
    by_covariances = grad.sum(-2, keepdim=True) * (whitening.mT @ whitening) - weighted.mT @ solved
    moved = deviation @ by_covariances
    by_deviation = 2 * (weighted + share * moved)
    by_means = -by_deviation.sum(-2)
    by_shares = (deviation * moved).sum(-1).mT + narrow @ by_means.mT
    by_narrow = by_deviation.sum(-3) + shares @ by_means
    by_floor = by_covariances.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    return by_narrow @ basis.mT, by_shares, by_floor[..., None, None]


class _NarrowDerivative(torch.autograd.Function):
    """The derivative where a graph of it is wanted. Its own is not there."""

    generate_vmap_rule = True
    forward = staticmethod(_narrow_derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            'EM for covariance_type="full" has first derivatives only where samples are fewer than '
            "features"
        )


def _walk(
    steps: _Steps[_S], data: Standardised, iterations: int, tolerance: float, ranks: Ranks
) -> tuple[_S, int, Tensor]:
    """Return where EM is before its last M-step; for the rest see `_iterate`."""
    state, log_joint = steps.begin()
    done = torch.zeros(data.x.shape[:-2], dtype=torch.bool, device=data.x.device)
    previous: Tensor | None = None
    for count in range(1, iterations + 1):
        if count > 1:
            updated, log_joint = steps.step(state)
            state = updated if tolerance == 0 else _where(done, state, updated)
        if tolerance == 0:
            continue
        likelihood = (data.mass * log_joint.detach().logsumexp(-1)).sum(-1).detach()
        (likelihood,) = ranks.sum([likelihood])
        if previous is not None:
            # NaN never converges, and the result shows it: there is nothing to wait for.
            change = (likelihood - previous).abs()
            done = done | (change < tolerance) | change.isnan()
            if bool(done.all()):
                return state, count, done
        previous = likelihood
    return state, iterations, done


def _steps(
    data: Standardised, start: Parameters, covariance_type: CovarianceType, ranks: Ranks
) -> _Steps[Any]:
    """Return the way of taking steps that is fastest."""
    rows, dim = data.x.shape[-2:]
    if covariance_type == "full" and 0 < rows < dim and ranks.group is None:
        return _Narrow(data, start)
    return _Plain(data, start, covariance_type, ranks)


def fit_with_posterior(
    data: Standardised,
    start: Parameters,
    covariance_type: CovarianceType,
    iterations: int,
    differentiate: Differentiate,
    ranks: Ranks,
) -> tuple[Parameters, PosteriorMoments]:
    """Return the mixture after EM and the posterior moments under it, both standardised.

    In one call where that is one pass: the moments are what a further step starts with.
    """
    if differentiate == "unroll" and _axes_alone(covariance_type, data.regularization):
        fitted, held, _ = _axis_aligned(
            data, start, data.floor, covariance_type, iterations, 0.0, True, ranks
        )
        return fitted, held
    if differentiate == "unroll" and iterations > 0:
        way = _steps(data, start, covariance_type, ranks)
        fitted, joint = way.end(_walk(way, data, iterations, 0.0, ranks)[0])
        return fitted, _held(data, joint, ranks)
    grad = torch.is_grad_enabled() and differentiate != "none"
    with torch.set_grad_enabled(grad):
        fitted = fit_standard(data, start, covariance_type, iterations, 0.0, differentiate, ranks)
    return fitted, posterior_moments(data, fitted, covariance_type, ranks)


def posterior_moments(
    data: Standardised, state: Parameters, covariance_type: CovarianceType, ranks: Ranks
) -> PosteriorMoments:
    """Return the posterior moments of samples under a mixture, both standardised."""
    if _axes_alone(covariance_type, data.regularization):
        floor = torch.full_like(data.floor, _SMALLEST_VARIANCE)
        _, held, _ = _axis_aligned(data, state, floor, covariance_type, 0, 0.0, True, ranks)
        return held
    return _held(data, _joint(data, _log_joint(data.x, state, covariance_type)), ranks)


def _held(data: Standardised, joint: Tensor, ranks: Ranks) -> PosteriorMoments:
    """Return the moments of samples under joint probabilities `(*batch, N, K)`."""
    weights, means = ranks.sum([joint.sum(-2), joint.mT @ data.x])
    means = means / torch.where(weights == 0, 1.0, weights).unsqueeze(-1)
    (scatters,) = ranks.sum([(joint * squared_euclidean_cost(data.x, means)).sum(-2)])
    return PosteriorMoments(weights, means, scatters)


def moments_from_standard(held: PosteriorMoments, data: Standardised) -> PosteriorMoments:
    """Return posterior moments in the units of the samples, in float64."""
    weights, means, scatters = held
    means = torch.addcmul(data.origin, data.scale, means)
    return PosteriorMoments(weights, means, data.scale.square().squeeze(-1) * scatters)


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
    if present is None:
        return merged
    chosen = _where(present, parameters_of(merged), parameters_of(old))
    return as_mixture(chosen, old.covariance_type)


def _where(condition: Tensor, yes: _S, no: _S) -> _S:
    """Choose between two states for each problem of the batch."""
    return cast("_S", _choose(condition, yes, no))


def _choose(condition: Tensor, yes: Any, no: Any) -> Any:
    if isinstance(yes, Tensor):
        shape = *condition.shape, *[1] * (yes.ndim - condition.ndim)
        return torch.where(condition.reshape(shape), yes, no)
    return type(yes)(*(_choose(condition, a, b) for a, b in zip(yes, no, strict=True)))


def _log_joint(x: Tensor, state: Parameters, covariance_type: CovarianceType) -> Tensor:
    """Return log pi_k + log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`: Eq. 2 and 4."""
    return log(state.weights).unsqueeze(-2) + _log_density(x, state, covariance_type)


def _log_density(x: Tensor, state: Parameters, covariance_type: CovarianceType) -> Tensor:
    """Return log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`; "full" takes diagonals as well."""
    _, means, covariances = state
    dim = x.shape[-1]
    if covariance_type == "full" and covariances.ndim == means.ndim:
        covariance_type = "diag"
    if covariance_type == "spherical":
        deviation = covariances.sqrt().unsqueeze(-2)
        # Divided twice: the square of a variance may leave the range in the gradient.
        distance = squared_euclidean_cost(x, means) / deviation / deviation
        log_det = 2 * dim * deviation.log()
    elif covariance_type == "diag":
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        distance = (deviation / covariances.sqrt().unsqueeze(-3)).square().sum(-1)
        log_det = covariances.log().sum(-1).unsqueeze(-2)
    elif covariance_type == "tied":
        whitening, log_det = _whiten(covariances)
        distance = squared_euclidean_cost(x @ whitening.mT, means @ whitening.mT)
        log_det = log_det[..., None, None]
    else:
        distance, log_det, _ = _FullDistance.apply(x, means, covariances)
        log_det = log_det.unsqueeze(-2)
    return -0.5 * (dim * math.log(2 * math.pi) + log_det + distance)


class _FullDistance(torch.autograd.Function):
    """(x_n - mu_k)^T S_k^-1 (x_n - mu_k), log det S_k, and W_k^T W_k = S_k^-1's factors W_k.

    With z = S^-1 (x - mu), the derivatives by S are -z z^T and S^-1: no factorisation is
    differentiated. The factors have no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whitening, log_det = _whiten(covariances)
        deviation = x.unsqueeze(-3) - means.unsqueeze(-2)
        distance = (deviation @ whitening.mT).square().sum(-1).mT
        return distance, log_det, whitening

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, by_distance: Tensor, by_log_det: Tensor, *unused: Any) -> Any:
        x, means, covariances, whitening = ctx.saved_tensors
        if torch.is_grad_enabled():
            whitening, _ = _whiten(covariances)
        # In float64: S^-1 may leave the range of float32 before it is multiplied by what is small.
        whitening = whitening.double()
        deviation = (x.unsqueeze(-3) - means.unsqueeze(-2)).double()
        solved = deviation @ whitening.mT @ whitening
        weighted = by_distance.double().mT.unsqueeze(-1) * solved
        inverse = whitening.mT @ whitening
        by_covariances = by_log_det.double()[..., None, None] * inverse - weighted.mT @ solved
        grads = 2 * weighted.sum(-3), -2 * weighted.sum(-2), by_covariances
        return tuple(grad.to(x.dtype) for grad in grads)


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


def check_remembered(name: str, x: Tensor, running: GaussianMixture) -> None:
    """Raise unless `x` can be compared with the prototypes that a module remembers."""
    if x.device != running.means.device:
        raise ValueError(
            f"{name} must be on the device of the prototypes remembered, {running.means.device}; "
            f"got {x.device}; move the module with .to(device)"
        )
    if lift(x).dtype != running.means.dtype:
        raise TypeError(
            f"{name} must have the dtype of the prototypes remembered, {running.means.dtype}; "
            f"got {x.dtype}; convert the module with .to(dtype)"
        )


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
    check_alike("x and the means of init", [x, init.means], ["x", "the means"])
