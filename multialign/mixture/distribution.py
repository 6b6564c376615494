"""Gaussian mixtures as distributions: densities, posteriors and draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign._draws import normal, uniform
from multialign._validation import (
    check_alike,
    check_choice,
    check_count,
    check_tensor,
    full_precision,
    lift,
)
from multialign.costs import squared_euclidean_cost
from multialign.mixture.parameters import COVARIANCE_TYPES, CovarianceType, Parameters
from multialign.ops import has_tangent, log, logsumexp

__all__ = [
    "GaussianMixture",
    "Report",
    "as_mixture",
    "log_density",
    "log_joint",
    "parameters_of",
    "whiten",
    "with_report",
]

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

    Attributes:
        iterations: How many iterations :func:`fit_gaussian_mixture` took, :math:`(*\text{batch})`;
            like the next two, None for a mixture that is not its result.
        converged: Whether the tolerance was reached, :math:`(*\text{batch})`; with tolerance 0, it
            is False.
        log_likelihood: Mean log-density of the samples fitted, by their weights,
            :math:`(*\text{batch})`, without gradient.

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
    iterations: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    converged: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    log_likelihood: Tensor | None = field(default=None, init=False, repr=False, compare=False)

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

    def detach(self) -> GaussianMixture:
        """Return the same mixture without gradient."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> GaussianMixture:
        """Return the mixture on another device or in another dtype, as :meth:`torch.Tensor.to`."""

        def move(x: Tensor) -> Tensor:
            moved = x.to(*args, **kwargs)
            # Counts keep their dtype.
            return moved if x.is_floating_point() else moved.to(x.dtype)

        return self._map(move)

    def _map(self, function: Callable[[Tensor], Tensor]) -> GaussianMixture:
        """Return the mixture with a function of each of its tensors."""
        names = [field.name for field in fields(self) if field.name != "covariance_type"]
        parts = {name: getattr(self, name) for name in names}
        parts = {name: None if x is None else function(x) for name, x in parts.items()}
        report = Report(*(parts.pop(name) for name in Report._fields))
        return with_report(replace(self, **parts), report)

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
        n = check_count("n", n)
        *batch, count, dim = self.means.shape
        # In float64: a component of little weight is below the spacing of other dtypes.
        cumulative = self.weights.double().cumsum(-1)
        draws = uniform([*batch, n], cumulative, generator) * cumulative[..., -1:]
        component = torch.searchsorted(cumulative, draws, right=True).clamp_max(count - 1)
        noise = normal([*batch, n, dim], self.means, generator)
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
        if self.covariance_type == "spherical":
            return self.covariances.unsqueeze(-1).expand(self.means.shape)
        if self.covariance_type == "tied":
            dim = self.means.shape[-1]
            return self.covariances.unsqueeze(-3).expand(*self.means.shape, dim)
        return self.covariances

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


class Report(NamedTuple):
    """What a fitted mixture tells of its fit; see there."""

    iterations: Tensor
    converged: Tensor
    log_likelihood: Tensor


def with_report(mixture: GaussianMixture, report: Report) -> GaussianMixture:
    """Return the mixture, which now tells of its fit; it must not be anyone else's."""
    for name, value in report._asdict().items():
        object.__setattr__(mixture, name, value)
    return mixture


def parameters_of(mixture: GaussianMixture) -> Parameters:
    """Return the parameters of a mixture."""
    return Parameters(mixture.weights, mixture.means, mixture.covariances)


def as_mixture(parameters: Parameters, covariance_type: CovarianceType) -> GaussianMixture:
    """Return the mixture that has these parameters."""
    weights, means, covariances = parameters
    return GaussianMixture(
        weights=weights, means=means, covariances=covariances, covariance_type=covariance_type
    )


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
        function = _FullDistance
        run = function.forward if has_tangent(x, means, covariances) else function.apply
        distance, log_det, _ = run(x, means, covariances)
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
