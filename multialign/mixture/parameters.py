"""The parameters of a mixture, and the moments of samples under it, as plain records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "COVARIANCE_TYPES",
    "CovarianceType",
    "Parameters",
    "PosteriorMoments",
    "select",
    "stack_modalities",
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
