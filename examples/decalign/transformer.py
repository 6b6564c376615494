"""The transformer that refines one modality's unique features (Sec. 3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.decalign.dropout import Dropout, dropout
from examples.decalign.encoders import masked_mean

__all__ = ["ModalityTransformer"]


class ModalityTransformer(nn.Module):
    """Transformer over one modality's steps, pooled over the valid ones.

    Queries come from the modality. Keys and values come from itself, or from a context: the other
    modalities' steps, as in MulT.

    Args:
        width: d_s.
        length: T_s.
        heads: Attention heads.
        layers: Blocks.
        attention_dropout: Of the attention weights.
        relu_dropout: Inside the feed-forward layers.
        residual_dropout: Of what each layer adds.
        embedding_dropout: Of the embedded input.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        heads: int,
        layers: int,
        attention_dropout: float = 0.0,
        relu_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.dropout = Dropout(embedding_dropout)
        self.blocks = nn.ModuleList(
            _Block(width, heads, attention_dropout, relu_dropout, residual_dropout)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def embed(self, x: Tensor) -> Tensor:
        """Return the steps `(N, T_s, d_s)` with their positions."""
        return self.dropout(x + self.position)

    def forward(
        self,
        embedded: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return `(N, d_s)`, `refine` averaged over the valid steps."""
        return masked_mean(self.refine(embedded, mask, context, context_mask), mask)

    def refine(
        self,
        embedded: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return steps from embedded steps; `context` None stands for the steps themselves."""
        keys = mask if context_mask is None else context_mask
        # A sample without any key attends to all of them, which are zeros: the softmax over no
        # key at all would be NaN.
        blocked = ~keys & keys.any(-1, keepdim=True)
        # What is added to all scores of a key.
        bias = torch.zeros(keys.shape, dtype=embedded.dtype, device=keys.device)
        bias = bias.masked_fill_(blocked, -math.inf)
        if context is not None:
            context = torch.where(keys.unsqueeze(-1), context, context.new_zeros(()))
        x = embedded
        for block in self.blocks:
            x = block(x, context, bias)
        return self.norm(x)


class _Block(nn.Module):
    """Attention and feed-forward layer, each normalised before and added after."""

    def __init__(
        self,
        width: int,
        heads: int,
        attention_dropout: float,
        relu_dropout: float,
        residual_dropout: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, attention_dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            Dropout(relu_dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = Dropout(residual_dropout)

    def forward(self, x: Tensor, context: Tensor | None, bias: Tensor) -> Tensor:
        keys = self.key_norm(x if context is None else context)
        x = x + self.dropout(self.attention(self.query_norm(x), keys, bias))
        return x + self.dropout(self.feed_forward(x))


class _Attention(nn.Module):
    """Scaled dot-product attention in several heads, with the parameters of `nn.MultiheadAttention`.

    On a CPU the products are written out: torch has no fused kernel there that drops weights, and
    what it does instead reads each head's steps from all over the memory.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        like = nn.MultiheadAttention(width, heads)  # the parameters and how they begin
        self.in_proj_weight, self.in_proj_bias = like.in_proj_weight, like.in_proj_bias
        self.out_proj = like.out_proj
        self.heads = heads
        self.dropout = dropout

    def forward(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Attend from `(N, T, D)` to `(N, S, D)`, with the `bias` `(N, S)` of each key."""
        width = queries.shape[-1]
        shares = [width, 2 * width]
        (query_weight, weight), (query_bias, offset) = (
            part.split(shares) for part in (self.in_proj_weight, self.in_proj_bias)
        )
        (query,) = self._heads(functional.linear(queries, query_weight, query_bias), 1)
        key, value = self._heads(functional.linear(keys, weight, offset), 2)
        # One row a head, all of them in the same order.
        bias = bias.repeat_interleave(self.heads, 0).unsqueeze(1)
        attended = attend(query, key, value, bias, self.dropout if self.training else 0.0)
        attended = attended.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return self.out_proj(attended)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Bring `(N, T, parts * heads * E)` to `(parts, N * heads, T, E)`."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, drop: float) -> Tensor:
    """Return softmax(Q K^T / sqrt(E) + bias) V, weights dropped with probability `drop`.

    Args:
        query: `(B, T, E)`.
        key: `(B, S, E)`.
        value: `(B, S, E)`.
        bias: `(B, 1, S)`.
        drop: The weights' dropout.
    """
    if query.device.type != "cpu":
        return functional.scaled_dot_product_attention(query, key, value, bias, drop)
    scores = torch.baddbmm(bias.to(query.dtype), query, key.mT, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(dropout(scores.softmax(-1), drop, True), value)
