"""log_matmul: products of exponentials on the tensor cores, right over any range.

With row maxima alpha_i of a and column maxima beta_k of b,

    out_ik = alpha_i + beta_k - 2 s + log P_ik,  P = exp(a - alpha + s) @ exp(b - beta + s).

The shift s makes use of the exponents above 1 as well as those below: each factor is at most e^s,
and P at most J e^(2s). The largest term of P_ik may still be far below that, where row and column
have their maxima at different j. Terms down to e^(2s - cut) are exact, since both of their factors
are. A P_ik < e^(2s - cut) is too small to be trusted: such an entry is found by its value, and a
second kernel computes it again by a streamed log-sum-exp. In a plan there are few, far from where
the mass is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import (
    MULTIPROCESSORS,
    block,
    cdiv,
    check_batched,
    launch,
    lifted,
    matrix_precision,
)
from multialign.ops._triton.tables import entries, finite, log_weights
from multialign.ops.operators import operator, register_batched_vmap, register_fake

__all__ = ["log_matmul", "log_matmul_reduce"]


class _Range(NamedTuple):
    """What the exponents of a dtype hold."""

    shift: float
    """s above: J e^(2s) is finite."""
    cut: float
    """How far below alpha + beta an entry is right."""
    negligible: float
    """Logarithm of the relative size of what rounding loses anyway."""


def _exponents(dtype: torch.dtype, terms: int) -> _Range:
    room = math.log(max(terms, 1))
    if dtype == torch.float64:
        shift = math.floor(min(340.0, (708.0 - room) / 2))
        return _Range(shift, shift + 660.0, -36.0)
    # A factor keeps its digits down to e^-72, where the lower part of its TF32 split is still
    # normal. From there to the cut is a margin of e^-20 for the terms that lost theirs.
    shift = math.floor(min(38.0, (88.0 - room) / 2))
    return _Range(shift, shift + 52.0, -16.0)


@triton.jit
def _raised(x, shift, lift):
    """Return exp(x + shift), with lift = exp(shift): the sum would cost the digits of a small x."""
    low = x < -shift
    return tl.exp(tl.where(low, x + shift, x)) * tl.where(low, 1.0, lift)


@triton.jit
def _log_matmul(
    a,  # (B, I, J)
    b,  # (B, J, K)
    w,  # (B, I, K), with REDUCE
    alpha,  # (B, I)
    beta,  # (B, K)
    out,  # (B, I, K), or with REDUCE (B, K blocks, I): log sum exp(w + .) over a block
    bound,  # (B, K blocks, I): the most that entries too small to be trusted may add to it
    I,
    J,
    K,
    stride_ab,
    stride_ai,
    stride_aj,
    stride_bb,
    stride_bj,
    stride_bk,
    stride_wb,
    stride_wi,
    stride_wk,
    shift,
    cut,
    REDUCE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_blocks = tl.cdiv(I, BLOCK_I)
    k_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    i_block = program % i_blocks
    k_block = program // i_blocks % k_blocks
    batch = (program // (i_blocks * k_blocks)).to(tl.int64)
    rows = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
    columns = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    a += batch * stride_ab
    b += batch * stride_bb

    row_top = log_weights(alpha + batch * I, rows, I, 1, DTYPE)
    column_top = log_weights(beta + batch * K, columns, K, 1, DTYPE)
    row_reference = finite(row_top)
    column_reference = finite(column_top)
    lift = tl.exp((shift + 0.0).to(DTYPE))
    product = tl.zeros((BLOCK_I, BLOCK_K), DTYPE)
    for start in range(0, J, BLOCK_J):
        inner = start + tl.arange(0, BLOCK_J)
        left = entries(a, rows, inner, I, J, stride_ai, stride_aj, DTYPE)
        right = entries(b, inner, columns, J, K, stride_bj, stride_bk, DTYPE)
        product = tl.dot(
            _raised(left - row_reference[:, None], shift, lift),
            _raised(right - column_reference[None, :], shift, lift),
            product,
            input_precision=PRECISION,
            out_dtype=DTYPE,
        )

    top = row_top[:, None] + column_top[None, :]
    # The logarithm of a number near 1 keeps more digits than that of one near e^(2 shift).
    high = product > 1.0
    log_product = tl.log(tl.where(high, product / lift / lift, product))
    log_product = tl.where(high, log_product, log_product - 2 * shift)
    # False for NaN, which is to stay, and where a row or a column holds no mass.
    doubtful = (log_product < -cut) & (top > float("-inf"))
    value = top + log_product
    if REDUCE:
        w += batch * stride_wb
        third = entries(w, rows, columns, I, K, stride_wi, stride_wk, DTYPE)
        value += third
        at = (batch * k_blocks + k_block) * I + rows
        maximum = finite(tl.max(value, 1))
        total = tl.sum(tl.exp(value - maximum[:, None]), 1)
        tl.store(out + at, maximum + tl.log(total), mask=rows < I)
        most = tl.where(doubtful, third + top - cut, float("-inf"))
        maximum = finite(tl.max(most, 1))
        total = tl.sum(tl.exp(most - maximum[:, None]), 1)
        tl.store(bound + at, maximum + tl.log(total), mask=rows < I)
    else:
        at = (batch * I + rows[:, None]) * K + columns[None, :]
        inside = (rows < I)[:, None] & (columns < K)[None, :]
        tl.store(out + at, tl.where(doubtful, float("nan"), value), mask=inside)


@triton.jit
def _streamed(
    a,
    b,
    rows,
    columns,
    I,
    J,
    K,
    stride_ai,
    stride_aj,
    stride_bj,
    stride_bk,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Return log sum_j exp(a_ij + b_jk) at `rows` x `columns`, by a maximum for each entry."""
    maximum = tl.full((rows.shape[0], columns.shape[0]), float("-inf"), DTYPE)
    total = tl.zeros((rows.shape[0], columns.shape[0]), DTYPE)
    for start in range(0, J, UNROLL):
        higher = maximum
        for step in tl.static_range(UNROLL):
            inner = start + step + tl.arange(0, 1)
            left = entries(a, rows, inner, I, J, stride_ai, stride_aj, DTYPE)
            right = entries(b, inner, columns, J, K, stride_bj, stride_bk, DTYPE)
            higher = tl.maximum(higher, left + right)
        reference = finite(higher)
        total = total * tl.exp(maximum - reference)
        for step in tl.static_range(UNROLL):
            inner = start + step + tl.arange(0, 1)
            left = entries(a, rows, inner, I, J, stride_ai, stride_aj, DTYPE)
            right = entries(b, inner, columns, J, K, stride_bj, stride_bk, DTYPE)
            total += tl.exp(left + right - reference)
        maximum = higher
    return finite(maximum) + tl.log(total)


@triton.jit
def _repair(
    a,  # as in _log_matmul
    b,
    w,
    total,  # (B, I), with REDUCE: the sum over all k so far
    out,
    bound,
    I,
    J,
    K,
    stride_ab,
    stride_ai,
    stride_aj,
    stride_bb,
    stride_bj,
    stride_bk,
    stride_wb,
    stride_wi,
    stride_wk,
    negligible,
    REDUCE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,  # with REDUCE the same as in _log_matmul
    STEP_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute again what _log_matmul found too small to be trusted."""
    i_blocks = tl.cdiv(I, BLOCK_I)
    k_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    i_block = program % i_blocks
    k_block = program // i_blocks % k_blocks
    batch = (program // (i_blocks * k_blocks)).to(tl.int64)
    rows = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
    a += batch * stride_ab
    b += batch * stride_bb

    if REDUCE:
        w += batch * stride_wb
        at = (batch * k_blocks + k_block) * I + rows
        inside = rows < I
        most = tl.load(bound + at, mask=inside, other=float("-inf"))
        so_far = tl.load(total + batch * I + rows, mask=inside, other=0.0)
        # Also False where both are -inf (an empty row with nothing in doubt), and where the sum is
        # NaN, which is to stay.
        if tl.max((most > so_far + negligible).to(tl.int32), 0) > 0:
            maximum = tl.full((BLOCK_I,), float("-inf"), DTYPE)
            summed = tl.zeros((BLOCK_I,), DTYPE)
            for start in range(0, BLOCK_K, STEP_K):
                columns = k_block * BLOCK_K + start + tl.arange(0, STEP_K)
                value = _streamed(
                    a, b, rows, columns, I, J, K, stride_ai, stride_aj, stride_bj, stride_bk,
                    DTYPE, UNROLL,
                )  # fmt: skip
                value += entries(w, rows, columns, I, K, stride_wi, stride_wk, DTYPE)
                higher = tl.maximum(maximum, tl.max(value, 1))
                reference = finite(higher)
                summed = summed * tl.exp(maximum - reference)
                summed += tl.sum(tl.exp(value - reference[:, None]), 1)
                maximum = higher
            tl.store(out + at, finite(maximum) + tl.log(summed), mask=inside)
    else:
        columns = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        at = (batch * I + rows[:, None]) * K + columns[None, :]
        inside = (rows < I)[:, None] & (columns < K)[None, :]
        found = tl.load(out + at, mask=inside, other=0.0)
        # Entries in doubt are marked by NaN; those that are NaN for a reason become it again.
        if tl.max(tl.max((found != found).to(tl.int32), 1), 0) > 0:
            value = _streamed(
                a, b, rows, columns, I, J, K, stride_ai, stride_aj, stride_bj, stride_bk, DTYPE,
                UNROLL,
            )  # fmt: skip
            tl.store(out + at, tl.where(found != found, value, found), mask=inside)


def _blocks(
    dtype: torch.dtype, batch: int, sizes: tuple[int, int, int], *, plain: bool
) -> dict[str, Any]:
    """Return the largest tiles that spill no registers and make a program per multiprocessor.

    A `plain` product has the registers to itself; a reduction after it needs some, and so do rows
    that do not begin at multiples of 16.
    """
    rows, _, columns = sizes
    plain = plain and all(size % 16 == 0 for size in sizes)
    tall, wide = (128 if plain else 64, 128) if dtype == torch.float32 else (64, 64)
    while wide > 32 and batch * cdiv(rows, tall) * cdiv(columns, wide) < MULTIPROCESSORS:
        tall = wide = wide // 2
    tall, wide = block(rows, tall), block(columns, wide)
    deep = 16 if tall * wide == 128 * 128 or dtype == torch.float64 else 32
    warps = 8 if dtype == torch.float64 and tall * wide > 32 * 32 else 4
    return {
        "BLOCK_I": tall,
        "BLOCK_K": wide,
        "BLOCK_J": deep,
        "num_warps": 8 if tall * wide > 64 * 64 else warps,
        "num_stages": 2,
    }


# Side of the tiles that are computed again.
_SIDE = 32


def _multiply(a: Tensor, b: Tensor, w: Tensor | None) -> Tensor:
    """Return log sum_j exp(a_ij + b_jk) + w_ik, and sum it over k if there is a `w`."""
    dtype, kind = lifted(a, b) if w is None else lifted(a, b, w)
    batch, rows, inner = a.shape
    columns = b.shape[2]
    sizes = rows, inner, columns
    options = _blocks(dtype, batch, sizes, plain=w is None)
    k_blocks = cdiv(columns, options["BLOCK_K"])
    shape = (batch, rows, columns) if w is None else (batch, k_blocks, rows)
    out = a.new_empty(shape, dtype=dtype)
    weight, bound = (out, out) if w is None else (w, torch.empty_like(out))
    layout = *sizes, *a.stride(), *b.stride(), *weight.stride()
    limits = _exponents(dtype, inner)
    launch(
        _log_matmul, batch * cdiv(rows, options["BLOCK_I"]) * k_blocks, a, b, weight,
        a.amax(2).to(dtype), b.amax(1).to(dtype), out, bound, *layout, limits.shift, limits.cut,
        REDUCE=w is not None, DTYPE=kind, PRECISION=matrix_precision(dtype), **options,
    )  # fmt: skip
    wide = _SIDE if w is None else options["BLOCK_K"]
    launch(
        _repair, batch * cdiv(rows, _SIDE) * cdiv(columns, wide), a, b, weight,
        out if w is None else torch.logsumexp(out, 1), out, bound, *layout, limits.negligible,
        REDUCE=w is not None, DTYPE=kind, BLOCK_I=_SIDE, BLOCK_K=wide, STEP_K=min(_SIDE, wide),
        UNROLL=4, num_warps=8 if dtype == torch.float32 else 4,
    )  # fmt: skip
    return out if w is None else torch.logsumexp(out, 1)


@operator("triton_log_matmul(Tensor a, Tensor b) -> Tensor")
def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return log sum_j exp(a_ij + b_jk), `(B, I, K)`, in float64 or else in float32.

    Entries of -inf are masses of zero, and a sum of nothing is -inf. Without gradient.

    Args:
        a: `(B, I, J)`.
        b: `(B, J, K)`.
    """
    check_batched(a=(a, a.shape), b=(b, (a.shape[0], a.shape[2], None)))
    return _multiply(a, b, None)


@register_fake(log_matmul)
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=lifted(a, b)[0])


register_batched_vmap(log_matmul)


@operator("triton_log_matmul_reduce(Tensor a, Tensor b, Tensor w) -> Tensor")
def log_matmul_reduce(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Return log sum_jk exp(a_ij + b_jk + w_ik), `(B, I)`: the update of one of three marginals.

    No table over i and k is written. Without gradient.

    Args:
        a: `(B, I, J)`.
        b: `(B, J, K)`.
        w: `(B, I, K)`.
    """
    batch, rows, inner = a.shape
    columns = b.shape[2]
    check_batched(a=(a, a.shape), b=(b, (batch, inner, None)), w=(w, (batch, rows, columns)))
    return _multiply(a, b, w)


@register_fake(log_matmul_reduce)
def _(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2], dtype=lifted(a, b, w)[0])


register_batched_vmap(log_matmul_reduce)
