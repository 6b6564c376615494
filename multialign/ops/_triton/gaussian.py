"""Sums over a Gaussian kernel matrix, and their derivatives, by tiles that are never written.

A program owns some rows and sums over all columns, or over a share of them where there are few
rows. No two programs add to one number, so the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import (
    MULTIPROCESSORS,
    block,
    cdiv,
    launch,
    lifted,
    matrix_precision,
)

__all__ = ["gaussian_form"]


@triton.jit
def _gaussian_sums(
    x,  # (B, N, D), contiguous like all that follow
    y,  # (B, M, D)
    squares_x,  # (B, N): |x|^2
    squares_y,  # (B, M)
    q,  # (B, M)
    equal,  # (B, N): whether x_n = y_n, so that their distance is exactly 0
    precisions,  # (B, S)
    sums,  # (B, shares, N): sum_m q_m k_nm
    slopes,  # (B, shares, N): sum_m q_m slope_nm
    moments,  # (B, shares, N, D): sum_m q_m slope_nm y_m
    N,
    M,
    D,
    S,
    shares,
    share,  # columns in a share
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SQUARE: tl.constexpr,  # whether N = M; else `equal` is not read
    DISTINCT: tl.constexpr,  # whether pairs n = m are left out
    SINGLE: tl.constexpr,  # whether BLOCK_D = BLOCK_F holds all features
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # features at a time in a distance
    BLOCK_F: tl.constexpr,  # features of the moments
):
    n_blocks = tl.cdiv(N, BLOCK_N)
    f_blocks = tl.cdiv(D, BLOCK_F)
    program = tl.program_id(0)
    rows = program % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    f_block = program // n_blocks % f_blocks
    part = program // (n_blocks * f_blocks) % shares
    batch = (program // (n_blocks * f_blocks * shares)).to(tl.int64)
    x += batch * N * D
    y += batch * M * D
    precisions += batch * S
    first = tl.load(precisions)

    in_rows = rows < N
    features = tl.arange(0, BLOCK_D)
    kept = f_block * BLOCK_F + tl.arange(0, BLOCK_F)
    square_x = tl.load(squares_x + batch * N + rows, mask=in_rows, other=0.0)
    if SQUARE:
        same = tl.load(equal + batch * N + rows, mask=in_rows, other=0) != 0
    x_at = rows[:, None].to(tl.int64) * D + features[None, :]
    x_mask = in_rows[:, None]
    if SINGLE:
        x_tile = tl.load(x + x_at, mask=x_mask & (features < D)[None, :], other=0.0)
    total = tl.zeros((BLOCK_N,), DTYPE)
    slope_total = tl.zeros((BLOCK_N,), DTYPE)
    moment = tl.zeros((BLOCK_N, BLOCK_F), DTYPE)
    for start in range(part * share, min(M, (part + 1) * share), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        in_columns = columns < M
        y_at = columns[:, None].to(tl.int64) * D
        y_tile = tl.load(
            y + y_at + kept[None, :], mask=in_columns[:, None] & (kept < D)[None, :], other=0.0
        )
        inner = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
        if SINGLE:
            inner = tl.dot(
                x_tile, tl.trans(y_tile), inner, input_precision=PRECISION, out_dtype=DTYPE
            )
        else:
            for d in range(0, D, BLOCK_D):
                here = (d + features < D)[None, :]
                left = tl.load(x + x_at + d, mask=x_mask & here, other=0.0)
                right = tl.load(
                    y + y_at + d + features[None, :], mask=in_columns[:, None] & here, other=0.0
                )
                inner = tl.dot(
                    left, tl.trans(right), inner, input_precision=PRECISION, out_dtype=DTYPE
                )
        square_y = tl.load(squares_y + batch * M + columns, mask=in_columns, other=0.0)
        weight = tl.load(q + batch * M + columns, mask=in_columns, other=0.0)
        cost = square_x[:, None] + square_y[None, :] - 2.0 * inner
        # Rounding may make it negative; unlike a maximum, the comparison keeps a NaN.
        cost = tl.where(cost < 0.0, 0.0, cost)
        if SQUARE:
            cost = tl.where((rows[:, None] == columns[None, :]) & same[:, None], 0.0, cost)
        kernel = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
        slope = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
        for s in range(S):
            precision = tl.load(precisions + s)
            term = tl.exp(cost * -precision)
            kernel += term
            slope += term * (precision / first)
        if DISTINCT:
            kernel = tl.where(rows[:, None] == columns[None, :], 0.0, kernel)
            slope = tl.where(rows[:, None] == columns[None, :], 0.0, slope)
        total += tl.sum(kernel * weight[None, :], 1)
        slope *= weight[None, :]
        slope_total += tl.sum(slope, 1)
        moment = tl.dot(slope, y_tile, moment, input_precision=PRECISION, out_dtype=DTYPE)

    at = (batch * shares + part) * N + rows
    if f_block == 0:
        tl.store(sums + at, total / S, mask=in_rows)
        tl.store(slopes + at, slope_total / S, mask=in_rows)
    tl.store(
        moments + at[:, None] * D + kept[None, :],
        moment / S,
        mask=in_rows[:, None] & (kept < D)[None, :],
    )


def gaussian_form(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, both: bool, distinct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `multialign.ops.kernel_sums` defines: p^T K q and its derivatives.

    For float32: triton 3.7 interprets the kernel in float64 but does not compile it.

    Returns:
        The form `(B)` in float64, and its derivatives by x and p and, if `both`, by y and q (else
        zeros).
    """
    origin = x.mean(-2, keepdim=True)
    x, y = (x - origin).contiguous(), (y - origin).contiguous()
    p, q, precisions = p.contiguous(), q.contiguous(), precisions.contiguous()
    sums_x, by_x = _row_sums(x, y, p, q, precisions, distinct)
    if both:
        sums_y, by_y = _row_sums(y, x, q, p, precisions, distinct)
    else:
        sums_y, by_y = torch.zeros_like(q, dtype=torch.float64), torch.zeros_like(y)
    value = (p.double() * sums_x).sum(-1)
    return value, by_x, sums_x.to(p.dtype), by_y, sums_y.to(q.dtype)


def _row_sums(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, distinct: bool
) -> tuple[Tensor, Tensor]:
    """Return K q in float64 and the derivative of p^T K q by x."""
    dtype, kind = lifted(x, y, p, q)
    batch, rows, depth = x.shape
    columns = y.shape[1]
    # The largest tiles that spill no registers.
    single = depth <= (64 if dtype == torch.float32 else 32)
    deep = block(depth, 64) if single else 32
    kept = deep if single else 128 if dtype == torch.float32 else 32
    tall, wide = block(rows, 64 if dtype == torch.float32 else 32), block(columns, 32)
    programs = batch * cdiv(rows, tall) * cdiv(depth, kept)
    shares = max(1, min(cdiv(columns, wide), 2 * MULTIPROCESSORS // max(1, programs)))
    share = cdiv(cdiv(columns, wide), shares) * wide
    sums = x.new_empty((batch, shares, rows))
    slopes = torch.empty_like(sums)
    moments = x.new_empty((batch, shares, rows, depth))
    square = rows == columns
    equal = (x == y).all(-1).to(torch.int8) if square else q  # never read unless square
    launch(
        _gaussian_sums, programs * shares, x, y, x.square().sum(-1), y.square().sum(-1), q,
        equal, precisions, sums, slopes, moments, rows, columns, depth, precisions.shape[1], shares,
        share, DTYPE=kind, PRECISION=matrix_precision(dtype), SQUARE=square, DISTINCT=distinct,
        SINGLE=single, BLOCK_N=tall, BLOCK_M=wide, BLOCK_D=deep, BLOCK_F=kept,
        num_warps=4 if kept <= 64 else 8, num_stages=2,
    )  # fmt: skip
    # d k(x_n, y_m) / d x_n = slope (y_m - x_n)
    slope = moments.sum(1) - slopes.sum(1).unsqueeze(-1) * x
    by_x = 2 * precisions[:, :1, None] * p.unsqueeze(-1) * slope
    return sums.double().sum(1), by_x
