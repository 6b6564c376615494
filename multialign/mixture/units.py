"""The units that mixtures are fitted in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multialign._distributed import Ranks
from multialign.mixture.parameters import Parameters, PosteriorMoments

__all__ = ["Standardised", "from_standard", "moments_from_standard", "standardise", "to_standard"]


class Standardised(NamedTuple):
    """Samples in units (x - origin) / scale, where neither offset nor scale costs digits.

    EM commutes with the change of units: origin and scale are constants for the gradient.
    """

    x: Tensor
    """`(*batch, N, D)`, float64, of mean variance 1 (0 if all samples are equal)."""
    mass: Tensor
    """`(*batch, N)`."""
    origin: Tensor
    """A present sample, `(*batch, 1, D)`."""
    scale: Tensor
    """`(*batch, 1, 1)`."""
    variance: Tensor
    """Of each feature, `(*batch, 1, D)`."""
    floor: Tensor
    """What is added to variances, `(*batch, 1, 1)`: the regularization, with its gradient."""


def standardise(
    features: Sequence[Tensor],
    masses: Sequence[Tensor],
    origins: Sequence[Tensor],
    regularization: float,
    ranks: Ranks,
) -> list[Standardised]:
    """Return sets of samples `(*batch, N, D)` in their own units.

    Their masses sum to 1 over all ranks. The origins are present rows; absent rows equal them.
    """
    masses = [mass.double() for mass in masses]
    origins = [origin.double() for origin in origins]
    deviations = [x.double() - origin for x, origin in zip(features, origins, strict=True)]
    rows = [mass.unsqueeze(-2) for mass in masses]
    means = ranks.sum([row @ x for row, x in zip(rows, deviations, strict=True)])
    variances = ranks.sum(
        [row @ (x - mean).square() for row, x, mean in zip(rows, deviations, means, strict=True)]
    )
    standardised = []
    for x, mass, origin, variance in zip(deviations, masses, origins, variances, strict=True):
        level = variance.mean(-1, keepdim=True)
        constant = level.detach()
        constant = torch.where(constant == 0, 1.0, constant)
        scale = constant.sqrt()
        floor = regularization * torch.where(level == 0, 1.0, level / constant)
        standardised.append(
            Standardised(x / scale, mass, origin, scale, variance / constant, floor)
        )
    return standardised


def to_standard(parameters: Parameters, data: Standardised) -> Parameters:
    """Express parameters in the units of the data."""
    weights, means, covariances = (part.double() for part in parameters)
    square = _for_covariances(data.scale.square(), covariances)
    return Parameters(weights, (means - data.origin) / data.scale, covariances / square)


def from_standard(parameters: Parameters, data: Standardised, dtype: torch.dtype) -> Parameters:
    """Undo `to_standard`."""
    weights, means, covariances = parameters
    square = _for_covariances(data.scale.square(), covariances)
    return Parameters(
        weights.to(dtype),
        torch.addcmul(data.origin, data.scale, means).to(dtype),
        (square * covariances).to(dtype),
    )


def moments_from_standard(moments: PosteriorMoments, data: Standardised) -> PosteriorMoments:
    """Return posterior moments in the units of the samples, in float64."""
    weights, means, scatters = moments
    means = torch.addcmul(data.origin, data.scale, means)
    return PosteriorMoments(weights, means, data.scale.square().squeeze(-1) * scatters)


def _for_covariances(number: Tensor, covariances: Tensor) -> Tensor:
    """Return a number per problem, `(*batch, 1, 1)`, in a shape that multiplies covariances."""
    batch = number.shape[:-2]
    return number.reshape(*batch, *[1] * (covariances.ndim - len(batch)))
