"""Plans of three marginals, by plain products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs
from multialign.transport.hessian import DenseHessian, RingMatrix, Scaling, pairwise_hessian
from multialign.transport.plan import Evaluation, Plan, difference_quotient, is_dense, moved_by
from multialign.transport.problem import Problem
from multialign.transport.sweeps import PairSweeps

__all__ = ["Range", "Triangle"]

# The part of a marginal that may be dropped.
_LOSS = {torch.float64: 1e-14, torch.float32: 1e-7}


class Triangle:
    """A plan of three marginals of K atoms each and three costs, by plain products of matrices.

    The plan is X_0(i, j) X_1(j, k) X_2(k, i), with half of each potential in either table it
    belongs to; what a table is multiplied by is the product of the two after it, transposed. Where
    the exponent range could lose what counts, another form takes over.
    """

    rounds = 4

    def __init__(self, problem: Problem, dtype: torch.dtype, fallback: Callable[[], Plan]) -> None:
        """Prepare; `fallback` makes the form that takes over."""
        self._problem, self.dtype, self._fallback = problem, dtype, fallback
        self._scaling = Scaling(problem.marginals, dtype)
        self._batch, self._size = problem.marginals[0].shape
        self._cost = torch.stack(
            [problem.costs[(0, 1)], problem.costs[(1, 2)], problem.costs[(0, 2)].mT]
        )
        nothing = torch.empty(())
        self._scaled = (nothing, self._cost)
        # Where the last sweep ended: potentials, epsilon, and the tables as it left them.
        self._swept = (nothing, nothing, nothing)
        self._matrix: RingMatrix | None = None
        self._logs: Plan | None = None
        nu = torch.stack(problem.marginals)
        absent = nu == 0
        self._range = Range(nu, dtype)
        wanted = (nu * math.exp(3 * self._range.raised)).to(dtype)
        self._pairs = PairSweeps(wanted.unbind(0), absent.unbind(0))
        self._absent = absent.unsqueeze(-1) if bool(absent.any()) else None

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""
        found = self._read(potentials, epsilon)
        if found is None:
            return self._in_logs().evaluate(potentials, epsilon)
        log_total, marginals, tables = found
        if is_dense(self._scaling):
            build = partial(self._fill, tables, marginals)
            return Evaluation(log_total, marginals, DenseHessian(self._scaling, build), None)
        singles = dict(enumerate(marginals.to(self.dtype).split(self._size, -1)))
        edges = {(0, 1): tables[0], (0, 2): tables[2].mT, (1, 2): tables[1]}
        hessian = pairwise_hessian(self._scaling, Beliefs(log_total, singles, edges))
        return Evaluation(log_total, marginals, hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials."""
        if self._logs is not None:
            return self._logs.tangent(potentials, epsilon, now)
        return difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Set one potential after another."""
        if self._logs is not None:
            return self._logs.sweep(potentials, epsilon, times, inner)
        if potentials is self._swept[0] and epsilon is self._swept[1]:
            factors = self._swept[2]
        else:
            factors = self._factors(potentials, epsilon)
        tables = factors.unbind(0)
        turned = [table.mT for table in tables]

        def joint(p: int) -> Tensor:
            return torch.bmm(turned[p - 2], turned[p]).mul_(tables[p - 1])

        def scale(p: int, here: Tensor, before: Tensor) -> None:
            tables[p - 1].mul_(here.mT).mul_(before)

        changes = self._pairs.sweep(times, inner, joint, scale)
        swept, moved = moved_by(potentials, changes, self._scaling)
        if not math.isfinite(moved.sum().item()):
            return self._in_logs().sweep(potentials, epsilon, times, inner)
        self._swept = swept, epsilon, factors
        return swept, moved

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and m."""
        found = self._read(potentials, epsilon)
        return found[:2] if found is not None else self._in_logs().marginals(potentials, epsilon)

    def _read(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return log Z, m, and the pairwise marginals; None where these would not be right."""
        if self._logs is not None:
            return None
        factors = self._factors(potentials, epsilon)
        turned, others = factors.mT.unbind(0), torch.empty_like(factors)
        for p, other in enumerate(others.unbind(0)):
            torch.bmm(turned[p - 1], turned[p - 2], out=other)
        largest = others.amax((0, 2, 3))
        tables = factors.mul_(others)
        marginals = tables.sum(-1)
        total = marginals[0].double().sum(-1)
        if not self._range.holds(largest, total):
            return None
        shares = (total if self._batch == 1 else total.unsqueeze(-1)).to(self.dtype)
        marginals = (marginals / shares).transpose(0, 1).reshape(self._batch, -1).double()
        return total.log() - 3 * self._range.raised, marginals, tables.div_(shares.unsqueeze(-1))

    def _factors(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return X_0, X_1 and X_2, raised, `(3, B, K, K)`."""
        if epsilon is not self._scaled[0]:
            scaled = (self._cost / -epsilon.view(-1, 1, 1)).add_(self._range.raised)
            if self._absent is not None:
                scaled.masked_fill_(self._absent, -math.inf)
            self._scaled = (epsilon, scaled.to(self.dtype))
        around = torch.cat([potentials, potentials[:, : self._size]], -1).to(self.dtype)
        around = around.view(self._batch, 4, -1).transpose(0, 1)
        x = torch.add(self._scaled[1], around[:3].unsqueeze(-1), alpha=0.5)
        x.add_(around[1:].unsqueeze(-2), alpha=0.5)
        return self._range.exp_(x)

    def _fill(self, tables: Tensor, marginals: Tensor) -> Tensor:
        if self._matrix is None:
            self._matrix = RingMatrix(self._scaling)
        return self._matrix.fill(tables, marginals)

    def _in_logs(self) -> Plan:
        if self._logs is None:
            self._logs = self._fallback()
        return self._logs


class Range:
    """The whole exponent range, for tables X with the plan X_0(i, j) X_1(j, k) X_2(k, i).

    They are raised by a constant, and entries below a floor are dropped, so that no product is
    denormal.
    """

    def __init__(self, marginals: Tensor, dtype: torch.dtype) -> None:
        """Prepare for marginals `(n, B, K)`."""
        # The product of two entries above exp(floor) is no denormal; half of what three may have
        # below the largest number is left to entries of a plan that are larger than 1.
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

    def holds(self, largest: Tensor, total: Tensor) -> bool:
        """Whether what tables are multiplied by is small enough, `(B,)`, for a plan's sum."""
        return bool((largest <= self._trusted * total).all())
