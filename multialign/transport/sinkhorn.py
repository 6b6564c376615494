"""Sweeps over the marginals for the dual problem (see forms/base.py), without gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multialign.transport.forms.base import Form, Level
from multialign.transport.problem import Problem

__all__ = ["Iterate", "finish", "sinkhorn"]

# A level is left at this L1 error or after this many sweeps.
_LEVEL_ERROR = 1e-2
_LEVEL_SWEEPS = 50
_LEVEL_FACTOR = 2.0
# The first epsilon, in standard deviations of the cost: there the plan is nearly a product.
_FIRST_EPSILON = 2.0
# The error is read after each of this many first sweeps, and then every so many.
_CHECKED_EACH = 4
_CHECK_EVERY = 10


class Iterate(NamedTuple):
    """Where the iterations ended."""

    potentials: Tensor
    """`(B, S)` in units of epsilon; the plan sums to 1."""
    iterations: Tensor
    """`(B,)`."""
    error: Tensor
    """`(B,)`: sum over p of the L1 distance of the plan's marginal from nu_p."""


@torch.no_grad()
def sinkhorn(problem: Problem, form: Form, tolerance: float, max_iterations: int) -> Iterate:
    """Set each potential in turn to match its marginal given the others.

    On the way epsilon falls from a large value to the one wanted.

    References:
        :cite:t:`benamou:15`, Section 4.
    """
    target = problem.epsilon
    level = form.at(torch.maximum(target, _FIRST_EPSILON * problem.deviation))
    wanted = torch.cat(problem.marginals, -1)
    potentials = torch.zeros_like(wanted)
    iterations = torch.zeros_like(target, dtype=torch.int64)
    level_sweeps = torch.zeros_like(iterations)
    active = torch.ones_like(target, dtype=torch.bool)

    count = 0
    while count < max_iterations:
        times = min(1 if count < _CHECKED_EACH else _CHECK_EVERY, max_iterations - count)
        count += times
        swept, _ = level.sweep(potentials, times)
        potentials = torch.where(active.unsqueeze(-1), swept, potentials)
        iterations = iterations + active * times
        level_sweeps = level_sweeps + times
        log_total, marginals = level.marginals(potentials)
        error = form.dual.at(potentials, level.epsilon, log_total, marginals).gradient.abs().sum(-1)
        arrived = level.epsilon <= target
        # A non-finite error never falls again: there is nothing to wait for.
        active = active & error.isfinite() & ~(arrived & (error <= tolerance))
        if tolerance > 0 and not bool(active.any()):
            break
        ready = (error <= _LEVEL_ERROR) | (level_sweeps >= _LEVEL_SWEEPS)
        falls = active & ~arrived & ready
        level_sweeps = torch.where(falls, 0, level_sweeps)
        lower = torch.maximum(target, level.epsilon / _LEVEL_FACTOR)
        lower = torch.where(falls, lower, level.epsilon)
        # The potentials in cost units, epsilon x, are what stays the same.
        if not form.dual.is_relaxed:
            potentials = form.balance(potentials, log_total)
        potentials = potentials * (level.epsilon / lower).unsqueeze(-1)
        level = form.at(lower)
    return finish(problem, form, level, potentials, iterations)


def finish(
    problem: Problem, form: Form, level: Level, potentials: Tensor, iterations: Tensor
) -> Iterate:
    """State the result at the epsilon asked for, which the last level may not have reached."""
    target = problem.epsilon
    potentials = potentials * (level.epsilon / target).unsqueeze(-1)
    log_total, marginals = form.at(target).marginals(potentials)
    error = form.dual.at(potentials, target, log_total, marginals).gradient.abs().sum(-1)
    return Iterate(form.normalised(potentials, log_total), iterations, error)
