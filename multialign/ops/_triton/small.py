"""solve_small: whole transport problems of 2 to 4 small marginals, one program for each.

One launch runs all iterations of all problems of a batch, each with its own end. In potentials x
in units of epsilon, T = exp(sum_p x_p - C / epsilon) has marginals m_p and pairwise marginals P_pq,
and minus the Hessian of the dual <x, nu> - sum T is H = [diag m_p, P_pq]. An iteration is

- a Newton step, H dx = nu - m by conjugate gradients, no longer than a trust radius, and
- a Sinkhorn sweep from there, in the log domain, exact at any epsilon;

a step that does not lessen the error is taken back, and a sweep alone comes next. Epsilon begins at
twice the deviation of the cost and falls by four each time the error is small.

Four variables v = 0, 1, 2, 3 stand for the M marginals, the last M of them; those before have one
atom. A tile holds the plan over variables 1, 2 and 3, or 2 and 3 alone where that is too large, and
loops run over the rest: the cost of a tile is built from its pairs each time. Without a loop it
stays in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import block, check_batched, launch, lifted
from multialign.ops._triton.tables import finite
from multialign.ops.batching import register_batched_vmap

__all__ = ["fits_small", "solve_small"]

LARGEST_SIZE = 32
# 32-bit words of a tile, and entries of a plan that few problems of a batch can share a card with.
_TILE = 4096
_CROWDED = 2**15

# Kernels read these from their globals, as constants.
_FIRST_EPSILON = tl.constexpr(2.0)  # in deviations of the cost
_LEVEL_FACTOR = tl.constexpr(0.25)
_LEVEL_ERROR = tl.constexpr(1e-2)
_NEWTON_ERROR = tl.constexpr(1.0)  # from this error on a Newton step is tried
_SHORTEST = tl.constexpr(0.5)  # trust radius, of a potential in units of epsilon
_LONGEST = tl.constexpr(3.0)
_PATIENCE = tl.constexpr(50)  # iterations at the last epsilon without a smaller error: rounding


@triton.jit
def _pair(pointer, rows, columns, row_count, column_count, DTYPE: tl.constexpr):
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    at = pointer + rows[:, None] * column_count + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _cost(
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
    """Return x[index]: no other entry, of which some are -inf, takes part."""
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
    """Return log T over a tile."""
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
        cost = _cost(i, j, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
    # What stands where a mass is zero does not matter.
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
                    # One maximum for the tile.
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
    """Return the potential whose marginal is the one wanted; -inf where that is zero."""
    return tl.where(wanted == float("-inf"), float("-inf"), x + (wanted - log_sums))


@triton.jit
def _sweep(
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
def _no_pairs(BLOCKS: tl.constexpr, DTYPE: tl.constexpr):
    return (
        tl.zeros((BLOCKS[0], BLOCKS[1]), DTYPE),
        tl.zeros((BLOCKS[0], BLOCKS[2]), DTYPE),
        tl.zeros((BLOCKS[0], BLOCKS[3]), DTYPE),
        tl.zeros((BLOCKS[1], BLOCKS[2]), DTYPE),
        tl.zeros((BLOCKS[1], BLOCKS[3]), DTYPE),
        tl.zeros((BLOCKS[2], BLOCKS[3]), DTYPE),
    )


@triton.jit
def _marginals(
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
    """Return P_01, P_02, P_03, P_12, P_13, P_23; those of variables that are not there are 0."""
    rows = tl.arange(0, BLOCKS[0])[:, None]
    inner = tl.arange(0, BLOCKS[1])[:, None]
    p01, p02, p03, p12, p13, p23 = _no_pairs(BLOCKS, DTYPE)
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
def _single(pairs, M: tl.constexpr):
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
def _error(m, nu, M: tl.constexpr):
    error = tl.sum(tl.abs(m[2] - nu[2]), 0) + tl.sum(tl.abs(m[3] - nu[3]), 0)
    if M >= 3:
        error += tl.sum(tl.abs(m[1] - nu[1]), 0)
    if M >= 4:
        error += tl.sum(tl.abs(m[0] - nu[0]), 0)
    return error


@triton.jit
def _times(pair, row, column):
    """Return pair @ column and pair.T @ row."""
    return tl.sum(pair * column[None, :], 1), tl.sum(pair * row[:, None], 0)


@triton.jit
def _hessian(v, diagonal, pairs, M: tl.constexpr):
    v0, v1, v2, v3 = v
    y0 = diagonal[0] * v0
    y1 = diagonal[1] * v1
    y2, y3 = _times(pairs[5], v2, v3)
    y2 += diagonal[2] * v2
    y3 += diagonal[3] * v3
    if M >= 3:
        by1, by2 = _times(pairs[3], v1, v2)
        y1 += by1
        y2 += by2
        by1, by3 = _times(pairs[4], v1, v3)
        y1 += by1
        y3 += by3
    if M >= 4:
        by0, one = _times(pairs[0], v0, v1)
        y0 += by0
        y1 += one
        by0, two = _times(pairs[1], v0, v2)
        y0 += by0
        y2 += two
        by0, three = _times(pairs[2], v0, v3)
        y0 += by0
        y3 += three
    return y0, y1, y2, y3


@triton.jit
def _inner(a, b, M: tl.constexpr):
    total = tl.sum(a[2] * b[2], 0) + tl.sum(a[3] * b[3], 0)
    if M >= 3:
        total += tl.sum(a[1] * b[1], 0)
    if M >= 4:
        total += tl.sum(a[0] * b[0], 0)
    return total


@triton.jit
def _plus(a, b, factor):
    return (
        a[0] + factor * b[0],
        a[1] + factor * b[1],
        a[2] + factor * b[2],
        a[3] + factor * b[3],
    )


@triton.jit
def _scaled(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@triton.jit
def _inverse(x):
    """Return 1 / x, or 0 where x is 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def _newton_direction(m, nu, pairs, error, atoms, M: tl.constexpr):
    """Solve (H + lambda diag nu) dx = nu - m by conjugate gradients, preconditioned by diag nu.

    H has M - 1 null vectors, constants that cancel; nu - m is orthogonal to them.
    """
    damping = tl.minimum(tl.maximum(0.1 * error, 1e-6), 1e-2)
    diagonal = _plus(m, nu, damping)
    weights = (_inverse(nu[0]), _inverse(nu[1]), _inverse(nu[2]), _inverse(nu[3]))
    residual = _plus(nu, m, -1.0)
    step = _plus(residual, residual, -1.0)
    direction = _scaled(residual, weights)
    size = _inner(residual, direction, M)
    forcing = tl.minimum(0.03, error)
    enough = size * forcing * forcing
    count = 0
    while (size > enough) & (count < 2 * atoms):
        image = _hessian(direction, diagonal, pairs, M)
        length = size / _inner(direction, image, M)
        step = _plus(step, direction, length)
        residual = _plus(residual, image, -length)
        scaled = _scaled(residual, weights)
        smaller = _inner(residual, scaled, M)
        direction = _plus(scaled, direction, smaller / size)
        size = smaller
        count += 1
    return step


@triton.jit
def _largest(v):
    largest = tl.maximum(tl.max(tl.abs(v[2]), 0), tl.max(tl.abs(v[3]), 0))
    largest = tl.maximum(largest, tl.max(tl.abs(v[1]), 0))
    return tl.maximum(largest, tl.max(tl.abs(v[0]), 0))


@triton.jit
def _chosen(condition, a, b):
    return (
        tl.where(condition, a[0], b[0]),
        tl.where(condition, a[1], b[1]),
        tl.where(condition, a[2], b[2]),
        tl.where(condition, a[3], b[3]),
    )


@triton.jit
def _masses(pointer, count, BLOCK: tl.constexpr, THERE: tl.constexpr, DTYPE: tl.constexpr):
    indices = tl.arange(0, BLOCK)
    if THERE:
        masses = tl.load(pointer + indices, mask=indices < count, other=0.0).to(DTYPE)
    else:
        masses = tl.full((BLOCK,), 1.0, DTYPE)
    return masses


@triton.jit
def _log_or_nothing(x):
    return tl.where(x == 0.0, float("-inf"), tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def _stretched(x, factor):
    return x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor


@triton.jit
def _moments(
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

    The mean is not finite where a cost is not; a deviation that is not is 0.
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
                cost = _cost(i, j, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
            cost = tl.where(weight == 0.0, 0.0, cost)
            mean += tl.sum(tl.sum(tl.sum(weight * cost, 2), 1), 0)
            square += tl.sum(tl.sum(tl.sum(weight * cost * cost, 2), 1), 0)
    variance = square - mean * mean
    return mean, tl.sqrt(tl.where((variance > 0.0) & (variance < float("inf")), variance, 0.0))


@triton.jit
def _store(pointer, x, count, BLOCK: tl.constexpr):
    indices = tl.arange(0, BLOCK)
    tl.store(pointer + indices, finite(x), mask=indices < count)


@triton.jit
def _solve_small(
    t01,  # (B, n0, n1), or the whole cost (B, n0, n1, n2, n3); contiguous like all that follow
    t02,
    t03,
    t12,
    t13,
    t23,
    nu0,  # (B, n0)
    nu1,
    nu2,
    nu3,
    epsilons,  # (B,)
    potentials,  # (B, atoms)
    iterations,  # (B,)
    errors,  # (B,)
    n0,
    n1,
    n2,
    n3,
    atoms,
    tolerance,
    max_iterations,
    M: tl.constexpr,
    PAIRS: tl.constexpr,  # bits of the tables that are there, or 64 for a whole cost
    LOOP: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    BLOCKS: tl.constexpr = (B0, B1, B2, B3)
    sizes = (n0, n1, n2, n3)
    if PAIRS == 64:
        t01 += batch * n0 * n1 * n2 * n3
    else:
        t01 += batch * n0 * n1
    t02 += batch * n0 * n2
    t03 += batch * n0 * n3
    t12 += batch * n1 * n2
    t13 += batch * n1 * n3
    t23 += batch * n2 * n3
    tables = (t01, t02, t03, t12, t13, t23)
    nu = (
        _masses(nu0 + batch * n0, n0, B0, M >= 4, DTYPE),
        _masses(nu1 + batch * n1, n1, B1, M >= 3, DTYPE),
        _masses(nu2 + batch * n2, n2, B2, True, DTYPE),
        _masses(nu3 + batch * n3, n3, B3, True, DTYPE),
    )
    wanted = (
        _log_or_nothing(nu[0]),
        _log_or_nothing(nu[1]),
        _log_or_nothing(nu[2]),
        _log_or_nothing(nu[3]),
    )
    target = tl.load(epsilons + batch).to(DTYPE)

    held = _cost(0, 0, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
    mean, deviation = _moments(nu, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
    # A constant on the left makes a constant of the product in the interpreter of triton 3.7.
    epsilon = tl.maximum(target, deviation * _FIRST_EPSILON)
    x = (
        tl.where(nu[0] == 0.0, float("-inf"), nu[0] * 0.0),
        tl.where(nu[1] == 0.0, float("-inf"), nu[1] * 0.0),
        tl.where(nu[2] == 0.0, float("-inf"), nu[2] * 0.0),
        tl.where(nu[3] == 0.0, float("-inf"), nu[3] * 0.0),
    )
    pairs = _no_pairs(BLOCKS, DTYPE)
    error = tl.max(nu[3], 0) + 1e30
    best = error
    radius = error * 0.0 + 1.0
    count = 0
    worse = 0
    rest = 1  # sweeps until the next Newton step
    going = (mean * 0.0 == 0.0) & (target > 0.0)
    while going:
        last = epsilon <= target
        start = x
        newton = False
        if (not last) & (error <= _LEVEL_ERROR):
            lower = tl.maximum(target, epsilon * _LEVEL_FACTOR)
            # In cost units, epsilon x, potentials stay as they are.
            start = _stretched(x, epsilon / lower)
            epsilon = lower
        else:
            if (rest <= 0) & (error < _NEWTON_ERROR):
                step = _newton_direction(_single(pairs, M), nu, pairs, error, atoms, M)
                start = _plus(x, step, tl.minimum(1.0, radius / tl.maximum(_largest(step), 1e-30)))
                newton = True
        inverse = 1.0 / epsilon
        swept = _sweep(start, wanted, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        pairs = _marginals(swept, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        found = _error(_single(pairs, M), nu, M)
        count += 1
        if newton & (not (found < error)):
            # `pairs` is not that of x now: a sweep has to come first.
            rest = 1
            radius = tl.maximum(0.5 * radius, _SHORTEST)
        else:
            x = swept
            error = found
            rest -= 1
            if newton:
                radius = tl.minimum(2.0 * radius, _LONGEST)
        last = epsilon <= target
        if last & (error >= best):
            worse += 1
        else:
            worse = 0
        if last:
            best = tl.minimum(best, error)
        # False where the error is NaN: it never falls again.
        going = (error < float("inf")) & (count < max_iterations) & (worse < _PATIENCE)
        going = going & ((not last) | (error > tolerance))
    if epsilon > target:
        x = _stretched(x, epsilon / target)
        pairs = _marginals(x, 1.0 / target, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        error = _error(_single(pairs, M), nu, M)
    if count == 0:
        error = float("nan") + error

    tl.store(iterations + batch, count)
    tl.store(errors + batch, error)
    potentials += batch * atoms
    if M >= 4:
        _store(potentials, x[0], n0, B0)
        potentials += n0
    if M >= 3:
        _store(potentials, x[1], n1, B1)
        potentials += n1
    _store(potentials, x[2], n2, B2)
    _store(potentials + n2, x[3], n3, B3)


_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def fits_small(sizes: Sequence[int], batch: int, dtype: torch.dtype) -> bool:
    """Return whether `solve_small` takes such problems and is made for them.

    A plan is one program's work: few problems with large plans leave most of a card idle.
    """
    entries = 1
    for size in sizes:
        entries *= size
    return (
        2 <= len(sizes) <= 4
        and min(sizes) >= 1
        and max(sizes) <= LARGEST_SIZE
        and dtype in (torch.float32, torch.float64)
        and (entries <= _CROWDED or batch >= 8)
    )


def solve_small(
    costs: Sequence[Tensor],
    scopes: Sequence[Sequence[int]],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve B transport problems of M = 2 to 4 marginals of at most 32 atoms each.

    An atom of mass 0 is absent: its costs do not matter, and its potential is 0. A problem with a
    cost, mass or epsilon that is not finite ends at once, with an error of NaN.

    Args:
        costs: Tables `(B, K_i, K_j)`, or one `(B, K_1, ..., K_M)`; best centred.
        scopes: The variables (i, j), i < j, of each table, or all of them.
        marginals: M tensors `(B, K_p)`, each of sum 1.
        epsilon: `(B,)`, > 0.
        tolerance: L1 error at which a problem is solved.
        max_iterations: At most so many sweeps.

    Returns:
        Potentials `(B, S)` in units of epsilon, one marginal after another; iterations `(B,)`;
        error `(B,)`, the sum over p of the L1 distance of the plan's marginal from the one wanted,
        at these potentials.
    """
    flat = [variable for scope in scopes for variable in scope]
    results: tuple[Tensor, Tensor, Tensor] = _solve(
        list(costs), flat, list(marginals), epsilon, tolerance, max_iterations
    )
    return results


@torch.library.custom_op(
    "multialign::triton_solve_small",
    mutates_args=(),
    schema=(
        "(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon, float tolerance, "
        "int max_iterations) -> (Tensor, Tensor, Tensor)"
    ),
)
def _solve(
    costs: list[Tensor],
    scopes: list[int],
    marginals: list[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [marginal.shape[-1] for marginal in marginals]
    batch, count = marginals[0].shape[0], len(sizes)
    if not 2 <= count <= 4 or not 1 <= min(sizes) <= max(sizes) <= LARGEST_SIZE:
        raise ValueError(
            f"solve_small takes 2 to 4 marginals of 1 to {LARGEST_SIZE} atoms; got {sizes}"
        )
    variables = iter(scopes)
    tables = {tuple(next(variables) for _ in cost.shape[1:]): cost for cost in costs}
    named = {f"costs[{s}]": (c, (batch, *[sizes[v] for v in s])) for s, c in tables.items()}
    named |= {f"marginals[{p}]": (m, (batch, sizes[p])) for p, m in enumerate(marginals)}
    check_batched(**named, epsilon=(epsilon, (batch,)))
    dtype, kind = lifted(*costs, *marginals, epsilon)

    atoms = sum(sizes)
    potentials = epsilon.new_empty((batch, atoms), dtype=dtype)
    iterations = epsilon.new_empty((batch,), dtype=torch.int64)
    errors = epsilon.new_empty((batch,), dtype=dtype)
    # Variables and tables of the kernel; what is not there is never read.
    first = 4 - count
    everything = tuple(range(count))
    pointers = [potentials] * 6
    present = 0
    if count > 2 and everything in tables:
        pointers[0], present = tables[everything].contiguous(), 64
    else:
        for bit, (v, w) in enumerate(_PAIRS):
            table = tables.get((v - first, w - first))
            if table is not None:
                pointers[bit], present = table.contiguous(), present | 1 << bit
    masses = [potentials] * first + [marginal.contiguous() for marginal in marginals]
    counts = [1] * first + sizes
    blocks = [block(size, LARGEST_SIZE, 1) for size in counts]
    tile = blocks[1] * blocks[2] * blocks[3]
    words = tile * dtype.itemsize // 4
    loop = words > _TILE
    launch(
        _solve_small, batch, *pointers, *masses, epsilon.contiguous(), potentials, iterations,
        errors, *counts, atoms, tolerance, max_iterations, M=count, PAIRS=present, LOOP=loop,
        B0=blocks[0], B1=blocks[1], B2=blocks[2], B3=blocks[3], DTYPE=kind,
        num_warps=_warps(words // blocks[1] if loop else words, whole=count > 3 and present == 64),
    )  # fmt: skip
    return potentials, iterations, errors


def _warps(words: int, whole: bool) -> int:
    """Return how many warps hold a tile of the plan without spilling registers.

    `whole`: of a cost of four variables that is read from memory each time.
    """
    return 1 + whole if words <= 512 else 4 if words <= 2048 else 8


@_solve.register_fake
def _(
    costs: list[Tensor],
    scopes: list[int],
    marginals: list[Tensor],
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, _ = lifted(*costs, *marginals, epsilon)
    atoms = sum(marginal.shape[-1] for marginal in marginals)
    return (
        epsilon.new_empty((epsilon.shape[0], atoms), dtype=dtype),
        torch.empty_like(epsilon, dtype=torch.int64),
        torch.empty_like(epsilon, dtype=dtype),
    )


register_batched_vmap(_solve)
