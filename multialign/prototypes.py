"""Prototype alignment: Gaussian mixtures, transport between their components, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from multialign._distributed import ProcessGroup, Ranks
from multialign._validation import (
    Samples,
    check_choice,
    check_count,
    check_positive,
    check_samples,
    full_precision,
    take_rows,
)
from multialign.costs import bures_wasserstein_cost, pairwise_bures_cost
from multialign.mixture import (
    CovarianceType,
    Differentiate,
    GaussianMixture,
    GaussianPrototypes,
    Parameters,
    PosteriorMoments,
    Standardised,
    as_mixture,
    check_fit_options,
    check_momentum,
    check_remembered,
    choose_rows,
    component_covariances,
    draw_means,
    fit_with_posterior,
    from_standard,
    moments_from_standard,
    parameters_of,
    posterior_moments,
    standardise,
    start_parameters,
    to_standard,
    with_matrices,
)
from multialign.ops import Backend
from multialign.transport.options import Method, SolverOptions
from multialign.transport.solution import TransportSolution
from multialign.transport.solver import multi_marginal_sinkhorn

__all__ = ["PrototypeAlignment", "PrototypeAlignmentLoss", "prototype_alignment_loss"]

Objective = Literal["transport", "regularized"]
Matching = Literal["index", "plan"]
CostReduction = Literal["sum", "mean"]

_Fields = TypeVar("_Fields", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class PrototypeAlignment:
    r"""The parts of a prototype alignment loss.

    Returned by :meth:`PrototypeAlignmentLoss.solve`.

    Attributes:
        loss: Their weighted sum, the scalar that the loss returns.
        transport_loss: The transport term, a scalar.
        prototype_loss: The sample-to-prototype term, a scalar.
        mixtures: The Gaussian mixture of each modality.
        solution: The transport problem between their components.

    Example:
        >>> import torch
        >>> from multialign import PrototypeAlignmentLoss
        >>> parts = PrototypeAlignmentLoss(2).solve(torch.randn(3, 10, 4))
        >>> parts.mixtures[0].means.shape, parts.solution.plan().shape
        (torch.Size([2, 4]), torch.Size([2, 2, 2]))
    """

    loss: Tensor
    transport_loss: Tensor
    prototype_loss: Tensor
    mixtures: list[GaussianMixture]
    solution: TransportSolution


@dataclass(frozen=True, kw_only=True)
class _Options:
    """All options but `num_prototypes`, checked. Their defaults stand in the signatures."""

    epsilon: float
    covariance_type: CovarianceType
    em_iterations: int
    regularization: float
    differentiate: Differentiate
    objective: Objective
    matching: Matching
    cost_reduction: CostReduction
    transport_weight: float
    prototype_weight: float
    tolerance: float | None
    max_iterations: int
    method: Method
    backend: Backend
    generator: torch.Generator | None
    process_group: ProcessGroup | None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        check_count("em_iterations", self.em_iterations)
        check_fit_options(self.covariance_type, self.regularization, self.differentiate)
        check_choice("objective", self.objective, ("transport", "regularized"))
        check_choice("matching", self.matching, ("index", "plan"))
        check_choice("cost_reduction", self.cost_reduction, ("sum", "mean"))
        check_positive("transport_weight", self.transport_weight, zero=True)
        check_positive("prototype_weight", self.prototype_weight, zero=True)
        SolverOptions(
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            method=self.method,
            backend=self.backend,
        )


def prototype_alignment_loss(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    num_prototypes: int | Sequence[int],
    epsilon: float = 0.1,
    covariance_type: CovarianceType = "diag",
    em_iterations: int = 10,
    regularization: float = 1e-6,
    differentiate: Differentiate = "unroll",
    objective: Objective = "transport",
    matching: Matching = "index",
    cost_reduction: CostReduction = "sum",
    transport_weight: float = 1.0,
    prototype_weight: float = 1.0,
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: Method = "auto",
    backend: Backend = "auto",
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Align modalities through the components of a Gaussian mixture fitted to each.

    .. math::
        L = a \, \langle T^\star, C \rangle
            + \frac{b}{M(M-1)} \sum_{i \ne j} \frac{1}{N} \sum_{n} \sum_{k}
              w_i^n(k) \, \|f_i^n - \mu_j^k\|^2

    with a the `transport_weight` and b the `prototype_weight`. The cost between components is
    :math:`C(k_1, \dots, k_M) = \sum_{i<j} C_{ij}(k_i, k_j)`, with :math:`C_{ij}` that of
    :func:`bures_wasserstein_cost`; the plan :math:`T^\star` solves Eq. 7-8
    (:func:`multi_marginal_sinkhorn`) with the component weights as marginals; and
    :math:`w_i^n(k)` is the posterior of component k (Eq. 3).

    Independent mixtures need not number their components alike. If all modalities have the same N,
    their samples are taken as paired, and the same rows seed component k everywhere; this is what
    gives "index" a meaning. For unpaired data take "plan", which puts the plan's barycentric image
    of component k in modality j, :math:`\sum_l T_{ij}(k, l) \mu_j^l / \sum_l T_{ij}(k, l)`, in
    place of :math:`\mu_j^k`.

    Args:
        features: M tensors :math:`(*\text{batch}, N_m, D)`, or one stacked tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative. A sample of weight 0 is absent; a modality left without weight is out.
        num_prototypes: K, or one for each modality (with ``matching="plan"``).
        epsilon: > 0, in the units of the costs.
        covariance_type: "diag", "full", "tied" or "spherical".
        em_iterations: EM steps from the seeds.
        regularization: Floor of the variances, relative to those of the data.
        differentiate: "unroll" differentiates through EM, posteriors included; "last" through its
            last step; "none" takes the mixtures as constants, and only the samples move.
        objective: "transport" for :math:`\langle T^\star, C \rangle`, "regularized" for the value
            of Eq. 7, which has the entropy term and may be negative.
        matching: "index" or "plan".
        cost_reduction: "sum" over features as in the paper; "mean" divides all squared distances,
            those of the second term too, by D.
        transport_weight: a >= 0.
        prototype_weight: b >= 0.
        tolerance: As in :func:`multi_marginal_sinkhorn`.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.
        generator: Draws the seeds; None stands for torch's global generator.
        process_group: Given one, the loss is that of all ranks' samples together. They stay on
            their ranks, but for the draw of seeds, which the first rank makes for all.

    Returns:
        A scalar, the mean over the batch, in squared units of the features.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: With "full" or "tied", batch N K D or batch K^2 D^2 is more than 2^28 entries.

    Warns:
        ConvergenceWarning: The plan did not reach the tolerance.

    References:
        Eq. 2-9 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import prototype_alignment_loss
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> loss = prototype_alignment_loss(
        ...     [x, x + 1.0], num_prototypes=2, prototype_weight=0.0
        ... )
        >>> loss
        tensor(1.)
    """
    options = _Options(
        epsilon=epsilon,
        covariance_type=covariance_type,
        em_iterations=em_iterations,
        regularization=regularization,
        differentiate=differentiate,
        objective=objective,
        matching=matching,
        cost_reduction=cost_reduction,
        transport_weight=transport_weight,
        prototype_weight=prototype_weight,
        tolerance=tolerance,
        max_iterations=max_iterations,
        method=method,
        backend=backend,
        generator=generator,
        process_group=process_group,
    )
    ranks = Ranks(process_group)
    samples = _check_samples(features, weights, ranks)
    counts = _counts(num_prototypes, len(samples.features), matching)
    with full_precision(samples.features[0]):
        return _loss(_fit(samples, counts, options, ranks), options)


class PrototypeAlignmentLoss(nn.Module):
    r"""Loss that aligns modalities through the components of a Gaussian mixture fitted to each.

    .. math::
        L = a \, \langle T^\star, C \rangle
            + \frac{b}{M(M-1)} \sum_{i \ne j} \frac{1}{N} \sum_{n} \sum_{k}
              w_i^n(k) \, \|f_i^n - \mu_j^k\|^2

    Called ``(features, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`prototype_alignment_loss` for the definition, units and errors. With `momentum`, each
    modality's mixture is remembered between calls (see :class:`GaussianPrototypes`), for batches
    too small to carry K components.

    Args:
        num_prototypes: K, or one for each modality (with ``matching="plan"``).
        epsilon: > 0, in the units of the costs.
        momentum: None, or the weight in (0, 1] of the newest batch in the running mixtures.
        covariance_type: "diag", "full", "tied" or "spherical".
        em_iterations: EM steps from the seeds or from the running mixture.
        objective: "transport" or "regularized".
        matching: "index" or "plan".
        cost_reduction: "sum" or "mean" over features.
        transport_weight: a >= 0.
        prototype_weight: b >= 0.
        regularization: Floor of the variances, relative to those of the data.
        differentiate: "unroll", "last" or "none".
        tolerance: As in :func:`multi_marginal_sinkhorn`.
        max_iterations: As in :func:`multi_marginal_sinkhorn`.
        method: As in :func:`multi_marginal_sinkhorn`.
        backend: As in :func:`multi_marginal_sinkhorn`.
        generator: Draws the seeds; None stands for torch's global generator.
        process_group: Given one, the loss is that of all ranks' samples together.

    References:
        Eq. 2-9 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import PrototypeAlignmentLoss
        >>> loss = PrototypeAlignmentLoss(4, epsilon=0.5, cost_reduction="mean")
        >>> features = [torch.randn(32, 8, requires_grad=True) for _ in range(3)]
        >>> loss(features).backward()
        >>> features[0].grad.shape
        torch.Size([32, 8])
    """

    def __init__(
        self,
        num_prototypes: int | Sequence[int],
        *,
        epsilon: float = 0.1,
        momentum: float | None = None,
        covariance_type: CovarianceType = "diag",
        em_iterations: int = 10,
        objective: Objective = "transport",
        matching: Matching = "index",
        cost_reduction: CostReduction = "sum",
        transport_weight: float = 1.0,
        prototype_weight: float = 1.0,
        regularization: float = 1e-6,
        differentiate: Differentiate = "unroll",
        tolerance: float | None = None,
        max_iterations: int = 2000,
        method: Method = "auto",
        backend: Backend = "auto",
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options = _Options(
            epsilon=epsilon,
            covariance_type=covariance_type,
            em_iterations=em_iterations,
            regularization=regularization,
            differentiate=differentiate,
            objective=objective,
            matching=matching,
            cost_reduction=cost_reduction,
            transport_weight=transport_weight,
            prototype_weight=prototype_weight,
            tolerance=tolerance,
            max_iterations=max_iterations,
            method=method,
            backend=backend,
            generator=generator,
            process_group=process_group,
        )
        check_momentum(momentum)
        for count in [num_prototypes] if isinstance(num_prototypes, int) else num_prototypes:
            check_count("num_prototypes", count)
        self.num_prototypes = num_prototypes
        self.momentum = momentum
        # One for each modality; how many there are is known from the first call on.
        self.prototypes = nn.ModuleList()

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M feature sets."""
        samples, counts, ranks = self._check(features, weights)
        with full_precision(samples.features[0]):
            return _loss(self._fit(samples, counts, ranks), self.options)

    def solve(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> PrototypeAlignment:
        """Return the loss of M feature sets with all its parts."""
        options = self.options
        samples, counts, ranks = self._check(features, weights)
        with full_precision(samples.features[0]):
            fit = self._fit(samples, counts, ranks)
            solution = _solve(fit, options)
            transport_loss = _transport_loss(solution, options)
            prototype_loss = _prototype_loss(fit, solution, options)
            return PrototypeAlignment(
                loss=options.transport_weight * transport_loss
                + options.prototype_weight * prototype_loss,
                transport_loss=transport_loss,
                prototype_loss=prototype_loss,
                mixtures=[as_mixture(part, options.covariance_type) for part in fit.parameters],
                solution=solution,
            )

    def _check(self, features: object, weights: object) -> tuple[Samples, list[int], Ranks]:
        ranks = Ranks(self.options.process_group)
        samples = _check_samples(features, weights, ranks)
        counts = _counts(self.num_prototypes, len(samples.features), self.options.matching)
        return samples, counts, ranks

    def _fit(self, samples: Samples, counts: list[int], ranks: Ranks) -> _Fit:
        options = self.options
        models = self._models(counts)
        if self.momentum is None:
            return _fit(samples, counts, options, ranks)
        for n, (model, x) in enumerate(zip(models, samples.features, strict=True)):
            if model.running is not None:
                check_remembered(f"features[{n}]", x, model.running)
        starts = [None if m.running is None else parameters_of(m.running) for m in models]
        if not self.training and all(start is not None for start in starts):
            data = _standardise(samples, counts, options, ranks)
            known = [start for start in starts if start is not None]
            return _known(samples, data, known, options, ranks)
        fit = _fit(samples, counts, options, ranks, starts)
        merged = [
            model.remember(as_mixture(batch, options.covariance_type), present != 0)
            for model, batch, present in zip(models, fit.parameters, samples.present, strict=True)
        ]
        return _known(samples, fit.data, [parameters_of(m) for m in merged], options, ranks)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        options = self.options
        return (
            f"{self.num_prototypes}, epsilon={options.epsilon}, momentum={self.momentum}, "
            f"covariance_type={options.covariance_type!r}, objective={options.objective!r}, "
            f"matching={options.matching!r}, cost_reduction={options.cost_reduction!r}"
        )

    def _models(self, counts: Sequence[int]) -> list[GaussianPrototypes]:
        if self.momentum is None and len(self.prototypes) != len(counts):
            self.prototypes = nn.ModuleList()  # nothing is remembered: M may change
        if len(self.prototypes) == 0:
            self.prototypes.extend(self._model(count) for count in counts)
        # A first call in eval mode, as Lightning's sanity check makes, must not leave them in it.
        if any(model.training != self.training for model in self.prototypes):
            self.prototypes.train(self.training)
        if len(self.prototypes) != len(counts):
            raise ValueError(
                f"features must have the {len(self.prototypes)} modalities whose prototypes are "
                f"remembered; got {len(counts)}"
            )
        return [model for model in self.prototypes if isinstance(model, GaussianPrototypes)]

    def _model(self, count: int) -> GaussianPrototypes:
        return GaussianPrototypes(
            count,
            covariance_type=self.options.covariance_type,
            em_iterations=self.options.em_iterations,
            momentum=self.momentum,
            regularization=self.options.regularization,
            differentiate=self.options.differentiate,
            generator=self.options.generator,
            process_group=self.options.process_group,
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = {
            key[len(prefix) :].split(".")[1]
            for key in state_dict
            if key.startswith(f"{prefix}prototypes.")
        }
        if len(self.prototypes) == 0 and saved:
            self._models(_counts(self.num_prototypes, len(saved), self.options.matching))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_samples(features: object, weights: object, ranks: Ranks) -> Samples:
    """Return this rank's samples, weighed against those of all ranks."""
    samples = check_samples(features, weights, gather=ranks.note)
    masses, present = ranks.normalise(samples.masses, samples.present)
    return samples._replace(masses=masses, present=present)


class _Fit(NamedTuple):
    """Samples of M modalities and a mixture for each."""

    samples: Samples
    data: list[Standardised]
    """The samples in their own units: one for all modalities side by side, or one for each."""
    parameters: list[Parameters]
    """M, in the units of the samples."""
    moments: list[PosteriorMoments]
    """Of the samples under these mixtures, standardised, in the order of `data`."""

    complete: bool
    """Whether it is known without a look that no modality is absent."""


def _fit(
    samples: Samples,
    counts: Sequence[int],
    options: _Options,
    ranks: Ranks,
    starts: Sequence[Parameters | None] | None = None,
) -> _Fit:
    """Fit a mixture to each modality, from `starts` where there are any."""
    data = _standardise(samples, counts, options, ranks)
    dtype = samples.features[0].dtype
    grad = torch.is_grad_enabled() and options.differentiate != "none"
    with torch.set_grad_enabled(grad):
        if starts is None or any(start is None for start in starts):
            begin = _seeds(samples, data, counts, options, ranks)
        if starts is not None and any(start is not None for start in starts):
            if any(start is None for start in starts):
                begin = [with_matrices(start, options.covariance_type) for start in begin]
                seeds = _unstack(
                    [from_standard(s, d, dtype) for s, d in zip(begin, data, strict=True)]
                )
                starts = [
                    s if start is None else start for s, start in zip(seeds, starts, strict=True)
                ]
            known = [start for start in starts if start is not None]
            begin = [to_standard(s, d) for s, d in zip(_stack(known, data), data, strict=True)]
    fitted, held = [], []
    for own, start in zip(data, begin, strict=True):
        mixture, moments = fit_with_posterior(
            own,
            start,
            options.covariance_type,
            options.em_iterations,
            options.differentiate,
            ranks,
        )
        fitted.append(from_standard(mixture, own, dtype))
        held.append(moments)
    return _Fit(samples, data, _unstack(fitted), held, _complete(samples, ranks))


def _known(
    samples: Samples,
    data: list[Standardised],
    parameters: list[Parameters],
    options: _Options,
    ranks: Ranks,
) -> _Fit:
    """Return given mixtures with the posterior moments of the samples under them."""
    held = [
        posterior_moments(own, to_standard(part, own), options.covariance_type, ranks)
        for part, own in zip(_stack(parameters, data), data, strict=True)
    ]
    return _Fit(samples, data, parameters, held, _complete(samples, ranks))


def _complete(samples: Samples, ranks: Ranks) -> bool:
    sizes = [x.shape[-2] for x in samples.features]
    return not samples.weighted and ranks.group is None and min(sizes) > 0


def _standardise(
    samples: Samples, counts: Sequence[int], options: _Options, ranks: Ranks
) -> list[Standardised]:
    """Return the samples in their own units; modalities of equal size as one batch of problems."""
    sizes = {x.shape[-2] for x in samples.features}
    # Over ranks all are, since sizes may be equal on one and not on another.
    if len(set(counts)) == 1 and (len(sizes) == 1 or ranks.group is not None):
        if len(sizes) > 1:
            samples = _pad(samples, max(sizes))
        features, masses = torch.stack(samples.features), torch.stack(samples.masses)
        samples = samples._replace(features=[features], masses=[masses])
    return standardise(samples, options.regularization, ranks)


def _stack(parameters: Sequence[Parameters], data: Sequence[Standardised]) -> list[Parameters]:
    """Arrange the parameters of M modalities as the data are."""
    if len(data) > 1:
        return list(parameters)
    return [Parameters(*(torch.stack(field) for field in zip(*parameters, strict=True)))]


def _unstack(parameters: Sequence[_Fields]) -> list[_Fields]:
    """Undo `_stack`, for any tuple of tensors."""
    if len(parameters) > 1:
        return list(parameters)
    kind = type(parameters[0])
    fields = (field.unbind(0) for field in parameters[0])
    return [kind(*one) for one in zip(*fields, strict=True)]


def _pad(samples: Samples, count: int) -> Samples:
    """Give all modalities `count` rows, the last ones absent."""
    missing = [count - x.shape[-2] for x in samples.features]
    return samples._replace(
        features=[
            functional.pad(x, (0, 0, 0, n)) for x, n in zip(samples.features, missing, strict=True)
        ],
        masses=[functional.pad(x, (0, n)) for x, n in zip(samples.masses, missing, strict=True)],
        weighted=True,
    )


def _seeds(
    samples: Samples,
    data: Sequence[Standardised],
    counts: Sequence[int],
    options: _Options,
    ranks: Ranks,
) -> list[Parameters]:
    """Return parameters to start from, from k-means++ rows, in the units and order of `data`."""

    def choose(samples: Samples) -> list[Tensor]:
        return _choose_rows(samples, counts, options.generator)

    if len(data) == 1:
        sizes = [x.shape[-2] for x in samples.features]
        features = [x[..., :size, :] for x, size in zip(data[0].x.unbind(0), sizes, strict=True)]
    else:
        features = [own.x for own in data]
    standard = samples._replace(features=features)
    if len(data) == 1 and ranks.group is None and features[0].shape[-2] > 0:
        means = [take_rows(data[0].x, torch.stack(choose(standard)))]
    else:
        means = draw_means(standard, counts, choose, ranks)
        if len(data) == 1:
            means = [torch.stack(means)]
    return [
        start_parameters(mean, own, options.covariance_type)
        for mean, own in zip(means, data, strict=True)
    ]


def _choose_rows(
    samples: Samples, counts: Sequence[int], generator: torch.Generator | None
) -> list[Tensor]:
    """Return the indices `(*batch, K_m)` of each modality's seeds."""

    def choose(x: Tensor, mass: Tensor, count: int) -> Tensor:
        return choose_rows(x, mass, count, init="kmeans++", generator=generator)

    if len({x.shape[-2] for x in samples.features}) > 1:
        return [
            choose(x, mass, count)
            for x, mass, count in zip(samples.features, samples.masses, counts, strict=True)
        ]
    # Standardised, all modalities have the same spread, and count alike.
    paired = choose(torch.cat(samples.features, -1), _joint_mass(samples), max(counts))
    chosen = [paired[..., :count] for count in counts]
    if samples.weighted:
        # Where no row is complete there is nothing to pair.
        own = choose(torch.stack(samples.features), torch.stack(samples.masses), max(counts))
        complete = _joint_mass(samples).sum(-1, keepdim=True) > 0
        chosen = [
            torch.where(complete, rows, own[m, ..., : counts[m]]) for m, rows in enumerate(chosen)
        ]
    return chosen


def _joint_mass(samples: Samples) -> Tensor:
    """Return the weights of the complete rows; a modality absent altogether does not count."""
    if not samples.weighted:
        return samples.masses[0]
    joint = torch.ones_like(samples.masses[0])
    for mass, present in zip(samples.masses, samples.present, strict=True):
        # Relative to the largest weight: a product of many masses 1/N would leave the range.
        share = mass / mass.amax(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        joint = joint * torch.where(present.unsqueeze(-1) == 0, 1.0, share)
    return joint.detach()


def _loss(fit: _Fit, options: _Options) -> Tensor:
    """Return Eq. 9; what has weight 0 is not computed."""
    by_plan = options.matching == "plan" and options.prototype_weight > 0
    solution = _solve(fit, options) if options.transport_weight > 0 or by_plan else None
    terms = []
    if solution is not None and options.transport_weight > 0:
        terms.append(options.transport_weight * _transport_loss(solution, options))
    if options.prototype_weight > 0 or not terms:
        terms.append(options.prototype_weight * _prototype_loss(fit, solution, options))
    return sum(terms[1:], start=terms[0])


def _solve(fit: _Fit, options: _Options) -> TransportSolution:
    """Return the transport between the components."""
    pairs = list(combinations(range(len(fit.parameters)), 2))
    costs: dict[tuple[int, int], Tensor] = {}
    for group in _alike(pairs, fit.parameters):
        if _same_number(fit.parameters):
            tables = pairwise_bures_cost(*_gaussians(fit.parameters, options), pairs)
        else:
            i, j = (_gaussians([fit.parameters[m]], options) for m in group[0])
            tables = bures_wasserstein_cost(*i, *j)
        if options.cost_reduction == "mean":
            tables = tables / fit.samples.features[0].shape[-1]
        costs |= zip(group, tables.unbind(0), strict=True)
    marginals = [weights for weights, _, _ in fit.parameters]
    if not fit.complete:
        marginals = [
            weights * present.unsqueeze(-1)
            for weights, present in zip(marginals, fit.samples.present, strict=True)
        ]
    return multi_marginal_sinkhorn(
        costs,
        marginals,
        options.epsilon,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        method=options.method,
        backend=options.backend,
    )


def _gaussians(parts: Sequence[Parameters], options: _Options) -> tuple[Tensor, Tensor]:
    """Return means and covariances of some modalities, stacked."""
    stacked = Parameters(*(torch.stack(field) for field in zip(*parts, strict=True)))
    return stacked.means, component_covariances(stacked, options.covariance_type)


def _alike(
    pairs: list[tuple[int, int]], parameters: Sequence[Parameters]
) -> list[list[tuple[int, int]]]:
    """Group the pairs by what can be computed in one call: all, if all have the same K."""
    return [pairs] if _same_number(parameters) else [[pair] for pair in pairs]


def _same_number(parameters: Sequence[Parameters]) -> bool:
    """Return whether all modalities have the same K."""
    return len({weights.shape[-1] for weights, _, _ in parameters}) == 1


def _transport_loss(solution: TransportSolution, options: _Options) -> Tensor:
    """Return the first term of Eq. 9."""
    regularized = options.objective == "regularized"
    return (solution.value if regularized else solution.transport_cost).mean()


def _prototype_loss(fit: _Fit, solution: TransportSolution | None, options: _Options) -> Tensor:
    """Return the second term of Eq. 9, the mean over ordered pairs of modalities.

    The mean squared distance of a component's samples from a point is that from their own mean,
    plus that of the mean from the point: all sums over samples are taken once for all pairs.
    """
    parameters, samples = fit.parameters, fit.samples
    pairs = list(permutations(range(len(parameters)), 2))
    moments = _unstack(
        [moments_from_standard(held, own) for held, own in zip(fit.moments, fit.data, strict=True)]
    )
    terms = []
    for group in _alike(pairs, parameters):
        weights, means, scatters = (
            torch.stack([moments[i][field] for i, _ in group]) for field in range(3)
        )
        targets = torch.stack([parameters[j].means for _, j in group]).double()
        if options.matching == "plan" and solution is not None:
            plans = [solution.pairwise_marginal(i, j) for i, j in group]
            targets = _barycentres(torch.stack(plans).double(), targets)
        distances = (means - targets).square().sum(-1)
        term = torch.addcmul(scatters, weights, distances).sum(-1)
        if not fit.complete:
            both = [samples.present[i] * samples.present[j] for i, j in group]
            term = torch.stack(both) * term
        terms.append(term.sum(0))
    total = sum(terms[1:], start=terms[0]).mean() / len(pairs)
    if options.cost_reduction == "mean":
        total = total / samples.features[0].shape[-1]
    return total.to(samples.features[0].dtype)


def _barycentres(plan: Tensor, means: Tensor) -> Tensor:
    """Return the mean that the plan `(*batch, K_i, K_j)` sends each component to."""
    mass = plan.sum(-1, keepdim=True)
    return (plan / torch.where(mass == 0, 1.0, mass)) @ means


def _counts(num_prototypes: object, modalities: int, matching: str) -> list[int]:
    """Return K for each modality."""
    if isinstance(num_prototypes, Sequence) and not isinstance(num_prototypes, str):
        counts = list(num_prototypes)
    else:
        counts = [num_prototypes] * modalities
    for count in counts:
        check_count("num_prototypes", count)
    if len(counts) != modalities:
        raise ValueError(
            f"num_prototypes must be an integer or {modalities} of them, one for each modality; "
            f"got {counts}"
        )
    if matching == "index" and len(set(counts)) > 1:
        raise ValueError(
            f'matching="index" needs the same num_prototypes in every modality; got {counts}; '
            f'use matching="plan"'
        )
    return counts
