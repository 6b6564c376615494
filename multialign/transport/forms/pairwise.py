"""Plans of pairwise costs, in logarithms, by elimination."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multialign.ops import Implementation
from multialign.transport.elimination import PairSet, beliefs
from multialign.transport.forms.base import Evaluation, Form, Level, distance, is_dense
from multialign.transport.message_sweeps import sweep
from multialign.transport.problem import Problem

__all__ = ["Pairwise"]


class Pairwise(Form):
    """A plan of pairwise costs, known through its marginals alone; right at any range."""

    def __init__(self, problem: Problem, dtype: torch.dtype, backend: Implementation) -> None:
        super().__init__(problem, dtype)
        self.backend = backend
        every = is_dense(self.scaling) or self.dual.is_relaxed
        self.pair_set: PairSet = "all" if every else "core"
        self.wanted = [x.to(dtype) for x in problem.log_marginals()]
        # Added to potentials: atoms of mass 0 have no plan.
        self.nowhere = torch.where(self.scaling.absent, -math.inf, 0.0)

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _PairwiseLevel(self, epsilon)


class _PairwiseLevel(Level):
    form: Pairwise

    def __init__(self, form: Pairwise, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        pairs = form.problem.pairs(epsilon).items()
        self._pairs = {(i, j): table.to(form.dtype) for (i, j), table in pairs}

    def evaluate(self, potentials: Tensor) -> Evaluation:
        form = self.form
        found = beliefs(self._unaries(potentials), self._pairs, form.pair_set, form.backend)
        return Evaluation(found.log_total.double(), found.joined().double(), form.hessian(found))

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        found = beliefs(self._unaries(potentials), self._pairs, "edges", self.form.backend)
        return found.log_total.double(), found.joined().double()

    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        form, moved, shrinkage = self.form, [], self.shrinkage()
        for _ in range(times):
            unaries = self._unaries(potentials)
            swept = sweep(unaries, self._pairs, form.wanted, form.backend, shrinkage)
            after = torch.where(form.scaling.absent, 0.0, torch.cat(swept, -1).double())
            moved.append(distance(after - potentials, form.scaling))
            potentials = after
        return potentials, torch.stack(moved, 1)

    def _unaries(self, potentials: Tensor) -> list[Tensor]:
        form = self.form
        unaries = (potentials + form.nowhere).to(form.dtype)
        return list(unaries.split(form.problem.sizes, -1))
