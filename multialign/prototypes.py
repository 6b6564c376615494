"""Prototype alignment: Gaussian mixtures, transport between their components, and calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from multialign._distributed import ProcessGroup
from multialign._samples import Samples, make_samples
from multialign._validation import (
    check_choice,
    check_count,
    check_positive,
    check_samples,
    check_size,
    full_precision,
)
from multialign.costs import costs_between_sets
from multialign.mixture import (
    CovarianceType,
    Differentiate,
    FitOptions,
    GaussianMixture,
    GaussianPrototypes,
    Modalities,
    Moments,
    MomentumModule,
    check_momentum,
    running_mixtures,
    unpack_moments,
)
from multialign.ops import Backend, pair_terms
from multialign.transport.options import Method, SolverOptions
from multialign.transport.prepare import check_arguments
from multialign.transport.solution import TransportSolution
from multialign.transport.solver import solve

__all__ = ["PrototypeAlignment", "PrototypeAlignmentLoss", "prototype_alignment_loss"]

Objective = Literal["transport", "regularized"]
Matching = Literal["index", "plan"]
CostReduction = Literal["sum", "mean"]

_Record = TypeVar("_Record")


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

    def detach(self) -> PrototypeAlignment:
        """Return the same parts without gradient."""
        return self._map(lambda part: part.detach())

    def to(self, *args: Any, **kwargs: Any) -> PrototypeAlignment:
        """Return the parts on another device or in another dtype, as :meth:`torch.Tensor.to`."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def _map(self, function: Callable[[Any], Any]) -> PrototypeAlignment:
        parts = {name: function(part) for name, part in vars(self).items() if name != "mixtures"}
        return PrototypeAlignment(mixtures=[function(x) for x in self.mixtures], **parts)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of Eq. 9, checked when made. Their defaults stand in the signatures."""

    epsilon: float
    objective: Objective
    matching: Matching
    cost_reduction: CostReduction
    transport_weight: float
    prototype_weight: float
    fit: FitOptions
    solver: SolverOptions

    def __post_init__(self) -> None:
        for name in ("epsilon", "transport_weight", "prototype_weight"):
            # A number of NumPy becomes Python's.
            vars(self)[name] = check_positive(name, getattr(self, name), zero=name != "epsilon")
        check_choice("objective", self.objective, ("transport", "regularized"))
        check_choice("matching", self.matching, ("index", "plan"))
        check_choice("cost_reduction", self.cost_reduction, ("sum", "mean"))


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
        RuntimeError: :func:`torch.utils.checkpoint.checkpoint` repeats a draw from `generator`.
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
    options = _sort_options(locals())
    samples = make_samples(*check_samples(features, weights), options.fit.ranks)
    counts = _counts(num_prototypes, len(samples.features), options.matching)
    with full_precision(samples.features[0]):
        modalities = Modalities(samples, counts, options.fit, options.solver.backend)
        return _loss(_make_fit(samples, *modalities.fit_with_posterior(), options), options)


class PrototypeAlignmentLoss(MomentumModule):
    r"""Loss that aligns modalities through the components of a Gaussian mixture fitted to each.

    .. math::
        L = a \, \langle T^\star, C \rangle
            + \frac{b}{M(M-1)} \sum_{i \ne j} \frac{1}{N} \sum_{n} \sum_{k}
              w_i^n(k) \, \|f_i^n - \mu_j^k\|^2

    Called ``(features, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`prototype_alignment_loss` for the definition, units and errors. With `momentum`, each
    modality's mixture is remembered between calls, for batches too small to carry K components:
    `prototypes` holds a :class:`GaussianPrototypes` for each modality, with its buffers, and
    features are :math:`(N_m, D)`.

    Options are attributes that are read at each call, so that ``loss.epsilon = 0.01`` counts from
    the next one on; those of `prototypes` do not count. With `momentum`, what fixes the shapes of
    buffers cannot be set, `num_modalities` included (see :class:`GaussianPrototypes`). A copy
    shares the `process_group`; a pickle drops it, with a warning: set it again after loading,
    ``loss.process_group = group``.

    Args:
        num_prototypes: K, or one for each modality (with ``matching="plan"``).
        epsilon: > 0, in the units of the costs.
        momentum: None, or the weight in (0, 1] of the newest batch in the running mixtures.
        num_features: D; `momentum` needs it.
        num_modalities: M; `momentum` needs it.
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
        num_features: int | None = None,
        num_modalities: int | None = None,
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
        self.num_prototypes = num_prototypes
        self.epsilon = epsilon
        self.momentum = momentum
        self.num_features = num_features
        self.num_modalities = num_modalities
        self.covariance_type = covariance_type
        self.em_iterations = em_iterations
        self.objective = objective
        self.matching = matching
        self.cost_reduction = cost_reduction
        self.transport_weight = transport_weight
        self.prototype_weight = prototype_weight
        self.regularization = regularization
        self.differentiate = differentiate
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.method = method
        self.backend = backend
        self.generator = generator
        self.process_group = process_group
        options = _sort_options(vars(self))  # checks them
        counts = _counts(num_prototypes, num_modalities, options.matching)
        self.prototypes = nn.ModuleList()
        if check_momentum(momentum) is not None:
            if num_features is None or num_modalities is None:
                raise ValueError(
                    "momentum needs num_features (D) and num_modalities (M), which the running "
                    f"mixtures' shapes depend on; got {num_features} and {num_modalities}"
                )
            fit = {key: value for key, value in vars(options.fit).items() if key != "em_tolerance"}
            self.prototypes.extend(
                GaussianPrototypes(count, num_features=num_features, momentum=momentum, **fit)
                for count in counts
            )
        self._has_buffers = momentum is not None

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M feature sets."""
        fit, options = self._fit(features, weights)
        with full_precision(fit.samples.features[0]):
            return _loss(fit, options)

    def solve(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> PrototypeAlignment:
        """Return the loss of M feature sets with all its parts."""
        fit, options = self._fit(features, weights)
        with full_precision(fit.samples.features[0]):
            solution = _solve(fit, options)
            transport = _transport_loss(solution, options)
            prototype = _prototype_loss(fit, solution, options)
            loss = options.transport_weight * transport + options.prototype_weight * prototype
            return PrototypeAlignment(loss, transport, prototype, fit.mixtures, solution)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"{self.num_prototypes}, epsilon={self.epsilon}, momentum={self.momentum}, "
            f"covariance_type={self.covariance_type!r}, objective={self.objective!r}, "
            f"matching={self.matching!r}, cost_reduction={self.cost_reduction!r}"
        )

    def _fit(self, features: object, weights: object) -> tuple[_Fit, _Options]:
        """Return the samples with their mixtures, and the options as they are now."""
        options, momentum = _sort_options(vars(self)), check_momentum(self.momentum)
        samples = make_samples(*check_samples(features, weights), options.fit.ranks)
        counts = _counts(self.num_prototypes, len(samples.features), options.matching)
        check_size("features", "num_modalities", self.num_modalities, len(counts))
        check_size("features", "num_features", self.num_features, samples.features[0].shape[-1])
        with full_precision(samples.features[0]):
            modalities = Modalities(samples, counts, options.fit, options.solver.backend)
            if momentum is None:
                return _make_fit(samples, *modalities.fit_with_posterior(), options), options
            models = [model for model in self.prototypes if isinstance(model, GaussianPrototypes)]
            mixtures = running_mixtures(models, modalities, options.fit, momentum, self.training)
            moments = modalities.posterior_moments(mixtures)
            return _make_fit(samples, mixtures, moments, options), options


def _sort_options(arguments: Mapping[str, Any]) -> _Options:
    """Sort the arguments of the loss, by the names of the fields, into its records of options."""

    def pick(kind: type[_Record], **records: object) -> _Record:
        names = vars(kind)["__dataclass_fields__"]
        return kind(**{name: arguments[name] for name in names if name in arguments}, **records)

    return pick(_Options, fit=pick(FitOptions), solver=pick(SolverOptions))


class _Fit(NamedTuple):
    """Samples of M modalities and a mixture for each."""

    samples: Samples
    mixtures: list[GaussianMixture]
    moments: Moments
    """Posterior moments of the samples under the mixtures."""
    costs: Sequence[Tensor] | None = None
    term: Tensor | None = None
    """Where the core has computed them: costs of each pair, and the second term by the index."""


def _make_fit(
    samples: Samples, mixtures: list[GaussianMixture], moments: Moments, options: _Options
) -> _Fit:
    """Return the fit, with what the core computes from its own."""
    if not isinstance(moments, Tensor):
        return _Fit(samples, mixtures, moments)
    sets = [(m.means, m.component_covariances()) for m in mixtures]
    present = samples.present.double().movedim(0, -1)
    terms = pair_terms(sets, moments, present, _scale(samples, options))
    return _Fit(samples, mixtures, moments, *terms)


def _loss(fit: _Fit, options: _Options) -> Tensor:
    """Return Eq. 9; a term of weight 0 is not computed."""
    a, b = options.transport_weight, options.prototype_weight
    by_plan = options.matching == "plan" and b > 0
    solution = _solve(fit, options) if a > 0 or by_plan else None
    total = None if solution is None or a == 0 else a * _transport_loss(solution, options)
    if total is not None and b == 0:
        return total
    term = b * _prototype_loss(fit, solution, options)
    return term if total is None else total + term


def _solve(fit: _Fit, options: _Options) -> TransportSolution:
    """Return the transport between the components."""
    pairs = list(combinations(range(len(fit.mixtures)), 2))
    tables, scale = fit.costs, _scale(fit.samples, options)
    if tables is None:
        sets = [(m.means, m.component_covariances()) for m in fit.mixtures]
        tables = [scale * cost for cost in costs_between_sets(sets, pairs)]
    costs = dict(zip(pairs, tables, strict=True))
    marginals = [mixture.weights for mixture in fit.mixtures]
    if not fit.samples.complete:
        marginals = [*map(torch.mul, marginals, fit.samples.present.unsqueeze(-1))]
    return solve(check_arguments(costs, marginals, options.epsilon), options.solver)


def _scale(samples: Samples, options: _Options) -> float:
    """Return what multiplies a sum over the features to make it what `cost_reduction` says."""
    return 1 / samples.features[0].shape[-1] if options.cost_reduction == "mean" else 1.0


def _transport_loss(solution: TransportSolution, options: _Options) -> Tensor:
    """Return the first term of Eq. 9."""
    regularized = options.objective == "regularized"
    return (solution.value if regularized else solution.transport_cost).mean()


def _prototype_loss(fit: _Fit, solution: TransportSolution | None, options: _Options) -> Tensor:
    """Return the second term of Eq. 9, the mean over ordered pairs of modalities.

    The mean squared distance of a component's samples from a point is that from their own mean,
    plus that of the mean from the point. So all pairs share the sums over samples.
    """
    samples, mixtures = fit.samples, fit.mixtures
    if fit.term is not None and options.matching == "index":
        return fit.term.mean().to(samples.features[0].dtype)
    counts, moments = [mixture.num_components for mixture in mixtures], fit.moments
    moments = unpack_moments(moments, counts) if isinstance(moments, Tensor) else moments
    pairs = list(permutations(range(len(mixtures)), 2))
    # One call computes all pairs of mixtures that have the same K.
    terms = []
    for group in [pairs] if len(set(counts)) == 1 else [[pair] for pair in pairs]:
        parts = zip(*(moments[i] for i, _ in group), strict=True)
        weights, means, scatters = (torch.stack(part) for part in parts)
        targets = torch.stack([mixtures[j].means for _, j in group]).double()
        if options.matching == "plan" and solution is not None:
            plan = torch.stack([solution.pairwise_marginal(i, j) for i, j in group]).double()
            mass = plan.sum(-1, keepdim=True)
            targets = (plan / torch.where(mass == 0, 1.0, mass)) @ targets
        distances = (means - targets).square().sum(-1)
        term = torch.addcmul(scatters, weights, distances).sum(-1)
        if not samples.complete:
            term = torch.stack([samples.present[i] * samples.present[j] for i, j in group]) * term
        terms.append(term.sum(0))
    total = sum(terms[1:], start=terms[0]).mean() / len(pairs)
    return (_scale(samples, options) * total).to(samples.features[0].dtype)


def _counts(num_prototypes: object, num_modalities: int | None, matching: str) -> list[int]:
    """Return K for each modality; for one where it is not known how many there are."""
    known = num_modalities is not None
    modalities = check_count("num_modalities", num_modalities) if known else 1
    if isinstance(num_prototypes, Sequence) and not isinstance(num_prototypes, str):
        counts = [check_count("num_prototypes", count) for count in num_prototypes]
        modalities = modalities if known else len(counts)
    else:
        counts = [check_count("num_prototypes", num_prototypes)] * modalities
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
