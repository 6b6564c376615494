"""Expectation-maximisation: the choice of step, the loop, and its derivative."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from multialign.costs import squared_euclidean_cost
from multialign.mixture.distribution import log_joint
from multialign.mixture.em_moments import SMALLEST_FLOOR, em_by_moments, log_joint_by_moments
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
from multialign.ops import has_tangent, logsumexp

__all__ = ["Ending", "fit_standard", "fit_with_posterior", "log_likelihood", "posterior_moments"]

# Of a component of a given mixture, relative to the data; rounding leaves no smaller variance.
_SMALLEST_VARIANCE = 1e-10


_Record = TypeVar("_Record", Parameters, Standardised)


class Ending(NamedTuple):
    """How EM ended, for each problem."""

    iterations: Tensor
    """`(*batch)`."""
    converged: Tensor
    """`(*batch)`: whether it stopped by the tolerance, which without one none does."""


def fit_standard(
    data: Standardised, start: Parameters, options: FitOptions
) -> tuple[Parameters, Ending]:
    """Return the mixture after EM, standardised, and how EM ended.

    The caller disables gradients for "none"; tangents of forward mode are taken off here.
    """
    iterations, tolerance = options.em_iterations, options.em_tolerance
    if options.differentiate == "none":
        data, start = _detach(data), _detach(start)
    if options.differentiate != "last":
        return _iterate(data, start, options, iterations, tolerance)
    with torch.no_grad():
        before, ending = _iterate(data, start, options, iterations - 1, tolerance)
        before = _detach(before)
    after, _ = _iterate(data, before, options, 1, None)
    ended = Ending(ending.iterations + 1, ending.converged)
    if tolerance is None:
        return after, ended
    # At a fixed point t = F(t, x) the derivative is that of F by x and, through t, itself: a
    # geometric series, whose terms fall as fast as EM converged. Each round adds one.
    for _ in range(int(ending.iterations.max())):
        moved = select(
            ending.converged,
            Parameters(*(a + (b - b.detach()) for a, b in zip(before, after, strict=True))),
            before,
        )
        after, _ = _iterate(data, moved, options, 1, None)
    return after, ended


def _detach(record: _Record) -> _Record:
    return type(record)(*(part.detach() for part in record))


def fit_with_posterior(
    data: Standardised, start: Parameters, options: FitOptions
) -> tuple[Parameters, PosteriorMoments]:
    """Return the mixture after all iterations and the posterior moments under it, standardised.

    Differentiated through all iterations, the moments are the sums of one more step.
    """
    if options.differentiate == "unroll" and _by_moments(data, start, options):
        iterations = options.em_iterations
        return em_by_moments(data, start, options, iterations=iterations, posterior=True)[:2]
    if options.differentiate == "unroll":
        em = _choose(data, start, options)
        fitted, joint = em.end(_loop(em, data, options, options.em_iterations, None)[0])
        return fitted, _moments(data, joint, options)
    with torch.set_grad_enabled(options.grad):
        fitted, _ = fit_standard(data, start, options)
    return fitted, posterior_moments(data, fitted, options)


def posterior_moments(
    data: Standardised, mixture: Parameters, options: FitOptions
) -> PosteriorMoments:
    """Return the posterior moments of samples under a mixture, both standardised."""
    if _by_moments(data, mixture, options):
        data = data._replace(floor=torch.full_like(data.floor, _SMALLEST_VARIANCE))
        return em_by_moments(data, mixture, options, iterations=0, posterior=True)[1]
    log_densities = log_joint(data.x, mixture, options.covariance_type)
    return _moments(data, joint_masses(data, log_densities), options)


def log_likelihood(data: Standardised, mixture: Parameters, options: FitOptions) -> Tensor:
    """Return the mean log-density of standardised samples, `(*batch)`, without gradient."""
    with torch.no_grad():
        if _by_moments(data, mixture, options):
            log_densities = log_joint_by_moments(data, mixture, options)
        else:
            log_densities = log_joint(data.x, mixture, options.covariance_type)
        likelihood = (data.mass * logsumexp(log_densities, -1)).sum(-1)
        return options.ranks.sum([likelihood])[0]


def _by_moments(data: Standardised, mixture: Parameters, options: FitOptions) -> bool:
    """Return whether EM by moments is exact enough; then it is the fastest.

    It has no forward-mode derivative.
    """
    axis_aligned = options.covariance_type in ("diag", "spherical")
    if not axis_aligned or options.regularization < SMALLEST_FLOOR:
        return False
    return not has_tangent(data.x, data.mass, *mixture)


def _choose(data: Standardised, start: Parameters, options: FitOptions) -> PlainEM | SubspaceEM:
    """Return the faster EM by differences."""
    rows, dim = data.x.shape[-2:]
    fewer = options.covariance_type == "full" and rows < dim and options.process_group is None
    if fewer and not has_tangent(data.x, data.mass, *start):
        return SubspaceEM(data, start)
    return PlainEM(data, start, options.covariance_type, options.ranks)


def _iterate(
    data: Standardised,
    start: Parameters,
    options: FitOptions,
    iterations: int,
    tolerance: float | None,
) -> tuple[Parameters, Ending]:
    """Return the mixture after EM, and how it ended."""
    if _by_moments(data, start, options):
        fitted, _, steps = em_by_moments(
            data, start, options, iterations=iterations, tolerance=tolerance
        )
        return fitted, Ending(steps.clamp_max(iterations).long(), steps <= iterations)
    if iterations == 0:
        mixture = with_matrices(start, options.covariance_type)
        none = torch.zeros_like(data.x[..., 0, 0], dtype=torch.long)
        return mixture, Ending(none, none > 0)
    em = _choose(data, start, options)
    state, ending = _loop(em, data, options, iterations, tolerance)
    return em.mixture(state), ending


def _loop(
    em: PlainEM | SubspaceEM,
    data: Standardised,
    options: FitOptions,
    iterations: int,
    tolerance: float | None,
) -> tuple[Any, Ending]:
    """Return the E-step before the last M-step, and how EM ends after that."""
    state: Any
    state, log_densities = em.begin()
    done = torch.zeros_like(data.x[..., 0, 0], dtype=torch.bool)
    steps = torch.full_like(data.x[..., 0, 0], iterations, dtype=torch.long)
    previous: Tensor | None = None
    for count in range(1, iterations + 1):
        if count > 1:
            updated, log_densities = em.step(state)
            state = updated if tolerance is None else select(done, state, updated)
        if tolerance is None:
            continue
        likelihood = (data.mass * log_densities.detach().logsumexp(-1)).sum(-1).detach()
        (likelihood,) = options.ranks.sum([likelihood])
        if previous is not None:
            # NaN never converges: stop, the result shows it.
            change = (likelihood - previous).abs()
            stop = ~done & ((change < tolerance) | change.isnan())
            steps = torch.where(stop, count, steps)
            done = done | stop
            if bool(done.all()):
                break
        previous = likelihood
    return state, Ending(steps, done)


def _moments(data: Standardised, joint: Tensor, options: FitOptions) -> PosteriorMoments:
    """Return the moments of samples under joint masses `(*batch, N, K)`."""
    ranks = options.ranks
    weights, means = ranks.sum([joint.sum(-2), joint.mT @ data.x])
    means = means / torch.where(weights == 0, 1.0, weights).unsqueeze(-1)
    (scatters,) = ranks.sum([(joint * squared_euclidean_cost(data.x, means)).sum(-2)])
    return PosteriorMoments(weights, means, scatters)
