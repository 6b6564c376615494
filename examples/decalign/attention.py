"""Scaled dot-product attention in several heads, and its products on a CPU.

torch has no fused CPU kernel for attention with dropout. Its fallback keeps several tables of
T x S weights for each head until the backward pass, and allocating them takes longer than filling
them. This implementation works on a few heads at a time, so that their weights stay in the cache.
It keeps 16 random bits for each weight, and computes the weights again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from examples.decalign.dropout import draw_bits, keep_factors

__all__ = ["Attention", "attend"]

# The number of attention weights in a block of heads.
_BLOCK_ENTRIES = 2**16


class Attention(nn.Module):
    """Attention with the parameters of `nn.MultiheadAttention`.

    Args:
        width: D, the features of queries, keys and output.
        heads: The number of heads; divides `width`.
        dropout: The rate for the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        attention = nn.MultiheadAttention(width, heads)  # for its initial parameters
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.heads = heads
        self.dropout = dropout

    def forward(self, queries: Tensor, keys: Tensor, blocked: Tensor) -> Tensor:
        """Attend from `(N, T, D)` to `(N, S, D)`, except to the keys `blocked` `(N, S)`."""
        width = queries.shape[-1]
        sizes = [width, 2 * width]
        weights = self.in_proj_weight.split(sizes)
        offsets = self.in_proj_bias.split(sizes)
        (query,) = self._heads(functional.linear(queries, weights[0], offsets[0]), 1)
        key, value = self._heads(functional.linear(keys, weights[1], offsets[1]), 2)
        bias = torch.zeros(blocked.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill_(blocked, -math.inf).repeat_interleave(self.heads, 0).unsqueeze(1)
        attended = attend(query, key, value, bias, self.dropout if self.training else 0.0)
        return self.out_proj(attended.reshape(len(queries), width, -1).mT)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Rearrange `(N, T, parts * heads * E)` to `(parts, N * heads, E, T)`."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 4, 1).flatten(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, drop: float = 0.0) -> Tensor:
    r"""Return :math:`V \, \text{dropout}(\text{softmax}(Q^\top K / \sqrt{E} + b))^\top`.

    The dimension of features precedes that of steps, which makes products with few features several
    times faster. On a CPU the function has first derivatives only.

    Args:
        query: `(B, E, T)`.
        key: `(B, E, S)`.
        value: `(B, E, S)`.
        bias: `(B, 1, S)`, without gradient.
        drop: Probability that a weight is dropped.

    Returns:
        `(B, E, T)`.
    """
    if query.device.type != "cpu":
        q, k, v = query.mT, key.mT, value.mT
        return functional.scaled_dot_product_attention(q, k, v, bias, drop).mT
    bits = draw_bits((len(query), query.shape[-1], key.shape[-1])) if drop > 0 else None
    attended: Tensor = _Attend.apply(query, key, value, bias, bits, drop)
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        bits: Tensor | None,
        drop: float,
    ) -> Tensor:
        query = query * query.shape[1] ** -0.5
        attended = torch.empty_like(query)
        for q, k, v, b, random, out in _blocks(query, key, value, bias, bits, attended):
            weights = torch.baddbmm(b, q.mT, k).softmax(-1)
            if random is not None:
                weights *= keep_factors(random, drop, weights.dtype)
            torch.bmm(v, weights.mT, out=out)
        ctx.save_for_backward(query, key, value, bias, bits, attended)
        ctx.drop = drop
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, bits, attended = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        # For each query, the sum over its keys of weight times derivative.
        average = (grad * attended).sum(1).unsqueeze(-1)
        for q, k, v, b, random, g, a, grad_q, grad_k, grad_v in _blocks(
            query, key, value, bias, bits, grad, average, *grads
        ):
            weights = torch.baddbmm(b, q.mT, k).softmax(-1)
            grad_weights = torch.bmm(g.mT, v)
            dropped = weights
            if random is not None:
                factors = keep_factors(random, ctx.drop, weights.dtype)
                grad_weights *= factors
                dropped = factors.mul_(weights)
            torch.bmm(g, dropped, out=grad_v)
            grad_scores = grad_weights.sub_(a).mul_(weights)
            torch.bmm(k, grad_scores.mT, out=grad_q)
            torch.bmm(q, grad_scores, out=grad_k)
        grads[0] *= query.shape[1] ** -0.5
        return *grads, None, None, None


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the same block of heads of each tensor; None stays None."""
    query, key = tensors[:2]
    count = max(1, _BLOCK_ENTRIES // max(1, query.shape[-1] * key.shape[-1]))
    for start in range(0, len(query), count):
        heads = slice(start, start + count)
        yield tuple(None if x is None else x[heads] for x in tensors)
