"""Plans of few entries, kept whole."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs, Edge, axes_without, join
from multialign.transport.hessian import DenseHessian, Scaling
from multialign.transport.plan import Evaluation, make_hessian, moved_by
from multialign.transport.problem import Problem, along
from multialign.transport.sweeps import PairSweeps

__all__ = ["Table", "Vector"]


class _Whole(ABC):
    """A plan of which every entry is kept."""

    dtype = torch.float64
    rounds = 1

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scaling = Scaling(problem.marginals, self.dtype)
        self._pairs = PairSweeps(problem.marginals, [nu == 0 for nu in problem.marginals])

    @abstractmethod
    def exponent(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return log of the plan times Z, `(B, n)`."""

    @abstractmethod
    def divided(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the plan divided by it."""

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Set one potential after another."""
        changes = self._changes(potentials, epsilon, times, inner)
        return moved_by(potentials, changes, self._scaling)

    def _changes(self, potentials: Tensor, epsilon: Tensor, times: int, inner: int) -> Tensor:
        """Return those of sweeps, `(B, times, S)`.

        They are made on the plan, or where some of its marginals are below the exponent range, its
        log.
        """
        marginals, sizes = self._problem.marginals, self._problem.sizes
        count = len(sizes)
        variables = tuple(range(count))
        whole = self.divided(potentials, epsilon)[1].view(len(potentials), *sizes)

        def joint(p: int) -> Tensor:
            before = (p - 1) % count
            axes = axes_without((before, p), count)
            table = whole.sum(axes) if axes else whole
            return table if before < p else table.mT

        def scale(p: int, here: Tensor, before: Tensor) -> None:
            whole.mul_(along(here.squeeze(-1), p, variables))
            if inner:
                whole.mul_(along(before.squeeze(-1), (p - 1) % count, variables))

        changes = self._pairs.sweep(times, inner, joint, scale)
        if bool(changes.isfinite().all()):
            return changes
        exponent = self.exponent(potentials, epsilon).view(len(potentials), *sizes)
        steps = []
        for p in variables * times:
            step = marginals[p].log() - exponent.logsumexp(axes_without((p,), count))
            step = step.masked_fill(marginals[p] == 0, 0.0)
            exponent = exponent.add_(along(step, p, variables))
            steps.append(step)
        return torch.cat(steps, -1).view(len(potentials), times, -1)


class Vector(_Whole):
    """A plan of few entries, as one vector of n."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._incidence = _incidence(tuple(problem.sizes), problem.epsilon.device)
        self._cost = join(problem.costs, problem.sizes).flatten(1)
        self._absent = self._scaling.absent.double() @ self._incidence.mT > 0
        self._scaled = (torch.empty(()), self._cost)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""
        log_total, plan = self.divided(potentials, epsilon)
        matrix = (plan.unsqueeze(-2) * self._incidence.mT) @ self._incidence
        marginals = matrix.diagonal(dim1=-2, dim2=-1)
        hessian = DenseHessian(self._scaling, lambda: self._scaling.matrix(matrix))
        return Evaluation(log_total, marginals, hessian, plan)

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials."""
        assert now.plan is not None
        excess = self._cost - (now.plan * self._cost).sum(-1, keepdim=True)
        return (now.plan * excess) @ self._incidence

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and m."""
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


class Table(_Whole):
    """A plan kept as one table over all variables: a small one, or that of a full cost tensor."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._cost = join(problem.costs, problem.sizes)
        count = len(problem.sizes)
        self._axes = {scope: axes_without(scope, count) for scope in combinations(range(count), 2)}
        # Atoms of mass 0 are left out by an infinite cost.
        masks = [torch.where(nu == 0, -math.inf, 0.0) for nu in problem.marginals]
        self._mask = join({(p,): mask for p, mask in enumerate(masks)}, problem.sizes)
        self._scaled = (torch.empty(()), self._cost)
        self._shape = (len(problem.epsilon), *[1] * count)

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""
        log_total, plan = self.divided(potentials, epsilon)
        tables = {edge: plan.sum(axes) if axes else plan for edge, axes in self._axes.items()}
        found = Beliefs(log_total, _singles(tables), tables)
        return Evaluation(
            log_total, found.joined().double(), make_hessian(self._scaling, found), plan
        )

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials."""
        assert now.plan is not None
        part = now.plan * self._cost
        tables = {edge: part.sum(axes) if axes else part for edge, axes in self._axes.items()}
        moved = torch.cat(list(_singles(tables).values()), -1)
        return moved - part.flatten(1).sum(-1, keepdim=True) * now.marginals

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z and m."""
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
