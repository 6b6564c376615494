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
    tables = list(factors.items())
    order, widest = _plan_elimination(factors, keep)
    check_entries(tables[0][1].shape[0] * widest)
    for variable in order:
        scope = tuple(_neighbourhood([list(variables) for variables, _ in tables], variable))
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
        widest = max([_plan_elimination(factors, keep)[1] for keep in keeps])
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


def _elimination_order(
    scopes: tuple[Scope, ...], sizes: tuple[int, ...], keep: Scope
) -> tuple[tuple[int, ...], int]:
    """Return the variables to sum out in order, and the entries of the largest table on the way.

    Each time the variable goes whose joined table is smallest.
    """
    # Lists, which torch.compile can follow, in place of sets and generators.
    tables = [list(scope) for scope in scopes]
    remaining = [v for v in range(len(sizes)) if v not in keep]
    order, widest = [], math.prod([sizes[v] for v in keep])
    while remaining:
        best, best_entries = remaining[0], -1
        for variable in remaining:
            entries = math.prod([sizes[v] for v in _neighbourhood(tables, variable)])
            if best_entries < 0 or entries < best_entries:
                best, best_entries = variable, entries
        joined = _neighbourhood(tables, best)
        order.append(best)
        widest = max(widest, best_entries)
        tables = [table for table in tables if best not in table]
        tables.append([v for v in joined if v != best])
        remaining = [v for v in remaining if v != best]
    return tuple(order), widest


_cached_elimination_order = lru_cache(maxsize=4096)(_elimination_order)


def _plan_elimination(factors: Factors, keep: Scope) -> tuple[tuple[int, ...], int]:
    # torch.compile traces once, and cannot see into a cache.
    plan = _elimination_order if torch.compiler.is_compiling() else _cached_elimination_order
    return plan(tuple(factors), _sizes(factors), keep)


def _neighbourhood(tables: list[list[int]], variable: int) -> list[int]:
    """Return the variables of all tables that hold `variable`, in increasing order."""
    found: list[int] = []
    for table in tables:
        if variable in table:
            found.extend([v for v in table if v not in found])
    return sorted(found)


def stack_blocks(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the matrix `(B, S, S)` made of blocks `(B, K_p, K_q)`."""
    return torch.cat([torch.cat(list(row), -1) for row in blocks], -2)
