"""Gaussian mixtures as distributions: densities, posteriors and draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multialign._validation import (
    check_alike,
    check_choice,
    check_count,
    check_tensor,
    full_precision,
    lift,
)
from multialign.mixture.density import log_joint
from multialign.mixture.parameters import (
    COVARIANCE_TYPES,
    CovarianceType,
    Parameters,
    component_covariances,
)
from multialign.ops import logsumexp

__all__ = ["GaussianMixture", "as_mixture", "parameters_of"]

_COVARIANCE_DIMENSIONS = {"diag": "KD", "full": "KDD", "tied": "DD", "spherical": "K"}


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    r"""Mixture of K Gaussians in D dimensions, or a batch of independent ones.

    .. math:: p(x) = \sum_k \pi_k \, \mathcal{N}(x; \mu_k, \Sigma_k)

    Args:
        weights: :math:`\pi`, :math:`(*\text{batch}, K)`, non-negative with sum 1.
        means: :math:`\mu`, :math:`(*\text{batch}, K, D)`.
        covariances: :math:`\Sigma` in scikit-learn's shapes: "diag" :math:`(*\text{batch}, K, D)`,
            "full" :math:`(*\text{batch}, K, D, D)`, "tied" :math:`(*\text{batch}, D, D)`,
            "spherical" :math:`(*\text{batch}, K)`.
        covariance_type: Which of these `covariances` is.

    Raises:
        ValueError: Shapes, devices or the covariance type do not fit.
        TypeError: An argument is no floating-point tensor, or dtypes differ.

    References:
        Eq. 2-4 of :cite:t:`decalign:26`; :cite:t:`bishop:06`, Section 9.2.

    Example:
        >>> import torch
        >>> from multialign import GaussianMixture
        >>> mixture = GaussianMixture(
        ...     weights=torch.tensor([0.5, 0.5]),
        ...     means=torch.tensor([[0.0], [4.0]]),
        ...     covariances=torch.ones(2, 1),
        ... )
        >>> mixture.posterior(torch.tensor([[0.0], [2.0]]))
        tensor([[9.9966e-01, 3.3535e-04],
                [5.0000e-01, 5.0000e-01]])
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    covariance_type: CovarianceType = "diag"

    def __post_init__(self) -> None:
        check_choice("covariance_type", self.covariance_type, COVARIANCE_TYPES)
        means = check_tensor("means", self.means, "(*batch, K, D)", 2)
        check_tensor("weights", self.weights, "(*batch, K)", 1)
        dimensions = _COVARIANCE_DIMENSIONS[self.covariance_type]
        check_tensor("covariances", self.covariances, f"(*batch, {', '.join(dimensions)})", 1)
        check_alike(
            "weights, means and covariances",
            [self.weights, means, self.covariances],
            ["weights", "means", "covariances"],
        )
        *batch, count, dim = means.shape
        expected = (*batch, *(count if letter == "K" else dim for letter in dimensions))
        if self.weights.shape != (*batch, count):
            raise ValueError(
                f"weights must have shape {(*batch, count)} for means of shape "
                f"{tuple(means.shape)}; got {tuple(self.weights.shape)}"
            )
        if self.covariances.shape != expected:
            raise ValueError(
                f"covariances must have shape {expected} for covariance_type="
                f'"{self.covariance_type}"; got {tuple(self.covariances.shape)}'
            )

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[-2]

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return the log-density of each row of `x` :math:`(*\text{batch}, N, D)`."""
        return logsumexp(self._log_joint(self._check(x)), -1)

    def posterior(self, x: Tensor) -> Tensor:
        r"""Return the probability of each component given each row: Eq. 3.

        Args:
            x: :math:`(*\text{batch}, N, D)`.

        Returns:
            :math:`(*\text{batch}, N, K)`; each row sums to 1.
        """
        return self._log_joint(self._check(x)).softmax(-1)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw `n` points, :math:`(*\text{batch}, n, D)`, without gradient."""
        check_count("n", n)
        *batch, count, dim = self.means.shape
        cumulative = self.weights.cumsum(-1)
        draws = torch.rand(*batch, n, generator=generator, device=cumulative.device)
        draws = draws.to(cumulative.dtype) * cumulative[..., -1:]
        component = torch.searchsorted(cumulative, draws, right=True).clamp_max(count - 1)
        noise = torch.randn(
            *batch, n, dim, generator=generator, device=draws.device, dtype=draws.dtype
        )
        index = component.unsqueeze(-1).expand(*batch, n, dim)
        means = self.means.gather(-2, index)
        covariances = self.component_covariances()
        if covariances.ndim == self.means.ndim:
            return means + covariances.gather(-2, index).sqrt() * noise
        factors = torch.linalg.cholesky_ex(covariances).L
        shaped = noise.unsqueeze(-3) @ factors.mT
        index = index.unsqueeze(-3)
        chosen: Tensor = shaped.gather(-3, index).squeeze(-3)
        return means + chosen

    def component_covariances(self) -> Tensor:
        r"""Return one covariance a component, as :func:`bures_wasserstein_cost` takes them.

        Returns:
            :math:`(*\text{batch}, K, D)` for "diag" and "spherical",
            :math:`(*\text{batch}, K, D, D)` for "full" and "tied".
        """
        return component_covariances(parameters_of(self), self.covariance_type)

    def _check(self, x: Tensor) -> Tensor:
        x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
        check_alike("means and x", [self.means, x], ["means", "x"])
        if x.shape[:-2] != self.means.shape[:-2] or x.shape[-1] != self.means.shape[-1]:
            raise ValueError(
                f"x (*batch, N, D) must agree in batch and D with the means "
                f"{tuple(self.means.shape)}; got {tuple(x.shape)}"
            )
        return x

    def _log_joint(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return log_joint(x, parameters_of(self), self.covariance_type)


def parameters_of(mixture: GaussianMixture) -> Parameters:
    """Return the parameters of a mixture."""
    return Parameters(mixture.weights, mixture.means, mixture.covariances)


def as_mixture(parameters: Parameters, covariance_type: CovarianceType) -> GaussianMixture:
    """Return the mixture that has these parameters."""
    weights, means, covariances = parameters
    return GaussianMixture(
        weights=weights, means=means, covariances=covariances, covariance_type=covariance_type
    )
