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

from multialign._validation import check_entries
from multialign.ops import (
    Implementation,
    LogProduct,
    StreamedProduct,
    log_matmul_reduce,
    log_matvec,
    log_product,
    logsumexp,
    real,
)

__all__ = [
    "Beliefs",
    "Collected",
    "Edge",
    "Order",
    "PairSet",
    "Pairs",
    "Scope",
    "Step",
    "axes_without",
    "beliefs",
    "check_table",
    "elimination_order",
    "join",
    "log_marginal",
    "table_of",
]

Scope = tuple[int, ...]
Edge = tuple[int, int]
Pairs = Mapping[Edge, Tensor]
"""Tables `(B, K_i, K_j)` by (i, j), i < j."""
PairSet = Literal["edges", "core", "all"]
"""Which pairwise marginals to compute: at least those with a cost; every pair, except that a leaf
is paired only with its neighbour; or every pair."""

# Where a variable is held at its values, at most this many entries of a table are made at once.
_CHUNK_ENTRIES = 2**20


class Step(NamedTuple):
    """A variable to sum out."""

    variable: int
    neighbours: tuple[int, ...]
    """None, one or two."""
    alone: bool
    """Whether the neighbours have no others, so that all their factors are known by then."""


class Order(NamedTuple):
    """Steps after which only the variables to keep are left, or one is `held` over an order."""

    steps: tuple[Step, ...]
    held: int | None
    inner: Order | None


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
    """The first steps, each of a variable with at most one neighbour, which is the one variable
    that `tables` pairs it with."""

    def table(self, i: int, j: int) -> Tensor:
        """Return the pairwise marginal `(B, K_i, K_j)`."""
        return table_of(self.tables, i, j)

    def joined(self) -> Tensor:
        """Return all marginals, one after another, `(B, S)`."""
        return torch.cat([self.marginals[p] for p in range(len(self.marginals))], -1)

    def part(self, variables: Scope) -> Beliefs:
        """Return the marginals of some variables, numbered anew, and of pairs of them."""
        number = {p: n for n, p in enumerate(variables)}
        marginals = {number[p]: self.marginals[p] for p in variables}
        tables = {
            (number[i], number[j]): table
            for (i, j), table in self.tables.items()
            if i in number and j in number
        }
        return Beliefs(self.log_total, marginals, tables)

    def put(self, i: int, j: int, table: Tensor) -> None:
        """Store the pairwise marginal `(B, K_i, K_j)`."""
        self.tables[(min(i, j), max(i, j))] = table if i < j else table.mT


def check_table(entries: int) -> None:
    """Raise before a table over all variables is built that would be larger than the bound."""
    check_entries(
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
    unaries: Sequence[Tensor], pairs: Pairs, keep: Scope = (), backend: Implementation = "torch"
) -> Tensor:
    """Return the logarithm of the sum over all variables but `keep`, `(B, *K_keep)`.

    `keep` holds up to two variables, in increasing order.
    """
    found = dict(enumerate(unaries))
    return _log_marginal(found, pairs, elimination_order(found, pairs, keep), keep, backend)


def beliefs(
    unaries: Sequence[Tensor],
    pairs: Pairs,
    pairs_wanted: PairSet,
    backend: Implementation = "torch",
) -> Beliefs:
    """Return the marginals of all variables, and of pairs of them."""
    found = dict(enumerate(unaries))
    return _beliefs(found, pairs, elimination_order(found, pairs, ()), pairs_wanted, backend)


def _log_marginal(
    unaries: Mapping[int, Tensor], pairs: Pairs, order: Order, keep: Scope, backend: Implementation
) -> Tensor:
    steps, last = order.steps, order.steps[-2:]
    # Of a triangle that ends in one variable, the table over two is not needed.
    at_once = (
        [len(step.neighbours) for step in last] == [2, 1]
        and last[1].variable in last[0].neighbours
    )  # fmt: skip
    rest = Collected(unaries, pairs, steps[:-2] if at_once else steps, backend, keep=False)
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
    unaries: Mapping[int, Tensor],
    pairs: Pairs,
    order: Order,
    pairs_wanted: PairSet,
    backend: Implementation,
) -> Beliefs:
    rest = Collected(unaries, pairs, order.steps, backend)
    if order.held is None or order.inner is None:
        result = Beliefs(rest.constant, {}, {})
    else:
        result = _mix(rest, order.held, order.inner, backend)
    leaves = tuple(takewhile(lambda step: len(step.neighbours) < 2, order.steps))
    result.leaves = () if pairs_wanted == "all" else leaves
    for number in reversed(range(len(order.steps))):
        step, conditional = order.steps[number], rest.conditionals[number]
        j = step.variable
        # Variables to pair j with that are no neighbours of it.
        others = [q for q in result.marginals if q not in step.neighbours]
        if pairs_wanted == "edges" or number < len(result.leaves):
            others = []
        if not isinstance(conditional, Tensor):
            i, k = step.neighbours
            left, right = conditional.spread(result.table(i, k))
            result.put(i, j, left)
            result.put(j, k, right)
            result.marginals[j] = right.sum(-1)
            for q in others:
                edge = (min(q, j), max(q, j))
                order_of_pair = elimination_order(unaries, pairs, edge)
                joint = _log_marginal(unaries, pairs, order_of_pair, edge, backend)
                result.tables[edge] = (joint - result.log_total[:, None, None]).exp()
            continue
        if not step.neighbours:
            result.marginals[j] = conditional
            for q in others:
                table = result.marginals[q].unsqueeze(-1) * conditional.unsqueeze(-2)
                result.put(q, j, table)
            continue
        (i,) = step.neighbours
        result.put(i, j, result.marginals[i].unsqueeze(-1) * conditional)
        for q in others:
            result.put(q, j, result.table(q, i) @ conditional)
        result.marginals[j] = result.table(i, j).sum(1)
    return result


class Collected:
    """What is left after some variables were summed out."""

    def __init__(
        self,
        unaries: Mapping[int, Tensor],
        pairs: Pairs,
        steps: Sequence[Step],
        backend: Implementation,
        *,
        keep: bool = True,
    ) -> None:
        """Sum out the variables of some steps; `keep` their distributions given the rest."""
        self._backend = backend
        self.unaries, self.pairs = dict(unaries), dict(pairs)
        first = next(iter(unaries.values()))
        self.constant = first.new_zeros(len(first))
        # For each step the distribution of its variable j given its neighbours: p(j), `(B, K_j)`;
        # p(j | i), `(B, K_i, K_j)`; or, given two, the product that can spread their table over j.
        self.conditionals: list[Tensor | LogProduct | StreamedProduct] = []
        # For each step: the logarithm of the sum, over the neighbours.
        self.messages: list[Tensor] = []
        for step in steps:
            x = self.unaries.pop(step.variable)
            conditional: Tensor | LogProduct | StreamedProduct | None = None
            if not step.neighbours:
                conditional, message = _softmax(x)
                self.constant = self.constant + message
            elif len(step.neighbours) == 1:
                (i,) = step.neighbours
                table = self._take(i, step.variable)
                if keep:
                    conditional, message = _softmax(table + x.unsqueeze(-2))
                else:
                    message = log_matvec(table, x, backend)
                self.unaries[i] = self.unaries[i] + message
            else:
                conditional = self._multiply(step, x)
                message = conditional.values
            self.messages.append(message)
            if conditional is not None:
                self.conditionals.append(conditional)

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


class _Part(NamedTuple):
    """A plan with one variable held at n of its values, as a batch of B n."""

    unaries: dict[int, Tensor]
    pairs: dict[Edge, Tensor]
    weights: Tensor
    """`(B, n)`: log-weights of the values."""


def _hold(rest: Collected, held: int) -> Iterator[_Part]:
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
                x = x + table_of(rest.pairs, held, p)[:, values]
            unaries[p] = x.expand(-1, chunk.shape[1], -1).flatten(0, 1)
        pairs = {
            edge: table.unsqueeze(1).expand(-1, chunk.shape[1], -1, -1).flatten(0, 1)
            for edge, table in tables.items()
        }
        yield _Part(unaries, pairs, chunk)


def _mix(rest: Collected, held: int, inner: Order, backend: Implementation) -> Beliefs:
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


def table_of(tables: Pairs, i: int, j: int) -> Tensor:
    """Return the table `(B, K_i, K_j)`, in either order."""
    return tables[(i, j)] if i < j else tables[(j, i)].mT


def elimination_order(unaries: Mapping[int, Tensor], pairs: Pairs, keep: Scope) -> Order:
    """Return in which order to sum out all variables but `keep`."""
    variables = tuple(unaries)
    return _cached_order(
        variables, tuple(pairs), tuple(unaries[p].shape[-1] for p in variables), keep
    )


@lru_cache(maxsize=1024)
def _cached_order(
    variables: Scope, edges: tuple[Edge, ...], sizes: tuple[int, ...], keep: Scope
) -> Order:
    """Sum out leaves first, then the variable whose product of tables is smallest."""
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
            inner = _cached_order(rest, left, tuple(size[v] for v in rest), keep)
            return Order(tuple(steps), held, inner)
        neighbours = tuple(sorted(near.pop(variable)))
        for v in neighbours:
            near[v] = (near[v] | set(neighbours)) - {v, variable}
        alone = all(near[v] <= set(neighbours) for v in neighbours)
        steps.append(Step(variable, neighbours, alone))
    return Order(tuple(steps), None, None)
