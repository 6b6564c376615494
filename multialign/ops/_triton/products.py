"""log_matmul: products of exponentials on the tensor cores, right over any range.

With row maxima alpha_i of a and column maxima beta_k of b,

    out_ik = alpha_i + beta_k - 2 s + log P_ik,  P = exp(a - alpha + s) @ exp(b - beta + s),

which shifts the factors up by s, to use the exponents above 1 as well as those below. Each factor
is at most e^s, and P at most J e^(2s). The largest term of P_ik may still lie far below that: rows
and columns have their maxima at different j. Terms down to e^(2s - cut) are exact, since both of
their factors are; P_ik < e^(2s - cut) is too small to be trusted. Such an entry is found by its
value and computed again, by a streamed log-sum-exp with a maximum of its own. In a plan they are
far from all that matters, and so they are few.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.gradients import log_matmul_backward
from multialign.ops._triton.launch import (
    MULTIPROCESSORS,
    block,
    cdiv,
    check_batched,
    launch,
    lifted,
    matrix_precision,
)
from multialign.ops._triton.rows import inverse_epsilon, row_maxima
from multialign.ops._triton.tables import entries, finite, log_weights
from multialign.ops.batching import register_batched_vmap

__all__ = ["log_matmul", "log_matmul_reduce", "log_matmul_reduce_points"]


class _Range(NamedTuple):
    """What the exponents of a dtype hold."""

    shift: float
    """s above: J e^(2s) is finite."""
    cut: float
    """How far below alpha + beta an entry is right."""
    negligible: float
    """log of what is lost in rounding anyway."""


def _exponents(dtype: torch.dtype, terms: int) -> _Range:
    room = math.log(max(terms, 1))
    if dtype == torch.float64:
        shift = math.floor(min(340.0, (708.0 - room) / 2))
        return _Range(shift, shift + 660.0, -36.0)
    # A factor keeps its digits down to e^-72: the lower part of its TF32 split is still normal
    # there. Between cut and 72 + s are e^-20 of margin for the terms that lost theirs.
    shift = math.floor(min(38.0, (88.0 - room) / 2))
    return _Range(shift, shift + 52.0, -16.0)


@triton.jit
def _raised(x, shift, lift):
    """Return exp(x + shift), with lift = exp(shift): the sum would cost the digits of a small x."""
    low = x < -shift
    return tl.exp(tl.where(low, x + shift, x)) * tl.where(low, 1.0, lift)


@triton.jit
def _log_matmul(
    a,  # (B, I, J) or points x (B, D, I)
    a_columns,  # points y (B, D, J)
    b,  # (B, J, K) or points y (B, D, J)
    b_columns,  # points z (B, D, K)
    w,  # (B, I, K) or points x (B, D, I)
    g,  # (B, J), with points
    h,  # (B, K), with points
    scales,  # (B,)
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
    depth,
    shift,
    cut,
    POINTS: tl.constexpr,
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
    scale = tl.load(scales + batch)
    if POINTS:
        a += batch * depth * I
        a_columns += batch * depth * J
        b += batch * depth * J
        b_columns += batch * depth * K
        w += batch * depth * I
    else:
        a += batch * stride_ab
        b += batch * stride_bb
        w += batch * stride_wb

    row_top = log_weights(alpha + batch * I, rows, I, 1, DTYPE)
    column_top = log_weights(beta + batch * K, columns, K, 1, DTYPE)
    row_reference = finite(row_top)
    column_reference = finite(column_top)
    lift = tl.exp((shift + 0.0).to(DTYPE))
    product = tl.zeros((BLOCK_I, BLOCK_K), DTYPE)
    for start in range(0, J, BLOCK_J):
        inner = start + tl.arange(0, BLOCK_J)
        left = entries(
            a, a_columns, rows, inner, I, J, stride_ai, stride_aj, depth, scale, POINTS, DTYPE
        )
        right = entries(
            b, b_columns, inner, columns, J, K, stride_bj, stride_bk, depth, scale, POINTS, DTYPE
        )
        if POINTS:
            half = 0.5 * log_weights(g + batch * J, inner, J, 1, DTYPE)
            left += half[None, :]
            right += half[:, None]
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
    # False for NaN, which is right as it is, and where a row or a column holds no mass.
    doubtful = (log_product < -cut) & (top > float("-inf"))
    value = top + log_product
    if REDUCE:
        third = entries(
            w, b_columns, rows, columns, I, K, stride_wi, stride_wk, depth, scale, POINTS, DTYPE
        )
        if POINTS:
            third += log_weights(h + batch * K, columns, K, 1, DTYPE)[None, :]
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
    a_columns,
    b,
    b_columns,
    g,
    rows,
    columns,
    I,
    J,
    K,
    stride_ai,
    stride_aj,
    stride_bj,
    stride_bk,
    depth,
    scale,
    POINTS: tl.constexpr,
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
            left = entries(
                a, a_columns, rows, inner, I, J, stride_ai, stride_aj, depth, scale, POINTS, DTYPE
            )
            right = entries(
                b, b_columns, inner, columns, J, K, stride_bj, stride_bk, depth, scale, POINTS,
                DTYPE,
            )  # fmt: skip
            if POINTS:
                left += log_weights(g, inner, J, 1, DTYPE)[None, :]
            higher = tl.maximum(higher, left + right)
        reference = finite(higher)
        total = total * tl.exp(maximum - reference)
        for step in tl.static_range(UNROLL):
            inner = start + step + tl.arange(0, 1)
            left = entries(
                a, a_columns, rows, inner, I, J, stride_ai, stride_aj, depth, scale, POINTS, DTYPE
            )
            right = entries(
                b, b_columns, inner, columns, J, K, stride_bj, stride_bk, depth, scale, POINTS,
                DTYPE,
            )  # fmt: skip
            if POINTS:
                left += log_weights(g, inner, J, 1, DTYPE)[None, :]
            total += tl.exp(left + right - reference)
        maximum = higher
    return finite(maximum) + tl.log(total)


@triton.jit
def _repair(
    a,  # as in _log_matmul
    a_columns,
    b,
    b_columns,
    w,
    g,
    h,
    scales,
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
    depth,
    negligible,
    POINTS: tl.constexpr,
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
    scale = tl.load(scales + batch)
    if POINTS:
        a += batch * depth * I
        a_columns += batch * depth * J
        b += batch * depth * J
        b_columns += batch * depth * K
        w += batch * depth * I
        g += batch * J
        h += batch * K
    else:
        a += batch * stride_ab
        b += batch * stride_bb
        w += batch * stride_wb

    if REDUCE:
        at = (batch * k_blocks + k_block) * I + rows
        inside = rows < I
        most = tl.load(bound + at, mask=inside, other=float("-inf"))
        so_far = tl.load(total + batch * I + rows, mask=inside, other=0.0)
        # -inf is never more than -inf: a row that may be empty asks for no work if nothing is in
        # doubt, and a NaN stays.
        if tl.max((most > so_far + negligible).to(tl.int32), 0) > 0:
            maximum = tl.full((BLOCK_I,), float("-inf"), DTYPE)
            summed = tl.zeros((BLOCK_I,), DTYPE)
            for start in range(0, BLOCK_K, STEP_K):
                columns = k_block * BLOCK_K + start + tl.arange(0, STEP_K)
                value = _streamed(
                    a, a_columns, b, b_columns, g, rows, columns, I, J, K, stride_ai, stride_aj,
                    stride_bj, stride_bk, depth, scale, POINTS, DTYPE, UNROLL,
                )  # fmt: skip
                value += entries(
                    w, b_columns, rows, columns, I, K, stride_wi, stride_wk, depth, scale, POINTS,
                    DTYPE,
                )  # fmt: skip
                if POINTS:
                    value += log_weights(h, columns, K, 1, DTYPE)[None, :]
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
                a, a_columns, b, b_columns, g, rows, columns, I, J, K, stride_ai, stride_aj,
                stride_bj, stride_bk, depth, scale, POINTS, DTYPE, UNROLL,
            )  # fmt: skip
            tl.store(out + at, tl.where(found != found, value, found), mask=inside)


class _Factors(NamedTuple):
    """The arguments that both kernels share."""

    pointers: tuple[Tensor, ...]
    """a, a_columns, b, b_columns, w, g, h, scales."""
    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    """Of a, b and w, the depth last."""
    points: bool


def _blocks(
    dtype: torch.dtype, batch: int, sizes: tuple[int, int, int], *, plain: bool
) -> dict[str, Any]:
    """Return the largest tiles that spill no registers and make a program per multiprocessor.

    `plain` is a product alone; what follows it in the other kernels needs registers too, and so do
    rows that do not begin at multiples of 16.
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


# At most so many sums over blocks of k at a time, or those of 64 rows.
_PARTIAL_ENTRIES = 2**22
# Side of the tiles that are computed again.
_SIDE = 32


def _repair_options(dtype: torch.dtype, wide: int = _SIDE) -> dict[str, Any]:
    return {
        "BLOCK_I": _SIDE,
        "BLOCK_K": wide,
        "STEP_K": min(_SIDE, wide),
        "UNROLL": 4,
        "num_warps": 8 if dtype == torch.float32 else 4,
    }


def _product(
    factors: _Factors,
    alpha: Tensor,
    beta: Tensor,
    out: Tensor,
    bound: Tensor,
    options: dict[str, Any],
) -> _Range:
    dtype, kind = lifted(out)
    limits = _exponents(dtype, factors.sizes[1])
    rows, _, columns = factors.sizes
    programs = alpha.shape[0] * cdiv(rows, options["BLOCK_I"]) * cdiv(columns, options["BLOCK_K"])
    launch(
        _log_matmul, programs, *factors.pointers, alpha, beta, out, bound, *factors.sizes,
        *factors.strides, limits.shift, limits.cut, POINTS=factors.points,
        REDUCE=bound is not out, DTYPE=kind, PRECISION=matrix_precision(dtype), **options,
    )  # fmt: skip
    return limits


@torch.library.custom_op(
    "multialign::triton_log_matmul", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)
def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return log sum_j exp(a_ij + b_jk), `(B, I, K)`, in float64 or else in float32.

    Differentiable once. Entries of -inf are masses of zero, and a sum of nothing is -inf.

    Args:
        a: `(B, I, J)`.
        b: `(B, J, K)`.
    """
    batch, rows, inner = a.shape
    columns = b.shape[2]
    check_batched(a=(a, a.shape), b=(b, (batch, inner, None)))
    dtype, kind = lifted(a, b)
    out = a.new_empty((batch, rows, columns), dtype=dtype)
    factors = _Factors(
        (a, a, b, b, out, out, out, out),
        (rows, inner, columns),
        (*a.stride(), *b.stride(), *out.stride(), 0),
        points=False,
    )
    alpha, beta = a.amax(2).to(dtype), b.amax(1).to(dtype)
    _product(factors, alpha, beta, out, out, _blocks(dtype, batch, factors.sizes, plain=True))
    programs = batch * cdiv(rows, _SIDE) * cdiv(columns, _SIDE)
    launch(
        _repair, programs, *factors.pointers, out, out, out, *factors.sizes, *factors.strides, 0.0,
        POINTS=False, REDUCE=False, DTYPE=kind, **_repair_options(dtype),
    )  # fmt: skip
    return out


@log_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=lifted(a, b)[0])


register_batched_vmap(log_matmul)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    derivatives: tuple[Tensor, ...] = log_matmul_backward(grad, *ctx.saved_tensors)
    return derivatives


log_matmul.register_autograd(_differentiate, setup_context=_keep)


def _reduce(factors: _Factors, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return log sum_k exp(w_ik + log_matmul_ik), `(B, I)`."""
    dtype, kind = lifted(alpha)
    batch = alpha.shape[0]
    rows, _, columns = factors.sizes
    options = _blocks(dtype, batch, factors.sizes, plain=False)
    partial = alpha.new_empty((batch, cdiv(columns, options["BLOCK_K"]), rows))
    bound = torch.empty_like(partial)
    limits = _product(factors, alpha, beta, partial, bound, options)
    launch(
        _repair, batch * cdiv(rows, _SIDE) * partial.shape[1], *factors.pointers,
        torch.logsumexp(partial, 1), partial, bound, *factors.sizes, *factors.strides,
        limits.negligible, POINTS=factors.points, REDUCE=True, DTYPE=kind,
        **_repair_options(dtype, options["BLOCK_K"]),
    )  # fmt: skip
    return torch.logsumexp(partial, 1)


@torch.library.custom_op(
    "multialign::triton_log_matmul_reduce",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor w) -> Tensor",
)
def log_matmul_reduce(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Return log sum_k exp(w_ik + log sum_j exp(a_ij + b_jk)), `(B, I)`.

    It is the update of one of three marginals. No table over i and k is written, but by the
    gradient. Differentiable once.

    Args:
        a: `(B, I, J)`.
        b: `(B, J, K)`.
        w: `(B, I, K)`.
    """
    batch, rows, inner = a.shape
    columns = b.shape[2]
    check_batched(a=(a, a.shape), b=(b, (batch, inner, None)), w=(w, (batch, rows, columns)))
    dtype, _ = lifted(a, b, w)
    alpha, beta = a.amax(2).to(dtype), b.amax(1).to(dtype)
    factors = _Factors(
        (a, a, b, b, w, alpha, alpha, alpha),
        (rows, inner, columns),
        (*a.stride(), *b.stride(), *w.stride(), 0),
        points=False,
    )
    return _reduce(factors, alpha, beta)


@log_matmul_reduce.register_fake
def _(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2], dtype=lifted(a, b, w)[0])


register_batched_vmap(log_matmul_reduce)


def _differentiate_reduced(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    a, b, w, total = ctx.saved_tensors
    value = log_matmul(a, b)
    total = torch.where(total == -math.inf, 0.0, total)
    by_w = grad.unsqueeze(2) * (w.to(total.dtype) + value - total.unsqueeze(2)).exp()
    return *log_matmul_backward(by_w, a, b, value), by_w.to(w.dtype)


log_matmul_reduce.register_autograd(_differentiate_reduced, setup_context=_keep)


@torch.library.custom_op(
    "multialign::triton_log_matmul_reduce_points",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor z, Tensor g, Tensor h, Tensor epsilon) -> Tensor",
)
def log_matmul_reduce_points(
    x: Tensor, y: Tensor, z: Tensor, g: Tensor, h: Tensor, epsilon: Tensor
) -> Tensor:
    """Return log sum_jk exp(g_j + h_k - (|x_i-y_j|^2 + |y_j-z_k|^2 + |x_i-z_k|^2) / epsilon).

    That is `(B, I)`: the update of one of three marginals, from points alone, for those who hold
    points too many for a table over two of them. Memory is O((I + J + K) D). Without gradient.

    Args:
        x: `(B, I, D)`.
        y: `(B, J, D)`.
        z: `(B, K, D)`.
        g: `(B, J)`.
        h: `(B, K)`.
        epsilon: `(B,)`, > 0.
    """
    batch, _, depth = x.shape
    inner, columns = y.shape[1], z.shape[1]
    check_batched(
        x=(x, x.shape),
        y=(y, (batch, None, depth)),
        z=(z, (batch, None, depth)),
        g=(g, (batch, inner)),
        h=(h, (batch, columns)),
        epsilon=(epsilon, (batch,)),
    )
    dtype, _ = lifted(x, y, z, g, h, epsilon)
    # A tile reads one coordinate of many points at a time.
    y, z = y.mT.contiguous(), z.mT.contiguous()
    g, h, scales = g.contiguous(), h.contiguous(), inverse_epsilon(epsilon, dtype)
    beta = row_maxima(z, y, g, scales, dtype)
    step = max(64, _PARTIAL_ENTRIES // max(1, batch * cdiv(columns, 32)))
    parts = []
    for points in x.split(step, 1):
        part = points.mT.contiguous()
        factors = _Factors(
            (part, y, y, z, part, g, h, scales),
            (points.shape[1], inner, columns),
            (0,) * 9 + (depth,),
            points=True,
        )
        parts.append(_reduce(factors, row_maxima(part, y, g, scales, dtype), beta))
    return torch.cat(parts, 1)


@log_matmul_reduce_points.register_fake
def _(x: Tensor, y: Tensor, z: Tensor, g: Tensor, h: Tensor, epsilon: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=lifted(x, y, z, g, h, epsilon)[0])


register_batched_vmap(log_matmul_reduce_points)
