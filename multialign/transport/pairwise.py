"""Plans of pairwise costs, in logarithms, by elimination."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multialign.transport.elimination import Edge, Which, Worker, beliefs, sweep
from multialign.transport.hessian import Scaling
from multialign.transport.plan import (
    Evaluation,
    difference_quotient,
    distance,
    is_dense,
    make_hessian,
)
from multialign.transport.problem import Problem, log_marginals

__all__ = ["Pairwise"]


class Pairwise:
    """A plan of pairwise costs, known through its marginals alone."""

    rounds = 1

    def __init__(self, problem: Problem, dtype: torch.dtype, backend: Worker) -> None:
        self._problem, self.dtype, self._backend = problem, dtype, backend
        self._scaling = Scaling(problem.marginals, dtype)
        self._which: Which = "all" if is_dense(self._scaling) else "core"
        self._scaled: tuple[Tensor, dict[Edge, Tensor]] = (torch.empty(()), {})
        self._wanted = [x.to(dtype) for x in log_marginals(problem)]
        # Added to potentials: atoms of mass 0 have no plan.
        self._nowhere = torch.where(self._scaling.absent, -math.inf, 0.0)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""
        found = beliefs(*self._factors(potentials, epsilon), self._which, self._backend)
        hessian = make_hessian(self._scaling, found)
        return Evaluation(found.log_total.double(), found.joined().double(), hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials."""
        return difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Set one potential after another."""
        moved = []
        for _ in range(times):
            unaries, pairs = self._factors(potentials, epsilon)
            swept = torch.cat(sweep(unaries, pairs, self._wanted, self._backend), -1).double()
            swept = torch.where(self._scaling.absent, 0.0, swept)
            moved.append(distance(swept - potentials, self._scaling))
            potentials = swept
        return potentials, torch.stack(moved, 1)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and m."""
        found = beliefs(*self._factors(potentials, epsilon), "edges", self._backend)
        return found.log_total.double(), found.joined().double()

    def _factors(
        self, potentials: Tensor, epsilon: Tensor
    ) -> tuple[list[Tensor], dict[Edge, Tensor]]:
        if epsilon is not self._scaled[0]:
            pairs = self._problem.pairs(epsilon).items()
            self._scaled = (epsilon, {(i, j): table.to(self.dtype) for (i, j), table in pairs})
        unaries = (potentials + self._nowhere).to(self.dtype).split(self._problem.sizes, -1)
        return list(unaries), self._scaled[1]
