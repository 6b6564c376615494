"""Matching the first three moments of the modalities' distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from multialign._distributed import GroupModule, ProcessGroup, Ranks
from multialign._samples import Samples, can_stack, make_samples
from multialign._validation import (
    check_choice,
    check_entries,
    check_positive,
    check_samples,
    full_precision,
)

__all__ = ["GaussianMomentLoss", "gaussian_moment_loss"]

Moment = Literal["mean", "covariance", "skewness"]
FeatureReduction = Literal["sum", "mean"]

# Entries of a block of rows.
_BLOCK_ENTRIES = 2**18

MOMENTS: tuple[Moment, ...] = ("mean", "covariance", "skewness")


def gaussian_moment_loss(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    moments: Sequence[Moment] = MOMENTS,
    feature_reduction: FeatureReduction = "sum",
    eps: float = 1e-6,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Compare mean, covariance and skewness between every two modalities.

    .. math::
        L = \frac{1}{M(M-1)} \sum_{i<j} \|\mu_i - \mu_j\|^2 + \|\Sigma_i - \Sigma_j\|_F^2
            + \|\Gamma_i - \Gamma_j\|^2

    with the biased moments :math:`\mu = \mathbb{E} f`,
    :math:`\Sigma = \mathbb{E} (f-\mu)(f-\mu)^\top` and, for each feature,
    :math:`\Gamma = \mathbb{E} \big((f-\mu) / (\sqrt{\operatorname{diag}\Sigma} + \epsilon)\big)^3`.
    A constant feature has skewness 0 and finite gradients.

    Args:
        features: M tensors :math:`(*\text{batch}, N_m, D)`, or one stacked tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative. A sample of weight 0 is absent; pairs with a modality that has no weight
            at all count 0.
        moments: Which of "mean", "covariance", "skewness" to compare.
        feature_reduction: "sum" as in Eq. 10, or "mean" over the entries of each moment, so that D
            does not set the scale.
        eps: Added to the standard deviation under the skewness, in units of the features.
        process_group: Given one, the loss is that of all ranks' samples together.

    Returns:
        A scalar >= 0: the mean over the batch. Its terms have the units of the features to the
        power 2 (mean), 4 (covariance) and 0 (skewness).

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: A covariance, over the batch, has more than 2^28 entries.

    References:
        Eq. 10 and Appendix B.6 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import gaussian_moment_loss
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, -1.0]])
        >>> gaussian_moment_loss([x, x + 1.0])
        tensor(1.)
    """
    eps = _check_options(moments, feature_reduction, eps)
    ranks = Ranks(process_group)
    tensors, checked = check_samples(features, weights)
    if "covariance" in moments:
        *batch, _, dim = tensors[0].shape
        check_entries(
            math.prod(batch) * dim**2, 'leave "covariance" out of moments, or project the features'
        )
    with full_precision(tensors[0]):
        samples = make_samples(tensors, checked, ranks)
        statistics = _moments(samples, moments, eps, ranks)
        batch_dims = samples.present.ndim - 1
        values = [value.flatten(1 + batch_dims) for value in statistics.values()]
        spread = _pairwise_spread(torch.cat(values, -1), samples.present.unsqueeze(-1))
        if feature_reduction == "sum":
            loss = spread.sum(-1)
        else:
            parts = spread.split([value.shape[-1] for value in values], -1)
            loss = torch.stack([part.mean(-1) for part in parts]).sum(0)
        pairs = len(samples.features) * (len(samples.features) - 1)
        return loss.mean() / pairs


class GaussianMomentLoss(GroupModule):
    r"""Loss that matches mean, covariance and skewness across modalities.

    .. math::
        L = \frac{1}{M(M-1)} \sum_{i<j} \|\mu_i - \mu_j\|^2 + \|\Sigma_i - \Sigma_j\|_F^2
            + \|\Gamma_i - \Gamma_j\|^2

    Called ``(features, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`gaussian_moment_loss` for the moments, weights, units and errors.

    Args:
        moments: Which of "mean", "covariance", "skewness" to compare.
        feature_reduction: "sum" (Eq. 10 of :cite:t:`decalign:26`) or "mean" over entries.
        eps: Added to the standard deviation under the skewness, in units of the features.
        process_group: Given one, the loss is that of all ranks' samples together.

    Example:
        >>> import torch
        >>> from multialign import GaussianMomentLoss
        >>> loss = GaussianMomentLoss(moments=["mean"], feature_reduction="mean")
        >>> loss([torch.zeros(5, 4), torch.ones(3, 4)])
        tensor(0.5000)
    """

    def __init__(
        self,
        moments: Sequence[Moment] = MOMENTS,
        feature_reduction: FeatureReduction = "sum",
        eps: float = 1e-6,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(moments, feature_reduction, eps)
        self.moments = tuple(moments)
        self.feature_reduction = feature_reduction
        self.eps = eps
        self.process_group = process_group

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M feature sets."""
        return gaussian_moment_loss(
            features,
            weights,
            moments=self.moments,
            feature_reduction=self.feature_reduction,
            eps=self.eps,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"moments={self.moments}, feature_reduction={self.feature_reduction!r}, eps={self.eps}"
        )


def _moments(
    samples: Samples, moments: Sequence[str], eps: float, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the chosen moments of all modalities, `(M, *batch, D)` or `(M, *batch, D, D)`.

    Each sum over the ranks needs the one before it: mean and covariance cost a collective each, the
    skewness two more, or three without the covariance.
    """
    features, masses = samples.features, samples.masses
    origins: Sequence[Tensor] = samples.origins.unbind(0)
    together = ranks.group is None and can_stack(features)
    if together:
        features, masses = [torch.stack(features)], masses[:1]
        if not samples.complete:
            masses = [torch.stack(samples.masses)]
        origins = [samples.origins]
    sums = [
        _Sums(x, None if samples.complete else mass, origin)
        for x, mass, origin in zip(features, masses, origins, strict=True)
    ]
    steps = ranks.sum([s.over(None, lambda d: d) for s in sums])
    units: list[Tensor | None] = [None] * len(sums)
    if "skewness" in moments:
        # Each feature has a unit of its own: the variance of a small one, or 1 / variance in the
        # gradient, would leave the range of float32.
        extents = ranks.sum([s.extent() for s in sums])
        units = [torch.where(extent == 0, 1.0, extent).detach() for extent in extents]
    groups = list(zip(sums, steps, units, strict=True))
    result = {}
    if "mean" in moments:
        result["mean"] = [
            (origin + step).squeeze(-2) for origin, step in zip(origins, steps, strict=True)
        ]
    if "covariance" in moments:
        scaled = ranks.sum([s.products(step, unit) for s, step, unit in groups])
        result["covariance"] = [
            c if unit is None else unit.mT * c * unit for c, unit in zip(scaled, units, strict=True)
        ]
    if "skewness" in moments:
        if "covariance" in moments:
            variances = [c.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) for c in scaled]
        else:
            variances = ranks.sum([s.over(step, torch.square, unit) for s, step, unit in groups])
        cubes = []
        for (s, step, unit), variance in zip(groups, variances, strict=True):
            assert unit is not None
            constant = variance == 0  # where the gradient of sqrt is infinite
            # Divided before the cube: a third moment may leave the range of float32 as well.
            width = torch.where(constant, 1.0, variance).sqrt() + eps / unit
            cubes.append(s.over(step, partial(_cube, width=width), unit).squeeze(-2))
        result["skewness"] = ranks.sum(cubes)
    return {name: parts[0] if together else torch.stack(parts) for name, parts in result.items()}


def _cube(deviation: Tensor, width: Tensor) -> Tensor:
    return (deviation / width).pow(3)


class _Sums:
    """Weighted sums over the rows of one modality, in blocks of rows that stay in the cache.

    Args:
        x: `(*batch, N, D)`.
        mass: `(*batch, N)`; None for 1 / N each.
        origin: `(*batch, 1, D)`, a row to measure from.
    """

    def __init__(self, x: Tensor, mass: Tensor | None, origin: Tensor) -> None:
        row_entries = x[..., :1, :].numel()
        rows = max(1, _BLOCK_ENTRIES // max(row_entries, 1))
        self.blocks = x.split(rows, -2)
        self.weights: Sequence[Tensor | None] = [None] * len(self.blocks)
        if mass is not None:
            self.weights = mass.unsqueeze(-1).split(rows, -2)
        self.share = 1.0 if mass is not None else 1 / max(x.shape[-2], 1)
        self.origin = origin

    def extent(self) -> Tensor:
        """Return the sum of |x - origin|, 0 for absent rows, `(*batch, 1, D)`."""
        with torch.no_grad():
            deviations = self._deviations(None)
            parts = [deviation.abs().sum(-2, keepdim=True) for deviation, _ in deviations]
            return sum(parts[1:], parts[0])

    def over(
        self, step: Tensor | None, function: Callable[[Tensor], Tensor], unit: Tensor | None = None
    ) -> Tensor:
        """Return the mean of function((x - origin - step) / unit), `(*batch, 1, D)`."""
        parts = []
        for deviation, weight in self._deviations(step, unit):
            value = function(deviation)
            value = value if weight is None else weight * value
            parts.append(value.sum(-2, keepdim=True))
        return self.share * sum(parts[1:], parts[0])

    def products(self, step: Tensor, unit: Tensor | None) -> Tensor:
        """Return the mean of d d^T for d = (x - origin - step) / unit, `(*batch, D, D)`."""
        parts = []
        for deviation, weight in self._deviations(step, unit):
            weighted = deviation if weight is None else weight * deviation
            parts.append(deviation.mT @ weighted)
        return self.share * sum(parts[1:], parts[0])

    def _deviations(
        self, step: Tensor | None, unit: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (x - origin - step) / unit and the weights of each block."""
        for x, weight in zip(self.blocks, self.weights, strict=True):
            # Subtract twice: the sum of origin and step would be rounded to the data's offset.
            deviation = x - self.origin
            if step is not None:
                deviation = deviation - step
            if unit is not None:
                deviation = deviation / unit
            yield deviation, weight


def _pairwise_spread(values: Tensor, present: Tensor) -> Tensor:
    """Return sum_{i<j} (v_i - v_j)^2 over the modalities present, for each entry.

    `values` is `(M, *batch, E)` and `present` `(M, *batch, 1)`, 1 or 0. The sum over pairs equals
    n sum_i (v_i - mean)^2 with the mean over the n modalities present, which takes M terms.
    """
    count = present.sum(0)
    # Measured from one of them, equal values have differences that are exactly 0.
    first = present.argmax(0, keepdim=True).expand(1, *values.shape[1:])
    values = values - values.detach().gather(0, first)
    mean = (present * values).sum(0) / count.clamp_min(1)
    # Blanked before the square, which may leave the range: 0 times infinity is NaN.
    return count * (present * (values - mean)).square().sum(0)


def _check_options(moments: Sequence[str], feature_reduction: str, eps: float) -> float:
    """Check the options and return eps as a number of Python."""
    if isinstance(moments, str) or not isinstance(moments, Sequence) or not moments:
        raise ValueError(f"moments must be a non-empty sequence of {MOMENTS}; got {moments!r}")
    for moment in moments:
        check_choice("each of moments", moment, MOMENTS)
    check_choice("feature_reduction", feature_reduction, ("sum", "mean"))
    return check_positive("eps", eps, zero=True)
