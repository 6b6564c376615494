"""solve_small: whole transport problems of 2 to 4 small marginals, one program for each.

One launch runs all iterations of all problems of a batch, each with its own end. In potentials x
in units of epsilon, T = exp(sum_p x_p - C / epsilon) has marginals m_p and pairwise marginals P_pq,
and minus the Hessian of the dual <x, nu> - sum T is H = [diag m_p, P_pq]. An iteration is

- a Newton step, H dx = nu - m by conjugate gradients, no longer than a trust radius, and
- a Sinkhorn sweep from there, in the log domain, exact at any epsilon.

A Newton step that does not lessen the error is undone, and a sweep alone follows. Epsilon begins at
twice the deviation of the cost and is divided by four each time the error is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import block, check_batched, launch, lifted
from multialign.ops._triton.small_newton import l1_error, largest, newton_step, plus, times
from multialign.ops._triton.small_plan import (
    cost_moments,
    cost_tile,
    no_pairs,
    pair_marginals,
    single_marginals,
    sweep,
)
from multialign.ops._triton.tables import finite
from multialign.ops.operators import operator, register_batched_vmap, register_fake

__all__ = ["fits_small", "solve_small"]

_LARGEST_SIZE = 32
# The largest tile, in 32-bit words.
_TILE = 4096
# Plans with more entries need a batch to be worth a launch: each is the work of one program, and
# few programs leave most of a card idle.
_LARGE_PLAN = 2**15
_LEAST_BATCH = 8

# Constants that the kernel reads as globals.
_FIRST_EPSILON = tl.constexpr(2.0)  # in deviations of the cost
_LEVEL_FACTOR = tl.constexpr(0.25)
_LEVEL_ERROR = tl.constexpr(1e-2)
_NEWTON_ERROR = tl.constexpr(1.0)  # from this error on a Newton step is tried
_SHORTEST = tl.constexpr(0.5)  # trust radius, of a potential in units of epsilon
_LONGEST = tl.constexpr(3.0)
_PATIENCE = tl.constexpr(50)  # iterations without progress at the last epsilon before it stops


@triton.jit
def _masses(pointer, count, BLOCK: tl.constexpr, THERE: tl.constexpr, DTYPE: tl.constexpr):
    indices = tl.arange(0, BLOCK)
    if THERE:
        masses = tl.load(pointer + indices, mask=indices < count, other=0.0).to(DTYPE)
    else:
        masses = tl.full((BLOCK,), 1.0, DTYPE)
    return masses


@triton.jit
def _log(x):
    return tl.where(x == 0.0, float("-inf"), tl.log(tl.where(x == 0.0, 1.0, x)))


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
    PAIRS: tl.constexpr,  # bits of the tables that exist, or 64 for a whole cost
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
    wanted = (_log(nu[0]), _log(nu[1]), _log(nu[2]), _log(nu[3]))
    target = tl.load(epsilons + batch).to(DTYPE)

    held = cost_tile(0, 0, tables, sizes, PAIRS, LOOP, BLOCKS, DTYPE)
    mean, deviation = cost_moments(nu, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
    # The constant stands second: the interpreter of triton 3.7 makes a constant of the product if
    # it stands first.
    epsilon = tl.maximum(target, deviation * _FIRST_EPSILON)
    x = (
        tl.where(nu[0] == 0.0, float("-inf"), nu[0] * 0.0),
        tl.where(nu[1] == 0.0, float("-inf"), nu[1] * 0.0),
        tl.where(nu[2] == 0.0, float("-inf"), nu[2] * 0.0),
        tl.where(nu[3] == 0.0, float("-inf"), nu[3] * 0.0),
    )
    pairs = no_pairs(BLOCKS, DTYPE)
    error = tl.max(nu[3], 0) + 1e30
    best = error
    radius = error * 0.0 + 1.0
    count = 0
    worse = 0
    wait = 1  # sweeps until the next Newton step
    active = (mean * 0.0 == 0.0) & (target > 0.0)
    while active:
        last = epsilon <= target
        start = x
        newton = False
        if (not last) & (error <= _LEVEL_ERROR):
            lower = tl.maximum(target, epsilon * _LEVEL_FACTOR)
            # In cost units, epsilon x, potentials stay as they are.
            start = times(x, epsilon / lower)
            epsilon = lower
        else:
            if (wait <= 0) & (error < _NEWTON_ERROR):
                step = newton_step(single_marginals(pairs, M), nu, pairs, error, atoms, M)
                start = plus(x, step, tl.minimum(1.0, radius / tl.maximum(largest(step), 1e-30)))
                newton = True
        inverse = 1.0 / epsilon
        swept = sweep(start, wanted, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        pairs = pair_marginals(swept, inverse, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        found = l1_error(single_marginals(pairs, M), nu, M)
        count += 1
        if newton & (not (found < error)):
            # `pairs` is no longer that of x: a sweep has to come first.
            wait = 1
            radius = tl.maximum(0.5 * radius, _SHORTEST)
        else:
            x = swept
            error = found
            wait -= 1
            if newton:
                radius = tl.minimum(2.0 * radius, _LONGEST)
        last = epsilon <= target
        if last & (error >= best):
            worse += 1
        else:
            worse = 0
        if last:
            best = tl.minimum(best, error)
        # False where the error is NaN.
        active = (error < float("inf")) & (count < max_iterations) & (worse < _PATIENCE)
        active = active & ((not last) | (error > tolerance))
    if epsilon > target:
        x = times(x, epsilon / target)
        pairs = pair_marginals(x, 1.0 / target, held, tables, sizes, M, PAIRS, LOOP, BLOCKS, DTYPE)
        error = l1_error(single_marginals(pairs, M), nu, M)
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
    """Return whether `solve_small` takes such problems, and is fast for them."""
    return (
        2 <= len(sizes) <= 4
        and 1 <= min(sizes) <= max(sizes) <= _LARGEST_SIZE
        and dtype in (torch.float32, torch.float64)
        and (math.prod(sizes) <= _LARGE_PLAN or batch >= _LEAST_BATCH)
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


@operator(
    "triton_solve_small(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon, "
    "float tolerance, int max_iterations) -> (Tensor, Tensor, Tensor)"
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
    if not 2 <= count <= 4 or not 1 <= min(sizes) <= max(sizes) <= _LARGEST_SIZE:
        raise ValueError(
            f"solve_small takes 2 to 4 marginals of 1 to {_LARGEST_SIZE} atoms; got {sizes}"
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
    # Arguments of the kernel; `potentials` fills the places of those that are never read.
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
    blocks = [block(size, _LARGEST_SIZE, 1) for size in counts]
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


@register_fake(_solve)
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
