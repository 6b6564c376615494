"""The parameters of a mixture and the units they are fitted in, as plain records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from multialign._distributed import Ranks

__all__ = [
    "COVARIANCE_TYPES",
    "CovarianceType",
    "Parameters",
    "PosteriorMoments",
    "Standardised",
    "from_standard",
    "moments_from_standard",
    "select",
    "stack_modalities",
    "standardise",
    "to_standard",
    "unpack_moments",
    "unstack_modalities",
    "with_matrices",
]

CovarianceType = Literal["diag", "full", "tied", "spherical"]
COVARIANCE_TYPES = ("diag", "full", "tied", "spherical")

_Record = TypeVar("_Record")


class Parameters(NamedTuple):
    """Weights, means and covariances, as a :class:`GaussianMixture` holds them, unchecked."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


class PosteriorMoments(NamedTuple):
    """Moments of the samples weighted by their posteriors, for each component."""

    weights: Tensor
    """Mass, `(*batch, K)`, of sum 1; of no meaning without samples."""
    means: Tensor
    """Mean, `(*batch, K, D)`."""
    scatters: Tensor
    """Mass times the mean squared distance from the mean, `(*batch, K)`."""


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


def unpack_moments(packed: Tensor, counts: Sequence[int]) -> list[PosteriorMoments]:
    """Return the posterior moments of each modality, given all, `(*batch, sum K, D + 2)`."""
    parts = packed.split(list(counts), -2)
    return [PosteriorMoments(x[..., 0], x[..., 2:], x[..., 1]) for x in parts]


def _for_covariances(number: Tensor, covariances: Tensor) -> Tensor:
    """Return a number per problem, `(*batch, 1, 1)`, in a shape that multiplies covariances."""
    batch = number.shape[:-2]
    return number.reshape(*batch, *[1] * (covariances.ndim - len(batch)))


def with_matrices(parameters: Parameters, covariance_type: CovarianceType) -> Parameters:
    """Return a mixture whose "full" covariances are matrices, where they may be diagonals."""
    _, means, covariances = parameters
    if covariance_type == "full" and covariances.ndim == means.ndim:
        return parameters._replace(covariances=torch.diag_embed(covariances))
    return parameters


def select(condition: Tensor, yes: _Record, no: _Record) -> _Record:
    """Choose between two records of tensors, nested or not, for each problem of the batch."""
    return cast("_Record", _select(condition, yes, no))


def _select(condition: Tensor, yes: Any, no: Any) -> Any:
    if isinstance(yes, Tensor):
        shape = *condition.shape, *[1] * (yes.ndim - condition.ndim)
        return torch.where(condition.reshape(shape), yes, no)
    return type(yes)(*(_select(condition, a, b) for a, b in zip(yes, no, strict=True)))


def stack_modalities(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors of several modalities as one batch, that of a single one as it is."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]


def unstack_modalities(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """Return the tensor of each of `count` modalities."""
    return tensor.unbind(0) if count > 1 else [tensor]
