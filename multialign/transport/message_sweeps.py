"""Sweeps over a plan of pairwise costs, by messages between its variables.

A sweep visits the variables from the last one summed out to the first, and sets the potential of
each. A step and the earlier ones that ended in its variable form a branch. What depends on a branch
alone is its message, a log-factor of the variables that it ends in; the visit of the branch changes
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multialign.ops import Implementation, log_matmul_reduce, log_matvec, log_product
from multialign.transport.elimination import (
    Collected,
    Pairs,
    Scope,
    Step,
    elimination_order,
    log_marginal,
)

__all__ = ["sweep"]


def sweep(
    unaries: Sequence[Tensor],
    pairs: Pairs,
    wanted: Sequence[Tensor],
    backend: Implementation = "torch",
    shrinkage: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Set one potential after another so that its marginal is the one wanted.

    Args:
        unaries: Potentials `(B, K_p)`, -inf at atoms of mass 0.
        pairs: The tables of -C / epsilon.
        wanted: The logarithms of the marginals wanted.
        backend: What multiplies tables.
        shrinkage: What each potential is multiplied by when it is set, `(B, 1)`.
    """
    found = dict(enumerate(unaries))
    order = elimination_order(found, pairs, ())
    if order.held is None:
        return _Visits(found, pairs, order.steps, wanted, backend, shrinkage).potentials
    potentials = list(unaries)
    for p, log_nu in enumerate(wanted):
        step = log_nu - log_marginal(potentials, pairs, (p,), backend)
        potentials[p] = torch.where(log_nu == -math.inf, -math.inf, potentials[p] + step)
        if shrinkage is not None:
            potentials[p] = shrinkage[p].to(step.dtype) * potentials[p]
    return potentials


class _Visits:
    """The visits of one sweep."""

    def __init__(
        self,
        unaries: Mapping[int, Tensor],
        pairs: Pairs,
        steps: Sequence[Step],
        wanted: Sequence[Tensor],
        backend: Implementation,
        shrinkage: Sequence[Tensor] | None,
    ) -> None:
        self._backend, self._shrinkage = backend, shrinkage
        self._x, self._pairs, self._steps, self._wanted = dict(unaries), pairs, steps, wanted
        self._messages = Collected(unaries, pairs, steps, backend, keep=False).messages
        # The steps that ended in each set of neighbours, and the branches of each step.
        self._ending: dict[Scope, list[int]] = {}
        self._branches: list[list[int]] = [[] for _ in steps]
        for n, step in enumerate(steps):
            self._ending.setdefault(step.neighbours, []).append(n)
            for m in range(n + 1, len(steps)):
                if steps[m].variable in step.neighbours:
                    self._branches[m].append(n)
                    break
        for n in self._ending[()]:
            self._visit(n, None, False)

    @property
    def potentials(self) -> list[Tensor]:
        """The potentials after the visits."""
        return [self._x[p] for p in range(len(self._x))]

    def _visit(self, n: int, outer: Tensor | None, again: bool) -> None:
        """Set the potentials of a branch.

        Args:
            n: Its last step.
            outer: The log-message from the rest of the graph to the step's neighbours.
            again: Whether the branch's own message is needed after the visit.
        """
        j = self._steps[n].variable
        change = self._wanted[j] - (self._own(j) + self._from_outside(n, outer))
        self._x[j] = torch.where(self._wanted[j] == -math.inf, -math.inf, self._x[j] + change)
        if self._shrinkage is not None:
            self._x[j] = self._shrinkage[j].to(change.dtype) * self._x[j]
        for number, branch in enumerate(self._branches[n], 1):
            message = self._message_to(branch, n, outer)
            self._visit(branch, message, again or number < len(self._branches[n]))
        if again:
            self._messages[n] = self._message(n)

    def _message_to(self, branch: int, n: int, outer: Tensor | None) -> Tensor:
        """Return the log-message from all other factors to the variables a branch ends in."""
        j, ends = self._steps[n].variable, self._steps[branch].neighbours
        if ends == (j,):
            return self._own(j, but=branch) + self._from_outside(n, outer)
        (i,) = set(ends) - {j}
        message = self._from_outside_to_both(n, outer, i) + self._own(j).unsqueeze(-2)
        others = self._table(i, j, but=branch)
        message = message if others is None else message + others
        return message if i < j else message.mT

    def _own(self, j: int, but: int = -1) -> Tensor:
        """Return the potential of j with the messages of its branches, but one."""
        x = self._x[j]
        for n in self._ending.get((j,), []):
            x = x if n == but else x + self._messages[n]
        return x

    def _table(self, i: int, j: int, but: int = -1) -> Tensor | None:
        """Return the table between i and j with the messages of branches to both, but one."""
        edge = (min(i, j), max(i, j))
        table = self._pairs.get(edge)
        for n in self._ending.get(edge, []):
            if n != but:
                table = self._messages[n] if table is None else table + self._messages[n]
        return table if table is None or i < j else table.mT

    def _from_outside(self, n: int, outer: Tensor | None) -> Tensor:
        """Return the log-message to a step's variable from outside its branches, `(B, K_j)`."""
        j, neighbours, _ = self._steps[n]
        if outer is None:
            return torch.zeros_like(self._x[j])
        if len(neighbours) == 1:
            table = self._table(j, neighbours[0])
            assert table is not None
            return log_matvec(table, outer, self._backend)
        outer, far, near = self._triangle(n, outer, neighbours[0])
        return log_matmul_reduce(far.mT, outer.mT, near.mT, self._backend)

    def _from_outside_to_both(self, n: int, outer: Tensor | None, i: int) -> Tensor:
        """Return the same to the variable j and its neighbour i, `(B, K_i, K_j)` or `(B, K_i, 1)`.

        The latter where it does not depend on j.
        """
        assert outer is not None
        j, neighbours, _ = self._steps[n]
        if len(neighbours) == 1:
            return outer.unsqueeze(-1)
        outer, far, near = self._triangle(n, outer, i)
        half = self._own(j).unsqueeze(-2) / 2
        product = log_product(outer, far + half, near + half, self._backend)
        return torch.where(half == -math.inf, -math.inf, product.values - half)

    def _triangle(self, n: int, outer: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors of (i, k), (k, j) and (i, j), with i and k the neighbours of j."""
        j, neighbours, _ = self._steps[n]
        (k,) = set(neighbours) - {i}
        near, far = self._table(i, j), self._table(k, j)
        assert near is not None
        assert far is not None
        # `outer` has the whole potential of k; with half of it in either factor, the two are large
        # at the same places, and far fewer entries of their product are below the exponent range.
        half = torch.where(self._x[k] == -math.inf, 0.0, self._x[k] / 2)
        outer = outer if i < k else outer.mT
        return outer - half.unsqueeze(-2), far + half.unsqueeze(-1), near

    def _message(self, n: int) -> Tensor:
        """Return the message of a branch."""
        j, neighbours, _ = self._steps[n]
        tables = [table for i in neighbours if (table := self._table(i, j)) is not None]
        if len(neighbours) == 1:
            return log_matvec(tables[0], self._own(j), self._backend)
        half = self._own(j).unsqueeze(-2) / 2
        return log_product(tables[0] + half, (tables[1] + half).mT, None, self._backend).values
