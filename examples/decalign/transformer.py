"""The transformer that refines one modality's unique features (Sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.decalign.attention import Attention
from examples.decalign.dropout import Dropout
from examples.decalign.encoders import masked_mean

__all__ = ["ModalityTransformer"]


class ModalityTransformer(nn.Module):
    """Transformer over one modality's steps, pooled over the valid ones.

    Queries come from the modality. Keys and values come from itself, or from a context: the other
    modalities' steps, as in MulT.

    Args:
        width: d_s.
        length: T_s.
        heads: The number of attention heads.
        layers: The number of blocks.
        attention_dropout: The rate for the attention weights.
        relu_dropout: The rate inside the feed-forward layers.
        residual_dropout: The rate for the output of each attention and feed-forward layer.
        embedding_dropout: The rate for the embedded input.
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
        """Return `(N, d_s)`, the result of `refine` averaged over the valid steps."""
        return masked_mean(self.refine(embedded, mask, context, context_mask), mask)

    def refine(
        self,
        embedded: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return steps from embedded steps; without `context`, they attend to themselves."""
        keys = mask if context_mask is None else context_mask
        # A sample without a valid key attends to all keys, which are zeros, since the softmax over
        # no key would be NaN.
        blocked = ~keys & keys.any(-1, keepdim=True)
        if context is not None:
            context = torch.where(keys.unsqueeze(-1), context, context.new_zeros(()))
        x = embedded
        for block in self.blocks:
            x = block(x, context, blocked)
        return self.norm(x)


class _Block(nn.Module):
    """An attention and a feed-forward layer, each with normalised input and a residual."""

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
        self.attention = Attention(width, heads, attention_dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            Dropout(relu_dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = Dropout(residual_dropout)

    def forward(self, x: Tensor, context: Tensor | None, blocked: Tensor) -> Tensor:
        keys = self.key_norm(x if context is None else context)
        x = x + self.dropout(self.attention(self.query_norm(x), keys, blocked))
        return x + self.dropout(self.feed_forward(x))
