"""Plain products of exponentials while the exponent range holds them, logarithms from then on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from multialign.transport.forms.base import Evaluation, Form, Level

__all__ = ["ExponentRange", "Guarded", "RangeError"]

# The part of a marginal that may be dropped.
_LOSS = {torch.float64: 1e-14, torch.float32: 1e-7}

_T = TypeVar("_T")


class RangeError(ArithmeticError):
    """The exponent range does not hold what a result is made of."""


class ExponentRange:
    """The whole exponent range, for tables X with the plan X_0(i, j) X_1(j, k) X_2(k, i).

    The tables are raised by a constant, and entries below a floor are dropped, so that no product
    is denormal.
    """

    def __init__(self, marginals: Tensor, dtype: torch.dtype) -> None:
        """Prepare for marginals `(n, B, K)`."""
        # The product of two entries above exp(floor) is not denormal. The product of three is at
        # most the square root of the largest number; a plan's larger entries have the rest.
        limits, entries = torch.finfo(dtype), 3 * marginals.shape[-1] ** 2
        self._floor = math.log(limits.tiny) / 2
        self.raised = (math.log(limits.max) - math.log(entries)) / 6
        # What is dropped of the plan is less than exp(floor) times the sum of what each entry is
        # multiplied by; `_trusted` is how large that may be, in units of the sum of the plan.
        smallest = marginals.masked_fill(marginals == 0, 1.0).amin((0, 2))
        self._trusted = smallest * math.exp(math.log(_LOSS[dtype] / entries) - self._floor)

    def exp_(self, x: Tensor) -> Tensor:
        """Return a table, given its logarithm with `raised` added, in the same storage."""
        return torch.threshold_(x, self._floor, -math.inf).exp_()

    def check(self, largest: Tensor, total: Tensor) -> None:
        """Raise unless tables are multiplied by at most `largest` `(B,)` in a plan of this sum."""
        holds = (largest <= self._trusted * total) & (total > 0) & (total < math.inf)
        if not bool(holds.all()):
            raise RangeError


class Guarded(Form):
    """A fast form that may raise `RangeError`, and the safe form that takes over when it does.

    The fast form is not tried again: epsilon falls, and the range that it needs grows.
    """

    def __init__(self, fast: Form, make_safe: Callable[[], Form]) -> None:
        self.problem, self.scaling, self.dual = fast.problem, fast.scaling, fast.dual
        self.dtype = fast.dtype
        self.sweep_pairs = fast.sweep_pairs
        self._fast, self._make_safe = fast, make_safe
        self._safe: Form | None = None

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _GuardedLevel(self, epsilon) if self._safe is None else self._safe.at(epsilon)

    def level(self, epsilon: Tensor, *, safe: bool) -> Level:
        """Return the plan in the fast form, or in the safe one, which stays from then on."""
        if not safe:
            return self._fast.at(epsilon)
        if self._safe is None:
            self._safe = self._make_safe()
        return self._safe.at(epsilon)


class _GuardedLevel(Level):
    form: Guarded

    def __init__(self, form: Guarded, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        self._level, self._is_safe = form.level(epsilon, safe=False), False

    def evaluate(self, potentials: Tensor) -> Evaluation:
        return self._try(lambda level: level.evaluate(potentials))

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        return self._try(lambda level: level.marginals(potentials))

    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        return self._try(lambda level: level.sweep(potentials, times, inner))

    def sweeps(self, potentials: Tensor, times: int, inner: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._is_safe:
            try:
                for swept in self._level.sweeps(potentials, times, inner):
                    potentials = swept[0]
                    yield swept
            except RangeError:
                self._level, self._is_safe = self.form.level(self.epsilon, safe=True), True
        yield from self._level.sweeps(potentials, times, inner)

    def _try(self, call: Callable[[Level], _T]) -> _T:
        if not self._is_safe:
            try:
                return call(self._level)
            except RangeError:
                self._level, self._is_safe = self.form.level(self.epsilon, safe=True), True
        return call(self._level)
