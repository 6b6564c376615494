"""Marginals of a plan given by pairwise costs, by eliminating one variable after another.

A plan T(k_1, ..., k_M) = exp(sum_p x_p(k_p) + sum_ij F_ij(k_i, k_j)) is a probabilistic graphical
model :cite:`haasler:21`. Summing out a variable with one neighbour i leaves a vector over i (a
log-sum-exp, K^2 operations); one with two neighbours i and k leaves a table over both (a product
of matrices of logarithms, K^3 operations and K^2 memory). Where every variable has three
neighbours or more, one is held at each of its values in turn, and the rest eliminated. So a chain,
star or tree takes K^2 operations for each edge, a cycle or three marginals K^3, and a complete
graph K^M; memory stays at K^2.

Going back through the same steps, each marginal is the derivative of log sum T by a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, takewhile
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from multialign import _validation
from multialign.ops import log_matmul_reduce, log_matvec, log_product, logsumexp, real
from multialign.ops.products import LogProduct, StreamedProduct

__all__ = [
    "Beliefs",
    "Edge",
    "Pairs",
    "Scope",
    "Step",
    "Which",
    "Worker",
    "axes_without",
    "beliefs",
    "check_entries",
    "join",
    "log_marginal",
    "sweep",
]

Scope = tuple[int, ...]
Edge = tuple[int, int]
Pairs = Mapping[Edge, Tensor]
"""Tables `(B, K_i, K_j)` by (i, j), i < j."""
Which = Literal["edges", "core", "all"]
"""Pairs to know: at least those with a cost; all but those of a leaf of the graph with others than
its neighbour; or all."""

Worker = Literal["torch", "triton"]
"""Which backend multiplies tables."""

# Where a variable is held at its values, so many entries of a table are worked on at once.
_CHUNK_ENTRIES = 2**20


class Step(NamedTuple):
    """A variable to sum out."""

    variable: int
    neighbours: tuple[int, ...]
    """None, one or two."""
    alone: bool
    """Whether the neighbours have no others, so that all their factors are known by then."""


class _Order(NamedTuple):
    """Steps after which only the variables to keep are left, or one is `held` over an order."""

    steps: tuple[Step, ...]
    held: int | None
    inner: _Order | None


@dataclass
class Beliefs:
    """What is known of a plan after it is divided by its sum."""

    log_total: Tensor
    """`(B,)`: the logarithm of that sum."""
    marginals: dict[int, Tensor]
    """`(B, K_p)` by p."""
    tables: dict[Edge, Tensor]
    """Pairwise marginals `(B, K_i, K_j)` by (i, j), i < j."""
    leaves: tuple[Step, ...] = ()
    """The first steps, each of a variable that had one neighbour at most. Of the pairs that these
    variables are in, `tables` holds those with their neighbour alone."""

    def table(self, i: int, j: int) -> Tensor:
        """Return the pairwise marginal `(B, K_i, K_j)`."""
        return _table(self.tables, i, j)

    def joined(self) -> Tensor:
        """Return all marginals, one after another, `(B, S)`."""
        return torch.cat([self.marginals[p] for p in range(len(self.marginals))], -1)

    def put(self, i: int, j: int, table: Tensor) -> None:
        """Store the pairwise marginal `(B, K_i, K_j)`."""
        self.tables[(min(i, j), max(i, j))] = table if i < j else table.mT


def check_entries(entries: int) -> None:
    """Raise before a table is built that would be larger than the bound."""
    _validation.check_entries(
        entries,
        "use fewer or smaller marginals, a smaller batch, or costs between pairs, "
        "{(i, j): C_ij}, which need tables of K^2 entries only",
    )


def join(tables: Mapping[Scope, Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the sum of tables over some variables, as one over all, `(B, *sizes)`."""
    everything = range(len(sizes))
    total: Tensor | None = None
    for scope, table in sorted(tables.items(), key=lambda item: len(item[0])):
        table = table.reshape(len(table), *[sizes[p] if p in scope else 1 for p in everything])
        total = table if total is None else total + table
    if total is None:
        raise ValueError("no table to join")
    return total.expand(-1, *sizes)


def axes_without(scope: Scope, count: int) -> list[int]:
    """Return the axes of a table `(B, K_1, ..., K_M)` that are of none of these variables."""
    return [1 + p for p in range(count) if p not in scope]


def log_marginal(
    unaries: Sequence[Tensor], pairs: Pairs, keep: Scope = (), backend: Worker = "torch"
) -> Tensor:
    """Return the logarithm of the sum over all variables but `keep`, `(B, *K_keep)`.

    `keep` holds up to two variables, in increasing order.
    """
    found = dict(enumerate(unaries))
    return _log_marginal(found, pairs, _plan(found, pairs, keep), keep, backend)


def beliefs(
    unaries: Sequence[Tensor], pairs: Pairs, which: Which, backend: Worker = "torch"
) -> Beliefs:
    """Return the marginals of all variables, and of pairs of them."""
    found = dict(enumerate(unaries))
    return _beliefs(found, pairs, _plan(found, pairs, ()), which, backend)


def sweep(
    unaries: Sequence[Tensor], pairs: Pairs, wanted: Sequence[Tensor], backend: Worker = "torch"
) -> list[Tensor]:
    """Set one potential after another so that its marginal is the one wanted.

    Args:
        unaries: Potentials `(B, K_p)`, -inf at atoms of mass 0.
        pairs: The tables of -C / epsilon.
        wanted: The logarithms of the marginals wanted.
        backend: What multiplies tables.
    """
    found = dict(enumerate(unaries))
    order = _plan(found, pairs, ())
    if order.held is None:
        return _Sweep(found, pairs, order.steps, wanted, backend).potentials
    for p, log_nu in enumerate(wanted):
        step = log_nu - _log_marginal(found, pairs, _plan(found, pairs, (p,)), (p,), backend)
        found[p] = torch.where(log_nu == -math.inf, -math.inf, found[p] + step)
    return list(found.values())


def _log_marginal(
    unaries: Mapping[int, Tensor], pairs: Pairs, order: _Order, keep: Scope, backend: Worker
) -> Tensor:
    steps, last = order.steps, order.steps[-2:]
    # Of a triangle that ends in one variable, the table over two is not needed.
    at_once = (
        [len(step.neighbours) for step in last] == [2, 1]
        and last[1].variable in last[0].neighbours
    )  # fmt: skip
    rest = _Collected(unaries, pairs, steps[:-2] if at_once else steps, backend, ways=False)
    if at_once:
        rest.sum_out_two(*last)
    trailing = [1] * len(keep)
    if order.held is None or order.inner is None:
        total = rest.constant.view(len(rest.constant), *trailing)
        for p, x in rest.unaries.items():
            total = total + x.reshape(len(x), *[-1 if p == v else 1 for v in keep])
        for table in rest.pairs.values():
            total = total + table
        return total
    parts = []
    for part in _hold(rest, order.held):
        found = _log_marginal(part.unaries, part.pairs, order.inner, keep, backend)
        found = found.unflatten(0, part.weights.shape)
        weights = part.weights.reshape(*part.weights.shape, *trailing)
        parts.append(logsumexp(found + weights, 1))
    return logsumexp(torch.stack(parts), 0) + rest.constant.view(len(rest.constant), *trailing)


def _beliefs(
    unaries: Mapping[int, Tensor], pairs: Pairs, order: _Order, which: Which, backend: Worker
) -> Beliefs:
    rest = _Collected(unaries, pairs, order.steps, backend)
    if order.held is None or order.inner is None:
        result = Beliefs(rest.constant, {}, {})
    else:
        result = _mix(rest, order.held, order.inner, backend)
    leaves = tuple(takewhile(lambda step: len(step.neighbours) < 2, order.steps))
    result.leaves = () if which == "all" else leaves
    for number in reversed(range(len(order.steps))):
        step, way = order.steps[number], rest.ways[number]
        j, known = step.variable, list(result.marginals)
        # Which pairs with variables that are no neighbours are to be known.
        others = [q for q in known if q not in step.neighbours]
        if which == "edges" or number < len(result.leaves):
            others = []
        if not isinstance(way, Tensor):
            i, k = step.neighbours
            left, right = way.spread(result.table(i, k))
            result.put(i, j, left)
            result.put(j, k, right)
            result.marginals[j] = right.sum(-1)
            for q in others:
                edge = (min(q, j), max(q, j))
                order_of_pair = _plan(unaries, pairs, edge)
                joint = _log_marginal(unaries, pairs, order_of_pair, edge, backend)
                result.tables[edge] = (joint - result.log_total[:, None, None]).exp()
            continue
        for i in step.neighbours:
            result.put(i, j, result.marginals[i].unsqueeze(-1) * way)
        for q in others:
            if step.neighbours:
                result.put(q, j, result.table(q, step.neighbours[0]) @ way)
            else:
                result.put(q, j, result.marginals[q].unsqueeze(-1) * way.unsqueeze(-2))
        if step.neighbours:
            way = result.table(step.neighbours[0], j).sum(1)
        result.marginals[j] = way
    return result


class _Collected:
    """What is left after some variables were summed out, and with `ways` the way back."""

    def __init__(
        self,
        unaries: Mapping[int, Tensor],
        pairs: Pairs,
        steps: Sequence[Step],
        backend: Worker,
        *,
        ways: bool = True,
    ) -> None:
        self._backend = backend
        self.unaries, self.pairs = dict(unaries), dict(pairs)
        first = next(iter(unaries.values()))
        self.constant = first.new_zeros(len(first))
        # For each step: p(j | i), `(B, K_i, K_j)`, if j had one neighbour; p(j) if it had none.
        self.ways: list[Tensor | LogProduct | StreamedProduct] = []
        # For each step: the logarithm of the sum, over the neighbours.
        self.messages: list[Tensor] = []
        for step in steps:
            x = self.unaries.pop(step.variable)
            way: Tensor | LogProduct | StreamedProduct | None = None
            if not step.neighbours:
                way, message = _softmax(x)
                self.constant = self.constant + message
            elif len(step.neighbours) == 1:
                (i,) = step.neighbours
                table = self._take(i, step.variable)
                if ways:
                    way, message = _softmax(table + x.unsqueeze(-2))
                else:
                    message = log_matvec(table, x, backend)
                self.unaries[i] = self.unaries[i] + message
            else:
                way = self._multiply(step, x)
                message = way.values
            self.messages.append(message)
            if way is not None:
                self.ways.append(way)

    def sum_out_two(self, step: Step, after: Step) -> None:
        """Sum out a variable with two neighbours, and then one of these with the other alone."""
        j, k, (i,) = step.variable, after.variable, after.neighbours
        half = self.unaries.pop(j) / 2
        a = self._take(i, j) + half.unsqueeze(-2)
        b = self._take(j, k) + half.unsqueeze(-1)
        weight = self.unaries.pop(k).unsqueeze(-2).expand(-1, a.shape[1], -1)
        if (min(i, k), max(i, k)) in self.pairs:
            weight = weight + self._take(i, k)
        self.unaries[i] = self.unaries[i] + log_matmul_reduce(a, b, weight, self._backend)

    def _multiply(self, step: Step, x: Tensor) -> LogProduct | StreamedProduct:
        i, k = step.neighbours
        # Half of the potential goes to each factor: the two are large at the same places.
        half = x / 2
        a = self._take(i, step.variable) + half.unsqueeze(-2)
        b = self._take(step.variable, k) + half.unsqueeze(-1)
        edge = self.pairs.get((i, k))
        weight = None
        if step.alone:
            weight = self.unaries[i].unsqueeze(-1) + self.unaries[k].unsqueeze(-2)
            weight = weight if edge is None else weight + edge
        product = log_product(a, b, weight, self._backend)
        self.pairs[(i, k)] = product.values if edge is None else edge + product.values
        return product

    def _take(self, i: int, j: int) -> Tensor:
        return self.pairs.pop((i, j)) if i < j else self.pairs.pop((j, i)).mT


class _Sweep:
    """A visit to each variable, from the last one summed out to the first, that sets its potential.

    A step and those before it that ended in its variable form a branch; what the rest of the plan
    says to a branch is its `outer`, a log-factor of the step's neighbours. Coming back from a
    branch, what it says to them has changed (its message).
    """

    def __init__(
        self,
        unaries: Mapping[int, Tensor],
        pairs: Pairs,
        steps: Sequence[Step],
        wanted: Sequence[Tensor],
        backend: Worker,
    ) -> None:
        self._backend = backend
        self._x, self._pairs, self._steps, self._wanted = dict(unaries), pairs, steps, wanted
        self._messages = _Collected(unaries, pairs, steps, backend, ways=False).messages
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
        """The potentials after the visit."""
        return [self._x[p] for p in range(len(self._x))]

    def _visit(self, n: int, outer: Tensor | None, again: bool) -> None:
        """Set the potentials of a branch; `again` if its message will be needed once more."""
        j = self._steps[n].variable
        rest = self._said(n, outer)
        step = self._wanted[j] - (self._own(j) + rest)
        self._x[j] = torch.where(self._wanted[j] == -math.inf, -math.inf, self._x[j] + step)
        for number, branch in enumerate(self._branches[n], 1):
            ends = self._steps[branch].neighbours
            if ends == (j,):
                said = self._own(j, but=branch) + self._said(n, outer)
            else:
                (i,) = set(ends) - {j}
                said = self._said_to(n, outer, i) + self._own(j).unsqueeze(-2)
                others = self._table(i, j, but=branch)
                said = said if others is None else said + others
                said = said if i < j else said.mT
            self._visit(branch, said, again or number < len(self._branches[n]))
        if again:
            self._messages[n] = self._message(n)

    def _own(self, j: int, but: int = -1) -> Tensor:
        """Return the potential of j with what its branches say, but one."""
        x = self._x[j]
        for n in self._ending.get((j,), []):
            x = x if n == but else x + self._messages[n]
        return x

    def _table(self, i: int, j: int, but: int = -1) -> Tensor | None:
        """Return the table between i and j with what branches say to both, but one."""
        edge = (min(i, j), max(i, j))
        table = self._pairs.get(edge)
        for n in self._ending.get(edge, []):
            if n != but:
                table = self._messages[n] if table is None else table + self._messages[n]
        return table if table is None or i < j else table.mT

    def _said(self, n: int, outer: Tensor | None) -> Tensor:
        """Return what all but its branches says to the variable of a step, `(B, K_j)`."""
        j, neighbours, _ = self._steps[n]
        if outer is None:
            return torch.zeros_like(self._x[j])
        if len(neighbours) == 1:
            table = self._table(j, neighbours[0])
            assert table is not None
            return log_matvec(table, outer, self._backend)
        outer, far, near = self._triangle(n, outer, neighbours[0])
        return log_matmul_reduce(far.mT, outer.mT, near.mT, self._backend)

    def _said_to(self, n: int, outer: Tensor | None, i: int) -> Tensor:
        """Return the same to a variable and its neighbour i, `(B, K_i, K_j)` (or 1 for K_j)."""
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
        j, neighbours, _ = self._steps[n]
        tables = [table for i in neighbours if (table := self._table(i, j)) is not None]
        if len(neighbours) == 1:
            return log_matvec(tables[0], self._own(j), self._backend)
        half = self._own(j).unsqueeze(-2) / 2
        return log_product(tables[0] + half, (tables[1] + half).mT, None, self._backend).values


class _Part(NamedTuple):
    """A plan with one variable held at n of its values, as a batch of B n."""

    unaries: dict[int, Tensor]
    pairs: dict[Edge, Tensor]
    weights: Tensor
    """`(B, n)`: log-weights of the values."""


def _hold(rest: _Collected, held: int) -> Iterator[_Part]:
    """Hold one variable at all its values, as many at once as memory should take."""
    weights = rest.unaries[held]
    others = {p: x for p, x in rest.unaries.items() if p != held}
    tables = {edge: table for edge, table in rest.pairs.items() if held not in edge}
    largest = max(table.numel() for table in tables.values())
    size = max(1, _CHUNK_ENTRIES // largest)
    for start in range(0, weights.shape[-1], size):
        values = slice(start, start + size)
        chunk = weights[:, values]
        unaries = {}
        for p, x in others.items():
            x = x.unsqueeze(1)
            if (min(p, held), max(p, held)) in rest.pairs:
                x = x + _table(rest.pairs, held, p)[:, values]
            unaries[p] = x.expand(-1, chunk.shape[1], -1).flatten(0, 1)
        pairs = {
            edge: table.unsqueeze(1).expand(-1, chunk.shape[1], -1, -1).flatten(0, 1)
            for edge, table in tables.items()
        }
        yield _Part(unaries, pairs, chunk)


def _mix(rest: _Collected, held: int, inner: _Order, backend: Worker) -> Beliefs:
    """Return the beliefs of a plan as the mixture of those with one variable held."""
    others = sorted(set(rest.unaries) - {held})
    edges = list(combinations(others, 2))
    totals: list[Tensor] = []
    conditionals: list[list[Tensor]] = []
    tables: list[Tensor] = []
    sum_so_far: Tensor | None = None
    for part in _hold(rest, held):
        found = _beliefs(part.unaries, part.pairs, inner, "all", backend)
        total = part.weights + found.log_total.view_as(part.weights)
        totals.append(total)
        conditionals.append([found.marginals[p].unflatten(0, total.shape) for p in others])
        share, level = _softmax(total)
        fresh = [
            torch.einsum("bn,bnik->bik", share, found.tables[edge].unflatten(0, share.shape))
            for edge in edges
        ]
        if sum_so_far is None:
            sum_so_far, tables = level, fresh
            continue
        share, sum_so_far = _softmax(torch.stack([sum_so_far, level], 1))
        old, new = share[:, :1, None], share[:, 1:, None]
        tables = [old * a + new * b for a, b in zip(tables, fresh, strict=True)]
    share, log_total = _softmax(torch.cat(totals, 1))
    result = Beliefs(
        log_total + rest.constant, {held: share}, dict(zip(edges, tables, strict=True))
    )
    for p, *rows in zip(others, *conditionals, strict=True):
        result.put(held, p, share.unsqueeze(-1) * torch.cat(rows, 1))
        result.marginals[p] = result.table(held, p).sum(1)
    return result


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp x over its sum along the last dimension, and the logarithm of that sum.

    Where all entries are -inf: zeros, and -inf.
    """
    limits = torch.finfo(x.dtype)
    top = real(x).amax(-1, keepdim=True).clamp_min(limits.min)
    terms = (x - top).exp_()
    total = terms.sum(-1, keepdim=True)
    message = (total.log() + top).squeeze(-1)
    if not x.is_complex():
        total = total.clamp_min_(limits.tiny)
    return terms.div_(total), message


def _table(tables: Pairs, i: int, j: int) -> Tensor:
    return tables[(i, j)] if i < j else tables[(j, i)].mT


def _plan(unaries: Mapping[int, Tensor], pairs: Pairs, keep: Scope) -> _Order:
    variables = tuple(unaries)
    return _order(variables, tuple(pairs), tuple(unaries[p].shape[-1] for p in variables), keep)


@lru_cache(maxsize=1024)
def _order(
    variables: Scope, edges: tuple[Edge, ...], sizes: tuple[int, ...], keep: Scope
) -> _Order:
    """Plan which variables to sum out: leaves first, then whose product of tables is smallest."""
    size = dict(zip(variables, sizes, strict=True))
    near: dict[int, set[int]] = {v: set() for v in variables}
    for i, j in edges:
        near[i].add(j)
        near[j].add(i)
    steps: list[Step] = []
    while free := [v for v in near if v not in keep]:
        degree = {v: len(near[v]) for v in free}
        work = {v: size[v] * math.prod(size[q] for q in near[v]) for v in free}
        variable = min(free, key=lambda v: (max(degree[v], 1), work[v]))
        if degree[variable] > 2:
            held = min(free, key=lambda v: (-degree[v], size[v]))
            rest = tuple(v for v in near if v != held)
            left = tuple((i, j) for i in rest for j in near[i] if i < j and j != held)
            inner = _order(rest, left, tuple(size[v] for v in rest), keep)
            return _Order(tuple(steps), held, inner)
        neighbours = tuple(sorted(near.pop(variable)))
        for v in neighbours:
            near[v] = (near[v] | set(neighbours)) - {v, variable}
        alone = all(near[v] <= set(neighbours) for v in neighbours)
        steps.append(Step(variable, neighbours, alone))
    return _Order(tuple(steps), None, None)
