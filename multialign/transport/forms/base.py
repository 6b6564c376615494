"""What iterations ask of a plan: its sum, its marginals, and how these change.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu - m with m the marginals of the plan divided by Z. Minus its Hessian H has the
marginals on the diagonal and the pairwise marginals off it. (The Hessian of log Z has m m^T
subtracted, which vanishes on every right side of Newton's equation.)

A `Form` holds what does not depend on epsilon, a `Level` what does; a level is a function of the
potentials alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.transport.dual import Dual
from multialign.transport.elimination import Beliefs, Pairs
from multialign.transport.hessian import (
    DenseHessian,
    Hessian,
    ScaledMatrix,
    Scaling,
    pairwise_hessian,
)
from multialign.transport.problem import Problem

__all__ = ["Evaluation", "Form", "Level", "distance", "is_dense", "moved_by"]

# Relative to 1 / epsilon. It moves no exponent that carries mass by more than a few hundredths.
_QUOTIENT_STEP = 1e-3
# Up to this many atoms, and entries over the batch, the Hessian is a matrix that is factored.
_DENSE_ATOMS = 512
_DENSE_ENTRIES = 2**24


class Evaluation(NamedTuple):
    """A plan at given potentials and epsilon."""

    log_total: Tensor
    """log Z, `(B,)`."""
    marginals: Tensor
    """m, `(B, S)` with S the sum of sizes."""
    hessian: Hessian
    plan: Tensor | None = None
    """The plan divided by Z, from a form that holds every entry."""


class Form(ABC):
    """A plan as a function of epsilon and potentials."""

    dtype: torch.dtype
    """That of the tables."""
    sweep_pairs = 1
    """Pairs of sweeps that cost about one Newton step."""

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float64) -> None:
        self.problem, self.dtype = problem, dtype
        self.scaling = Scaling(problem.marginals, dtype, problem.relaxed)
        self.dual = Dual(problem)

    @abstractmethod
    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""

    def hessian(self, found: Beliefs) -> Hessian:
        """Return H of a plan known by its pairwise marginals: all of them if it `is_dense`."""
        if not is_dense(self.scaling):
            return pairwise_hessian(self.scaling, found)
        return self.dense_hessian(lambda: (found.joined(), found.tables))

    def dense_hessian(self, read: Callable[[], tuple[Tensor, Pairs]]) -> Hessian:
        """Return H as a matrix; `read` returns the marginals `(B, S)` and those of all pairs."""
        return DenseHessian(self.scaling, lambda: self._matrix.fill(*read()))

    def normalised(self, potentials: Tensor, log_total: Tensor) -> Tensor:
        """Divide the plan by its sum, where hard marginals fix that."""
        if self.dual.is_relaxed:
            return potentials
        return potentials - (log_total / len(self.problem.marginals)).unsqueeze(-1)

    def balance(self, potentials: Tensor, log_total: Tensor) -> Tensor:
        """Divide the plan by its sum, and give all variables the same mean potential.

        Constants that cancel would cost digits.
        """
        blocks = potentials.split(self.problem.sizes, -1)
        means = [
            (x * nu).sum(-1, keepdim=True)
            for x, nu in zip(blocks, self.problem.marginals, strict=True)
        ]
        common = torch.stack(means).mean(0) - log_total.unsqueeze(-1) / len(means)
        return torch.cat([x + (common - m) for x, m in zip(blocks, means, strict=True)], -1)

    @cached_property
    def _matrix(self) -> ScaledMatrix:
        return ScaledMatrix(self.scaling)


class Level(ABC):
    """A plan at one epsilon as a function of potentials x `(B, S)`, finite at absent atoms."""

    def __init__(self, form: Form, epsilon: Tensor) -> None:
        self.form, self.epsilon = form, epsilon

    @abstractmethod
    def evaluate(self, potentials: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""

    @abstractmethod
    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z `(B,)` and m `(B, S)`."""

    @abstractmethod
    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        """Set one potential after another so that its marginal is the one wanted.

        A form that sums the plan to tables of two variables sets both on such a table, in turn,
        `inner` further times. Other forms ignore `inner`.

        Returns:
            The potentials, and how far each sweep moved them, `(B, times)`: the mean of |dx_p|
            under nu_p, summed over p. To first order it is the L1 error before the sweep.
        """

    def sweeps(self, potentials: Tensor, times: int, inner: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Sweep on and on, `times` at once; what a form has multiplied in place it goes on with."""
        while True:
            potentials, moved = self.sweep(potentials, times, inner)
            yield potentials, moved

    def shrinkage(self) -> list[Tensor] | None:
        """Return rho / (rho + epsilon) of each marginal, `(B, 1)`; None if none is relaxed.

        A relaxed potential x is set to this times what would match its marginal:
        nu exp(-x epsilon / rho) is then the marginal :cite:`chizat:18`.
        """
        if not self.form.dual.is_relaxed:
            return None
        problem = self.form.problem
        assert problem.rho is not None
        shrinkage = [torch.ones_like(self.epsilon).unsqueeze(-1) for _ in problem.marginals]
        own = problem.rho / (problem.rho + self.epsilon.unsqueeze(-1))
        for p, one in zip(problem.relaxed, own.split(1, -1), strict=True):
            shrinkage[p] = one
        return shrinkage

    def tangent(self, potentials: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d log(1 / epsilon) at constant epsilon x, `(B, S)`.

        A difference quotient is exact enough for a direction, and costs one evaluation of the
        marginals.
        """
        level = self.form.at(self.epsilon / (1 + _QUOTIENT_STEP))
        _, moved = level.marginals(potentials * (1 + _QUOTIENT_STEP))
        return (now.marginals - moved) / _QUOTIENT_STEP


def moved_by(potentials: Tensor, changes: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return potentials after changes `(B, times, S)`, and how far each moved them."""
    return potentials + changes.sum(1), distance(changes.transpose(0, 1), scaling).mT


def distance(change: Tensor, scaling: Scaling) -> Tensor:
    """Return how far a change `(*, B, S)` moves potentials, `(*, B)`."""
    far: Tensor = torch.linalg.vecdot(change.abs(), scaling.wanted)
    return far


def is_dense(scaling: Scaling) -> bool:
    """Return whether H is a matrix that is factored."""
    batch, atoms = scaling.root.shape
    return atoms <= _DENSE_ATOMS and batch * atoms**2 <= _DENSE_ENTRIES
