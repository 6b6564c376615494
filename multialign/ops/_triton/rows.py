"""log_matvec: one pass over a table, with a running maximum for each row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import block, cdiv, check_batched, launch, lifted
from multialign.ops._triton.tables import entries, entries_of_points, finite, log_weights
from multialign.ops.operators import operator, register_batched_vmap, register_fake

__all__ = ["log_matvec", "log_matvec_points"]


@triton.jit
def _log_matvec(
    first,  # the table (B, I, J), or points x (B, D, I)
    second,  # points y (B, D, J)
    weights,  # (B, J)
    scales,  # (B,), of the squared distances
    out,  # (B, I): log sum_j exp(table_ij + weights_j)
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
        if POINTS:
            value = entries_of_points(
                first, second, rows, columns, row_count, column_count, depth, scale, DTYPE
            )
        else:
            value = entries(
                first, rows, columns, row_count, column_count, stride_row, stride_column, DTYPE
            )
        value += log_weights(weights, columns, column_count, stride_weights, DTYPE)[None, :]
        higher = tl.maximum(maximum, tl.max(value, 1))
        reference = finite(higher)
        total = total * tl.exp(maximum - reference)
        total += tl.sum(tl.exp(value - reference[:, None]), 1)
        maximum = higher
    at = out + batch * row_count + rows
    tl.store(at, finite(maximum) + tl.log(total), mask=rows < row_count)


def _launch_rows(
    first: Tensor,
    second: Tensor,
    weights: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    points: bool,
) -> None:
    batch, rows = out.shape
    columns = weights.shape[1]
    _, kind = lifted(out)
    wide = block(columns, 128 if points else 512)
    # A table is read once, so short blocks of rows are best: they make many programs. Where
    # neighbouring rows are adjacent in memory, eight of them fill one transaction (32 bytes).
    adjacent = not points and first.stride(1) < first.stride(2)
    tall = 16 if points else 8 if adjacent else max(1, min(8, 1024 // wide))
    blocks = cdiv(rows, tall)
    launch(
        _log_matvec, batch * blocks, first, second, weights, scales, out, rows, columns,
        *(first.stride() if not points else (0, 0, 0)), *weights.stride(), first.shape[1], blocks,
        POINTS=points, DTYPE=kind, ROWS=tall, COLUMNS=wide, num_warps=4,
    )  # fmt: skip


@operator("triton_log_matvec(Tensor a, Tensor g) -> Tensor")
def log_matvec(a: Tensor, g: Tensor) -> Tensor:
    """Return log sum_j exp(a_ij + g_j), `(B, I)`, in float64 or else in float32.

    A row that is all -inf gives -inf. Without gradient.

    Args:
        a: `(B, I, J)`.
        g: `(B, J)`.
    """
    batch, rows, columns = a.shape
    check_batched(a=(a, a.shape), g=(g, (batch, columns)))
    out = a.new_empty((batch, rows), dtype=lifted(a, g)[0])
    _launch_rows(a, a, g, out, out, points=False)
    return out


@register_fake(log_matvec)
def _(a: Tensor, g: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2], dtype=lifted(a, g)[0])


register_batched_vmap(log_matvec)


@operator("triton_log_matvec_points(Tensor x, Tensor y, Tensor g, Tensor epsilon) -> Tensor")
def log_matvec_points(x: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    """Return log sum_j exp(g_j - |x_i - y_j|^2 / epsilon), `(B, I)`, from points alone.

    It is the update of one of two marginals for clouds too large for a table of both: memory is
    O((I + J) D). Without gradient.

    Args:
        x: `(B, I, D)`.
        y: `(B, J, D)`.
        g: `(B, J)`.
        epsilon: `(B,)`, > 0.
    """
    batch, rows, depth = x.shape
    check_batched(
        x=(x, x.shape),
        y=(y, (batch, None, depth)),
        g=(g, (batch, y.shape[1])),
        epsilon=(epsilon, (batch,)),
    )
    dtype, _ = lifted(x, y, g, epsilon)
    out = x.new_empty((batch, rows), dtype=dtype)
    scales = epsilon.to(dtype).reciprocal().contiguous()
    _launch_rows(x.mT.contiguous(), y.mT.contiguous(), g, scales, out, points=True)
    return out


@register_fake(log_matvec_points)
def _(x: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=lifted(x, y, g, epsilon)[0])


register_batched_vmap(log_matvec_points)
