"""Plans of few entries, of which every one is held."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs, Edge, Scope, axes_without, join
from multialign.transport.forms.base import Evaluation, Form, Level, moved_by
from multialign.transport.forms.pair_sweeps import PairSweeps
from multialign.transport.hessian import DenseHessian
from multialign.transport.problem import Problem, along

__all__ = ["Table", "Vector"]


class _Dense(Form):
    """A plan of which every entry is held."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.pairs = PairSweeps(problem.marginals, [nu == 0 for nu in problem.marginals])


class _DenseLevel(Level):
    form: _Dense

    @abstractmethod
    def exponent(self, potentials: Tensor) -> Tensor:
        """Return log of the plan times Z, `(B, n)`."""

    @abstractmethod
    def divided(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z, and the plan divided by it."""

    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        changes = None
        if not self.form.dual.is_relaxed:
            changes = self._changes_of_plan(potentials, times, inner)
        if changes is None or not bool(changes.isfinite().all()):
            changes = self._changes_of_logarithms(potentials, times)
        return moved_by(potentials, changes, self.form.scaling)

    def _changes_of_plan(self, potentials: Tensor, times: int, inner: int) -> Tensor:
        """Return the changes of sweeps, `(B, times, S)`; not finite where a marginal underflows."""
        sizes = self.form.problem.sizes
        count = len(sizes)
        variables = tuple(range(count))
        plan = self.divided(potentials)[1].view(len(potentials), *sizes)

        def joint(p: int) -> Tensor:
            before = (p - 1) % count
            axes = axes_without((before, p), count)
            table = plan.sum(axes) if axes else plan
            return table if before < p else table.mT

        def scale(p: int, here: Tensor, before: Tensor) -> None:
            plan.mul_(along(here.squeeze(-1), p, variables))
            if inner:
                plan.mul_(along(before.squeeze(-1), (p - 1) % count, variables))

        return self.form.pairs.sweep(times, inner, joint, scale)

    def _changes_of_logarithms(self, potentials: Tensor, times: int) -> Tensor:
        """Return the changes of sweeps, `(B, times, S)`."""
        marginals, sizes = self.form.problem.marginals, self.form.problem.sizes
        variables = tuple(range(len(sizes)))
        exponent = self.exponent(potentials).view(len(potentials), *sizes)
        blocks, shrinkage = list(potentials.split(sizes, -1)), self.shrinkage()
        steps = []
        for p in variables * times:
            step = marginals[p].log() - exponent.logsumexp(axes_without((p,), len(sizes)))
            if shrinkage is not None:
                step = shrinkage[p] * (blocks[p] + step) - blocks[p]
            step = step.masked_fill(marginals[p] == 0, 0.0)
            blocks[p] = blocks[p] + step
            exponent = exponent.add_(along(step, p, variables))
            steps.append(step)
        return torch.cat(steps, -1).view(len(potentials), times, -1)


class Vector(_Dense):
    """A plan as one vector of n entries; its marginals are products with an incidence matrix."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.incidence = _incidence(tuple(problem.sizes), problem.epsilon.device)
        self.cost = join(problem.costs, problem.sizes).flatten(1)
        self.absent = self.scaling.absent.double() @ self.incidence.mT > 0
        if problem.forbidden:
            masks = {scope: mask.double() for scope, mask in problem.forbidden.items()}
            self.absent |= join(masks, problem.sizes).flatten(1) > 0

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _VectorLevel(self, epsilon)


class _VectorLevel(_DenseLevel):
    form: Vector

    def __init__(self, form: Vector, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        scaled = form.cost / -epsilon.unsqueeze(-1)
        self._scaled = scaled.masked_fill_(form.absent, -math.inf)

    def evaluate(self, potentials: Tensor) -> Evaluation:
        log_total, plan = self.divided(potentials)
        incidence, scaling = self.form.incidence, self.form.scaling
        matrix = (plan.unsqueeze(-2) * incidence.mT) @ incidence
        marginals = matrix.diagonal(dim1=-2, dim2=-1)
        hessian = DenseHessian(scaling, lambda: scaling.matrix(matrix))
        return Evaluation(log_total, marginals, hessian, plan)

    def tangent(self, potentials: Tensor, now: Evaluation) -> Tensor:
        assert now.plan is not None
        part = torch.xlogy(now.plan, now.plan)
        return (now.plan * part.sum(-1, keepdim=True) - part) @ self.form.incidence

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        log_total, plan = self.divided(potentials)
        return log_total, plan @ self.form.incidence

    def divided(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        exponent = self.exponent(potentials)
        plan = exponent.softmax(-1)
        return exponent.amax(-1) - plan.amax(-1).log_(), plan

    def exponent(self, potentials: Tensor) -> Tensor:
        return torch.addmm(self._scaled, potentials, self.form.incidence.mT)


class Table(_Dense):
    """A plan as one table over all variables: a small one, or that of a full cost tensor."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.cost = join(problem.costs, problem.sizes)
        count = len(problem.sizes)
        self.axes = {scope: axes_without(scope, count) for scope in combinations(range(count), 2)}
        # Atoms of mass 0 are left out by an infinite cost.
        masks = [torch.where(nu == 0, -math.inf, 0.0) for nu in problem.marginals]
        tables: dict[Scope, Tensor] = {(p,): mask for p, mask in enumerate(masks)}
        for scope, mask in problem.forbidden.items():
            tables[scope] = torch.where(mask, -math.inf, 0.0)
        self.mask = join(tables, problem.sizes)

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _TableLevel(self, epsilon)


class _TableLevel(_DenseLevel):
    form: Table

    def __init__(self, form: Table, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        shaped = epsilon.view(len(epsilon), *[1] * len(form.problem.sizes))
        self._scaled = torch.addcdiv(form.mask, form.cost, shaped, value=-1)

    def evaluate(self, potentials: Tensor) -> Evaluation:
        log_total, plan = self.divided(potentials)
        tables = self._pair_sums(plan)
        found = Beliefs(log_total, _singles(tables), tables)
        return Evaluation(log_total, found.joined(), self.form.hessian(found), plan)

    def tangent(self, potentials: Tensor, now: Evaluation) -> Tensor:
        assert now.plan is not None
        part = torch.xlogy(now.plan, now.plan)
        moved = torch.cat(list(_singles(self._pair_sums(part)).values()), -1)
        return part.flatten(1).sum(-1, keepdim=True) * now.marginals - moved

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        now = self.evaluate(potentials)
        return now.log_total, now.marginals

    def exponent(self, potentials: Tensor) -> Tensor:
        blocks = potentials.split(self.form.problem.sizes, -1)
        unary = blocks[0]
        for block in blocks[1:-1]:
            unary = unary.unsqueeze(-1) + block.view(len(block), *[1] * (unary.ndim - 1), -1)
        exponent: Tensor = self._scaled + unary.unsqueeze(-1)
        exponent += blocks[-1].view(len(unary), *[1] * (exponent.ndim - 2), -1)
        return exponent.flatten(1)

    def divided(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.exponent(potentials)
        top = plan.amax(1, keepdim=True)
        plan = plan.sub_(top).exp_()
        total = plan.sum(1, keepdim=True)
        plan = plan.div_(total).view_as(self.form.cost)
        return (total.log_() + top).squeeze(1), plan

    def _pair_sums(self, plan: Tensor) -> dict[Edge, Tensor]:
        """Return the sums of a table over all but two variables."""
        return {edge: plan.sum(axes) if axes else plan for edge, axes in self.form.axes.items()}


def _singles(tables: dict[Edge, Tensor]) -> dict[int, Tensor]:
    """Return the marginals of single variables, given those of all pairs."""
    count = max(j for _, j in tables) + 1
    return {p: tables[(0, p)].sum(1) if p else tables[(0, 1)].sum(2) for p in range(count)}


@lru_cache(maxsize=64)
def _incidence(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return which entry of a plan belongs to which atom of each marginal, `(n, S)`."""
    axes = [torch.arange(size, device=device) for size in sizes]
    atoms = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    for p, first in enumerate(accumulate(sizes[:-1]), 1):
        atoms[:, p] += first
    shape = (len(atoms), sum(sizes))
    return torch.zeros(shape, dtype=torch.float64, device=device).scatter_(1, atoms, 1.0)
