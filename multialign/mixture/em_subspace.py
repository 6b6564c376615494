"""Expectation-maximisation for full covariances of fewer samples than features.

The N samples span N of the D dimensions. Outside their span the covariances of an M-step equal the
floor, and samples and means agree. So the densities differ from those in N dimensions by a constant
factor, and a step takes K N^3 operations instead of K N D^2 + K D^3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign.mixture.distribution import log_density, whiten
from multialign.mixture.em_moments import SMALLEST_FLOOR
from multialign.mixture.em_plain import check_deviations, joint_masses, scatter_matrices
from multialign.mixture.parameters import Parameters, Standardised, with_matrices
from multialign.ops import log

__all__ = ["SubspaceEM"]


class SubspaceEStep(NamedTuple):
    """The result of an E-step, whose mixture is known by weighted means of the samples."""

    joint: Tensor
    """The mass of each sample times its posteriors, `(*batch, N, K)`."""
    weights: Tensor
    """Of the mixture, `(*batch, K)`."""
    shares: Tensor
    """Weights of the samples in the mean and covariance of each component, `(*batch, N, K)`.

    They are 0 for a component that is still that of the start.
    """


class SubspaceEM:
    """The methods of :class:`PlainEM`, for covariance_type="full", N < D and one rank.

    A component without samples so far has the densities of the first E-step.
    """

    def __init__(self, data: Standardised, start: Parameters) -> None:
        check_deviations(data.x, start.means)
        self._data, self._start = data, with_matrices(start, "full")
        self._first = log_density(data.x, start, "full")
        self._basis = torch.linalg.qr(data.x.detach().mT).Q
        self._coordinates = data.x.detach() @ self._basis
        dim, outside = data.x.shape[-1], data.x.shape[-1] - self._basis.shape[-1]
        self._constant = -0.5 * (dim * math.log(2 * math.pi) + outside * data.floor.log())

    def begin(self) -> tuple[SubspaceEStep, Tensor]:
        """Return the first E-step, and log pi_k + log N(x_n) under its mixture."""
        weights = self._start.weights
        log_joint = log(weights).unsqueeze(-2) + self._first
        joint = joint_masses(self._data, log_joint)
        return SubspaceEStep(joint, weights, torch.zeros_like(joint)), log_joint

    def step(self, state: SubspaceEStep) -> tuple[SubspaceEStep, Tensor]:
        """Return the next E-step, and log pi_k + log N(x_n) under its mixture."""
        weights, shares, untouched = self._maximise(state)
        density, _, _ = _SubspaceDensity.apply(
            self._data.x, shares, self._data.floor, self._coordinates, self._basis
        )
        density = torch.where(untouched, self._first, density + self._constant)
        log_joint = log(weights).unsqueeze(-2) + density
        return SubspaceEStep(joint_masses(self._data, log_joint), weights, shares), log_joint

    def mixture(self, state: SubspaceEStep) -> Parameters:
        """Return the mixture of the next M-step."""
        weights, shares, untouched = self._maximise(state)
        kept = untouched.mT
        means = torch.where(kept, self._start.means, shares.mT @ self._data.x)
        deviation = self._data.x.unsqueeze(-3) - means.unsqueeze(-2)
        scatter = scatter_matrices(shares, deviation)
        diagonal = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        covariances = scatter + self._data.floor.unsqueeze(-1) * diagonal
        covariances = torch.where(kept.unsqueeze(-1), self._start.covariances, covariances)
        return Parameters(weights, means, covariances)

    def end(self, state: SubspaceEStep) -> tuple[Parameters, Tensor]:
        """Return the mixture of the next M-step and the joint masses `(*batch, N, K)` under it."""
        return self.mixture(state), self.step(state)[0].joint

    def _maximise(self, state: SubspaceEStep) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, shares, and which components are untouched, `(*batch, 1, K)`."""
        weights = state.joint.sum(-2, keepdim=True)
        empty = weights <= torch.finfo(weights.dtype).eps
        shares = torch.where(empty, state.shares, state.joint / torch.where(empty, 1.0, weights))
        weights = torch.where((weights == 0).all(-1), state.weights, weights.squeeze(-2))
        return weights, shares, (shares == 0).all(-2, keepdim=True)


class _SubspaceDensity(torch.autograd.Function):
    """Log-densities of samples, up to a constant, under Gaussians with these `shares` of them.

    They depend on the Gram matrix of the samples alone. Moving a sample out of the span changes the
    Gram matrix only to second order, so the basis is a constant for the first derivative. The
    second derivative would be wrong and is refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, shares: Tensor, floor: Tensor, coordinates: Tensor, basis: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        deviation = coordinates.unsqueeze(-3) - (shares.mT @ coordinates).unsqueeze(-2)
        covariances = scatter_matrices(shares, deviation)
        covariances.diagonal(dim1=-2, dim2=-1).add_(floor)
        whitening, log_det = whiten(covariances)
        distance = (deviation @ whitening.mT).square().sum(-1)
        return -0.5 * (distance + log_det.unsqueeze(-1)).mT, deviation, whitening

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:2], *inputs[3:], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        derivative = _SubspaceDerivative.apply if torch.is_grad_enabled() else _subspace_derivative
        return *derivative(grad, *ctx.saved_tensors), None, None


def _subspace_derivative(
    grad: Tensor,
    shares: Tensor,
    coordinates: Tensor,
    basis: Tensor,
    deviation: Tensor,
    whitening: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by samples, shares and floor."""
    share = shares.mT.unsqueeze(-1)
    grad = -0.5 * grad.mT.unsqueeze(-1)
    solved = deviation @ whitening.mT @ whitening
    weighted = grad * solved
    by_covariances = grad.sum(-2, keepdim=True) * (whitening.mT @ whitening) - weighted.mT @ solved
    moved = deviation @ by_covariances
    by_deviation = 2 * (weighted + share * moved)
    by_means = -by_deviation.sum(-2)
    by_shares = (deviation * moved).sum(-1).mT + coordinates @ by_means.mT
    by_coordinates = by_deviation.sum(-3) + shares @ by_means
    by_floor = by_covariances.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    return by_coordinates @ basis.mT, by_shares, by_floor[..., None, None]


class _SubspaceDerivative(torch.autograd.Function):
    """The first derivative where autograd records it; it refuses the second."""

    generate_vmap_rule = True
    forward = staticmethod(_subspace_derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            'EM for covariance_type="full" has first derivatives only where samples are fewer than '
            'features; give more samples, or covariance_type="diag" with a regularization below '
            f"{SMALLEST_FLOOR}, which has them all"
        )
