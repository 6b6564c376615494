"""The fit of mixtures to M modalities at once; :func:`fit_gaussian_mixture` is the case M = 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from multialign._distributed import ProcessGroup
from multialign._samples import Samples, make_samples, pad_rows
from multialign._validation import (
    check_alike,
    check_count,
    check_positive,
    check_tensor,
    check_weights,
    full_precision,
    lift,
)
from multialign.mixture.distribution import (
    GaussianMixture,
    Report,
    as_mixture,
    parameters_of,
    with_report,
)
from multialign.mixture.em import (
    Ending,
    fit_standard,
    fit_with_posterior,
    log_likelihood,
    posterior_moments,
)
from multialign.mixture.em_moments import SMALLEST_FLOOR
from multialign.mixture.options import Differentiate, FitOptions, Init
from multialign.mixture.parameters import (
    CovarianceType,
    Parameters,
    PosteriorMoments,
    Standardised,
    from_standard,
    moments_from_standard,
    select,
    stack_modalities,
    standardise,
    to_standard,
    unstack_modalities,
    with_matrices,
)
from multialign.mixture.seeds import core_draws, draw_means, start_parameters
from multialign.ops import AxesFit, Backend, FitSettings, core_fits, fit_axes, has_tangent

__all__ = ["Modalities", "Moments", "fit_gaussian_mixture", "one_modality"]

Moments = Sequence[PosteriorMoments] | Tensor
"""Posterior moments of each modality, or of all in one tensor: see `unpack_moments`."""

# Sums of features that differ by this part of the largest are those of equal samples.
_EQUAL = 1e-14

_Fields = TypeVar("_Fields", bound=tuple[Tensor, ...])


class Modalities:
    """The samples of M modalities, standardised, and the mixtures fitted to them.

    Modalities with equal N and equal K are one batch of problems, stacked along a first dimension;
    otherwise each is fitted alone. Over several ranks equal K is enough: N may be equal on one rank
    and not on another, and all ranks must take part in the same collectives.

    Args:
        samples: The samples.
        counts: K for each modality.
        options: Of the fit.
        backend: "auto" and "native" let the compiled core fit what it takes.
    """

    def __init__(
        self,
        samples: Samples,
        counts: Sequence[int],
        options: FitOptions,
        backend: Backend | Literal["native"] = "auto",
    ) -> None:
        self.samples = samples
        self._counts, self._options = counts, options
        self._sizes = [x.shape[-2] for x in samples.features]
        self._dtype = samples.features[0].dtype
        ranks, every = options.ranks, range(len(counts))
        equal_sizes = len(set(self._sizes)) == 1 or ranks.group is not None
        together = len(set(counts)) == 1 and equal_sizes
        self._stacks = [list(every)] if together else [[m] for m in every]
        # EM takes at least one row.
        self._rows = max(1, *self._sizes) if together else 1
        self._standardised: list[Standardised] | None = None
        self._grad, self._core = torch.is_grad_enabled(), backend in ("auto", "native")

    @property
    def _data(self) -> list[Standardised]:
        """The samples in their own units, stacked."""
        if self._standardised is None:
            padded = pad_rows(self.samples, self._rows)
            alone = len(self._stacks) == len(self._counts)
            with torch.set_grad_enabled(self._grad):
                self._standardised = standardise(
                    self._stack_tensors(padded.features),
                    self._stack_tensors(padded.masses),
                    padded.origins.unbind(0) if alone else [padded.origins],
                    self._options.regularization,
                    self._options.ranks,
                )
        return self._standardised

    def _in_core(
        self, starts: Sequence[GaussianMixture] | None = None, *, iterations: int | None = None
    ) -> AxesFit | None:
        """Return the fit that the compiled core makes; None if it does not take these samples."""
        options, samples, counts = self._options, self.samples, self._counts
        steps = options.em_iterations if iterations is None else iterations
        fields = [x for start in starts or () for x in parameters_of(start)]
        if (
            not self._core
            or options.covariance_type not in ("diag", "spherical")
            or options.regularization < SMALLEST_FLOOR
            or options.process_group is not None
            or (starts is None and options.init != "kmeans++")
            or not core_fits(samples.features)
            or has_tangent(*samples.features, *samples.masses, *fields)
        ):
            return None
        settings = FitSettings(
            options.covariance_type == "spherical",
            options.differentiate if steps else "unroll",
            steps,
            options.regularization,
            options.em_tolerance or 0.0,
        )
        draws = core_draws(samples, counts, options) if starts is None else ((), ())
        return fit_axes(
            samples.features, samples.masses, [*samples.origins], fields, draws, counts, settings
        )

    def _core_mixtures(self, fit: AxesFit) -> list[GaussianMixture]:
        kind = self._options.covariance_type
        triples = zip(fit.weights, fit.means, fit.covariances, strict=True)
        return [as_mixture(Parameters(*triple), kind) for triple in triples]

    def fit(
        self,
        starts: Sequence[GaussianMixture] | None = None,
        started: Sequence[Tensor] | None = None,
    ) -> list[GaussianMixture]:
        """Return the mixture of each modality after EM.

        Args:
            starts: None for seeds, or the mixture that EM starts from in each modality.
            started: None, or whether to start from it, `(*batch)` for each modality.
        """
        with torch.set_grad_enabled(self._options.grad):
            core = self._in_core(starts) if started is None else None
        if core is not None:
            return self._core_mixtures(core)
        return self._mixtures(fitted for fitted, _ in self._fit(starts, started))

    def fit_with_report(
        self, starts: Sequence[GaussianMixture] | None = None
    ) -> list[GaussianMixture]:
        """Return the same mixtures, which tell of their fit. This takes one more E-step."""
        with torch.set_grad_enabled(self._options.grad):
            core = self._in_core(starts)
        if core is not None:
            parts = [x.unbind(-1) for x in core.report.unbind(-2)]
            found = [Report(n.long(), done > 0, x.to(self._dtype)) for n, done, x in parts]
            return list(map(with_report, self._core_mixtures(core), found))
        fits, reports = self._fit(starts, None), []
        for (fitted, ending), data in zip(fits, self._data, strict=True):
            # The density of samples in their own units is that of standardised ones over s^D.
            change = data.x.shape[-1] * data.scale.log().squeeze((-2, -1))
            likelihood = log_likelihood(data, fitted, self._options) - change
            reports.append(Report(*ending, likelihood.to(self._dtype)))
        mixtures = self._mixtures(fitted for fitted, _ in fits)
        return [
            with_report(mixture, report)
            for mixture, report in zip(mixtures, self._unstack(reports), strict=True)
        ]

    def _fit(
        self, starts: Sequence[GaussianMixture] | None, started: Sequence[Tensor] | None
    ) -> list[tuple[Parameters, Ending]]:
        with (
            torch.set_grad_enabled(self._options.grad),
            full_precision(self.samples.features[0]),
        ):
            pairs = zip(self._data, self._begin(starts, started), strict=True)
            return [fit_standard(*pair, self._options) for pair in pairs]

    def fit_with_posterior(self) -> tuple[list[GaussianMixture], Moments]:
        """Return the mixtures after all iterations, and the posterior moments under them."""
        core = self._in_core()
        if core is not None:
            return self._core_mixtures(core), core.moments
        with torch.set_grad_enabled(self._options.grad):
            pairs = zip(self._data, self._begin(), strict=True)
        fits = [fit_with_posterior(*pair, self._options) for pair in pairs]
        return self._mixtures(fit[0] for fit in fits), self._moments(fit[1] for fit in fits)

    def seeds(self) -> list[GaussianMixture]:
        """Return a mixture of drawn means for each modality, without gradient."""
        with torch.no_grad():
            kind = self._options.covariance_type
            return self._mixtures(with_matrices(seed, kind) for seed in self._seeds())

    def posterior_moments(self, mixtures: Sequence[GaussianMixture]) -> Moments:
        """Return the posterior moments of the samples under given mixtures."""
        core = self._in_core(mixtures, iterations=0)
        if core is not None:
            return core.moments
        pairs = zip(self._data, self._to_standard(mixtures), strict=True)
        return self._moments(posterior_moments(*pair, self._options) for pair in pairs)

    def _begin(
        self,
        starts: Sequence[GaussianMixture] | None = None,
        started: Sequence[Tensor] | None = None,
    ) -> list[Parameters]:
        """Return the standardised mixtures that EM starts from; for the arguments see `fit`."""
        if starts is None:
            return self._seeds()
        given = self._to_standard(starts)
        if started is None:
            return given
        kind = self._options.covariance_type
        seeds = [with_matrices(seed, kind) for seed in self._seeds()]
        triples = zip(self._stack_tensors(started), given, seeds, strict=True)
        return [select(flag, start, seed) for flag, start, seed in triples]

    def _seeds(self) -> list[Parameters]:
        """Return the standardised mixtures of drawn means."""
        options = self._options
        means = draw_means(
            self._data, self._stacks, self._sizes, self._counts, self.samples.weighted, options
        )
        return [
            start_parameters(mean, data, options)
            for mean, data in zip(means, self._data, strict=True)
        ]

    def _to_standard(self, mixtures: Sequence[GaussianMixture]) -> list[Parameters]:
        """Return the parameters of mixtures of the samples, standardised."""
        fields = zip(*(parameters_of(mixture) for mixture in mixtures), strict=True)
        stacked = zip(*(self._stack_tensors(field) for field in fields), self._data, strict=True)
        return [to_standard(Parameters(*part), data) for *part, data in stacked]

    def _mixtures(self, parameters: Iterable[Parameters]) -> list[GaussianMixture]:
        """Return the mixtures of standardised parameters, in the units of the samples."""
        pairs = zip(parameters, self._data, strict=True)
        fitted = self._unstack([from_standard(part, data, self._dtype) for part, data in pairs])
        return [as_mixture(part, self._options.covariance_type) for part in fitted]

    def _moments(self, moments: Iterable[PosteriorMoments]) -> list[PosteriorMoments]:
        """Return standardised moments in the units of the samples."""
        pairs = zip(moments, self._data, strict=True)
        return self._unstack([moments_from_standard(part, data) for part, data in pairs])

    def _stack_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [stack_modalities([tensors[m] for m in stack]) for stack in self._stacks]

    def _unstack(self, records: Sequence[_Fields]) -> list[_Fields]:
        """Return a tuple of tensors for each modality from one for each stack."""
        return [
            type(record)(*fields)
            for record, stack in zip(records, self._stacks, strict=True)
            for fields in zip(*(unstack_modalities(x, len(stack)) for x in record), strict=True)
        ]


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
    works in the N dimensions that the samples span, in :math:`K N^3` time. Forward-mode derivatives
    (:func:`torch.func.jvp`) are exact and always take the slower path, by differences.

    Args:
        x: :math:`(*\text{batch}, N, D)`; batch entries are independent problems.
        num_components: K. It may exceed N; some components then share samples.
        covariance_type: "diag", "full", "tied" (one for all components) or "spherical".
        weights: None or :math:`(*\text{batch}, N)`, boolean or non-negative; 0 is absent.
        init: "kmeans++" and "random" choose K samples as means, with equal weights and the
            variances of the data; a :class:`GaussianMixture` is the state to start from.
            "kmeans++" is the greedy kind, which draws :math:`2 + \lfloor \log K \rfloor` candidates
            for each mean and takes the best; the variances are then those of the data times the
            share that is left around the nearest means.
        iterations: Largest number of iterations.
        tolerance: A problem stops once its mean log-likelihood changes by less; 0 runs all
            iterations and never reads a value back from the device.
        regularization: :math:`\rho \ge 0`, dimensionless. At 0 nothing keeps a covariance from
            becoming singular, on a constant feature for example, and the mixture is then NaN.
        differentiate: "unroll" differentiates through all iterations, "last" through the last
            alone, the state before it being constant, "none" not at all. A problem that converged
            to the `tolerance` is at a fixed point: there "last" adds the derivative of that state,
            which makes it the implicit derivative of the limit, whatever the start.
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, the mixture is that of all ranks' samples together. They stay on
            their ranks, but for the draw of initial means, which the first rank makes for all. An
            initial mixture must be the same on all ranks.

    Returns:
        The mixture, in the units of `x`, with `iterations`, `converged` and `log_likelihood`.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        RuntimeError: :func:`torch.utils.checkpoint.checkpoint` repeats a draw from `generator`.
        MemoryError: With "full" or "tied", batch N K D is more than 2^28 entries.

    Warns:
        UserWarning: There are fewer distinct samples than components. This is looked at on the CPU,
            with a tolerance above 0, outside torch.compile.

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
    num_components = check_count("num_components", num_components)
    check_count("iterations", iterations)
    tolerance = check_positive("tolerance", tolerance, zero=True)
    options = FitOptions(
        covariance_type=covariance_type,
        em_iterations=iterations,
        em_tolerance=tolerance or None,
        regularization=regularization,
        differentiate=differentiate,
        init="kmeans++" if isinstance(init, GaussianMixture) else init,
        generator=generator,
        process_group=process_group,
    )
    modality = one_modality(x, weights, num_components, options)
    first = modality.samples.features[0]
    starts = None
    if isinstance(init, GaussianMixture):
        _check_start(init, first, num_components, covariance_type)
        starts = [init]
    with full_precision(first):
        _warn_of_few_samples(modality.samples, num_components, options)
        return modality.fit_with_report(starts)[0]


def one_modality(x: object, weights: Tensor | None, count: int, options: FitOptions) -> Modalities:
    """Return samples `(*batch, N, D)` of one modality, checked."""
    x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one feature; got {tuple(x.shape)}")
    checked = check_weights([weights], [x], x.shape[:-2])
    with full_precision(x):
        return Modalities(make_samples([x], checked, options.ranks), [count], options)


def _warn_of_few_samples(samples: Samples, count: int, options: FitOptions) -> None:
    """Warn if this rank has fewer distinct samples than components.

    Values are read where a tolerance has them read anyway, and on the CPU alone.
    """
    (x,), (mass,) = samples.features, samples.masses
    if torch.compiler.is_compiling() or options.em_tolerance is None or x.device.type != "cpu":
        return
    if options.process_group is not None or x.shape[-2] == 0:
        return
    with torch.no_grad():
        # Distinct samples differ in a weighted sum of features; cos has no period of integers.
        factors = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64).cos()
        sums = ((x - samples.origins[0]).double() * factors).sum(-1)
        tops = sums.abs().amax(-1, keepdim=True)
        sums = torch.where(mass == 0, math.inf, sums).sort(-1).values
        same = sums.diff(dim=-1) <= _EQUAL * tops
        distinct = (sums != math.inf).sum(-1) - same.sum(-1)
        fewest = int(distinct.min()) if distinct.numel() else count
    if fewest < count:
        warnings.warn(
            f"{fewest} distinct samples for {count} components: some components will be equal; "
            "give a smaller num_components or more samples",
            stacklevel=3,
        )


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
