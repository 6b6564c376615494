"""Expectation-maximisation for axis-aligned Gaussians by moments, with its own derivative.

The log-density of component k is linear in the features z(x) = (-x^2 / 2, x) of a sample,

    log pi_k + log N(x; mu_k, diag v_k) = c_k + a_k . z(x) + constant,
    a_k = (1 / v_k, mu_k / v_k),   c_k = log pi_k - sum_d (log v_kd + mu_kd^2 / v_kd) / 2,

and the M-step needs only the mean of z(x) under the posterior of each component, its moments. So a
step is two matrix products, without a table of N K D entries.

The variance E x^2 - mu^2 is a small difference where a component is narrow and far from the origin.
Hence float64, samples in units of their spread, measured from one of themselves, and a floor of at
least `SMALLEST_FLOOR`. Since pi_k mu_k^2 is at most about D, the sum of the variances, the relative
rounding error of a variance is at most about eps D / (pi_k floor).

The derivative is one pass back over the weights and moments of all steps. Nothing else is saved:
the posteriors are computed again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multialign._distributed import ProcessGroup, Ranks
from multialign.mixture.options import FitOptions
from multialign.mixture.parameters import Parameters, PosteriorMoments, Standardised

__all__ = ["SMALLEST_FLOOR", "em_by_moments", "log_joint_by_moments"]

SMALLEST_FLOOR = 1e-7
# How many posteriors the pass back computes at once.
_BLOCK_ENTRIES = 2**20


def em_by_moments(
    data: Standardised,
    start: Parameters,
    options: FitOptions,
    *,
    iterations: int,
    tolerance: float | None = None,
    posterior: bool = False,
) -> tuple[Parameters, PosteriorMoments, Tensor]:
    """Return the mixture after EM, its posterior moments, and the step each problem stopped at.

    It has first derivatives only. All ranks start from the same mixture, and a problem without
    samples stays there. A problem stops once its mean log-likelihood changes by less than the
    `tolerance`; None does not look. One that did not stop has `iterations` + 1. The moments mean
    nothing without `posterior`, which needs no tolerance.
    """
    weights, means, variances = start
    spherical = options.covariance_type == "spherical"
    if spherical:
        variances = variances.unsqueeze(-1).expand_as(means)
    batch = means.shape[:-2]
    flat = len(batch) != 1
    problem = [data.x, data.mass, weights, means, variances, data.floor]
    if flat:
        problem = [part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in problem]
    settings = iterations, tolerance, spherical, posterior, options.process_group
    parts = _EM.apply(*problem, *settings)[:7]
    if flat:
        parts = [part.reshape((*batch, *part.shape[1:])) for part in parts]
    weights, means, variances = parts[:3]
    if spherical:
        variances = variances[..., 0]
    return Parameters(weights, means, variances), PosteriorMoments(*parts[3:6]), parts[6]


def log_joint_by_moments(data: Standardised, mixture: Parameters, options: FitOptions) -> Tensor:
    """Return log pi_k + log N(x_n; mu_k, Sigma_k), `(*batch, N, K)`, without gradient."""
    weights, means, variances = mixture
    spherical = options.covariance_type == "spherical"
    if spherical:
        variances = variances.unsqueeze(-1).expand_as(means)
    moments = torch.cat([-0.5 * (variances - data.floor + means.square()), means], -1)
    slopes, offsets, _, _ = _coefficients(weights.unsqueeze(-1), moments, data.floor, spherical)
    constant = 0.5 * means.shape[-1] * math.log(2 * math.pi)
    return (slopes @ _features(data.x) + (offsets - constant)).mT


class _EM(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        mass: Tensor,
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        floor: Tensor,
        iterations: int,
        tolerance: float | None,
        spherical: bool,
        posterior: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        moments = torch.cat([-0.5 * (variances - floor + means.square()), means], -1)
        path, steps = _forward(
            x,
            mass.unsqueeze(-2),
            weights.unsqueeze(-1),
            moments,
            floor,
            iterations + posterior,  # the posterior moments are those of a further step
            tolerance,
            spherical,
            Ranks(group),
        )
        weights, moments = path[-1 - posterior]
        variances, means = _parameters(moments, floor, spherical)
        shares, found = path[-1]
        squares, centres = found.chunk(2, -1)
        spreads = torch.addcmul(-2 * squares, centres, centres, value=-1).sum(-1)
        shares = shares.squeeze(-1)
        # An output, since only inputs and outputs can be saved for the derivative.
        history = [torch.stack(part, 1) for part in zip(*path, strict=True)]
        return (
            weights.squeeze(-1),
            means.clone(),
            variances,
            shares.clone(),
            centres.clone(),
            shares * spreads.clamp_min(0),
            steps.flatten(),
            *history,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mass, _, _, _, floor, _, tolerance, spherical, posterior, group = inputs
        ctx.mark_non_differentiable(*output[6:])
        ctx.save_for_backward(x, mass, floor, *output[6:])
        ctx.options = tolerance is not None, spherical, posterior, group

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Only a recorded derivative has a derivative to refuse.
        differentiate = _Derivative.apply if torch.is_grad_enabled() else _Derivative.forward
        derivatives = differentiate(*ctx.saved_tensors, *grads[:6], *ctx.options)
        return (*derivatives, None, None, None, None, None)


class _Derivative(torch.autograd.Function):
    """The first derivative. It refuses the second, which would be wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        mass: Tensor,
        floor: Tensor,
        steps: Tensor,
        weights: Tensor,
        moments: Tensor,
        grad_weights: Tensor,
        grad_means: Tensor,
        grad_variances: Tensor,
        grad_shares: Tensor,
        grad_centres: Tensor,
        grad_scatters: Tensor,
        stops: bool,
        spherical: bool,
        posterior: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        by_squares = -2 * grad_variances
        means = moments[:, -1 - posterior].chunk(2, -1)[1]
        by_moments = torch.cat([by_squares, torch.addcmul(grad_means, means, by_squares)], -1)
        if spherical:
            by_moments = _average_spreads(by_moments, means)
        grads = [(grad_weights.unsqueeze(-1), by_moments)]
        if posterior:
            squares, centres = moments[:, -1].chunk(2, -1)
            spreads = torch.addcmul(-2 * squares, centres, centres, value=-1)
            grad_scatters = grad_scatters.unsqueeze(-1)
            by_spread = -2 * weights[:, -1] * grad_scatters
            by_centres = torch.addcmul(grad_centres, centres, by_spread)
            by_shares = torch.addcmul(
                grad_shares.unsqueeze(-1), grad_scatters, spreads.sum(-1, keepdim=True)
            )
            grads.append((by_shares, torch.cat([by_spread.expand_as(centres), by_centres], -1)))
        grad_x, grad_mass, grad_weights, grad_moments, grad_floor = _backward(
            x,
            mass.unsqueeze(-2),
            floor,
            steps.reshape(-1, 1, 1),
            weights,
            moments,
            grads,
            stops,
            spherical,
            Ranks(group),
        )
        means = moments[:, 0].chunk(2, -1)[1]
        by_first, by_means = grad_moments.chunk(2, -1)
        by_floor = (by_first - by_squares).sum((-2, -1), keepdim=True)
        return (
            grad_x,
            grad_mass.squeeze(-2),
            grad_weights.squeeze(-1),
            torch.addcmul(by_means, means, by_first, value=-1),
            -0.5 * by_first,
            torch.add(grad_floor, by_floor, alpha=0.5),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            'EM for covariance_type="diag" and "spherical" has first derivatives only; '
            f"regularization below {SMALLEST_FLOOR} takes a slower path that has them all"
        )


# From here on weights are (B, K, 1), mass is (B, 1, N), and a number per problem is (B, 1, 1).


def _inertia() -> float:
    """Return the mass that each component has at its own moments: one without samples keeps them.

    It is no constant of the module, since torch.compile with dynamic shapes makes a symbol of that,
    which belongs to the first call of the operator and fails in the next one.
    """
    return 1e-30


def _forward(
    x: Tensor,
    mass: Tensor,
    weights: Tensor,
    moments: Tensor,
    floor: Tensor,
    iterations: int,
    tolerance: float | None,
    spherical: bool,
    ranks: Ranks,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return weights and moments before and after each step, and where each problem stopped."""
    features = _features(x)
    rows = features.mT
    absent = _absent(mass, ranks)
    path = [(weights, moments)]
    steps = torch.full_like(absent, iterations + 1)
    done = steps < 0
    previous: Tensor | None = None
    for _ in range(iterations):
        slopes, offsets, _, _ = _coefficients(weights, moments, floor, spherical)
        log_joint = torch.baddbmm(offsets, slopes, features)
        joint = mass * log_joint.softmax(-2)
        sums = [joint.sum(-1, keepdim=True), torch.bmm(joint, rows)]
        if tolerance is not None:
            sums.append((mass * log_joint.logsumexp(-2, keepdim=True)).sum(-1, keepdim=True))
        shares, totals, *likelihood = ranks.sum(sums)
        updated = torch.add(totals, moments, alpha=_inertia()) / (shares + _inertia())
        shares = torch.addcmul(shares, absent, weights)
        if tolerance is None:
            weights, moments = shares, updated
            path.append((weights, moments))
            continue
        weights, moments = torch.where(done, weights, shares), torch.where(done, moments, updated)
        path.append((weights, moments))
        if previous is not None:
            # NaN never converges: stop, the result shows it.
            change = (likelihood[0] - previous).abs()
            stop = ~done & ((change < tolerance) | change.isnan())
            steps = torch.where(stop, len(path) - 1, steps)
            done = done | stop
            if bool(done.all()):
                break
        previous = likelihood[0]
    return path, steps


def _backward(
    x: Tensor,
    mass: Tensor,
    floor: Tensor,
    steps: Tensor,
    weights: Tensor,
    moments: Tensor,
    grads: list[tuple[Tensor, Tensor]],
    stops: bool,
    spherical: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the derivatives by x, mass, weights, moments and floor.

    `weights` and `moments` are those of all steps, along dimension 1, and `grads` the derivatives
    by the last one or two of them. `stops` says whether problems may have stopped; their later
    steps are the identity.
    """
    features = _features(x)
    rows = features.mT
    absent = _absent(mass, ranks)
    count, components = weights.shape[1] - 1, weights.shape[2]
    block = max(1, _BLOCK_ENTRIES // max(1, mass.numel() * components))
    grad_features, grad_mass = torch.zeros_like(features), torch.zeros_like(mass)
    grad_floor = torch.zeros_like(floor)
    whole = sum(by_weights for by_weights, _ in grads)
    grad_weights, grad_moments = grads.pop()

    for end in range(count, 0, -block):
        start = max(0, end - block)
        # What does not depend on the derivative, for all steps of the block at once.
        before, after = slice(start, end), slice(start + 1, end + 1)
        slopes, offsets, precisions, means = _coefficients(
            weights[:, before], moments[:, before], floor.unsqueeze(1), spherical
        )
        log_joint = torch.baddbmm(offsets.flatten(1, 2), slopes.flatten(1, 2), features)
        posteriors = log_joint.reshape(*slopes.shape[:-1], log_joint.shape[-1]).softmax(-2)
        # How a and c vary with E x^2 / -2 and the mean, a first by its own half, then by the other.
        square = 2 * precisions.square()
        mixed = square * means
        linear = torch.addcmul(precisions, mixed, means)
        half = -0.5 * mixed * means
        by_a = torch.cat([square, linear], -1), torch.cat([mixed, mixed], -1)
        by_c = torch.cat([precisions + half, half * means], -1)
        shares = (1 - absent.unsqueeze(1)) * weights[:, after] + _inertia()
        parts = [slopes, posteriors, mass.unsqueeze(1) * posteriors, *by_a, by_c]
        parts += [shares.reciprocal(), weights[:, before].clamp_min(_inertia())]
        parts += [moments[:, after], means]
        if stops:
            turns = torch.arange(start, end, device=x.device).reshape(-1, 1, 1)
            parts.append(turns >= steps.unsqueeze(1))
        left, right, averages, changes = [], [], [], []
        for step in reversed(list(zip(*(part.unbind(1) for part in parts), strict=True))):
            slope, posterior, joint, own, other, offset, inverse, weight, moment, mean = step[:10]
            # Through the M-step.
            by_totals = inverse * grad_moments
            by_shares = grad_weights - (by_totals * moment).sum(-1, keepdim=True)
            if stops:
                by_totals = torch.where(step[10], 0.0, by_totals)
                by_shares = torch.where(step[10], 0.0, by_shares)
            before_weights, before_moments = grad_weights, grad_moments
            inertia = by_totals
            by_shares, by_totals = ranks.sum([by_shares, by_totals])
            # Through the posteriors.
            by_joint = torch.baddbmm(by_shares, by_totals, features)
            average = (posterior * by_joint).sum(-2, keepdim=True)
            by_log_joint = joint * (by_joint - average)
            left += [by_totals, slope]
            right += [joint, by_log_joint]
            averages.append(average)
            # Through a and c.
            by_slope = torch.bmm(by_log_joint, rows)
            by_offset = by_log_joint.sum(-1, keepdim=True)
            crossed = torch.cat(by_slope.chunk(2, -1)[::-1], -1)
            grad_moments = torch.addcmul(own * by_slope, other, crossed)
            change = torch.addcmul(own * by_slope, other, crossed)
            change = torch.addcmul(change, by_offset, offset)
            if spherical:
                change = _average_spreads(change, mean)
            changes.append(change)
            grad_moments = torch.add(change, inertia, alpha=_inertia())
            grad_weights = by_offset / weight
            if stops:
                grad_moments = torch.where(step[10], before_moments, grad_moments)
                grad_weights = torch.where(step[10], before_weights, grad_weights)
            if grads:
                by_weights, by_moments = grads.pop()
                grad_weights, grad_moments = grad_weights + by_weights, grad_moments + by_moments
        grad_features = torch.baddbmm(grad_features, torch.cat(left, 1).mT, torch.cat(right, 1))
        grad_mass = grad_mass + torch.cat(averages, 1).sum(1, keepdim=True)
        by_floor = torch.cat(changes, 1)[..., : x.shape[-1]].sum((-2, -1), keepdim=True)
        grad_floor = torch.sub(grad_floor, by_floor, alpha=0.5)
    by_square, by_x = grad_features.chunk(2, 1)
    grad_x = torch.addcmul(by_x, by_square, x.mT, value=-1).mT
    grad_weights = torch.where(absent != 0, whole, grad_weights)
    return grad_x, (1 - absent) * grad_mass, grad_weights, grad_moments, grad_floor


def _average_spreads(by_moments: Tensor, means: Tensor) -> Tensor:
    """Return the derivative by moments whose variances are averaged over the features."""
    by_squares, by_means = by_moments.chunk(2, -1)
    average = by_squares.mean(-1, keepdim=True).expand_as(by_squares)
    return torch.cat([average, torch.addcmul(by_means, means, average - by_squares)], -1)


def _features(x: Tensor) -> Tensor:
    """Return z(x), samples last: `(*batch, 2 D, N)`."""
    columns = x.mT
    return torch.cat([-0.5 * columns.square(), columns], -2)


def _parameters(moments: Tensor, floor: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Return variances and means."""
    squares, means = moments.chunk(2, -1)
    variances = torch.addcmul(torch.add(floor, squares, alpha=-2), means, means, value=-1)
    if spherical:
        variances = variances.mean(-1, keepdim=True).expand_as(variances)
    # Rounding may take a variance below the floor.
    return torch.maximum(variances, floor), means


def _coefficients(
    weights: Tensor, moments: Tensor, floor: Tensor, spherical: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a, c, the precisions and the means."""
    variances, means = _parameters(moments, floor, spherical)
    precisions = variances.reciprocal()
    linear = means * precisions
    norms = torch.addcmul(variances.log(), means, linear).sum(-1, keepdim=True)
    slopes = torch.cat([precisions, linear], -1)
    return slopes, torch.sub(weights.log(), norms, alpha=0.5), precisions, means


def _absent(mass: Tensor, ranks: Ranks) -> Tensor:
    """Return 1 for a problem without samples, else 0."""
    (total,) = ranks.sum([mass.sum(-1, keepdim=True)])
    return (total == 0).to(mass.dtype)
