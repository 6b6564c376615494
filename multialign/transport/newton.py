"""Newton's method for the dual problem (see forms/base.py), without gradient.

First sweeps at falling epsilon lead to where Newton's method converges. From there `_descend`
follows the solution down in epsilon by its tangent. Each problem of a batch has its own epsilon and
its own end. What is decided for each is decided in Python numbers, read from the device once a
step: how epsilon falls (`Continuation`), how far a step goes (`LineSearch`), and when to stop
(`Stopping`). The directions of all problems are solved for together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.ops import Implementation
from multialign.transport.forms.base import Form, Level
from multialign.transport.forms.choose import FormName, make_form
from multialign.transport.problem import Problem
from multialign.transport.sinkhorn import Iterate, finish

__all__ = ["newton"]

# Newton begins where first sweeps lead, at these values of epsilon in units of the cost: while each
# sweep halves the error, it does as much as a step at a fraction of its price. The unit is the
# standard deviation, or this part of the largest entry: atoms of little mass may be far away.
_FIRST_LEVELS = (0.25, 0.05)
_LARGEST_COST = 25.0
# Each sweep sets pairs of potentials this many further times.
_INNER = 4
# From there, a level is left for an epsilon this much smaller at an L1 error of at most (target
# epsilon / deviation of the cost)^1.5, within bounds, and a relative error of at most this at any
# atom: a plan falls apart as epsilon falls, and mass that is in the wrong part by then takes a
# detour of many steps.
_LEVEL_FACTOR = 4.0
_LEVEL_POWER = 1.5
_LEVEL_ERRORS = (1e-8, 0.1)
_LEVEL_RELATIVE_ERROR = 0.5
# From this many epsilon on, the constants in potentials matter to their digits.
_FAR = 1e6
# Added to the scaled Hessian: the error, within bounds.
_DAMPING = (1e-13, 1e-2)
# The part of the right side that conjugate gradients may leave: the error, and at most this.
_SLACKEST = 0.1
_OVERSOLVED = 0.3
# More of their steps than this are worth less than another Newton step.
_CONJUGATE_STEPS = 100
# The first step moves no potential by more than this, in units of epsilon. After a step that this
# bound has shortened and that raised the dual, the bound is larger by a factor: where parts of the
# plan exchange no mass their potentials are almost free, and may have to move far.
_LONGEST_STEP = 10.0
_LONGER_STEP = 4.0
_ARMIJO = 1e-4
_SHORTEST_STEP = 2.0**-10
# At the last level, this many steps in a row without a smaller error or a higher dual are the end:
# rounding.
_PATIENCE = {torch.float64: 50, torch.float32: 3}
# Float32 is used where its rounding is below this part of the tolerance.
_SINGLE = 0.03


@torch.no_grad()
def newton(
    problem: Problem,
    tolerance: float,
    max_iterations: int,
    single: bool,
    backend: Implementation,
    name: FormName,
) -> Iterate:
    """Follow the solution down in epsilon by its tangent, with Newton steps on the dual.

    `single` allows float32 in large tables, where its rounding is well below the tolerance. The end
    is then measured, and if that is needed improved, in float64.
    """
    tables = [cost.flatten(1) for cost in problem.costs.values()]
    largest = torch.stack([torch.linalg.vector_norm(x, math.inf, 1) for x in tables]).amax(0)
    scale = torch.maximum(problem.deviation, largest / _LARGEST_COST)
    # Read together: on an accelerator each reading waits.
    targets, deviations, scales = torch.stack([problem.epsilon, problem.deviation, scale]).tolist()
    numbers = list(zip(targets, deviations, strict=True))
    # Where the plan has its mass, the cost is a few deviations below its mean.
    rounding = max(4 * row[1] / row[0] for row in numbers) * torch.finfo(torch.float32).eps
    single = single and rounding <= _SINGLE * tolerance
    form = make_form(problem, torch.float32 if single else torch.float64, backend, name)
    potentials, level, epsilons = _first_sweeps(
        form, list(zip(targets, scales, strict=True)), tolerance
    )
    descents = [
        _Descent(Continuation(target, deviation, epsilon), max_iterations)
        for (target, deviation), epsilon in zip(numbers, epsilons, strict=True)
    ]
    if form.dtype == torch.float32:
        potentials, level, _ = _descend(form, level, potentials, descents, largest, tolerance / 2)
        form = make_form(problem, torch.float64, backend, name)
        level = form.at(level.epsilon)
    potentials, level, end = _descend(form, level, potentials, descents, largest, tolerance)
    steps = [descent.steps for descent in descents]
    iterations = _numbers(steps, torch.empty_like(problem.epsilon, dtype=torch.int64))
    if all(descent.continuation.arrived and not descent.search.failed for descent in descents):
        return Iterate(form.normalised(potentials, end.log_total), iterations, end.error)
    return finish(problem, form, level, potentials, iterations)


# -- First sweeps ----------------------------------------------------------------------------------


def _first_sweeps(
    form: Form, numbers: Sequence[tuple[float, float]], tolerance: float
) -> tuple[Tensor, Level, list[float]]:
    """Sweep at falling epsilon as long as it pays; return potentials, the last level, its epsilons.

    `numbers` are the target of epsilon and the scale of the cost, for each problem.
    """
    wanted = form.scaling.wanted
    # The product of the marginals, which is the plan at epsilon = infinity.
    potentials = product = torch.where(wanted == 0, 0.0, wanted.log())
    sweeps = [_FirstSweeps(*pair, form.sweep_pairs) for pair in numbers]
    epsilons = [one.epsilon for one in sweeps]
    level = form.at(_numbers(epsilons, wanted))
    pairs = level.sweeps(potentials, 2, _INNER)
    while True:
        going = [one.going for one in sweeps]
        if not any(going):
            return potentials, level, epsilons
        swept, moved = next(pairs)
        potentials = _choose(going, swept, potentials)
        if not all(going):
            pairs = level.sweeps(potentials, 2, _INNER)
        for one, (first, second) in zip(sweeps, moved.tolist(), strict=True):
            one.decide(first, second, tolerance)
        lower = [one.epsilon for one in sweeps]
        if lower != epsilons:
            epsilons, before = lower, level.epsilon
            level = form.at(_numbers(lower, wanted))
            # What the cost has added to the potentials is, in cost units, what stays the same.
            potentials = torch.lerp(product, potentials, (before / level.epsilon).unsqueeze(-1))
            pairs = level.sweeps(potentials, 2, _INNER)


class _FirstSweeps:
    """How one problem goes through the first levels, two sweeps at a time."""

    def __init__(self, target: float, scale: float, pairs: int) -> None:
        levels = [max(target, level * scale) for level in _FIRST_LEVELS]
        self.epsilon, self.going = levels[0], True
        self._lower = [level for level in levels if level < levels[0]]
        self._pairs = pairs

    def decide(self, first: float, second: float, tolerance: float) -> None:
        """Go on, or to the next level, or stop, after sweeps that moved the potentials so far."""
        if not self.going:
            return
        halved = second <= first / 2
        if halved and self._lower:
            self.epsilon = self._lower.pop(0)
            return
        self._pairs -= 1
        solved = second**2 <= first * tolerance / 2
        self.going = halved and not solved and self._pairs > 0


# -- Descent ---------------------------------------------------------------------------------------


class _End(NamedTuple):
    """What the last step saw."""

    log_total: Tensor
    """log Z, `(B,)`."""
    error: Tensor
    """`(B,)`."""


def _descend(
    form: Form,
    level: Level,
    potentials: Tensor,
    descents: Sequence[_Descent],
    largest: Tensor,
    tolerance: float,
) -> tuple[Tensor, Level, _End]:
    """Take steps until each problem stops; return where: potentials, level and what was seen there.

    `largest` `(B,)` is the largest entry of the cost: potentials in cost units differ by no more.

    In a step each problem either takes a new direction from where it is, tries a shorter step in
    the one it has, or gives that up for a sweep.
    """
    start = direction = potentials
    inverse = form.scaling.wanted.reciprocal().masked_fill(form.scaling.absent, 0.0)
    for descent in descents:
        descent.begin(form.dtype)
    while True:
        now = level.evaluate(potentials)
        dual, gradient, total, diagonal = form.dual.at(potentials, level.epsilon, *now[:2])
        error = torch.linalg.vector_norm(gradient, 1, -1)
        relative = error
        if not all(descent.continuation.arrived for descent in descents):
            relative = torch.linalg.vector_norm(gradient * inverse, math.inf, -1)
        for descent, (its_error, its_dual, worst) in zip(
            descents, torch.stack([error, dual, relative], 1).tolist(), strict=True
        ):
            descent.decide(its_error, its_dual, worst, tolerance)
        if all(descent.done for descent in descents):
            # A problem that stops at a step that raised the dual too little goes back.
            failed = [descent.search.failed for descent in descents]
            return _choose(failed, start, potentials), level, _End(now.log_total, error)

        renewed = [descent.renews for descent in descents]
        falls = [descent.falls for descent in descents]
        right = gradient
        if any(falls):
            lower = form.at(_numbers([d.continuation.epsilon for d in descents], gradient))
            # Potentials in cost units, epsilon x, change little as epsilon falls.
            ratio = (level.epsilon / lower.epsilon).unsqueeze(-1)
            if not form.dual.is_relaxed:
                right = gradient + (ratio - 1) * level.tangent(potentials, now)
                if float((largest / lower.epsilon).max()) > _FAR:
                    potentials = form.balance(potentials, now.log_total)
            potentials, level = ratio * potentials, lower
        if any(renewed):
            bounds = zip(*[descent.accuracy(tolerance) for descent in descents], strict=True)
            damping, slack = (_numbers(bound, gradient) for bound in bounds)
            damping = damping.unsqueeze(-1)
            if total is not None and diagonal is not None:
                right, damping = right / total, damping + diagonal
            fresh = now.hessian.solve(right, damping, slack, _CONJUGATE_STEPS)
            fresh = fresh.to(potentials.dtype)
            slope = torch.linalg.vecdot(gradient, fresh)
            longest = torch.linalg.vector_norm(fresh, math.inf, -1)
            for descent, row in zip(
                descents, torch.stack([slope, longest], 1).tolist(), strict=True
            ):
                descent.aim(*row)
            start = _choose(renewed, potentials, start)
            if any(falls):
                # Along what the plan hardly determines, the equation may have any solution.
                bound = (largest / level.epsilon).unsqueeze(-1)
                fresh = _choose(falls, torch.maximum(torch.minimum(fresh, bound), -bound), fresh)
            direction = _choose(renewed, fresh, direction)
        ahead = _ahead(start, direction, [descent.search.length for descent in descents])
        sweeping = [descent.sweeps for descent in descents]
        if any(sweeping):
            swept, _ = level.sweep(ahead, 1, _INNER)
            ahead = _choose(sweeping, swept, ahead)
        potentials = _choose([descent.done for descent in descents], potentials, ahead)


def _ahead(start: Tensor, direction: Tensor, lengths: Sequence[float]) -> Tensor:
    """Return start + length * direction; a direction of length 0 may be anything."""
    if all(length == 1 for length in lengths):
        return start + direction
    ahead = start + _numbers(lengths, start).unsqueeze(-1) * direction
    return _choose([length > 0 for length in lengths], ahead, start)


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a number for each problem; of one problem, without a copy that would wait."""
    return like.new_full((1,), values[0]) if len(values) == 1 else like.new_tensor(values)


def _choose(flags: Sequence[bool], yes: Tensor, no: Tensor) -> Tensor:
    """Choose for each problem of a batch."""
    if all(flags):
        return yes
    if not any(flags):
        return no
    return torch.where(torch.tensor(flags, device=yes.device).unsqueeze(-1), yes, no)


class Continuation:
    """How epsilon falls to its target for one problem.

    With each fall, the step follows the tangent dx / d(1 / epsilon) as well, and a sweep at the new
    epsilon takes back what the tangent overshot.
    """

    def __init__(self, target: float, deviation: float, epsilon: float) -> None:
        self.epsilon, self._target = epsilon, target
        depth = (target / max(target, deviation)) ** _LEVEL_POWER
        self._level_error = min(max(depth, _LEVEL_ERRORS[0]), _LEVEL_ERRORS[1])

    @property
    def arrived(self) -> bool:
        """Whether epsilon is at its target."""
        return self.epsilon <= self._target

    def fall(self, error: float, worst: float) -> bool:
        """Lower epsilon, if it may fall and the errors, L1 and relative, are small enough."""
        if self.arrived or error > self._level_error or worst > _LEVEL_RELATIVE_ERROR:
            return False
        self.epsilon = max(self._target, self.epsilon / _LEVEL_FACTOR)
        return True


class LineSearch:
    """Halves a step of one problem until it raises the dual enough (Armijo's rule)."""

    def __init__(self, rounding: float) -> None:
        self._rounding = rounding
        self.length = 1.0
        self.failed = False
        """Whether the last step raised the dual too little."""
        self.reset()

    def reset(self, length: float = 1.0) -> None:
        """Take the next step as it is."""
        self._dual, self._slope, self.length = -math.inf, 0.0, length
        self._longest = _LONGEST_STEP
        self._clipped = False

    def begin(self, dual: float, slope: float, longest: float) -> None:
        """Begin where the dual has this value, in a direction of this slope and largest entry."""
        self._dual, self._slope = dual, slope
        self._clipped = longest > self._longest
        self.length = self._longest / longest if self._clipped else 1.0
        self._shortest = self.length * _SHORTEST_STEP

    def look(self, dual: float) -> None:
        """See whether the step raised the dual enough."""
        least = self._dual + _ARMIJO * self.length * self._slope
        self.failed = dual < least - self._rounding * (1 + abs(dual))
        if self._clipped:
            factor = 0.5 if self.failed else _LONGER_STEP
            self._longest = max(self._longest * factor, _LONGEST_STEP)

    def halve(self) -> bool:
        """Halve the step; return whether it is still worth trying."""
        self.length /= 2
        return self.length >= self._shortest


class Stopping:
    """Tells when rounding leaves nothing to gain at the last level."""

    def __init__(self, rounding: float, patience: int) -> None:
        self._rounding, self._patience = rounding, patience
        self._best, self._highest, self._stalled = math.inf, -math.inf, 0

    def stalls(self, error: float, dual: float) -> bool:
        """Return whether too many steps in a row brought nothing.

        Where parts of the plan tie, the dual can rise for long before the error falls.
        """
        rises = dual > self._highest + self._rounding * (1 + abs(dual))
        self._stalled = 0 if error < self._best or rises else self._stalled + 1
        self._best = min(self._best, error)
        self._highest = max(self._highest, dual)
        return self._stalled >= self._patience


class _Descent:
    """What one problem does in each step."""

    def __init__(self, continuation: Continuation, budget: int) -> None:
        self.continuation, self._budget = continuation, budget
        self.steps = 0

    def begin(self, dtype: torch.dtype) -> None:
        """Begin at a point, with tables of `dtype`."""
        # Differences of the dual below this, relative to it, are rounding.
        rounding = 50 * torch.finfo(dtype).eps
        self.search = LineSearch(rounding)
        self._stopping = Stopping(rounding, _PATIENCE[dtype])
        self._error, self._dual = math.inf, -math.inf
        self.done = self.falls = self.renews = self.sweeps = False

    def decide(self, error: float, dual: float, worst: float, tolerance: float) -> None:
        """Decide what to do at a point with this L1 error, dual and largest relative error."""
        if self.done:
            return
        self._error, self._dual = error, dual
        self.search.look(dual)
        arrived = self.continuation.arrived
        stalled = arrived and self._stopping.stalls(error, dual)
        solved = arrived and error <= tolerance
        # A non-finite error never falls again: there is nothing to wait for.
        self.falls = self.renews = self.sweeps = False
        if solved or stalled or self.steps >= self._budget or not math.isfinite(error):
            self.done = True
            self.search.failed &= error > tolerance
            return
        self.steps += 1
        if self.search.failed:
            if not self.search.halve():
                self._sweep_instead()
            return
        self.falls = self.sweeps = self.continuation.fall(error, worst)
        self.renews = True

    def accuracy(self, tolerance: float) -> tuple[float, float]:
        """Return the damping of a step, and the part of its right side that may be left.

        The step need not lead any nearer than the tolerance.
        """
        error = max(self._error, _DAMPING[0])
        slack = max(error, _OVERSOLVED * tolerance / error)
        return min(error, _DAMPING[1]), min(slack, _SLACKEST)

    def aim(self, slope: float, longest: float) -> None:
        """Take a new direction with this slope and largest entry, if one is wanted."""
        if not self.renews:
            return
        if self.falls:
            self.search.reset()
        elif math.isfinite(longest):
            self.search.begin(self._dual, slope, longest)
        else:
            self._sweep_instead()

    def _sweep_instead(self) -> None:
        """Sweep from where the step started."""
        self.search.reset(length=0.0)
        self.sweeps = True
