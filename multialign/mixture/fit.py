"""The fit of one Gaussian mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from multialign._distributed import ProcessGroup
from multialign._samples import Samples, make_samples
from multialign._validation import (
    check_alike,
    check_count,
    check_positive,
    check_tensor,
    check_weights,
    full_precision,
    lift,
)
from multialign.mixture.distribution import GaussianMixture
from multialign.mixture.modalities import Modalities
from multialign.mixture.options import Differentiate, FitOptions, Init
from multialign.mixture.parameters import CovarianceType

__all__ = ["fit_gaussian_mixture", "fit_one"]


def fit_gaussian_mixture(
    x: Tensor,
    num_components: int,
    *,
    covariance_type: CovarianceType = "diag",
    weights: Tensor | None = None,
    init: Init | GaussianMixture = "kmeans++",
    iterations: int = 100,
    tolerance: float = 1e-3,
    regularization: float = 1e-6,
    differentiate: Differentiate = "unroll",
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> GaussianMixture:
    r"""Fit a Gaussian mixture by expectation-maximisation.

    Each iteration computes the posteriors :math:`w^n(k)` of Eq. 3 and then

    .. math::
        \pi_k = \sum_n p_n w^n(k), \quad
        \mu_k = \frac{1}{\pi_k} \sum_n p_n w^n(k)\, x_n, \quad
        \Sigma_k = \frac{1}{\pi_k} \sum_n p_n w^n(k) (x_n - \mu_k)(x_n - \mu_k)^\top + \rho s^2 I

    with :math:`p` the sample weights divided by their sum, :math:`\rho` the `regularization` and
    :math:`s^2` the variance of the data averaged over features (1 if that is 0), so that scaling
    the data scales the mixture. A component that no sample belongs to keeps its parameters. All
    arguments scikit-learn knows mean what they mean there, except that scikit-learn adds
    :math:`\rho` without :math:`s^2`. All arithmetic is in float64.

    For "diag" and "spherical" (with :math:`\rho \ge 10^{-7}`; below, differences replace moments)
    an iteration takes :math:`N K D` time and two matrix products, and the backward pass keeps the
    mixtures it went through alone, so that memory does not grow with :math:`N K` times the
    iterations; it has first derivatives only. So has "full" with :math:`N < D`, where an iteration
    works in the N dimensions that the samples span, in :math:`K N^3` time.

    Args:
        x: :math:`(*\text{batch}, N, D)`; batch entries are independent problems.
        num_components: K. It may exceed N; some components then share samples.
        covariance_type: "diag", "full", "tied" (one for all components) or "spherical".
        weights: None or :math:`(*\text{batch}, N)`, boolean or non-negative; 0 is absent.
        init: "kmeans++" and "random" choose K samples as means, with the variances of the data and
            equal weights; a :class:`GaussianMixture` is the state to start from.
        iterations: Largest number of iterations.
        tolerance: A problem stops once its mean log-likelihood changes by less; 0 runs all
            iterations and never reads a value back from the device.
        regularization: :math:`\rho`, dimensionless.
        differentiate: "unroll" differentiates through all iterations, "last" through the last
            alone, the state before it being constant, "none" not at all. A problem that converged
            to the `tolerance` is at a fixed point: there "last" adds the derivative of that state,
            which makes it the implicit derivative of the limit, whatever the start.
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, the mixture is that of all ranks' samples together. They stay on
            their ranks, but for the draw of initial means, which the first rank makes for all. An
            initial mixture must be the same on all ranks.

    Returns:
        The mixture, in the units of `x`.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: With "full" or "tied", batch N K D is more than 2^28 entries.

    References:
        :cite:t:`dempster:77`; :cite:t:`arthur:07` for k-means++; Eq. 2-4 of
        :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import fit_gaussian_mixture
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> mixture = fit_gaussian_mixture(x, 2, generator=torch.Generator().manual_seed(0))
        >>> mixture.means.flatten().sort().values
        tensor([ 0.5000, 10.5000])
    """
    check_count("num_components", num_components)
    check_count("iterations", iterations)
    check_positive("tolerance", tolerance, zero=True)
    options = FitOptions(
        covariance_type=covariance_type,
        em_iterations=iterations,
        em_tolerance=tolerance,
        regularization=regularization,
        differentiate=differentiate,
        init="kmeans++" if isinstance(init, GaussianMixture) else init,
        generator=generator,
        process_group=process_group,
    )
    start = init if isinstance(init, GaussianMixture) else None
    return fit_one(x, weights, num_components, options, start)[0]


def fit_one(
    x: Tensor,
    weights: Tensor | None,
    count: int,
    options: FitOptions,
    start: GaussianMixture | None,
) -> tuple[GaussianMixture, Samples]:
    """Return the mixture of one modality, from `start` if there is one, and its samples."""
    x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one feature; got {tuple(x.shape)}")
    if start is not None:
        _check_start(start, x, count, options.covariance_type)
    checked = check_weights([weights], [x], x.shape[:-2])
    with full_precision(x):
        samples = make_samples([x], checked, options.ranks)
        (mixture,) = Modalities(samples, [count], options).fit([start])
    return mixture, samples


def _check_start(
    init: GaussianMixture, x: Tensor, num_components: int, covariance_type: CovarianceType
) -> None:
    if init.covariance_type != covariance_type:
        raise ValueError(
            f'init must be a mixture of covariance_type="{covariance_type}"; '
            f'got "{init.covariance_type}"'
        )
    expected = (*x.shape[:-2], num_components, x.shape[-1])
    if init.means.shape != expected:
        raise ValueError(f"init must have means of shape {expected}; got {tuple(init.means.shape)}")
    check_alike("x and the means of init", [x, init.means], ["x", "the means"])
