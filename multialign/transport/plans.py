"""What iterations read of a plan: its sum, its marginals, and how these change.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu - m with m the marginals of the plan divided by Z. Minus its Hessian H has the
marginals on the diagonal and the pairwise marginals off it. (The Hessian of log Z has m m^T
subtracted, which acts on nothing that Newton's equation contains.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import combinations
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import (
    Beliefs,
    Edge,
    Scope,
    Which,
    Worker,
    axes_without,
    beliefs,
    join,
    log_marginal,
    sweep,
)
from multialign.transport.hessian import (
    AppliedHessian,
    DenseHessian,
    Hessian,
    RingMatrix,
    Scaling,
    dense,
    pairwise_hessian,
)
from multialign.transport.problem import Problem, along, log_marginals

__all__ = ["Evaluation", "Plan", "make_plan"]

# Up to this many multiplications for its Hessian a plan is kept whole, in a few operations a step.
_VECTOR_WORK = 2**18
# Up to this many entries it is kept as a table, which takes fewer operations than elimination.
_TABLE_ENTRIES = 2**15
# From this many entries products of matrices take less time than either.
_TRIANGLE_ENTRIES = 2**9
# From this many entries float32 is so much faster that it pays to begin with it.
_LARGE_ENTRIES = 2**19
# Up to this many atoms, and entries over the batch, the Hessian is a matrix that is factored.
_DENSE_ATOMS = 512
_DENSE_ENTRIES = 2**24
# The edges of `_Triangle`, and the part of a marginal that it may drop.
_TRIANGLE = ((0, 1), (0, 2), (1, 2))
_LOSS = {torch.float64: 1e-14, torch.float32: 1e-7}


class Evaluation(NamedTuple):
    """What is read of a plan at potentials x and epsilon."""

    log_total: Tensor
    """log Z, `(B,)`."""
    marginals: Tensor
    """m, `(B, S)` with S the sum of sizes."""
    hessian: Hessian
    plan: Tensor | None
    """The plan divided by Z, where it is kept whole."""


class Plan(Protocol):
    """A plan as a function of potentials x `(B, S)`, finite at absent atoms, and epsilon `(B,)`."""

    dtype: torch.dtype
    """That of its tables."""
    rounds: int
    """So often two sweeps take less time than a Newton step."""

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials, `(B, S)`."""

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Set one potential after another so that its marginal is the one wanted.

        With each, the one before it (of the first: the last) is set again too, and both in turn
        `inner` times, on the table of these two that the first setting needs anyway. A plan that
        builds no such table leaves that out.

        Returns:
            The potentials, and how far each sweep moved them, `(B, times)`: the mean of |dx_p|
            under nu_p, summed over p. To first order it is the L1 error before the sweep.
        """

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z `(B,)` and m `(B, S)`."""


def make_plan(problem: Problem, dtype: torch.dtype, backend: Worker = "torch") -> Plan:
    """Return the form of the plan that is fastest; `dtype` is that of large tables."""
    if problem.copies > 1:
        return _Copies(problem, backend)
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    if entries * sum(problem.sizes) ** 2 <= _VECTOR_WORK:
        return _Vector(problem)
    if entries < _LARGE_ENTRIES:
        dtype = torch.float64
    alike = len(problem.sizes) == 3 and len(set(problem.sizes)) == 1
    triangle = alike and set(problem.costs) == set(_TRIANGLE)
    if triangle and backend == "torch" and entries >= _TRIANGLE_ENTRIES:
        return _Triangle(problem, dtype)
    return _in_logarithms(problem, dtype, backend)


def _in_logarithms(problem: Problem, dtype: torch.dtype, backend: Worker) -> _Table | _Pairwise:
    """Return a form of the plan that is right at any range."""
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    if entries <= _TABLE_ENTRIES or any(len(scope) > 2 for scope in problem.costs):
        return _Table(problem)
    return _Pairwise(problem, dtype, backend)


class _Vector:
    """A plan of few entries, as one vector of n."""

    dtype = torch.float64
    rounds = 1

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scaling = Scaling(problem.marginals, self.dtype)
        self._pairs = _PairSweeps(problem.marginals, [nu == 0 for nu in problem.marginals])
        self._incidence = _incidence(tuple(problem.sizes), problem.epsilon.device)
        self._cost = join(problem.costs, problem.sizes).flatten(1)
        self._absent = self._scaling.absent.double() @ self._incidence.mT > 0
        self._scaled = (torch.empty(()), self._cost)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        log_total, plan = self.divided(potentials, epsilon)
        matrix = (plan.unsqueeze(-2) * self._incidence.mT) @ self._incidence
        marginals = matrix.diagonal(dim1=-2, dim2=-1)
        hessian = DenseHessian(self._scaling, lambda: self._scaling.matrix(matrix))
        return Evaluation(log_total, marginals, hessian, plan)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        assert now.plan is not None
        excess = self._cost - (now.plan * self._cost).sum(-1, keepdim=True)
        return (now.plan * excess) @ self._incidence

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        changes = _sweep_whole(self, self._pairs, self._problem, potentials, epsilon, times, inner)
        return _moved(potentials, changes, self._scaling)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        log_total, plan = self.divided(potentials, epsilon)
        return log_total, plan @ self._incidence

    def divided(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the plan divided by it, `(B, n)`."""
        exponent = self.exponent(potentials, epsilon)
        plan = exponent.softmax(-1)
        return exponent.amax(-1) - plan.amax(-1).log_(), plan

    def exponent(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return log of the plan times Z, `(B, n)`."""
        if epsilon is not self._scaled[0]:
            scaled = self._cost / -epsilon.unsqueeze(-1)
            self._scaled = (epsilon, scaled.masked_fill_(self._absent, -math.inf))
        return torch.addmm(self._scaled[1], potentials, self._incidence.mT)


class _Table:
    """A plan kept as one table over all variables: a small one, or that of a full cost tensor."""

    dtype = torch.float64
    rounds = 1

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scaling = Scaling(problem.marginals, self.dtype)
        self._pairs = _PairSweeps(problem.marginals, [nu == 0 for nu in problem.marginals])
        self._cost = join(problem.costs, problem.sizes)
        count = len(problem.sizes)
        self._axes = {scope: axes_without(scope, count) for scope in combinations(range(count), 2)}
        # Atoms of mass 0 are left out by an infinite cost.
        masks = [torch.where(nu == 0, -math.inf, 0.0) for nu in problem.marginals]
        self._mask = join({(p,): mask for p, mask in enumerate(masks)}, problem.sizes)
        self._scaled = (torch.empty(()), self._cost)
        self._shape = (len(problem.epsilon), *[1] * count)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        log_total, plan = self.divided(potentials, epsilon)
        tables = {edge: plan.sum(axes) if axes else plan for edge, axes in self._axes.items()}
        found = Beliefs(log_total, _singles(tables), tables)
        return Evaluation(log_total, found.joined().double(), _hessian(self._scaling, found), plan)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        assert now.plan is not None
        part = now.plan * self._cost
        tables = {edge: part.sum(axes) if axes else part for edge, axes in self._axes.items()}
        moved = torch.cat(list(_singles(tables).values()), -1)
        return moved - part.flatten(1).sum(-1, keepdim=True) * now.marginals

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        changes = _sweep_whole(self, self._pairs, self._problem, potentials, epsilon, times, inner)
        return _moved(potentials, changes, self._scaling)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        now = self.evaluate(potentials, epsilon)
        return now.log_total, now.marginals

    def exponent(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return log of the plan times Z, `(B, n)`."""
        if epsilon is not self._scaled[0]:
            scaled = torch.addcdiv(self._mask, self._cost, epsilon.view(self._shape), value=-1)
            self._scaled = (epsilon, scaled)
        blocks = potentials.split(self._problem.sizes, -1)
        unary = blocks[0]
        for block in blocks[1:-1]:
            unary = unary.unsqueeze(-1) + block.view(len(block), *[1] * (unary.ndim - 1), -1)
        exponent: Tensor = self._scaled[1] + unary.unsqueeze(-1)
        exponent += blocks[-1].view(len(unary), *[1] * (exponent.ndim - 2), -1)
        return exponent.flatten(1)

    def divided(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the plan divided by it as a table."""
        plan = self.exponent(potentials, epsilon)
        top = plan.amax(1, keepdim=True)
        plan = plan.sub_(top).exp_()
        total = plan.sum(1, keepdim=True)
        plan = plan.div_(total).view_as(self._cost)
        return (total.log_() + top).squeeze(1), plan


class _Triangle:
    """A plan of three marginals of K atoms each and three costs, by plain products of matrices.

    The plan is X_0(i, j) X_1(j, k) X_2(k, i), with half of each potential in either table it
    belongs to; what a table is multiplied by is the product of the two after it, transposed. Where
    the exponent range could lose what counts, another form takes over.
    """

    rounds = 4

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self._problem, self.dtype = problem, dtype
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
        self._logs: _Table | _Pairwise | None = None
        nu = torch.stack(problem.marginals)
        absent = nu == 0
        self._range = _Range(nu, dtype)
        wanted = (nu * math.exp(3 * self._range.raised)).to(dtype)
        self._pairs = _PairSweeps(wanted.unbind(0), absent.unbind(0))
        self._absent = absent.unsqueeze(-1) if bool(absent.any()) else None

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        found = self._read(potentials, epsilon)
        if found is None:
            return self._in_logs().evaluate(potentials, epsilon)
        log_total, marginals, tables = found
        if _is_dense(self._scaling):
            build = partial(self._fill, tables, marginals)
            return Evaluation(log_total, marginals, DenseHessian(self._scaling, build), None)
        singles = dict(enumerate(marginals.to(self.dtype).split(self._size, -1)))
        edges = {(0, 1): tables[0], (0, 2): tables[2].mT, (1, 2): tables[1]}
        hessian = pairwise_hessian(self._scaling, Beliefs(log_total, singles, edges))
        return Evaluation(log_total, marginals, hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        if self._logs is not None:
            return self._logs.tangent(potentials, epsilon, now)
        return _difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
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
        swept, moved = _moved(potentials, changes, self._scaling)
        if not math.isfinite(moved.sum().item()):
            return self._in_logs().sweep(potentials, epsilon, times, inner)
        self._swept = swept, epsilon, factors
        return swept, moved

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
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

    def _in_logs(self) -> _Table | _Pairwise:
        if self._logs is None:
            self._logs = _in_logarithms(self._problem, self.dtype, "torch")
        return self._logs


class _Range:
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


class _Pairwise:
    """A plan of pairwise costs, known through its marginals alone."""

    rounds = 1

    def __init__(self, problem: Problem, dtype: torch.dtype, backend: Worker) -> None:
        self._problem, self.dtype, self._backend = problem, dtype, backend
        self._scaling = Scaling(problem.marginals, dtype)
        self._which: Which = "all" if _is_dense(self._scaling) else "core"
        self._scaled: tuple[Tensor, dict[Edge, Tensor]] = (torch.empty(()), {})
        self._wanted = [x.to(dtype) for x in log_marginals(problem)]
        # Added to potentials: atoms of mass 0 have no plan.
        self._nowhere = torch.where(self._scaling.absent, -math.inf, 0.0)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        found = beliefs(*self._factors(potentials, epsilon), self._which, self._backend)
        hessian = _hessian(self._scaling, found)
        return Evaluation(found.log_total.double(), found.joined().double(), hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        return _difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        moved = []
        for _ in range(times):
            unaries, pairs = self._factors(potentials, epsilon)
            swept = torch.cat(sweep(unaries, pairs, self._wanted, self._backend), -1).double()
            swept = torch.where(self._scaling.absent, 0.0, swept)
            moved.append(_distance(swept - potentials, self._scaling))
            potentials = swept
        return potentials, torch.stack(moved, 1)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
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


class _Copies:
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
        self._range = _Range(problem.marginals[0].unsqueeze(0), self.dtype) if plain else None

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
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
        if _is_dense(self._scaling):
            hessian = DenseHessian(self._scaling, build)
        return Evaluation(log_total / self._count, marginal, hessian, None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        return _difference_quotient(self, self._problem, potentials, epsilon, now)

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
            moved.append(_distance(change, self._scaling))
        return potentials, torch.stack(moved, 1)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
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


def _difference_quotient(
    plan: Plan, problem: Problem, potentials: Tensor, epsilon: Tensor, now: Evaluation
) -> Tensor:
    """Return the tangent, exact enough for a direction, at the price of one evaluation.

    The step moves no exponent of weight by more than about 1e-3.
    """
    step = 1e-3 * (epsilon / problem.deviation).clamp_max(1.0)
    _, moved = plan.marginals(potentials, epsilon / (1 + step))
    return (now.marginals - moved) * (epsilon / step).unsqueeze(-1)


def _moved(potentials: Tensor, changes: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return potentials after changes `(B, times, S)`, and how far each moved them."""
    return potentials + changes.sum(1), _distance(changes.transpose(0, 1), scaling).mT


def _distance(change: Tensor, scaling: Scaling) -> Tensor:
    """Return how far a change `(*, B, S)` moves potentials, `(*, B)`."""
    far: Tensor = torch.linalg.vecdot(change.abs(), scaling.wanted)
    return far


class _PairSweeps:
    """Sweeps over a plan that is multiplied in place."""

    def __init__(self, wanted: Sequence[Tensor], absent: Sequence[Tensor]) -> None:
        """Prepare for marginals `(B, K_p)`, up to a factor, without the atoms that are absent."""
        self._wanted = [nu.unsqueeze(-1) for nu in wanted]
        some = bool(torch.cat(list(absent), -1).any())
        self._absent = [mask.unsqueeze(-1) for mask in absent] if some else None

    def sweep(
        self,
        times: int,
        inner: int,
        joint: Callable[[int], Tensor],
        scale: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Return the changes of potentials, `(B, times, S)`; not finite where the plan underflows.

        Args:
            times: How many sweeps.
            inner: How often each pair of variables is set in turn.
            joint: Returns the plan's marginal of variables p - 1 and p.
            scale: Multiplies the plan by factors `(B, K, 1)` of p, and of p - 1.
        """
        # What each sweep multiplies each potential by when it is visited, and before the next is.
        ratios = [nu.new_ones(times, 2, *nu.shape) for nu in self._wanted]
        slots = [ratio.flatten(0, 1).unbind(0) for ratio in ratios]
        sums = [torch.empty_like(nu) for nu in self._wanted]

        def match(p: int, table: Tensor, other: Tensor, ratio: Tensor) -> None:
            torch.div(self._wanted[p], torch.bmm(table, other, out=sums[p]), out=ratio)
            if self._absent is not None:
                ratio.masked_fill_(self._absent[p], 1.0)

        for first in range(0, 2 * times, 2):
            for p in range(len(slots)):
                here, before, table = slots[p][first], slots[p - 1][first + 1], joint(p)
                turned = table.mT
                match(p, turned, before, here)
                for _ in range(inner):
                    match(p - 1, table, here, before)
                    match(p, turned, before, here)
                scale(p, here, before)
        changes = torch.cat(ratios, 3).log_().sum(1)
        return changes.squeeze(-1).transpose(0, 1).double()


def _sweep_whole(
    plan: _Vector | _Table,
    pairs: _PairSweeps,
    problem: Problem,
    potentials: Tensor,
    epsilon: Tensor,
    times: int,
    inner: int,
) -> Tensor:
    """Return the changes of a plan's sweeps, `(B, times, S)`.

    They are made on the plan, or where some of its marginals are below the exponent range, its log.
    """
    count = len(problem.sizes)
    variables = tuple(range(count))
    whole = plan.divided(potentials, epsilon)[1].view(len(potentials), *problem.sizes)

    def joint(p: int) -> Tensor:
        before = (p - 1) % count
        axes = axes_without((before, p), count)
        table = whole.sum(axes) if axes else whole
        return table if before < p else table.mT

    def scale(p: int, here: Tensor, before: Tensor) -> None:
        whole.mul_(along(here.squeeze(-1), p, variables))
        if inner:
            whole.mul_(along(before.squeeze(-1), (p - 1) % count, variables))

    changes = pairs.sweep(times, inner, joint, scale)
    if bool(changes.isfinite().all()):
        return changes
    exponent = plan.exponent(potentials, epsilon).view(len(potentials), *problem.sizes)
    steps = []
    for p in variables * times:
        step = problem.marginals[p].log() - exponent.logsumexp(axes_without((p,), count))
        step = step.masked_fill(problem.marginals[p] == 0, 0.0)
        exponent = exponent.add_(along(step, p, variables))
        steps.append(step)
    return torch.cat(steps, -1).view(len(potentials), times, -1)


def _hessian(scaling: Scaling, found: Beliefs) -> Hessian:
    if _is_dense(scaling):
        return DenseHessian(scaling, lambda: scaling.matrix(dense(found)))
    return pairwise_hessian(scaling, found)


def _is_dense(scaling: Scaling) -> bool:
    return _fits_dense(*scaling.root.shape)


def _fits_dense(batch: int, atoms: int) -> bool:
    return atoms <= _DENSE_ATOMS and batch * atoms**2 <= _DENSE_ENTRIES


def _singles(tables: dict[Edge, Tensor]) -> dict[int, Tensor]:
    """Return the marginals of single variables, given those of all pairs."""
    count = max(j for _, j in tables) + 1
    return {p: tables[(0, p)].sum(1) if p else tables[(0, 1)].sum(2) for p in range(count)}


@lru_cache(maxsize=64)
def _incidence(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return which entry of a plan belongs to which atom of each marginal, `(n, S)`."""
    axes = [torch.arange(size, device=device) for size in sizes]
    atoms = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    first = torch.tensor([0, *sizes[:-1]], device=device).cumsum(0)
    shape = (len(atoms), sum(sizes))
    return torch.zeros(shape, dtype=torch.float64, device=device).scatter_(1, atoms + first, 1.0)
