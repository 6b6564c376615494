"""Plans of three marginals, by plain products of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs, Pairs
from multialign.transport.forms.base import Evaluation, Form, Level, is_dense, moved_by
from multialign.transport.forms.guarded import ExponentRange, RangeError
from multialign.transport.forms.pair_sweeps import PairSweeps
from multialign.transport.problem import Problem

__all__ = ["Triangle"]


class Triangle(Form):
    """A plan of three marginals of K atoms each and three costs, by plain products of matrices.

    The plan is X_0(i, j) X_1(j, k) X_2(k, i), with half of each potential in either table it
    belongs to; what a table is multiplied by is the product of the other two, transposed. Raises
    `RangeError` where the exponent range could lose what counts.
    """

    sweep_pairs = 4

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self.batch, self.size = problem.marginals[0].shape
        self.cost = torch.stack(
            [problem.costs[(0, 1)], problem.costs[(1, 2)], problem.costs[(0, 2)].mT]
        )
        nu = torch.stack(problem.marginals)
        absent = nu == 0
        self.absent = absent.unsqueeze(-1) if bool(absent.any()) else None
        self.range = ExponentRange(nu, dtype)
        wanted = (nu * math.exp(3 * self.range.raised)).to(dtype)
        self.pairs = PairSweeps(wanted.unbind(0), absent.unbind(0))

    def at(self, epsilon: Tensor) -> Level:
        """Return the plan at epsilon `(B,)`."""
        return _TriangleLevel(self, epsilon)


class _TriangleLevel(Level):
    form: Triangle

    def __init__(self, form: Triangle, epsilon: Tensor) -> None:
        super().__init__(form, epsilon)
        scaled = (form.cost / -epsilon.view(-1, 1, 1)).add_(form.range.raised)
        if form.absent is not None:
            scaled.masked_fill_(form.absent, -math.inf)
        self._scaled = scaled.to(form.dtype)

    def evaluate(self, potentials: Tensor) -> Evaluation:
        form = self.form
        log_total, marginals, tables = self._read(potentials)

        def read() -> tuple[Tensor, Pairs]:
            return marginals, {(0, 1): tables[0], (0, 2): tables[2].mT, (1, 2): tables[1]}

        if is_dense(form.scaling):
            return Evaluation(log_total, marginals, form.dense_hessian(read))
        singles = dict(enumerate(marginals.to(form.dtype).split(form.size, -1)))
        return Evaluation(
            log_total, marginals, form.hessian(Beliefs(log_total, singles, dict(read()[1])))
        )

    def marginals(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(potentials)[:2]

    def sweep(self, potentials: Tensor, times: int = 1, inner: int = 0) -> tuple[Tensor, Tensor]:
        return next(self.sweeps(potentials, times, inner))

    def sweeps(self, potentials: Tensor, times: int, inner: int) -> Iterator[tuple[Tensor, Tensor]]:
        tables = self._factors(potentials).unbind(0)
        turned = [table.mT for table in tables]

        def joint(p: int) -> Tensor:
            return torch.bmm(turned[p - 2], turned[p]).mul_(tables[p - 1])

        def scale(p: int, here: Tensor, before: Tensor) -> None:
            tables[p - 1].mul_(here.mT).mul_(before)

        while True:
            changes = self.form.pairs.sweep(times, inner, joint, scale)
            potentials, moved = moved_by(potentials, changes, self.form.scaling)
            if not math.isfinite(moved.sum().item()):
                raise RangeError
            yield potentials, moved

    def _read(self, potentials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Z, m, and the pairwise marginals."""
        form = self.form
        factors = self._factors(potentials)
        turned, others = factors.mT.unbind(0), torch.empty_like(factors)
        for p, other in enumerate(others.unbind(0)):
            torch.bmm(turned[p - 1], turned[p - 2], out=other)
        largest = others.amax((0, 2, 3))
        tables = factors.mul_(others)
        marginals = tables.sum(-1)
        total = marginals[0].double().sum(-1)
        form.range.check(largest, total)
        shares = (total if form.batch == 1 else total.unsqueeze(-1)).to(form.dtype)
        marginals = (marginals / shares).transpose(0, 1).reshape(form.batch, -1).double()
        return total.log() - 3 * form.range.raised, marginals, tables.div_(shares.unsqueeze(-1))

    def _factors(self, potentials: Tensor) -> Tensor:
        """Return X_0, X_1 and X_2, raised, `(3, B, K, K)`."""
        form = self.form
        around = torch.cat([potentials, potentials[:, : form.size]], -1).to(form.dtype)
        around = around.view(form.batch, 4, -1).transpose(0, 1)
        x = torch.add(self._scaled, around[:3].unsqueeze(-1), alpha=0.5)
        x.add_(around[1:].unsqueeze(-2), alpha=0.5)
        return form.range.exp_(x)
