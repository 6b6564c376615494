"""What iterations read of a plan: its sum, its marginals, and how these change.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu - m with m the marginals of the plan divided by Z. Minus its Hessian H has the
marginals on the diagonal and the pairwise marginals off it. (The Hessian of log Z has m m^T
subtracted, which acts on nothing that Newton's equation contains.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import (
    Beliefs,
    Edge,
    Which,
    Worker,
    axes_without,
    beliefs,
    join,
    sweep,
)
from multialign.transport.hessian import DenseHessian, Hessian, PairwiseHessian, Scaling, dense
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

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials, `(B, S)`."""

    def sweep(self, potentials: Tensor, epsilon: Tensor, times: int = 1) -> Tensor:
        """Set one potential after another so that its marginal is the one wanted."""

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z `(B,)` and m `(B, S)`."""


def make_plan(problem: Problem, dtype: torch.dtype, backend: Worker = "torch") -> Plan:
    """Return the form of the plan that is fastest; `dtype` is that of large tables."""
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

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scaling = Scaling(problem.marginals, self.dtype)
        self._incidence = _incidence(tuple(problem.sizes), problem.epsilon.device)
        self._cost = join(problem.costs, problem.sizes).flatten(1)
        self._absent = self._scaling.absent.double() @ self._incidence.mT > 0
        self._scaled = (torch.empty(()), self._cost)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        log_total, plan = self.divided(potentials, epsilon)
        matrix = (plan.unsqueeze(-2) * self._incidence.mT) @ self._incidence
        marginals = matrix.diagonal(dim1=-2, dim2=-1)
        return Evaluation(log_total, marginals, DenseHessian(self._scaling, lambda: matrix), plan)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        assert now.plan is not None
        excess = self._cost - (now.plan * self._cost).sum(-1, keepdim=True)
        return (now.plan * excess) @ self._incidence

    def sweep(self, potentials: Tensor, epsilon: Tensor, times: int = 1) -> Tensor:
        return _sweep_whole(self, self._problem, potentials, epsilon, times)

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        log_total, plan = self.divided(potentials, epsilon)
        return log_total, plan @ self._incidence

    def divided(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the plan divided by it, `(B, n)`."""
        exponent = self.exponent(potentials, epsilon)
        log_total = exponent.logsumexp(-1, keepdim=True)
        return log_total.squeeze(-1), (exponent - log_total).exp()

    def exponent(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return log of the plan times Z, `(B, n)`."""
        if epsilon is not self._scaled[0]:
            scaled = self._cost / -epsilon.unsqueeze(-1)
            self._scaled = (epsilon, scaled.masked_fill_(self._absent, -math.inf))
        return torch.addmm(self._scaled[1], potentials, self._incidence.mT)


class _Table:
    """A plan kept as one table over all variables: a small one, or that of a full cost tensor."""

    dtype = torch.float64

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scaling = Scaling(problem.marginals, self.dtype)
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

    def sweep(self, potentials: Tensor, epsilon: Tensor, times: int = 1) -> Tensor:
        return _sweep_whole(self, self._problem, potentials, epsilon, times)

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

    The plan is X_12(i, j) X_13(i, k) X_23(j, k), with half of each potential in either table it
    belongs to. The tables use the whole exponent range: they are raised by a constant, and entries
    below a floor are dropped, so that no product is denormal. Where that could lose what counts,
    another form takes over.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self._problem, self.dtype = problem, dtype
        self._scaling = Scaling(problem.marginals, dtype)
        self._size = problem.sizes[0]
        self._cost = torch.stack([problem.costs[edge] for edge in _TRIANGLE])
        ends = torch.tensor(_TRIANGLE, device=self._cost.device)
        self._rows, self._columns = ends.unbind(1)
        self._scaled = (torch.empty(()), self._cost)
        self._nowhere = torch.where(self._scaling.absent, -math.inf, 0.0)
        self._logs: _Table | _Pairwise | None = None
        # The product of two entries above exp(floor) is no denormal; half of what three may have
        # below the largest number is left to entries of a plan that are larger than 1.
        limits, entries = torch.finfo(dtype), 3 * self._size**2
        self._floor = math.log(limits.tiny) / 2
        self._raised = (math.log(limits.max) - math.log(entries)) / 6
        nu = torch.stack(problem.marginals)
        absent = nu == 0
        # What is dropped of the plan is less than exp(floor) times the sum of what each entry is
        # multiplied by; `_trusted` is how large that may be, in units of the sum of the plan.
        smallest = torch.where(absent, 1.0, nu).amin((0, 2))
        self._trusted = smallest * math.exp(math.log(_LOSS[dtype] / entries) - self._floor)
        # An absent atom has a marginal of 0 and would be divided by it.
        self._absent = absent.to(dtype)
        self._wanted = (nu * math.exp(3 * self._raised) + self._absent).to(dtype)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        found = self._read(potentials, epsilon)
        if found is None:
            return self._in_logs().evaluate(potentials, epsilon)
        log_total, marginals, tables = found
        singles = marginals.to(self.dtype).split(self._problem.sizes, -1)
        edges = dict(zip(_TRIANGLE, tables, strict=True))
        known = Beliefs(log_total, dict(enumerate(singles)), edges)
        return Evaluation(log_total, marginals, _hessian(self._scaling, known), None)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        if self._logs is not None:
            return self._logs.tangent(potentials, epsilon, now)
        return _difference_quotient(self, self._problem, potentials, epsilon, now)

    def sweep(self, potentials: Tensor, epsilon: Tensor, times: int = 1) -> Tensor:
        if self._logs is not None:
            return self._logs.sweep(potentials, epsilon, times)
        x, y, z = self._factors(potentials, epsilon)
        wanted, absent = self._wanted.unbind(0), self._absent.unbind(0)
        ratios = []
        for _ in range(times):
            joint = (y @ z.mT).mul_(x)
            first = wanted[0] / joint.sum(-1).add_(absent[0])
            second = wanted[1] / (first.unsqueeze(-2) @ joint).squeeze(-2).add_(absent[1])
            x.mul_(first.unsqueeze(-1)).mul_(second.unsqueeze(-2))
            third = wanted[2] / (x @ z).mul_(y).sum(-2).add_(absent[2])
            y.mul_(third.unsqueeze(-2))
            ratios += [first, second, third]
        changes = torch.cat(ratios, -1).log().double().view(len(x), times, -1).sum(1)
        if not bool(changes.isfinite().all()):
            return self._in_logs().sweep(potentials, epsilon, times)
        return potentials + changes

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        found = self._read(potentials, epsilon)
        return found[:2] if found is not None else self._in_logs().marginals(potentials, epsilon)

    def _read(
        self, potentials: Tensor, epsilon: Tensor
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]] | None:
        """Return log Z, m, and the pairwise marginals; None where these would not be right."""
        if self._logs is not None:
            return None
        x, y, z = self._factors(potentials, epsilon)
        others = x.new_empty((3, *x.shape))
        by_x, by_y, by_z = others.unbind(0)
        torch.bmm(y, z.mT, out=by_x)
        torch.bmm(x, z, out=by_y)
        torch.bmm(x.mT, y, out=by_z)
        largest = others.amax((0, 2, 3)).double()
        tables = by_x.mul_(x), by_y.mul_(y), by_z.mul_(z)
        marginals = torch.cat([by_x.sum(-1), by_z.sum(-1), by_y.sum(-2)], -1).double()
        total = marginals[:, : self._size].sum(-1, keepdim=True)
        if not bool((largest <= self._trusted * total.squeeze(-1)).all()):
            return None
        others.div_(total.unsqueeze(-1))
        return total.squeeze(-1).log() - 3 * self._raised, marginals / total, tables

    def _factors(self, potentials: Tensor, epsilon: Tensor) -> Sequence[Tensor]:
        """Return X_12, X_13 and X_23, raised."""
        if epsilon is not self._scaled[0]:
            scaled = (self._cost / -epsilon.view(-1, 1, 1)).add_(self._raised)
            self._scaled = (epsilon, scaled.to(self.dtype))
        half = (potentials + self._nowhere).mul_(0.5).to(self.dtype)
        half = half.view(-1, 3, self._size).transpose(0, 1)
        x = self._scaled[1] + half[self._rows].unsqueeze(-1)
        x += half[self._columns].unsqueeze(-2)
        tables: Sequence[Tensor] = torch.threshold_(x, self._floor, -math.inf).exp_().unbind(0)
        return tables

    def _in_logs(self) -> _Table | _Pairwise:
        if self._logs is None:
            self._logs = _in_logarithms(self._problem, self.dtype, "torch")
        return self._logs


class _Pairwise:
    """A plan of pairwise costs, known through its marginals alone."""

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

    def sweep(self, potentials: Tensor, epsilon: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            unaries, pairs = self._factors(potentials, epsilon)
            swept = torch.cat(sweep(unaries, pairs, self._wanted, self._backend), -1).double()
            potentials = torch.where(self._scaling.absent, 0.0, swept)
        return potentials

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


def _difference_quotient(
    plan: Plan, problem: Problem, potentials: Tensor, epsilon: Tensor, now: Evaluation
) -> Tensor:
    """Return the tangent, exact enough for a direction, at the price of one evaluation.

    The step moves no exponent of weight by more than about 1e-3.
    """
    step = 1e-3 * (epsilon / problem.deviation).clamp_max(1.0)
    _, moved = plan.marginals(potentials, epsilon / (1 + step))
    return (now.marginals - moved) * (epsilon / step).unsqueeze(-1)


def _sweep_whole(
    plan: _Vector | _Table, problem: Problem, potentials: Tensor, epsilon: Tensor, times: int
) -> Tensor:
    """Sweep on the plan, or where some of its marginals are below the exponent range, its log."""
    count = len(problem.sizes)
    variables = tuple(range(count))
    _, whole = plan.divided(potentials, epsilon)
    whole = whole.view(len(whole), *problem.sizes)
    ratios = []
    for p in variables * times:
        nu = problem.marginals[p]
        ratio = (nu / whole.sum(axes_without((p,), count))).masked_fill_(nu == 0, 1.0)
        whole = whole.mul_(along(ratio, p, variables))
        ratios.append(ratio)
    changes = torch.cat(ratios, -1).log_()
    if not bool(changes.isfinite().all()):
        exponent = plan.exponent(potentials, epsilon).view(len(whole), *problem.sizes)
        steps = []
        for p in variables * times:
            nu = problem.marginals[p]
            step = nu.log() - exponent.logsumexp(axes_without((p,), count))
            step = step.masked_fill(nu == 0, 0.0)
            exponent = exponent.add_(along(step, p, variables))
            steps.append(step)
        changes = torch.cat(steps, -1)
    return potentials + changes.view(len(changes), times, -1).sum(1)


def _hessian(scaling: Scaling, found: Beliefs) -> Hessian:
    if _is_dense(scaling):
        return DenseHessian(scaling, lambda: dense(found))
    return PairwiseHessian(scaling, found)


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
