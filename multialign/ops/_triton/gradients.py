"""The derivatives of log_matmul, in O(I J + J K) memory.

    grad_a_ij = sum_k G_ik exp(a_ij + b_jk - out_ik)

No exponential here is above 1, but its factors may be. In a tile of i and j with alpha_i the
maximum of a over its j, and beta_k that of b,

    grad_a_ij = exp(a_ij - alpha_i) sum_k W_ik exp(b_jk - beta_k),
    W_ik = G_ik exp(alpha_i + beta_k - out_ik),

is a product on the tensor cores. Where an exponent of W is large the terms are taken one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multialign.ops._triton.launch import block, cdiv, launch, lifted, matrix_precision
from multialign.ops._triton.tables import entries, finite
from multialign.ops.batching import register_batched_vmap

__all__ = ["log_matmul_backward"]

# The largest exponent of W: with factors down to e^-87 a term below e^-27 of G may be lost.
_LARGEST = {torch.float32: 60.0, torch.float64: 600.0}


@triton.jit
def _left_gradient(
    a,  # (B, I, J)
    b,  # (B, J, K)
    value,  # (B, I, K): log_matmul of them
    grad,  # (B, I, K)
    out,  # (B, I, J)
    I,
    J,
    K,
    stride_ab,
    stride_ai,
    stride_aj,
    stride_bb,
    stride_bj,
    stride_bk,
    stride_vb,
    stride_vi,
    stride_vk,
    stride_gb,
    stride_gi,
    stride_gk,
    largest,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_blocks = tl.cdiv(I, BLOCK_I)
    j_blocks = tl.cdiv(J, BLOCK_J)
    program = tl.program_id(0)
    batch = (program // (i_blocks * j_blocks)).to(tl.int64)
    rows = program % i_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inner = program // i_blocks % j_blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    a += batch * stride_ab
    b += batch * stride_bb
    value += batch * stride_vb
    grad += batch * stride_gb

    left = entries(a, a, rows, inner, I, J, stride_ai, stride_aj, 0, 0, False, DTYPE)
    row_top = tl.max(left, 1)
    product = tl.zeros((BLOCK_I, BLOCK_J), DTYPE)
    singly = tl.zeros((BLOCK_I, BLOCK_J), DTYPE)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        right = entries(b, b, columns, inner, K, J, stride_bk, stride_bj, 0, 0, False, DTYPE)
        column_top = tl.max(right, 1)
        total = entries(value, value, rows, columns, I, K, stride_vi, stride_vk, 0, 0, False, DTYPE)
        inside = (rows < I)[:, None] & (columns < K)[None, :]
        at = rows[:, None].to(tl.int64) * stride_gi + columns[None, :].to(tl.int64) * stride_gk
        weight = tl.load(grad + at, mask=inside, other=0.0).to(DTYPE)
        exponent = row_top[:, None] + column_top[None, :] - total
        # A sum of nothing, or outside of the table: no derivative.
        exponent = tl.where(total == float("-inf"), float("-inf"), exponent)
        if tl.max(tl.max(exponent, 1), 0) <= largest:
            product = tl.dot(
                weight * tl.exp(exponent),
                tl.exp(right - finite(column_top)[:, None]),
                product,
                input_precision=PRECISION,
                out_dtype=DTYPE,
            )
        else:
            for step in range(BLOCK_K):
                column = start + step + tl.arange(0, 1)
                b_jk = entries(b, b, column, inner, K, J, stride_bk, stride_bj, 0, 0, False, DTYPE)
                value_ik = entries(
                    value, value, rows, column, I, K, stride_vi, stride_vk, 0, 0, False, DTYPE
                )
                one_at = grad + rows[:, None].to(tl.int64) * stride_gi
                one_at += column[None, :].to(tl.int64) * stride_gk
                grad_ik = tl.load(
                    one_at, mask=(rows < I)[:, None] & (column < K)[None, :], other=0.0
                ).to(DTYPE)
                share = tl.exp(left + b_jk - finite(value_ik))
                singly += grad_ik * tl.where(value_ik == float("-inf"), 0.0, share)
    result = product * tl.exp(left - finite(row_top)[:, None]) + singly
    at = (batch * I + rows[:, None]) * J + inner[None, :]
    tl.store(out + at, result, mask=(rows < I)[:, None] & (inner < J)[None, :])


def _by_left(grad: Tensor, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    batch, rows, inner = a.shape
    columns = b.shape[2]
    dtype, kind = lifted(value)
    out = value.new_empty((batch, rows, inner))
    side = 64 if dtype == torch.float32 else 32
    tall, wide = block(rows, side), block(inner, side)
    launch(
        _left_gradient, batch * cdiv(rows, tall) * cdiv(inner, wide), a, b, value, grad, out,
        rows, inner, columns, *a.stride(), *b.stride(), *value.stride(), *grad.stride(),
        _LARGEST[dtype], DTYPE=kind, PRECISION=matrix_precision(dtype), BLOCK_I=tall,
        BLOCK_J=wide, BLOCK_K=32 if side == 64 else 16,
        num_warps=8 if tall * wide > 32 * 32 else 4, num_stages=2,
    )  # fmt: skip
    return out.to(a.dtype)


@torch.library.custom_op(
    "multialign::triton_log_matmul_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor a, Tensor b, Tensor value) -> (Tensor, Tensor)",
)
def log_matmul_backward(grad: Tensor, a: Tensor, b: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of sum(grad * log_matmul(a, b)) by a and b; `value` is the product.

    The second is the first of the transposed problem.
    """
    by_b = _by_left(grad.mT, b.mT, a.mT, value.mT)
    return _by_left(grad, a, b, value), by_b.mT.contiguous()


@log_matmul_backward.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


register_batched_vmap(log_matmul_backward)
