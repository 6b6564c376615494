"""Plans of variables that are all alike, known through one of them."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from multialign.transport.elimination import Scope, Worker, log_marginal
from multialign.transport.hessian import AppliedHessian, DenseHessian, Hessian, Scaling
from multialign.transport.plan import Evaluation, difference_quotient, distance, is_dense
from multialign.transport.problem import Problem, log_marginals
from multialign.transport.triangle import Range

__all__ = ["Copies"]


class Copies:
    """A plan over M copies of one variable, each with each at the same symmetric cost.

    The copies have one potential. Everything here is that of one of them: log Z is divided by M,
    and H, which acts on the potential of all, is diag(m) + (M - 1) P with P a pair's marginal.
    """

    dtype = torch.float64
    rounds = 1

    def __init__(self, problem: Problem, backend: Worker) -> None:
        self._problem, self._backend, self._count = problem, backend, problem.copies
        self._scaling = Scaling(problem.marginals, self.dtype)
        self._wanted = log_marginals(problem)[0]
        nothing = torch.empty(())
        self._scaled, self._raised = (nothing, nothing), (nothing, nothing)
        # Three are read by plain products of matrices while the exponent range holds them.
        plain = backend == "torch" and self._count == 3
        self._range = Range(problem.marginals[0].unsqueeze(0), self.dtype) if plain else None

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""
        found = self._read(potentials, epsilon)
        if found is None:
            pair = self._log_marginal(potentials, epsilon, (0, 1))
            log_total = pair.flatten(1).logsumexp(1)
            pair = pair.sub_(log_total[:, None, None]).exp_()
        else:
            total, pair = found
            log_total, pair = self._log(total), pair.div_(total[:, None, None])
        marginal = pair.sum(-1)

        def times(vector: Tensor) -> Tensor:
            others = torch.bmm(pair, vector.unsqueeze(-1)).squeeze(-1)
            return torch.add(marginal * vector, others, alpha=self._count - 1)

        def build() -> Tensor:
            matrix = pair * (self._count - 1)
            matrix.diagonal(dim1=-2, dim2=-1).add_(marginal)
            return self._scaling.matrix(matrix)

        hessian: Hessian = AppliedHessian(self._scaling, times, build)
        if is_dense(self._scaling):
            hessian = DenseHessian(self._scaling, build)
        return Evaluation(log_total / self._count, marginal, hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials."""
        return difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Move the potential by 1 / M of what would set one copy's, that of each at once.

        References:
            :cite:t:`feydy:19`, Section 3.1, for two.
        """
        moved = []
        for _ in range(times):
            _, marginal = self._log_marginals(potentials, epsilon)
            change = (self._wanted - marginal).masked_fill(self._scaling.absent, 0.0)
            potentials = potentials + change / self._count
            moved.append(distance(change, self._scaling))
        return potentials, torch.stack(moved, 1)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and m."""
        log_total, marginal = self._log_marginals(potentials, epsilon)
        return log_total / self._count, marginal.exp()

    def _log_marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the logarithm of m."""
        found = self._read(potentials, epsilon)
        if found is not None:
            total, pair = found
            marginal = pair.sum(-1).div_(total.unsqueeze(-1)).log_()
            if bool((marginal > -math.inf).logical_or_(self._scaling.absent).all()):
                return self._log(total), marginal
            self._range = None
        joint = self._log_marginal(potentials, epsilon, (0,))
        log_total = joint.logsumexp(-1, keepdim=True)
        return log_total.squeeze(-1), joint - log_total

    def _read(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the sum of a plan of three, and the marginal of a pair times it, both raised.

        None where these would not be right.
        """
        if self._range is None:
            return None
        if epsilon is not self._raised[0]:
            scaled = (self._problem.costs[(0, 1)] / -epsilon[:, None, None]).add_(
                self._range.raised
            )
            absent = self._scaling.absent
            scaled.masked_fill_(absent.unsqueeze(-1) | absent.unsqueeze(-2), -math.inf)
            self._raised = (epsilon, scaled)
        half = potentials / 2
        table = self._range.exp_(self._raised[1] + (half.unsqueeze(-1) + half.unsqueeze(-2)))
        others = torch.bmm(table, table)
        pair = table.mul_(others)
        total = pair.sum((1, 2))
        if not self._range.holds(others.amax((1, 2)), total):
            self._range = None
            return None
        return total, pair

    def _log(self, total: Tensor) -> Tensor:
        assert self._range is not None
        return total.log() - 3 * self._range.raised

    def _log_marginal(self, potentials: Tensor, epsilon: Tensor, keep: Scope) -> Tensor:
        if epsilon is not self._scaled[0]:
            self._scaled = (epsilon, self._problem.pairs(epsilon)[(0, 1)])
        unaries = self._problem.unaries(potentials) * self._count
        pairs = dict.fromkeys(combinations(range(self._count), 2), self._scaled[1])
        return log_marginal(unaries, pairs, keep, self._backend)
