"""Tiles of a table of log-weights, read from memory or computed from points."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["entries", "entries_of_points", "finite", "log_weights"]


@triton.jit
def entries(
    table,
    rows,
    columns,
    row_count,
    column_count,
    stride_row,
    stride_column,
    DTYPE: tl.constexpr,
):
    """Return the entries at `rows` x `columns`, -inf outside of the table."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(table + at, mask=inside, other=float("-inf")).to(DTYPE)


@triton.jit
def entries_of_points(
    x,  # (depth, row_count), contiguous
    y,  # (depth, column_count), contiguous
    rows,
    columns,
    row_count,
    column_count,
    depth,
    scale,
    DTYPE: tl.constexpr,
):
    """Return -scale |x - y|^2 at `rows` x `columns`, -inf outside.

    It is summed from differences: products of x and y would lose the digits of near points at a
    small epsilon.
    """
    in_rows = rows < row_count
    in_columns = columns < column_count
    total = tl.zeros((rows.shape[0], columns.shape[0]), DTYPE)
    for d in range(depth):
        x_d = tl.load(x + d * row_count + rows, mask=in_rows, other=0.0).to(DTYPE)
        y_d = tl.load(y + d * column_count + columns, mask=in_columns, other=0.0).to(DTYPE)
        difference = x_d[:, None] - y_d[None, :]
        total += difference * difference
    return tl.where(in_rows[:, None] & in_columns[None, :], total * -scale, float("-inf"))


@triton.jit
def log_weights(pointer, indices, count, stride, DTYPE: tl.constexpr):
    """Return the entries of a vector of log-weights, -inf outside."""
    at = pointer + indices.to(tl.int64) * stride
    return tl.load(at, mask=indices < count, other=float("-inf")).to(DTYPE)


@triton.jit
def finite(x):
    """Return x, or 0 where it is -inf.

    A maximum is subtracted in this form: -inf minus -inf would be NaN.
    """
    return tl.where(x == float("-inf"), 0.0, x)
