"""Matching the first three moments of the modalities' distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from multialign._distributed import ProcessGroup, gatherer
from multialign._validation import (
    check_choice,
    check_positive,
    check_samples,
    full_precision,
    reference_row,
)

__all__ = ["GaussianMomentLoss", "gaussian_moment_loss"]

Moment = Literal["mean", "covariance", "skewness"]
FeatureReduction = Literal["sum", "mean"]

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

    References:
        Eq. 10 and Appendix B.6 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import gaussian_moment_loss
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, -1.0]])
        >>> gaussian_moment_loss([x, x + 1.0])
        tensor(1.)
    """
    _check_options(moments, feature_reduction, eps)
    samples = check_samples(features, weights, gather=gatherer(process_group))

    with full_precision(samples.features[0]):
        statistics: dict[str, list[Tensor]] = {moment: [] for moment in moments}
        for x, mass in zip(samples.features, samples.masses, strict=True):
            for moment, value in _moments(x, mass, moments, eps).items():
                statistics[moment].append(value)
        batch_dims = samples.present.ndim - 1
        loss = samples.present.new_zeros(())
        for values in statistics.values():
            stacked = torch.stack(values).flatten(1 + batch_dims)
            spread = _pairwise_spread(stacked, samples.present.unsqueeze(-1))
            loss = loss + (spread.mean(-1) if feature_reduction == "mean" else spread.sum(-1))
        pairs = len(samples.features) * (len(samples.features) - 1)
        return loss.mean() / pairs


class GaussianMomentLoss(nn.Module):
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


def _moments(x: Tensor, mass: Tensor, moments: Sequence[str], eps: float) -> dict[str, Tensor]:
    """Return the chosen moments of one modality, `(*batch, D)` or `(*batch, D, D)`."""
    origin = reference_row(x, mass)
    weight = mass.unsqueeze(-1)
    shifted = torch.where(weight == 0, x.new_zeros(()), x - origin)
    mean = (weight * shifted).sum(-2, keepdim=True)
    deviation = torch.where(weight == 0, x.new_zeros(()), shifted - mean)
    result = {}
    if "mean" in moments:
        result["mean"] = (origin + mean).squeeze(-2)
    if "covariance" in moments:
        result["covariance"] = deviation.mT @ (weight * deviation)
    if "skewness" in moments:
        variance = (weight * deviation.square()).sum(-2, keepdim=True)
        constant = variance == 0  # where the gradient of sqrt is infinite
        spread = torch.where(constant, x.new_ones(()), variance).sqrt() + eps
        result["skewness"] = (weight * (deviation / spread).pow(3)).sum(-2)
    return result


def _pairwise_spread(values: Tensor, present: Tensor) -> Tensor:
    """Return sum_{i<j} (v_i - v_j)^2 over the modalities present, for each entry.

    `values` is `(M, *batch, E)` and `present` `(M, *batch, 1)`, 1 or 0. The sum over pairs equals
    n sum_i (v_i - mean)^2 with the mean over the n modalities present, which takes M terms.
    """
    count = present.sum(0)
    mean = (present * values).sum(0) / count.clamp_min(1)
    return count * (present * (values - mean).square()).sum(0)


def _check_options(moments: Sequence[str], feature_reduction: str, eps: float) -> None:
    if isinstance(moments, str) or not isinstance(moments, Sequence) or not moments:
        raise ValueError(f"moments must be a non-empty sequence of {MOMENTS}; got {moments!r}")
    for moment in moments:
        check_choice("each of moments", moment, MOMENTS)
    check_choice("feature_reduction", feature_reduction, ("sum", "mean"))
    check_positive("eps", eps, zero=True)
