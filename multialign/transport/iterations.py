"""Iterations for the dual problem (see plan.py), without gradient.

Each problem of a batch has its own epsilon on the way and its own end. What is decided for each is
decided in Python numbers, read from the device once a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from multialign.transport.elimination import Worker
from multialign.transport.plan import Evaluation, Plan
from multialign.transport.plans import make_plan
from multialign.transport.problem import Problem

__all__ = ["Iterate", "finish", "newton", "sinkhorn"]

# Newton begins where sweeps lead, at these values of epsilon in standard deviations of the cost:
# while each sweep takes away half of the error, it does as much as a step at a fraction of its
# price. Each sets pairs of potentials so many further times.
_FIRST_LEVELS = (0.25, 0.05)
_INNER = 4
# From there, a level is left for an epsilon this much smaller at an L1 error of at most (target
# epsilon / deviation of the cost)^1.5, within bounds: a plan falls apart as epsilon falls, and mass
# that is in the wrong part by then takes a detour of many steps.
_LEVEL_FACTOR = 4.0
_LEVEL_POWER = 1.5
_LEVEL_ERRORS = (1e-8, 0.1)
# Added to the scaled Hessian: the error, within bounds.
_DAMPING = (1e-13, 1e-2)
# What conjugate gradients may leave of the right side: the error, and at most this.
_SLACKEST = 0.1
_OVERSOLVED = 0.3
# More of their steps than this are worth less than another Newton step.
_CONJUGATE_STEPS = 100
# A step moves no potential by more than this, in units of epsilon.
_LONGEST_STEP = 10.0
_ARMIJO = 1e-4
_SHORTEST_STEP = 2.0**-10
# At the last level, so many steps in a row without a smaller error, or a higher dual, are
# the end: rounding.
_PATIENCE = {torch.float64: 50, torch.float32: 3}
# Float32 is used where its rounding is below this part of the tolerance.
_SINGLE = 0.03

# Sinkhorn: a level is left at this L1 error or after so many sweeps.
_SWEEP_ERROR = 1e-2
_SWEEP_FACTOR = 2.0
_LEVEL_SWEEPS = 50
# The first epsilon, in standard deviations of the cost: there the plan is nearly a product.
_FIRST_EPSILON = 2.0
# The error of a sweep is read at so many first ones and then every so many.
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
def sinkhorn(
    problem: Problem, tolerance: float, max_iterations: int, backend: Worker = "torch"
) -> Iterate:
    """Sweep over the marginals, setting each potential to match its own given the others.

    On the way epsilon falls from a large value to the one wanted.

    References:
        :cite:t:`benamou:15`, Section 4.
    """
    plan = make_plan(problem, torch.float64, backend)
    target = problem.epsilon
    epsilon = torch.maximum(target, _FIRST_EPSILON * problem.deviation)
    wanted = torch.cat(problem.marginals, -1)
    potentials = torch.zeros_like(wanted)
    iterations = torch.zeros_like(target, dtype=torch.int64)
    level_sweeps = torch.zeros_like(iterations)
    active = torch.ones_like(target, dtype=torch.bool)

    count = 0
    while count < max_iterations:
        times = min(1 if count < _CHECKED_EACH else _CHECK_EVERY, max_iterations - count)
        count += times
        swept, _ = plan.sweep(potentials, epsilon, times)
        potentials = torch.where(active.unsqueeze(-1), swept, potentials)
        iterations = iterations + active * times
        level_sweeps = level_sweeps + times
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
    return finish(problem, plan, potentials, epsilon, iterations)


@torch.no_grad()
def newton(
    problem: Problem,
    tolerance: float,
    max_iterations: int,
    single: bool,
    backend: Worker = "torch",
) -> Iterate:
    """Follow the solution down in epsilon by its tangent, with Newton steps on the dual.

    One linear solve a step: for the Newton direction, and where the error is small enough already,
    for the tangent dx / d(1 / epsilon) as well, along which epsilon falls; a Sinkhorn sweep at the
    new epsilon takes back what the tangent overshot. A step at constant epsilon is halved until it
    raises the dual enough; if it never does, a sweep replaces it.

    `single` allows float32 in large tables, where its rounding is well below the tolerance. The end
    is then measured, and if that is needed improved, in float64.
    """
    numbers = torch.stack([problem.epsilon, problem.deviation], 1).tolist()
    # Where the plan has its mass, the cost is a few deviations below its mean.
    rounding = max(4 * row[1] / row[0] for row in numbers) * torch.finfo(torch.float32).eps
    single = single and rounding <= _SINGLE * tolerance
    plan = make_plan(problem, torch.float32 if single else torch.float64, backend)
    wanted = torch.cat(problem.marginals, -1)
    approaches = [_Approach(target, deviation, plan.rounds) for target, deviation in numbers]
    potentials, epsilon = _approach(plan, wanted, approaches, tolerance)
    descents = [
        _Descent(target, deviation, approach.epsilon, max_iterations)
        for (target, deviation), approach in zip(numbers, approaches, strict=True)
    ]
    if plan.dtype == torch.float32:
        potentials, epsilon, _, _ = _descend(
            plan, wanted, potentials, epsilon, descents, tolerance / 2
        )
        plan = make_plan(problem, torch.float64, backend)
    potentials, epsilon, now, error = _descend(
        plan, wanted, potentials, epsilon, descents, tolerance
    )
    iterations = torch.tensor([descent.steps for descent in descents], device=wanted.device)
    if any(descent.epsilon > descent.target or descent.searching for descent in descents):
        return finish(problem, plan, potentials, epsilon, iterations)
    return Iterate(_normalised(problem, potentials, now.log_total), iterations, error)


def _approach(
    plan: Plan, wanted: Tensor, approaches: list[_Approach], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Sweep at falling epsilon as long as it pays; return the potentials and epsilon."""
    # The product of the marginals, which is the plan at epsilon = infinity.
    potentials = product = torch.where(wanted == 0, 0.0, wanted.log())
    epsilons = [approach.epsilon for approach in approaches]
    epsilon = wanted.new_tensor(epsilons)
    going = [True] * len(approaches)
    while any(going):
        swept, moved = plan.sweep(potentials, epsilon, 2, _INNER)
        if not all(going):
            these = torch.tensor(going, device=wanted.device).unsqueeze(-1)
            swept = torch.where(these, swept, potentials)
        potentials = swept
        for approach, (first, second) in zip(approaches, moved.tolist(), strict=True):
            approach.look(first, second, tolerance)
        lower, before = [approach.epsilon for approach in approaches], epsilon
        if lower != epsilons:
            epsilons, epsilon = lower, wanted.new_tensor(lower)
            # What the cost has added to the potentials is, in cost units, what stays the same.
            potentials = torch.lerp(product, potentials, (before / epsilon).unsqueeze(-1))
        going = [approach.going for approach in approaches]
    return potentials, epsilon


class _Approach:
    """How one problem goes through the first levels."""

    def __init__(self, target: float, deviation: float, rounds: int) -> None:
        levels = [max(target, level * deviation) for level in _FIRST_LEVELS]
        self.epsilon, self._rounds, self.going = levels[0], rounds, True
        self._lower = [level for level in levels if level < levels[0]]

    def look(self, first: float, second: float, tolerance: float) -> None:
        """Decide how to go on after two sweeps that moved the potentials so far."""
        if not self.going:
            return
        halved = second <= first / 2
        if halved and self._lower:
            self.epsilon = self._lower.pop(0)
            return
        self._rounds -= 1
        solved = second**2 <= first * tolerance / 2
        self.going = halved and not solved and self._rounds > 0


def _descend(
    plan: Plan,
    wanted: Tensor,
    potentials: Tensor,
    epsilon: Tensor,
    descents: list[_Descent],
    tolerance: float,
) -> tuple[Tensor, Tensor, Evaluation, Tensor]:
    """Return where it ends: potentials, epsilon, and the plan and its error there."""
    start = direction = potentials
    for descent in descents:
        descent.begin(plan.dtype)
    while True:
        now = plan.evaluate(potentials, epsilon)
        gradient = wanted - now.marginals
        error = torch.linalg.vector_norm(gradient, 1, -1)
        dual = torch.linalg.vecdot(potentials, wanted) - now.log_total
        for descent, (one, its_dual) in zip(
            descents, torch.stack([error, dual], 1).tolist(), strict=True
        ):
            descent.look(one, its_dual, tolerance)
        states = [descent.state for descent in descents]
        if all(state == "stop" for state in states):
            break

        right = gradient
        if "onward" in states:
            lower = epsilon.new_tensor([descent.epsilon for descent in descents])
            change = (1 / lower - 1 / epsilon).unsqueeze(-1)
            right = gradient + change * plan.tangent(potentials, epsilon, now)
            epsilon = lower
        if "onward" in states or "step" in states:
            bounds = [descent.bounds(tolerance) for descent in descents]
            damping, slack = epsilon.new_tensor(bounds).unbind(1)
            fresh = now.hessian.solve(right, damping, slack, _CONJUGATE_STEPS)
            fresh = fresh.to(potentials.dtype)
            slope = torch.linalg.vecdot(gradient, fresh)
            longest = torch.linalg.vector_norm(fresh, math.inf, -1)
            for descent, row in zip(
                descents, torch.stack([slope, longest], 1).tolist(), strict=True
            ):
                descent.go(*row)
            states = [descent.state for descent in descents]
        else:
            fresh = direction
        lengths = [descent.length for descent in descents]
        if len(set(states)) == 1 and states[0] in ("step", "onward"):
            start, direction = potentials, fresh
            if min(lengths) < 1:
                fresh = epsilon.new_tensor(lengths).unsqueeze(-1) * fresh
            potentials = potentials + fresh
            if states[0] == "onward":
                potentials, _ = plan.sweep(potentials, epsilon, 1, _INNER)
            continue

        def where(*chosen: str, states: Sequence[str] = states) -> Tensor:
            return torch.tensor([[state in chosen] for state in states], device=wanted.device)

        again = where("retry", "sweep")
        start = torch.where(again, start, potentials)
        direction = torch.where(again, direction, fresh)
        ahead = start + epsilon.new_tensor(lengths).unsqueeze(-1) * direction
        if "onward" in states or "sweep" in states:
            ahead = torch.where(where("sweep"), start, ahead)
            swept, _ = plan.sweep(ahead, epsilon, 1, _INNER)
            ahead = torch.where(where("onward", "sweep"), swept, ahead)
        potentials = torch.where(where("stop"), potentials, ahead)

    if any(descent.searching for descent in descents):
        unfinished = epsilon.new_tensor([[descent.searching] for descent in descents]) > 0
        potentials = torch.where(unfinished, start, potentials)
    return potentials, epsilon, now, error


class _Descent:
    """How one problem goes down in epsilon, and how its line search goes."""

    def __init__(self, target: float, deviation: float, epsilon: float, budget: int) -> None:
        self.target, self.epsilon, self._budget = target, epsilon, budget
        depth = (target / max(target, deviation)) ** _LEVEL_POWER
        self._level_error = min(max(depth, _LEVEL_ERRORS[0]), _LEVEL_ERRORS[1])
        self.steps = 0

    def begin(self, dtype: torch.dtype) -> None:
        """Begin at a point, with tables of `dtype`."""
        # Differences of the dual below this, relative to it, are rounding.
        self._rounding = 50 * torch.finfo(dtype).eps
        self._patience = _PATIENCE[dtype]
        self.state: Literal["step", "onward", "retry", "sweep", "stop"] = "step"
        self._best, self._highest, self._stalled = math.inf, -math.inf, 0
        # The line search: the dual and its slope where it started, and the length tried.
        self._dual, self._slope, self.length = -math.inf, 0.0, 1.0
        self._now, self._error = -math.inf, math.inf
        self.searching = False

    def look(self, error: float, dual: float, tolerance: float) -> None:
        """Decide what to do at a point with this error and dual."""
        if self.state == "stop":
            return
        self._now, self._error = dual, error
        arrived = self.epsilon <= self.target
        if arrived:
            # Where parts of the plan tie, the dual can rise for long before the error falls.
            rises = dual > self._highest + self._rounding * (1 + abs(dual))
            self._stalled = 0 if error < self._best or rises else self._stalled + 1
            self._best = min(self._best, error)
            self._highest = max(self._highest, dual)
        least = self._dual + _ARMIJO * self.length * self._slope
        self.searching = dual < least - self._rounding * (1 + abs(dual))
        finished = arrived and (error <= tolerance or self._stalled >= self._patience)
        # A non-finite error never falls again: there is nothing to wait for.
        if finished or self.steps >= self._budget or not math.isfinite(error):
            self.state = "stop"
            self.searching &= error > tolerance
        elif self.searching:
            self.length /= 2
            self.state = "retry"
            if self.length < _SHORTEST_STEP:
                self.state, self._dual = "sweep", -math.inf
        elif not arrived and error <= self._level_error:
            self.state, self._dual = "onward", -math.inf
            self.epsilon = max(self.target, self.epsilon / _LEVEL_FACTOR)
        else:
            self.state = "step"
        self.steps += self.state != "stop"

    def bounds(self, tolerance: float) -> tuple[float, float]:
        """Return the damping of a step, and what conjugate gradients may leave of its right side.

        The step need not lead any nearer than the tolerance.
        """
        error = max(self._error, _DAMPING[0])
        slack = max(error, _OVERSOLVED * tolerance / error)
        return min(error, _DAMPING[1]), min(slack, _SLACKEST)

    def go(self, slope: float, longest: float) -> None:
        """Take a new direction with this slope and largest entry."""
        if self.state == "onward":
            self.length = 1.0
        elif self.state == "step" and not math.isfinite(longest):
            self.state, self._dual = "sweep", -math.inf
        elif self.state == "step":
            self._dual, self._slope = self._now, slope
            self.length = min(1.0, _LONGEST_STEP / longest) if longest > 0 else 1.0


def finish(
    problem: Problem, plan: Plan, potentials: Tensor, epsilon: Tensor, iterations: Tensor
) -> Iterate:
    """State the result at the epsilon asked for, which may not have been reached."""
    target = problem.epsilon
    potentials = potentials * (epsilon / target).unsqueeze(-1)
    log_total, marginals = plan.marginals(potentials, target)
    error = (marginals - torch.cat(problem.marginals, -1)).abs().sum(-1)
    return Iterate(_normalised(problem, potentials, log_total), iterations, error)


def _normalised(problem: Problem, potentials: Tensor, log_total: Tensor) -> Tensor:
    """Shift the potentials so that the plan sums to 1."""
    return potentials - (log_total / len(problem.marginals)).unsqueeze(-1)
