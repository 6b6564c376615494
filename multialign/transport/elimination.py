"""Marginals of a product of factors, by eliminating one variable after another in the log domain.

A plan T(k_1, ..., k_M) = exp(sum of factors), each factor a table over a few of the variables, is
a probabilistic graphical model :cite:`haasler:21`. Summing a variable out joins the factors that
hold it into one table over its neighbours. A tree of pairwise costs never makes a table larger
than K^2, a cycle K^3, and a complete graph K^M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from multialign.ops import logsumexp

__all__ = [
    "Factors",
    "Scope",
    "check_entries",
    "join",
    "log_marginal",
    "probabilities",
    "stack_blocks",
]

Scope = tuple[int, ...]
Factors = Mapping[Scope, Tensor]
"""Tables `(B, K_i, K_j, ...)` of log-weights by their variables, in increasing order."""

# A table this small is cheaper to build whole than to eliminate step by step.
_SMALL_ENTRIES = 2**14
# The largest table that is ever built: 2 GiB in float64.
_MAX_ENTRIES = 2**28


def log_marginal(factors: Factors, keep: Scope) -> Tensor:
    """Return the logarithm of the sum over all variables but `keep`, `(B, *K_keep)`."""
    sizes = _sizes(factors)
    batch = next(iter(factors.values())).shape[0]
    tables = list(factors.items())
    for variable in _elimination_order(tuple(factors), sizes, keep, batch):
        scope: Scope = tuple(sorted({v for s, _ in tables if variable in s for v in s}))
        joined = join([table for table in tables if variable in table[0]], scope)
        rest = tuple(v for v in scope if v != variable)
        tables = [table for table in tables if variable not in table[0]]
        tables.append((rest, logsumexp(joined, 1 + scope.index(variable))))
    return join(tables, keep)


def probabilities(factors: Factors, keeps: Sequence[Scope]) -> list[Tensor]:
    """Return exp(log_marginal) for several sets of variables, `(B, *K_keep)` each."""
    sizes = _sizes(factors)
    everything = tuple(range(len(sizes)))
    entries = math.prod(sizes)
    batch = next(iter(factors.values())).shape[0]
    largest = max(len(scope) for scope in factors)
    if entries * batch > _SMALL_ENTRIES and largest < len(sizes):
        widest = max(_widest_table(tuple(factors), sizes, keep) for keep in keeps)
        if widest < entries:
            return [log_marginal(factors, keep).exp() for keep in keeps]
    check_entries(batch * entries)
    plan = join(list(factors.items()), everything).exp()
    results = []
    for keep in keeps:
        others = [1 + v for v in everything if v not in keep]
        results.append(plan.sum(others) if others else plan)
    return results


def check_entries(entries: int) -> None:
    """Raise before a table is built that would be larger than the bound."""
    if entries > _MAX_ENTRIES:
        raise MemoryError(
            f"this needs a table of {entries} entries, {entries * 8 / 2**30:.1f} GiB in float64, "
            f"more than the bound of {_MAX_ENTRIES * 8 / 2**30:.0f} GiB; use fewer or smaller "
            f"marginals, a smaller batch, or a cost graph with fewer edges (a chain or a star "
            f"needs tables of K^2 entries only)"
        )


def join(tables: Sequence[tuple[Scope, Tensor]], scope: Scope) -> Tensor:
    """Return the sum of the tables, each broadcast to the variables in `scope`."""
    total: Tensor | None = None
    for variables, table in sorted(tables, key=lambda item: len(item[0])):
        for position, variable in enumerate(scope, start=1):
            if variable not in variables:
                table = table.unsqueeze(position)
        total = table if total is None else total + table
    if total is None:
        raise ValueError("no factor to join")
    return total


def _sizes(factors: Factors) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for scope, table in factors.items():
        found.update(zip(scope, table.shape[1:], strict=True))
    return tuple(found[v] for v in sorted(found))


@lru_cache(maxsize=4096)
def _elimination_order(
    scopes: tuple[Scope, ...], sizes: tuple[int, ...], keep: Scope, batch: int
) -> tuple[int, ...]:
    """Return the variables to sum out, each time the one with the smallest joined table."""
    order, widest = _greedy(scopes, sizes, keep)
    check_entries(batch * widest)
    return order


@lru_cache(maxsize=4096)
def _widest_table(scopes: tuple[Scope, ...], sizes: tuple[int, ...], keep: Scope) -> int:
    return _greedy(scopes, sizes, keep)[1]


def _greedy(
    scopes: tuple[Scope, ...], sizes: tuple[int, ...], keep: Scope
) -> tuple[tuple[int, ...], int]:
    tables = [frozenset(scope) for scope in scopes]
    remaining = set(range(len(sizes))) - set(keep)
    order, widest = [], math.prod(sizes[v] for v in keep)
    while remaining:
        joined = {
            v: frozenset().union(*(table for table in tables if v in table)) for v in remaining
        }
        entries = {v: math.prod(sizes[u] for u in joined[v]) for v in remaining}
        variable = min(remaining, key=lambda v: (entries[v], v))
        order.append(variable)
        widest = max(widest, entries[variable])
        tables = [table for table in tables if variable not in table]
        tables.append(joined[variable] - {variable})
        remaining.remove(variable)
    return tuple(order), widest


def stack_blocks(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the matrix `(B, S, S)` made of blocks `(B, K_p, K_q)`."""
    return torch.cat([torch.cat(list(row), -1) for row in blocks], -2)
