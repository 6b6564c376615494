"""Log-densities of samples under Gaussians."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multialign.costs import squared_euclidean_cost
from multialign.mixture.parameters import CovarianceType, Parameters
from multialign.ops import log

__all__ = ["log_density", "log_joint", "whiten"]


def log_joint(x: Tensor, state: Parameters, covariance_type: CovarianceType) -> Tensor:
    """Return log pi_k + log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`: Eq. 2 and 4."""
    return log(state.weights).unsqueeze(-2) + log_density(x, state, covariance_type)


def log_density(x: Tensor, state: Parameters, covariance_type: CovarianceType) -> Tensor:
    """Return log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`; "full" takes diagonals as well."""
    _, means, covariances = state
    dim = x.shape[-1]
    if covariance_type == "full" and covariances.ndim == means.ndim:
        covariance_type = "diag"
    if covariance_type == "spherical":
        deviation = covariances.sqrt().unsqueeze(-2)
        # Divide twice: the square of a variance may leave the range in the gradient.
        distance = squared_euclidean_cost(x, means) / deviation / deviation
        log_det = 2 * dim * deviation.log()
    elif covariance_type == "diag":
        deviation = x.unsqueeze(-2) - means.unsqueeze(-3)
        distance = (deviation / covariances.sqrt().unsqueeze(-3)).square().sum(-1)
        log_det = covariances.log().sum(-1).unsqueeze(-2)
    elif covariance_type == "tied":
        whitening, log_det = whiten(covariances)
        distance = squared_euclidean_cost(x @ whitening.mT, means @ whitening.mT)
        log_det = log_det[..., None, None]
    else:
        distance, log_det, _ = _FullDistance.apply(x, means, covariances)
        log_det = log_det.unsqueeze(-2)
    return -0.5 * (dim * math.log(2 * math.pi) + log_det + distance)


class _FullDistance(torch.autograd.Function):
    """(x_n - mu_k)^T S_k^-1 (x_n - mu_k), log det S_k, and W_k^T W_k = S_k^-1's factors W_k.

    With z = S^-1 (x - mu), the derivatives by S are -z z^T and S^-1: no factorisation is
    differentiated. The factors have no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whitening, log_det = whiten(covariances)
        deviation = x.unsqueeze(-3) - means.unsqueeze(-2)
        distance = (deviation @ whitening.mT).square().sum(-1).mT
        return distance, log_det, whitening

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, by_distance: Tensor, by_log_det: Tensor, *unused: Any) -> Any:
        x, means, covariances, whitening = ctx.saved_tensors
        if torch.is_grad_enabled():
            whitening, _ = whiten(covariances)
        # In float64: S^-1 may leave the range of float32 before it is multiplied by what is small.
        whitening = whitening.double()
        deviation = (x.unsqueeze(-3) - means.unsqueeze(-2)).double()
        solved = deviation @ whitening.mT @ whitening
        weighted = by_distance.double().mT.unsqueeze(-1) * solved
        inverse = whitening.mT @ whitening
        by_covariances = by_log_det.double()[..., None, None] * inverse - weighted.mT @ solved
        grads = 2 * weighted.sum(-3), -2 * weighted.sum(-2), by_covariances
        return tuple(grad.to(x.dtype) for grad in grads)


def whiten(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return W with W S W^T = I, and log det S, for matrices S `(*, D, D)`.

    Factored in float64: in float32 a matrix of rank below D, plus its floor, may seem indefinite.
    """
    factor, info = torch.linalg.cholesky_ex(covariances.double())
    factor = torch.where((info == 0)[..., None, None], factor, math.nan)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return whitening.to(covariances.dtype), log_det.to(covariances.dtype)
