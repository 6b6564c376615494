"""Prototype alignment: Gaussian mixtures, transport between their components, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Literal

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
)
from multialign.costs import bures_wasserstein_cost, squared_euclidean_cost
from multialign.mixture import (
    CovarianceType,
    Differentiate,
    GaussianMixture,
    GaussianPrototypes,
    check_fit_options,
    check_momentum,
    choose_rows,
    draw_means,
    fit_gaussian_mixture,
    start_mixture,
    variance_floor,
    variances,
)
from multialign.ops import Backend
from multialign.transport.solution import TransportSolution
from multialign.transport.solver import Method, check_solver_options, multi_marginal_sinkhorn

__all__ = ["PrototypeAlignment", "PrototypeAlignmentLoss", "prototype_alignment_loss"]

Objective = Literal["transport", "regularized"]
Matching = Literal["index", "plan"]
CostReduction = Literal["sum", "mean"]


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
    """All options but `num_prototypes`, checked."""

    epsilon: float = 0.1
    covariance_type: CovarianceType = "diag"
    em_iterations: int = 10
    regularization: float = 1e-6
    differentiate: Differentiate = "unroll"
    objective: Objective = "transport"
    matching: Matching = "index"
    cost_reduction: CostReduction = "sum"
    transport_weight: float = 1.0
    prototype_weight: float = 1.0
    tolerance: float | None = None
    max_iterations: int = 2000
    method: Method = "auto"
    backend: Backend = "auto"
    generator: torch.Generator | None = None
    process_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        check_count("em_iterations", self.em_iterations)
        check_fit_options(self.covariance_type, self.regularization, self.differentiate)
        check_choice("objective", self.objective, ("transport", "regularized"))
        check_choice("matching", self.matching, ("index", "plan"))
        check_choice("cost_reduction", self.cost_reduction, ("sum", "mean"))
        check_positive("transport_weight", self.transport_weight, zero=True)
        check_positive("prototype_weight", self.prototype_weight, zero=True)
        check_solver_options(self.tolerance, self.max_iterations, self.method, self.backend)


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
        return _align(samples, _fit(samples, counts, options, ranks), options, ranks).loss


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
        return self.solve(features, weights).loss

    def solve(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> PrototypeAlignment:
        """Return the loss of M feature sets with all its parts."""
        options = self.options
        ranks = Ranks(options.process_group)
        samples = _check_samples(features, weights, ranks)
        counts = _counts(self.num_prototypes, len(samples.features), options.matching)
        models = self._models(counts)
        starts = [model.running for model in models]
        with full_precision(samples.features[0]):
            if not self.training and all(start is not None for start in starts):
                mixtures = [start for start in starts if start is not None]
            else:
                mixtures = _fit(samples, counts, options, ranks, starts)
                mixtures = [
                    model.remember(mixture, present != 0)
                    for model, mixture, present in zip(
                        models, mixtures, samples.present, strict=True
                    )
                ]
            return _align(samples, mixtures, options, ranks)

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


def _fit(
    samples: Samples,
    counts: Sequence[int],
    options: _Options,
    ranks: Ranks,
    starts: Sequence[GaussianMixture | None] | None = None,
) -> list[GaussianMixture]:
    """Fit a mixture to each modality, from `starts` where there are any."""
    if starts is None:
        starts = [None] * len(counts)
    if any(start is None for start in starts):
        seeds = _seeds(samples, counts, options, ranks)
        starts = [
            seed if start is None else start for seed, start in zip(seeds, starts, strict=True)
        ]

    def fit(x: Tensor, mass: Tensor, count: int, start: GaussianMixture) -> GaussianMixture:
        return fit_gaussian_mixture(
            x,
            count,
            covariance_type=options.covariance_type,
            weights=mass,
            init=start,
            iterations=options.em_iterations,
            tolerance=0.0,
            regularization=options.regularization,
            differentiate=options.differentiate,
            process_group=options.process_group,
        )

    begin = [start for start in starts if start is not None]
    sizes = {x.shape[-2] for x in samples.features}
    if len(set(counts)) == 1 and (len(sizes) == 1 or ranks.group is not None):
        # Modalities of equal size are one batch of problems. Over ranks all must be, since sizes
        # may be equal on one and not on another.
        if len(sizes) > 1:
            samples = _pad(samples, max(sizes))
        fields = {
            name: torch.stack([getattr(start, name) for start in begin])
            for name in ("weights", "means", "covariances")
        }
        start = GaussianMixture(**fields, covariance_type=options.covariance_type)
        joint = fit(torch.stack(samples.features), torch.stack(samples.masses), counts[0], start)
        return [
            GaussianMixture(
                weights=joint.weights[m],
                means=joint.means[m],
                covariances=joint.covariances[m],
                covariance_type=options.covariance_type,
            )
            for m in range(len(counts))
        ]
    return [
        fit(x, mass, count, start)
        for x, mass, count, start in zip(
            samples.features, samples.masses, counts, begin, strict=True
        )
    ]


def _pad(samples: Samples, count: int) -> Samples:
    """Give all modalities `count` rows, the last ones absent."""
    missing = [count - x.shape[-2] for x in samples.features]
    return samples._replace(
        features=[
            functional.pad(x, (0, 0, 0, n)) for x, n in zip(samples.features, missing, strict=True)
        ],
        masses=[functional.pad(x, (0, n)) for x, n in zip(samples.masses, missing, strict=True)],
    )


def _seeds(
    samples: Samples, counts: Sequence[int], options: _Options, ranks: Ranks
) -> list[GaussianMixture]:
    """Return a mixture to start from for each modality, from k-means++ rows."""

    def choose(samples: Samples) -> list[Tensor]:
        return _choose_rows(samples, counts, options.generator)

    means = draw_means(samples, counts, choose, ranks)
    spreads = variances(samples.features, samples.masses, ranks)
    return [
        start_mixture(
            mean, spread, variance_floor(spread, options.regularization), options.covariance_type
        )
        for mean, spread in zip(means, spreads, strict=True)
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
    joint, mass = _joint_samples(samples)
    paired = choose(joint, mass, max(counts))
    chosen = [paired[..., :count] for count in counts]
    if samples.weighted:
        # Where no row is complete there is nothing to pair.
        own = choose(torch.stack(samples.features), torch.stack(samples.masses), max(counts))
        complete = mass.sum(-1, keepdim=True) > 0
        chosen = [
            torch.where(complete, rows, own[m, ..., : counts[m]]) for m, rows in enumerate(chosen)
        ]
    return chosen


@torch.no_grad()
def _joint_samples(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return all modalities' features side by side, and the weights of the complete rows.

    Each modality is scaled to the same spread. One that is absent altogether does not count.
    """
    parts, mass = [], torch.ones_like(samples.masses[0])
    for x, own, present in zip(samples.features, samples.masses, samples.present, strict=True):
        mean = (own.unsqueeze(-1) * x).sum(-2, keepdim=True)
        deviation = x - mean
        variance = (own.unsqueeze(-1) * deviation.square()).sum((-2, -1), keepdim=True)
        parts.append(deviation / torch.where(variance == 0, 1.0, variance).sqrt())
        # Relative to the largest weight: a product of many masses 1/N would leave the range.
        share = own / own.amax(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        mass = mass * torch.where(present.unsqueeze(-1) == 0, 1.0, share)
    return torch.cat(parts, -1), mass


def _align(
    samples: Samples, mixtures: list[GaussianMixture], options: _Options, ranks: Ranks
) -> PrototypeAlignment:
    """Return Eq. 9 and its parts for given mixtures."""
    scale = 1 / samples.features[0].shape[-1] if options.cost_reduction == "mean" else 1.0
    costs = {}
    for i, j in combinations(range(len(mixtures)), 2):
        a, b = mixtures[i], mixtures[j]
        costs[(i, j)] = scale * bures_wasserstein_cost(
            a.means, a.component_covariances(), b.means, b.component_covariances()
        )
    solution = multi_marginal_sinkhorn(
        costs,
        [
            mixture.weights * present.unsqueeze(-1)
            for mixture, present in zip(mixtures, samples.present, strict=True)
        ],
        options.epsilon,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        method=options.method,
        backend=options.backend,
    )
    transport = solution.value if options.objective == "regularized" else solution.transport_cost
    transport_loss = transport.mean()
    calibration = _calibration(samples, mixtures, solution, options.matching, ranks)
    prototype_loss = scale * calibration.mean()
    return PrototypeAlignment(
        loss=options.transport_weight * transport_loss + options.prototype_weight * prototype_loss,
        transport_loss=transport_loss,
        prototype_loss=prototype_loss,
        mixtures=mixtures,
        solution=solution,
    )


def _calibration(
    samples: Samples,
    mixtures: Sequence[GaussianMixture],
    solution: TransportSolution,
    matching: Matching,
    ranks: Ranks,
) -> Tensor:
    """Return the second term of Eq. 9, the mean over ordered pairs of modalities, `(*batch)`."""
    count = len(mixtures)
    pairs = list(permutations(range(count), 2))
    posteriors = [
        mass.unsqueeze(-1) * mixture.posterior(x)
        for x, mass, mixture in zip(samples.features, samples.masses, mixtures, strict=True)
    ]
    plans = {}
    if matching == "plan":
        for i, j in combinations(range(count), 2):
            plans[(i, j)] = solution.pairwise_marginal(i, j)
            plans[(j, i)] = plans[(i, j)].mT
    terms = []
    for i, j in pairs:
        targets = mixtures[j].means
        if matching == "plan":
            targets = _barycentres(plans[(i, j)], targets)
        distance = squared_euclidean_cost(samples.features[i], targets)
        terms.append((posteriors[i] * distance).sum((-2, -1)))
    total = torch.zeros_like(samples.present[0])
    for (i, j), term in zip(pairs, ranks.sum(terms), strict=True):
        total = total + samples.present[i] * samples.present[j] * term
    return total / len(pairs)


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
