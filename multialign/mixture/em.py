"""Expectation-maximisation: the choice of step, the loop, and its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multialign.costs import squared_euclidean_cost
from multialign.mixture.distribution import log_joint
from multialign.mixture.em_moments import SMALLEST_FLOOR, em_by_moments
from multialign.mixture.em_plain import PlainEM, joint_masses
from multialign.mixture.em_subspace import SubspaceEM
from multialign.mixture.options import FitOptions
from multialign.mixture.parameters import (
    Parameters,
    PosteriorMoments,
    Standardised,
    select,
    with_matrices,
)

__all__ = ["fit_standard", "fit_with_posterior", "posterior_moments"]

# Of a component of a given mixture, relative to the data; rounding leaves no smaller variance.
_SMALLEST_VARIANCE = 1e-10


def fit_standard(data: Standardised, start: Parameters, options: FitOptions) -> Parameters:
    """Return the mixture after EM, standardised. The caller disables gradients for "none"."""
    iterations, tolerance = options.em_iterations, options.em_tolerance
    if options.differentiate != "last":
        return _iterate(data, start, options, iterations, tolerance)[0]
    with torch.no_grad():
        before, taken, converged = _iterate(data, start, options, iterations - 1, tolerance)
    after, _, _ = _iterate(data, before, options, 1, 0.0)
    if tolerance == 0:
        return after
    # At a fixed point t = F(t, x) the derivative is that of F by x and, through t, itself: a
    # geometric series, whose terms fall as fast as EM converged. Each round adds one.
    for _ in range(taken):
        moved = select(
            converged,
            Parameters(*(a + (b - b.detach()) for a, b in zip(before, after, strict=True))),
            before,
        )
        after, _, _ = _iterate(data, moved, options, 1, 0.0)
    return after


def fit_with_posterior(
    data: Standardised, start: Parameters, options: FitOptions
) -> tuple[Parameters, PosteriorMoments]:
    """Return the mixture after all iterations and the posterior moments under it, standardised.

    Differentiated through all iterations, the moments are the sums of one more step.
    """
    if options.differentiate == "unroll" and _by_moments(options):
        iterations = options.em_iterations
        return em_by_moments(data, start, options, iterations=iterations, posterior=True)[:2]
    if options.differentiate == "unroll":
        em = _choose(data, start, options)
        fitted, joint = em.end(_loop(em, data, options, options.em_iterations, 0.0)[0])
        return fitted, _moments(data, joint, options)
    with torch.set_grad_enabled(options.grad):
        fitted = fit_standard(data, start, options)
    return fitted, posterior_moments(data, fitted, options)


def posterior_moments(
    data: Standardised, mixture: Parameters, options: FitOptions
) -> PosteriorMoments:
    """Return the posterior moments of samples under a mixture, both standardised."""
    if _by_moments(options):
        data = data._replace(floor=torch.full_like(data.floor, _SMALLEST_VARIANCE))
        return em_by_moments(data, mixture, options, iterations=0, posterior=True)[1]
    log_densities = log_joint(data.x, mixture, options.covariance_type)
    return _moments(data, joint_masses(data, log_densities), options)


def _by_moments(options: FitOptions) -> bool:
    """Return whether EM by moments is exact enough; then it is the fastest."""
    axis_aligned = options.covariance_type in ("diag", "spherical")
    return axis_aligned and options.regularization >= SMALLEST_FLOOR


def _choose(data: Standardised, start: Parameters, options: FitOptions) -> PlainEM | SubspaceEM:
    """Return the faster EM by differences."""
    rows, dim = data.x.shape[-2:]
    if options.covariance_type == "full" and rows < dim and options.process_group is None:
        return SubspaceEM(data, start)
    return PlainEM(data, start, options.covariance_type, options.ranks)


def _iterate(
    data: Standardised, start: Parameters, options: FitOptions, iterations: int, tolerance: float
) -> tuple[Parameters, int, Tensor]:
    """Return the mixture after EM, the most steps of any problem, and which problems converged.

    With tolerance 0 none counts as converged.
    """
    if _by_moments(options):
        fitted, _, steps = em_by_moments(
            data, start, options, iterations=iterations, tolerance=tolerance
        )
        if tolerance == 0:
            return fitted, iterations, steps < 0
        return fitted, int(steps.max()), steps < iterations
    if iterations == 0:
        mixture = with_matrices(start, options.covariance_type)
        return mixture, 0, torch.zeros_like(data.x[..., 0, 0], dtype=torch.bool)
    em = _choose(data, start, options)
    state, count, converged = _loop(em, data, options, iterations, tolerance)
    return em.mixture(state), count, converged


def _loop(
    em: PlainEM | SubspaceEM,
    data: Standardised,
    options: FitOptions,
    iterations: int,
    tolerance: float,
) -> tuple[Any, int, Tensor]:
    """Return the E-step before the last M-step; for the rest see `_iterate`."""
    state: Any
    state, log_densities = em.begin()
    done = torch.zeros_like(data.x[..., 0, 0], dtype=torch.bool)
    previous: Tensor | None = None
    for count in range(1, iterations + 1):
        if count > 1:
            updated, log_densities = em.step(state)
            state = updated if tolerance == 0 else select(done, state, updated)
        if tolerance == 0:
            continue
        likelihood = (data.mass * log_densities.detach().logsumexp(-1)).sum(-1).detach()
        (likelihood,) = options.ranks.sum([likelihood])
        if previous is not None:
            # NaN never converges: stop, the result shows it.
            change = (likelihood - previous).abs()
            done = done | (change < tolerance) | change.isnan()
            if bool(done.all()):
                return state, count, done
        previous = likelihood
    return state, iterations, done


def _moments(data: Standardised, joint: Tensor, options: FitOptions) -> PosteriorMoments:
    """Return the moments of samples under joint masses `(*batch, N, K)`."""
    ranks = options.ranks
    weights, means = ranks.sum([joint.sum(-2), joint.mT @ data.x])
    means = means / torch.where(weights == 0, 1.0, weights).unsqueeze(-1)
    (scatters,) = ranks.sum([(joint * squared_euclidean_cost(data.x, means)).sum(-2)])
    return PosteriorMoments(weights, means, scatters)
