"""Tiles of a table of log-weights, held in memory or computed from points."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["entries", "finite", "log_weights"]


@triton.jit
def entries(
    first,  # the table, or the points of its rows (depth, row_count), contiguous
    second,  # the points of its columns (depth, column_count), contiguous; unused with a table
    rows,
    columns,
    row_count,
    column_count,
    stride_row,  # of the table
    stride_column,
    depth,  # of the points
    scale,  # of their squared distances
    POINTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the entries at `rows` x `columns`, -inf outside of the table.

    Of points an entry is -scale |x - y|^2, from differences: x y products would lose the digits of
    near points at a small epsilon.
    """
    in_rows = rows < row_count
    in_columns = columns < column_count
    inside = in_rows[:, None] & in_columns[None, :]
    if POINTS:
        value = tl.zeros((rows.shape[0], columns.shape[0]), DTYPE)
        for d in range(depth):
            x = tl.load(first + d * row_count + rows, mask=in_rows, other=0.0).to(DTYPE)
            y = tl.load(second + d * column_count + columns, mask=in_columns, other=0.0).to(DTYPE)
            difference = x[:, None] - y[None, :]
            value += difference * difference
        value = tl.where(inside, value * -scale, float("-inf"))
    else:
        at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
        value = tl.load(first + at, mask=inside, other=float("-inf")).to(DTYPE)
    return value


@triton.jit
def log_weights(pointer, indices, count, stride, DTYPE: tl.constexpr):
    """Return the entries of a vector of log-weights, -inf outside."""
    at = pointer + indices.to(tl.int64) * stride
    return tl.load(at, mask=indices < count, other=float("-inf")).to(DTYPE)


@triton.jit
def finite(x):
    """Return x, or 0 where it is -inf: what can be subtracted from anything that x bounds."""
    return tl.where(x == float("-inf"), 0.0, x)
