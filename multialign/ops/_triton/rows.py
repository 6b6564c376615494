"""log_matvec: one pass over a table with a running maximum for each row."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import block, cdiv, check_batched, launch, lifted
from multialign.ops._triton.tables import entries, finite, log_weights
from multialign.ops.batching import register_batched_vmap

__all__ = ["inverse_epsilon", "log_matvec", "log_matvec_points", "row_maxima"]


@triton.jit
def _log_matvec(
    first,  # (B, I, J) or points (B, D, I)
    second,  # points (B, D, J)
    weights,  # (B, J)
    scales,  # (B,)
    out,  # (B, I): log sum_j exp(table_ij + weights_j)
    top,  # (B, I): the maximum over j
    row_count,
    column_count,
    stride_batch,
    stride_row,
    stride_column,
    stride_weights_batch,
    stride_weights,
    depth,
    row_blocks,
    POINTS: tl.constexpr,
    SHARE: tl.constexpr,  # how much of the weights counts
    WITH_TOP: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // row_blocks).to(tl.int64)
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(scales + batch) if POINTS else 1.0
    if POINTS:
        first += batch * depth * row_count
        second += batch * depth * column_count
    else:
        first += batch * stride_batch
    weights += batch * stride_weights_batch

    maximum = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    for start in range(0, column_count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        value = entries(
            first, second, rows, columns, row_count, column_count,
            stride_row, stride_column, depth, scale, POINTS, DTYPE,
        )  # fmt: skip
        value += SHARE * log_weights(weights, columns, column_count, stride_weights, DTYPE)[None, :]
        higher = tl.maximum(maximum, tl.max(value, 1))
        reference = finite(higher)
        total = total * tl.exp(maximum - reference)
        total += tl.sum(tl.exp(value - reference[:, None]), 1)
        maximum = higher
    inside = rows < row_count
    if WITH_TOP:
        tl.store(top + batch * row_count + rows, maximum, mask=inside)
    else:
        tl.store(out + batch * row_count + rows, finite(maximum) + tl.log(total), mask=inside)


def _launch_rows(
    first: Tensor,
    second: Tensor,
    weights: Tensor,
    scales: Tensor,
    out: Tensor,
    columns: int,
    points: bool,
    share: float,
    with_top: bool,
) -> None:
    batch, rows = out.shape
    depth = first.shape[1] if points else 0
    _, kind = lifted(out)
    wide = block(columns, 128 if points else 512)
    # Short blocks of rows: a table is read once, so what counts is to have many readers. Where rows
    # lie side by side in memory, eight fill what is read at once (32 bytes).
    beside = not points and first.stride(1) < first.stride(2)
    tall = 16 if points else 8 if beside else max(1, min(8, 1024 // wide))
    blocks = cdiv(rows, tall)
    launch(
        _log_matvec, batch * blocks, first, second, weights, scales, out, out, rows, columns,
        *(first.stride() if not points else (0, 0, 0)), *weights.stride(), depth, blocks,
        POINTS=points, SHARE=share, WITH_TOP=with_top, DTYPE=kind, ROWS=tall, COLUMNS=wide,
        num_warps=4,
    )  # fmt: skip


@torch.library.custom_op(
    "multialign::triton_log_matvec", mutates_args=(), schema="(Tensor a, Tensor g) -> Tensor"
)
def log_matvec(a: Tensor, g: Tensor) -> Tensor:
    """Return log sum_j exp(a_ij + g_j), `(B, I)`, in float64 or else in float32.

    A row of -inf alone gives -inf, with derivatives of 0.

    Args:
        a: `(B, I, J)`.
        g: `(B, J)`.
    """
    batch, rows, columns = a.shape
    check_batched(a=(a, a.shape), g=(g, (batch, columns)))
    dtype, _ = lifted(a, g)
    out = a.new_empty((batch, rows), dtype=dtype)
    _launch_rows(a, a, g, out, out, columns, points=False, share=1.0, with_top=False)
    return out


@log_matvec.register_fake
def _(a: Tensor, g: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2], dtype=lifted(a, g)[0])


register_batched_vmap(log_matvec)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, g, value = ctx.saved_tensors
    top = torch.where(value == -math.inf, 0.0, value)
    exponent = a.to(value.dtype) + g.unsqueeze(1) - top.unsqueeze(2)
    by_a = grad.unsqueeze(2) * exponent.exp()
    return by_a.to(a.dtype), by_a.sum(1).to(g.dtype)


log_matvec.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(
    "multialign::triton_log_matvec_points",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor g, Tensor epsilon) -> Tensor",
)
def log_matvec_points(x: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    """Return log sum_j exp(g_j - |x_i - y_j|^2 / epsilon), `(B, I)`, from points alone.

    It is the update of one of two marginals, for those who hold points too many for a table over
    two of them: memory is O((I + J) D). Without gradient.

    Args:
        x: `(B, I, D)`.
        y: `(B, J, D)`.
        g: `(B, J)`.
        epsilon: `(B,)`, > 0.
    """
    batch, rows, depth = x.shape
    columns = y.shape[1]
    check_batched(
        x=(x, x.shape),
        y=(y, (batch, None, depth)),
        g=(g, (batch, columns)),
        epsilon=(epsilon, (batch,)),
    )
    dtype, _ = lifted(x, y, g, epsilon)
    out = x.new_empty((batch, rows), dtype=dtype)
    _launch_rows(
        x.mT.contiguous(), y.mT.contiguous(), g, inverse_epsilon(epsilon, dtype), out, columns,
        points=True, share=1.0, with_top=False,
    )  # fmt: skip
    return out


@log_matvec_points.register_fake
def _(x: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=lifted(x, y, g, epsilon)[0])


register_batched_vmap(log_matvec_points)


def inverse_epsilon(epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / epsilon, what the kernels multiply squared distances by."""
    return epsilon.to(dtype).reciprocal().contiguous()


def row_maxima(x: Tensor, y: Tensor, g: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return max_j (g_j / 2 - scale |x_i - y_j|^2), `(B, I)`, of transposed points `(B, D, N)`."""
    out = x.new_empty((x.shape[0], x.shape[2]), dtype=dtype)
    _launch_rows(x, y, g, scales, out, y.shape[2], points=True, share=0.5, with_top=True)
    return out
