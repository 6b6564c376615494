"""Plans of variables that are all alike, known through one of them."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from multialign.ops import Implementation
from multialign.transport.elimination import Scope, log_marginal
from multialign.transport.forms.base import Evaluation, Form, Level, distance, is_dense
from multialign.transport.forms.guarded import ExponentRange, RangeError
from multialign.transport.hessian import AppliedHessian, DenseHessian, Hessian
from multialign.transport.problem import Problem

__all__ = ["Copies", "ThreeCopies"]


class Copies(Form):
    """A plan over M copies of one variable, each with each at the same symmetric cost.

    The copies have one potential. Everything here is that of one of them: log Z is divided by M,
    and H, which acts on the potential of all, is diag(m) + (M - 1) P with P a pair's marginal.
    """

    def __init__(self, problem: Problem, backend: Implementation) -> None:
        super().__init__(problem)
        self.backend, self.count = backend, problem.copies
        self.wanted = problem.log_marginals()[0]

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _CopiesLevel(self, epsilon)


class _CopiesLevel(Level):
    form: Copies

    def __init__(self, form: Copies, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        self._cost = form.problem.pairs(epsilon)[(0, 1)]

    def pair(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sum over all copies, and the marginal of two of them."""
        pair = self._log_marginal(potentials, (0, 1))
        log_total = pair.flatten(1).logsumexp(1)
        return log_total, pair.sub_(log_total[:, None, None]).exp_()

    def single(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sum over all copies, and the logarithm of m."""
        joint = self._log_marginal(potentials, (0,))
        log_total = joint.logsumexp(-1, keepdim=True)
        return log_total.squeeze(-1), joint - log_total

    def evaluate(self, potentials: Tensor) -> Evaluation:
        count, scaling = self.form.count, self.form.scaling
        log_total, pair = self.pair(potentials)
        marginal = pair.sum(-1)

        def times(vector: Tensor) -> Tensor:
            others = torch.bmm(pair, vector.unsqueeze(-1)).squeeze(-1)
            return torch.add(marginal * vector, others, alpha=count - 1)

        def build() -> Tensor:
            matrix = pair * (count - 1)
            matrix.diagonal(dim1=-2, dim2=-1).add_(marginal)
            return scaling.matrix(matrix)

        hessian: Hessian = AppliedHessian(scaling, times, build)
        if is_dense(scaling):
            hessian = DenseHessian(scaling, build)
        return Evaluation(log_total / count, marginal, hessian)

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        log_total, marginal = self.single(potentials)
        return log_total / self.form.count, marginal.exp()

    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        """Move the potential by 1 / M of what would set one copy's, that of each at once.

        References:
            :cite:t:`feydy:19`, Section 3.1, for two.
        """
        form, moved = self.form, []
        for _ in range(times):
            _, marginal = self.single(potentials)
            change = (form.wanted - marginal).masked_fill(form.scaling.absent, 0.0)
            potentials = potentials + change / form.count
            moved.append(distance(change, form.scaling))
        return potentials, torch.stack(moved, 1)

    def _log_marginal(self, potentials: Tensor, keep: Scope) -> Tensor:
        form = self.form
        unaries = form.problem.unaries(potentials) * form.count
        pairs = dict.fromkeys(combinations(range(form.count), 2), self._cost)
        return log_marginal(unaries, pairs, keep, form.backend)


class ThreeCopies(Copies):
    """Three copies, by plain products of matrices; raises `RangeError`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, "torch")
        self.range = ExponentRange(problem.marginals[0].unsqueeze(0), self.dtype)

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _ThreeCopiesLevel(self, epsilon)


class _ThreeCopiesLevel(_CopiesLevel):
    form: ThreeCopies

    def __init__(self, form: ThreeCopies, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        absent = form.scaling.absent
        self._cost = self._cost + form.range.raised
        self._cost.masked_fill_(absent.unsqueeze(-1) | absent.unsqueeze(-2), -math.inf)

    def pair(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        half = potentials / 2
        table = self.form.range.exp_(self._cost + (half.unsqueeze(-1) + half.unsqueeze(-2)))
        others = torch.bmm(table, table)
        pair = table.mul_(others)
        total = pair.sum((1, 2))
        self.form.range.check(others.amax((1, 2)), total)
        return total.log() - 3 * self.form.range.raised, pair.div_(total[:, None, None])

    def single(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        log_total, pair = self.pair(potentials)
        marginal = pair.sum(-1).log_()
        if not bool((marginal > -math.inf).logical_or_(self.form.scaling.absent).all()):
            raise RangeError
        return log_total, marginal
