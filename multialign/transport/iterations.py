"""Iterations for the dual problem (see plans.py), without gradient.

Each problem of a batch has its own epsilon on the way and its own end. What is decided for each is
decided in Python numbers, read from the device once a step.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from multialign.transport.plans import Plan, make_plan
from multialign.transport.problem import Problem, cost_deviation, log_marginals

__all__ = ["Iterate", "newton", "sinkhorn"]

# The first epsilon, in standard deviations of the cost: there the plan is nearly a product.
_FIRST_EPSILON = 2.0

# Newton: on the way, a level is left for an epsilon this much smaller at an L1 error of at most
# (target epsilon / deviation of the cost)^2, within bounds. A plan falls apart as epsilon falls,
# and mass that is in the wrong part by then takes a detour of many steps.
_LEVEL_FACTOR = 4.0
_LEVEL_POWER = 2.0
_LEVEL_ERRORS = (1e-8, 0.1)
# Added to the scaled Hessian: the error, within bounds.
_DAMPING = (1e-13, 1e-2)
# What conjugate gradients may leave of the right side: the error, and at most this.
_SLACKEST = 0.1
# More of their steps than this are worth less than another Newton step.
_CONJUGATE_STEPS = 100
# A step moves no potential by more than this, in units of epsilon.
_LONGEST_STEP = 10.0
_ARMIJO = 1e-4
_SHORTEST_STEP = 2.0**-10
# Differences of the dual below this, relative to it, are rounding.
_ROUNDING = 1e-14
# At the last level, so many steps in a row without a smaller error are the end: rounding.
_PATIENCE = 50

# Sinkhorn: a level is left at this L1 error or after so many sweeps.
_SWEEP_ERROR = 1e-2
_SWEEP_FACTOR = 2.0
_LEVEL_SWEEPS = 50
# The error of a sweep is read at the first ones and then every so many.
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
def sinkhorn(problem: Problem, tolerance: float, max_iterations: int) -> Iterate:
    """Sweep over the marginals, setting each potential to match its own given the others.

    On the way epsilon falls from a large value to the one wanted.

    References:
        :cite:t:`benamou:15`, Section 4.
    """
    plan = make_plan(problem, torch.float64)
    target, epsilon = problem.epsilon, _first_epsilon(problem)
    wanted = torch.cat(problem.marginals, -1)
    potentials = torch.zeros_like(wanted)
    iterations = torch.zeros_like(target, dtype=torch.int64)
    level_sweeps = torch.zeros_like(iterations)
    active = torch.ones_like(target, dtype=torch.bool)

    for count in range(1, max_iterations + 1):
        swept = _sweep(problem, plan, potentials, epsilon)
        potentials = torch.where(active.unsqueeze(-1), swept, potentials)
        iterations = iterations + active
        level_sweeps = level_sweeps + 1
        if count > 4 and count % _CHECK_EVERY:
            continue
        error = (plan.marginals(potentials, epsilon)[1] - wanted).abs().sum(-1)
        arrived = epsilon <= target
        # A non-finite error never falls again: there is nothing to wait for.
        active = active & error.isfinite() & ~(arrived & (error <= tolerance))
        if not bool(active.any()):
            break
        ready = (error <= _SWEEP_ERROR) | (level_sweeps >= _LEVEL_SWEEPS)
        onward = active & ~arrived & ready
        lower = torch.where(onward, torch.maximum(target, epsilon / _SWEEP_FACTOR), epsilon)
        # The potentials in cost units, epsilon x, are what stays the same.
        potentials = potentials * (epsilon / lower).unsqueeze(-1)
        level_sweeps = torch.where(onward, 0, level_sweeps)
        epsilon = lower
    return _finish(problem, plan, potentials, epsilon, iterations)


@torch.no_grad()
def newton(problem: Problem, tolerance: float, max_iterations: int) -> Iterate:
    """Follow the solution down in epsilon by its tangent, with Newton steps on the dual.

    One linear solve a step: for the Newton direction, and where the error is small enough already,
    for the tangent dx / d(1 / epsilon) as well, along which epsilon falls. A step at constant
    epsilon is halved until it raises the dual enough; if it never does, a Sinkhorn sweep replaces
    it.
    """
    plan = make_plan(problem, torch.float64)
    wanted = torch.cat(problem.marginals, -1)
    potentials = start = direction = torch.zeros_like(wanted)
    epsilon = _first_epsilon(problem)
    descents = [_Descent(*row) for row in torch.stack([problem.epsilon, epsilon], 1).tolist()]

    for count in range(max_iterations + 1):
        now = plan.evaluate(potentials, epsilon)
        gradient = wanted - now.marginals
        error = gradient.abs().sum(-1)
        dual = (potentials * wanted).sum(-1) - now.log_total
        for descent, row in zip(descents, torch.stack([error, dual], 1).tolist(), strict=True):
            descent.look(*row, tolerance)
        states = [descent.state for descent in descents]
        if count == max_iterations or all(state == "stop" for state in states):
            break

        right = gradient
        if "onward" in states:
            lower = epsilon.new_tensor([descent.epsilon for descent in descents])
            change = (1 / lower - 1 / epsilon).unsqueeze(-1)
            right = gradient + change * plan.tangent(potentials, epsilon, now)
            epsilon = lower
        fresh = now.hessian.solve(
            right, error.clamp(*_DAMPING), error.clamp_max(_SLACKEST), _CONJUGATE_STEPS
        )
        slope, longest = (gradient * fresh).sum(-1), fresh.abs().amax(-1)
        for descent, row in zip(descents, torch.stack([slope, longest], 1).tolist(), strict=True):
            descent.go(*row)
        lengths = epsilon.new_tensor([[descent.length] for descent in descents])
        if all(state in ("onward", "step") for state in states):
            start, direction = potentials, fresh
            potentials = potentials + lengths * fresh
            continue

        def where(*chosen: str, states: list[str] = states) -> Tensor:
            return torch.tensor([[state in chosen] for state in states], device=wanted.device)

        again = where("retry", "sweep")
        start = torch.where(again, start, potentials)
        direction = torch.where(again, direction, fresh)
        ahead = start + lengths * direction
        if "sweep" in states:
            ahead = torch.where(where("sweep"), _sweep(problem, plan, start, epsilon), ahead)
        potentials = torch.where(where("stop"), potentials, ahead)

    unfinished = torch.tensor([[state in ("retry", "sweep")] for state in states])
    potentials = torch.where(unfinished.to(wanted.device), start, potentials)
    iterations = torch.tensor([descent.steps for descent in descents], device=wanted.device)
    return _finish(problem, plan, potentials, epsilon, iterations)


class _Descent:
    """How one problem goes down in epsilon, and how its line search goes."""

    def __init__(self, target: float, epsilon: float) -> None:
        self.target, self.epsilon = target, epsilon
        depth = (_FIRST_EPSILON * target / epsilon) ** _LEVEL_POWER
        self.level_error = min(max(depth, _LEVEL_ERRORS[0]), _LEVEL_ERRORS[1])
        self.state: Literal["step", "onward", "retry", "sweep", "stop"] = "step"
        self.steps = 0
        self.best, self.stalled = math.inf, 0
        # The line search: the dual and its slope where it started, and the length tried.
        self.dual, self.slope, self.length = -math.inf, 0.0, 1.0
        self._dual = -math.inf

    def look(self, error: float, dual: float, tolerance: float) -> None:
        """Decide what to do at a point with this error and dual."""
        if self.state == "stop":
            return
        self._dual = dual
        arrived = self.epsilon <= self.target
        if arrived:
            self.stalled = self.stalled + 1 if error >= self.best else 0
            self.best = min(self.best, error)
        # A non-finite error never falls again: there is nothing to wait for.
        finished = arrived and (error <= tolerance or self.stalled >= _PATIENCE)
        if finished or not math.isfinite(error):
            self.state = "stop"
            return
        if dual < self.dual + _ARMIJO * self.length * self.slope - _ROUNDING * (1 + abs(dual)):
            self.length /= 2
            self.state = "retry"
            if self.length < _SHORTEST_STEP:
                self.state, self.dual = "sweep", -math.inf
        elif not arrived and error <= self.level_error:
            self.state, self.dual = "onward", -math.inf
            self.epsilon = max(self.target, self.epsilon / _LEVEL_FACTOR)
        else:
            self.state = "step"

    def go(self, slope: float, longest: float) -> None:
        """Step, if that is new along a direction with this slope and largest entry."""
        self.steps += self.state != "stop"
        if self.state == "onward":
            self.length = 1.0
        elif self.state == "step":
            self.dual, self.slope = self._dual, slope
            self.length = min(1.0, _LONGEST_STEP / longest) if longest > 0 else 1.0


def _sweep(problem: Problem, plan: Plan, potentials: Tensor, epsilon: Tensor) -> Tensor:
    blocks = list(potentials.split(problem.sizes, -1))
    for p, (marginal, log_nu) in enumerate(
        zip(problem.marginals, log_marginals(problem), strict=True)
    ):
        found = plan.log_marginal(torch.cat(blocks, -1), epsilon, p)
        absent = marginal == 0
        blocks[p] = torch.where(absent, 0.0, blocks[p] + log_nu - found)
    return torch.cat(blocks, -1)


def _first_epsilon(problem: Problem) -> Tensor:
    return torch.maximum(problem.epsilon, _FIRST_EPSILON * cost_deviation(problem))


def _finish(
    problem: Problem, plan: Plan, potentials: Tensor, epsilon: Tensor, iterations: Tensor
) -> Iterate:
    """State the result at the epsilon asked for, which may not have been reached."""
    target = problem.epsilon
    potentials = potentials * (epsilon / target).unsqueeze(-1)
    log_total, marginals = plan.marginals(potentials, target)
    error = (marginals - torch.cat(problem.marginals, -1)).abs().sum(-1)
    shift = (log_total / len(problem.marginals)).unsqueeze(-1)
    return Iterate(potentials - shift, iterations, error)
