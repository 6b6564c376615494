"""Expectation-maximisation as in textbooks, for every kind of covariance, by differences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multialign._distributed import Ranks
from multialign._validation import check_entries
from multialign.mixture.distribution import log_joint
from multialign.mixture.parameters import CovarianceType, Parameters, Standardised, with_matrices

__all__ = ["PlainEM", "check_deviations", "joint_masses", "scatter_matrices"]


class EStep(NamedTuple):
    """The result of an E-step."""

    joint: Tensor
    """The mass of each sample times its posteriors, `(*batch, N, K)`."""
    mixture: Parameters
    """The mixture of these posteriors; the M-step keeps its components without samples."""


class PlainEM:
    """EM by E-steps, the first of the mixture `start`, each other after an M-step."""

    def __init__(
        self, data: Standardised, start: Parameters, covariance_type: CovarianceType, ranks: Ranks
    ) -> None:
        self._data, self._start, self._ranks = data, start, ranks
        self._type: CovarianceType = covariance_type

    def begin(self) -> tuple[EStep, Tensor]:
        """Return the first E-step, and log pi_k + log N(x_n) under its mixture."""
        log_densities = log_joint(self._data.x, self._start, self._type)
        mixture = with_matrices(self._start, self._type)
        return EStep(joint_masses(self._data, log_densities), mixture), log_densities

    def step(self, state: EStep) -> tuple[EStep, Tensor]:
        """Return the next E-step, and log pi_k + log N(x_n) under its mixture."""
        mixture = self.mixture(state)
        log_densities = log_joint(self._data.x, mixture, self._type)
        return EStep(joint_masses(self._data, log_densities), mixture), log_densities

    def mixture(self, state: EStep) -> Parameters:
        """Return the mixture of the next M-step."""
        return _maximise(self._data, state.joint, state.mixture, self._type, self._ranks)

    def end(self, state: EStep) -> tuple[Parameters, Tensor]:
        """Return the mixture of the next M-step and the joint masses `(*batch, N, K)` under it."""
        after, _ = self.step(state)
        return after.mixture, after.joint


def joint_masses(data: Standardised, log_densities: Tensor) -> Tensor:
    """Return the mass of each sample times its posteriors, `(*batch, N, K)`."""
    return data.mass.unsqueeze(-1) * log_densities.softmax(-1)


def _maximise(
    data: Standardised,
    joint: Tensor,
    kept: Parameters,
    covariance_type: CovarianceType,
    ranks: Ranks,
) -> Parameters:
    """Return the mixture of an M-step; a component without samples is that of `kept`.

    Deviations are from the new means: E x^2 - mu^2 would lose the variance of a narrow component to
    rounding.
    """
    x, floor = data.x, data.floor
    check_deviations(x, kept.means)
    weights, means = ranks.sum([joint.sum(-2), joint.mT @ x])
    empty = weights <= torch.finfo(x.dtype).eps
    safe = torch.where(empty, 1.0, weights)
    means = torch.where(empty.unsqueeze(-1), kept.means, means / safe.unsqueeze(-1))
    absent = weights.sum(-1, keepdim=True) == 0
    weights = torch.where(absent, kept.weights, weights)

    if covariance_type in ("diag", "spherical"):
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        (scatter,) = ranks.sum([(joint.unsqueeze(-1) * deviation.square()).sum(-3)])
        covariances = scatter / safe.unsqueeze(-1) + floor
        empty = empty.unsqueeze(-1)
        if covariance_type == "spherical":
            covariances, empty = covariances.mean(-1), empty.squeeze(-1)
    else:
        deviation = x.unsqueeze(-3) - means.unsqueeze(-2)
        shares = joint / safe.unsqueeze(-2) if covariance_type == "full" else joint
        scatter = scatter_matrices(shares, deviation)
        if covariance_type == "tied":
            scatter = scatter.sum(-3)
        (scatter,) = ranks.sum([scatter])
        diagonal = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if covariance_type == "tied":
            covariances, empty = scatter + floor * diagonal, absent.unsqueeze(-1)
        else:
            covariances = scatter + floor.unsqueeze(-1) * diagonal
            empty = empty[..., None, None]
    covariances = torch.where(empty, kept.covariances, covariances)
    return Parameters(weights, means, covariances)


def scatter_matrices(shares: Tensor, deviation: Tensor) -> Tensor:
    """Return sum_n s_nk d_kn d_kn^T, `(*batch, K, D, D)`, of deviations `(*batch, K, N, D)`."""
    return (shares.mT.unsqueeze(-1) * deviation).mT @ deviation


def check_deviations(x: Tensor, means: Tensor) -> None:
    """Raise before there are too many deviations of all samples from all means."""
    check_entries(
        means.numel() * x.shape[-2],
        'use covariance_type="diag" or "spherical" with the default regularization, which need no '
        "such table, fewer samples, or projected features",
    )
