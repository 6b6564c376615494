"""The plan of a small problem: its cost, marginals and Sinkhorn sweeps, by tiles.

Four variables v = 0, 1, 2, 3 stand for the M marginals: the last M of them, while those before have
one atom. A tile holds the plan over variables 1, 2 and 3; or, with LOOP, over 2 and 3 alone, where
that would be too large. Loops run over the other variables. The cost of a tile is built from its
pairs each time; where one tile is all there is, it stays in registers as `held`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multialign.ops._triton.tables import finite

__all__ = [
    "cost_moments",
    "cost_tile",
    "no_pairs",
    "pair_marginals",
    "single_marginals",
    "sweep",
]


@triton.jit
def _pair(pointer, rows, columns, row_count, column_count, DTYPE: tl.constexpr):
    """Return the entries of a table of two variables, 0 outside."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    at = pointer + rows[:, None] * column_count + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def cost_tile(
    i,
    j,
    tables,
    sizes,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the cost at index i of variable 0 and, with LOOP, j of 1, over the others."""
    n0, n1, n2, n3 = sizes
    first = i + tl.arange(0, 1)
    third = tl.arange(0, BLOCKS[2])
    fourth = tl.arange(0, BLOCKS[3])
    if LOOP:
        second = j + tl.arange(0, 1)
    else:
        second = tl.arange(0, BLOCKS[1])
    cost = tl.zeros((second.shape[0], BLOCKS[2], BLOCKS[3]), DTYPE)
    if PAIRS == 64:  # one table over all variables
        at = i * n1 * n2 * n3
        if LOOP:
            cost += _pair(tables[0] + at + j * n2 * n3, third, fourth, n2, n3, DTYPE)[None, :, :]
        else:
            at += (second[:, None, None] * n2 + third[None, :, None]) * n3 + fourth[None, None, :]
            inside = (second < n1)[:, None, None] & (third < n2)[None, :, None]
            inside = inside & (fourth < n3)[None, None, :]
            cost += tl.load(tables[0] + at, mask=inside, other=0.0).to(DTYPE)
    else:
        if PAIRS & 1:
            pair = _pair(tables[0], first, second, n0, n1, DTYPE)
            cost += tl.sum(pair, 0)[:, None, None]
        if PAIRS & 2:
            pair = _pair(tables[1], first, third, n0, n2, DTYPE)
            cost += tl.sum(pair, 0)[None, :, None]
        if PAIRS & 4:
            pair = _pair(tables[2], first, fourth, n0, n3, DTYPE)
            cost += tl.sum(pair, 0)[None, None, :]
        if PAIRS & 8:
            cost += _pair(tables[3], second, third, n1, n2, DTYPE)[:, :, None]
        if PAIRS & 16:
            cost += _pair(tables[4], second, fourth, n1, n3, DTYPE)[:, None, :]
        if PAIRS & 32:
            cost += _pair(tables[5], third, fourth, n2, n3, DTYPE)[None, :, :]
    return cost


@triton.jit
def _at(x, index):
    """Return x[index]. The other entries are masked, since they may be -inf."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == index, x, 0.0), 0)


@triton.jit
def _log_plan(
    i,
    j,
    x,
    inverse,
    held,
    tables,
    sizes,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the logarithm of the plan over a tile."""
    x0, x1, x2, x3 = x
    total = x2[None, :, None] + x3[None, None, :]
    if LOOP:
        total += _at(x1, j)
    else:
        total += x1[:, None, None]
    if M == 4:
        total += _at(x0, i)
    if M < 4 and not LOOP:
        cost = held
    else:
        cost = cost_tile(i, j, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
    # -inf where a mass is zero, even if the cost there is NaN.
    return tl.where(total == float("-inf"), float("-inf"), total - cost * inverse)


@triton.jit
def _log_sums(
    x,
    inverse,
    held,
    tables,
    sizes,
    VARIABLE: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the logarithm of the marginal of one variable."""
    indices = tl.arange(0, BLOCKS[VARIABLE])
    maximum = tl.full((BLOCKS[VARIABLE],), float("-inf"), DTYPE)
    total = tl.zeros((BLOCKS[VARIABLE],), DTYPE)
    steps = 1
    if LOOP:
        steps = sizes[1]
    for i in range(sizes[0]):
        for j in range(steps):
            plan = _log_plan(i, j, x, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
            if VARIABLE == 3:
                top = tl.max(tl.max(plan, 1), 0)
                part = tl.exp(plan - finite(top)[None, None, :])
                part = tl.sum(tl.sum(part, 1), 0)
            elif VARIABLE == 2:
                top = tl.max(tl.max(plan, 2), 0)
                part = tl.exp(plan - finite(top)[None, :, None])
                part = tl.sum(tl.sum(part, 2), 0)
            else:
                top = tl.max(tl.max(plan, 2), 1)
                if VARIABLE == 0:
                    # Here the whole tile is one entry of the marginal.
                    top = tl.zeros_like(top) + tl.max(top, 0)
                part = tl.exp(plan - finite(top)[:, None, None])
                part = tl.sum(tl.sum(part, 2), 1)
                if VARIABLE == 0:
                    here = indices == i
                    top = tl.where(here, tl.max(top, 0), float("-inf"))
                    part = tl.where(here, tl.sum(part, 0), 0.0)
                elif LOOP:
                    here = indices == j
                    top = tl.where(here, top, float("-inf"))
                    part = tl.where(here, part, 0.0)
            higher = tl.maximum(maximum, top)
            reference = finite(higher)
            total = total * tl.exp(maximum - reference) + part * tl.exp(top - reference)
            maximum = higher
    return finite(maximum) + tl.log(total)


@triton.jit
def _updated(x, wanted, log_sums):
    """Return the potential that gives the marginal wanted; -inf where that is zero."""
    return tl.where(wanted == float("-inf"), float("-inf"), x + (wanted - log_sums))


@triton.jit
def sweep(
    x,
    wanted,
    inverse,
    held,
    tables,
    sizes,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Set each potential in turn so that its marginal is the one wanted."""
    x0, x1, x2, x3 = x
    if M >= 4:
        sums = _log_sums(
            (x0, x1, x2, x3), inverse, held, tables, sizes, 0, M, PAIRS, LOOP, BLOCKS, DTYPE
        )
        x0 = _updated(x0, wanted[0], sums)
    if M >= 3:
        sums = _log_sums(
            (x0, x1, x2, x3), inverse, held, tables, sizes, 1, M, PAIRS, LOOP, BLOCKS, DTYPE
        )
        x1 = _updated(x1, wanted[1], sums)
    sums = _log_sums(
        (x0, x1, x2, x3), inverse, held, tables, sizes, 2, M, PAIRS, LOOP, BLOCKS, DTYPE
    )
    x2 = _updated(x2, wanted[2], sums)
    sums = _log_sums(
        (x0, x1, x2, x3), inverse, held, tables, sizes, 3, M, PAIRS, LOOP, BLOCKS, DTYPE
    )
    x3 = _updated(x3, wanted[3], sums)
    return x0, x1, x2, x3


@triton.jit
def no_pairs(BLOCKS: tl.constexpr, DTYPE: tl.constexpr):
    """Return zeros for P_01, P_02, P_03, P_12, P_13, P_23."""
    return (
        tl.zeros((BLOCKS[0], BLOCKS[1]), DTYPE),
        tl.zeros((BLOCKS[0], BLOCKS[2]), DTYPE),
        tl.zeros((BLOCKS[0], BLOCKS[3]), DTYPE),
        tl.zeros((BLOCKS[1], BLOCKS[2]), DTYPE),
        tl.zeros((BLOCKS[1], BLOCKS[3]), DTYPE),
        tl.zeros((BLOCKS[2], BLOCKS[3]), DTYPE),
    )


@triton.jit
def pair_marginals(
    x,
    inverse,
    held,
    tables,
    sizes,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return P_01, P_02, P_03, P_12, P_13, P_23; those of absent variables are 0."""
    rows = tl.arange(0, BLOCKS[0])[:, None]
    inner = tl.arange(0, BLOCKS[1])[:, None]
    p01, p02, p03, p12, p13, p23 = no_pairs(BLOCKS, DTYPE)
    steps = 1
    if LOOP:
        steps = sizes[1]
    for i in range(sizes[0]):
        for j in range(steps):
            plan = tl.exp(
                _log_plan(i, j, x, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
            )
            by12 = tl.sum(plan, 2)
            by13 = tl.sum(plan, 1)
            p23 += tl.sum(plan, 0)
            if LOOP:
                by12 = tl.where(inner == j, by12, 0.0)
                by13 = tl.where(inner == j, by13, 0.0)
            if M >= 3:
                p12 += by12
                p13 += by13
            if M >= 4:
                p01 += tl.where(rows == i, tl.sum(by12, 1)[None, :], 0.0)
                p02 += tl.where(rows == i, tl.sum(by12, 0)[None, :], 0.0)
                p03 += tl.where(rows == i, tl.sum(by13, 0)[None, :], 0.0)
    return p01, p02, p03, p12, p13, p23


@triton.jit
def single_marginals(pairs, M: tl.constexpr):
    """Return m_0, m_1, m_2, m_3 from the pairwise marginals."""
    m3 = tl.sum(pairs[5], 0)
    m2 = tl.sum(pairs[5], 1)
    if M >= 3:
        m1 = tl.sum(pairs[3], 1)
    else:
        m1 = tl.sum(pairs[3], 1) + 1.0
    if M >= 4:
        m0 = tl.sum(pairs[0], 1)
    else:
        m0 = tl.sum(pairs[0], 1) + 1.0
    return m0, m1, m2, m3


@triton.jit
def cost_moments(
    nu,
    held,
    tables,
    sizes,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return mean and deviation of the cost under independent marginals.

    The mean is not finite if a cost is not. A deviation that is not finite is returned as 0.
    """
    mean = tl.max(nu[3], 0) * 0.0
    square = mean
    steps = 1
    if LOOP:
        steps = sizes[1]
    for i in range(sizes[0]):
        for j in range(steps):
            weight = nu[2][None, :, None] * nu[3][None, None, :]
            if LOOP:
                weight = weight * _at(nu[1], j)
            else:
                weight = weight * nu[1][:, None, None]
            if M == 4:
                weight = weight * _at(nu[0], i)
            if M < 4 and not LOOP:
                cost = held
            else:
                cost = cost_tile(i, j, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
            cost = tl.where(weight == 0.0, 0.0, cost)
            mean += tl.sum(tl.sum(tl.sum(weight * cost, 2), 1), 0)
            square += tl.sum(tl.sum(tl.sum(weight * cost * cost, 2), 1), 0)
    variance = square - mean * mean
    return mean, tl.sqrt(tl.where((variance > 0.0) & (variance < float("inf")), variance, 0.0))
