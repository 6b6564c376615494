"""The layers of DecAlign and its rivals: convolution over time, encoders, transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarking.model import Sizes, by_modality

__all__ = [
    "Distribution",
    "DistributionEncoder",
    "Encoder",
    "ModalityTransformer",
    "TemporalConv",
    "blank",
    "convolve",
    "make_convs",
    "make_transformer",
    "masked_mean",
]


class TemporalConv(nn.Module):
    """Convolution over time that brings one modality to the common shape T_s x d_s.

    The convolution keeps the length ("same" padding, so T = 1 works). The steps are then averaged
    over T_s equal parts of the time axis, or repeated where T < T_s.

    Args:
        dim: d_m, the features of one step.
        width: d_s.
        length: T_s.
        kernel_size: The number of steps in the kernel; odd.
        dropout: The rate for the input.
        bias: Whether the convolution has a bias.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        length: int,
        kernel_size: int = 5,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.length = length
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv1d(dim, width, kernel_size, padding="same", bias=bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(N, T_s, d_s)` and its valid steps, from `x` `(N, T, d_m)` and its mask."""
        x = self.conv(self.dropout(blank(x, mask)).mT).mT
        share = mask.unsqueeze(1) * _overlap(x.shape[1], self.length, x)
        total = share.sum(-1, keepdim=True)
        valid = total > 0
        return share @ x / torch.where(valid, total, 1.0), valid.squeeze(-1)


def make_convs(modalities: Mapping[str, int], sizes: Sizes, *, bias: bool = True) -> nn.ModuleDict:
    """Return the convolution of each modality to T_s x d_s."""
    dropout = by_modality("input_dropout", sizes.input_dropout, modalities)
    shape = (sizes.width, sizes.length, sizes.kernel_size)
    return nn.ModuleDict(
        {name: TemporalConv(dim, *shape, dropout[name], bias) for name, dim in modalities.items()}
    )


def convolve(
    convs: nn.ModuleDict, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the steps `(N, T_s, d_s)` of each modality and which of them are valid."""
    steps, valid = [], []
    for name, conv in convs.items():
        x = features[name]
        mask = (masks or {}).get(name)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        x, mask = conv(x, mask)
        steps.append(x)
        valid.append(mask)
    return steps, valid


class Encoder(nn.Sequential):
    """Layers on each time step, for unique and for common features.

    The normalisation at the end of "mlp" fixes the scale of the features. Without it, shrinking
    them would reduce every alignment loss. "linear" is one matrix, as in the released code.
    """

    def __init__(
        self, width: int, dropout: float = 0.0, kind: Literal["mlp", "linear"] = "mlp"
    ) -> None:
        if kind == "linear":
            super().__init__(nn.Linear(width, width, bias=False))
            return
        super().__init__(
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )


class Distribution(NamedTuple):
    """The Gaussian of each sample, `(N, d_s)`; a point if `log_variance` is None."""

    mean: Tensor
    log_variance: Tensor | None

    def sample(self) -> Tensor:
        """Draw a sample, with gradients to both parameters."""
        if self.log_variance is None:
            return self.mean
        return self.mean + (self.log_variance / 2).exp() * torch.randn_like(self.mean)


class DistributionEncoder(nn.Module):
    """The probabilistic distribution encoder (PDE) of Sec. 3.3.

    Args:
        width: d_s.
        stochastic: Whether to return a variance too. Without it the encoder is a plain MLP, as in
            the authors' released code.
    """

    def __init__(self, width: int, *, stochastic: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU())
        self.mean = nn.Linear(2 * width, width)
        self.log_variance = nn.Linear(2 * width, width) if stochastic else None
        if self.log_variance is not None:
            # Start with little noise; training adjusts it.
            nn.init.constant_(self.log_variance.bias, -4.0)

    def forward(self, common: Tensor) -> Distribution:
        """Return the distribution of each row of `(N, d_s)`."""
        hidden = self.hidden(common)
        spread = None if self.log_variance is None else self.log_variance(hidden)
        return Distribution(self.mean(hidden), spread)


class ModalityTransformer(nn.Module):
    """The transformer of one modality (Sec. 3.4).

    Queries come from the modality. Keys and values come from itself, or from a context: the other
    modalities' steps, as in MulT.

    Args:
        width: d_s.
        length: T_s.
        sizes: The number of layers and heads, and the rates of dropout.
        attention_dropout: The rate for the attention weights of this modality.
        causal: Whether a step attends to no later step.
    """

    def __init__(
        self,
        width: int,
        length: int,
        sizes: Sizes,
        attention_dropout: float = 0.0,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.heads = sizes.heads
        self.position = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.dropout = nn.Dropout(sizes.embedding_dropout)
        self.blocks = nn.ModuleList(
            _Block(width, sizes, attention_dropout) for _ in range(sizes.layers)
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
        """Return refined steps; without `context`, the embedded steps attend to themselves."""
        keys = mask if context_mask is None else context_mask
        # A sample without a valid key attends to all keys, which are zeros, since the softmax over
        # no key would be NaN.
        blocked = ~keys & keys.any(-1, keepdim=True)
        if context is not None:
            context = blank(context, keys)
        forbidden = None
        if self.causal:
            rows, columns = embedded.shape[1], keys.shape[1]
            # The steps of several contexts stand one after the other, each from its beginning.
            time = torch.arange(columns, device=keys.device) % rows
            later = time > torch.arange(rows, device=keys.device).unsqueeze(1)
            forbidden = later | blocked.unsqueeze(1)
            # Before its first valid key, a step attends to all, for the same reason.
            forbidden = forbidden & ~forbidden.all(-1, keepdim=True)
            forbidden, blocked = forbidden.repeat_interleave(self.heads, 0), None
        x = embedded
        for block in self.blocks:
            x = block(x, context, blocked, forbidden)
        return self.norm(x)


class _Block(nn.Module):
    """An attention and a feed-forward layer, each with normalised input and a residual."""

    def __init__(self, width: int, sizes: Sizes, attention_dropout: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(
            width, sizes.heads, attention_dropout, batch_first=True
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, sizes.expansion * width),
            nn.ReLU(),
            nn.Dropout(sizes.relu_dropout),
            nn.Linear(sizes.expansion * width, width),
        )
        self.dropout = nn.Dropout(sizes.residual_dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        blocked: Tensor | None,
        forbidden: Tensor | None,
    ) -> Tensor:
        keys = self.key_norm(x if context is None else context)
        attended, _ = self.attention(
            self.query_norm(x),
            keys,
            keys,
            key_padding_mask=blocked,
            attn_mask=forbidden,
            need_weights=False,
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(x))


def make_transformer(
    sizes: Sizes,
    modalities: Mapping[str, int],
    name: str,
    *,
    copies: int = 1,
    length: int | None = None,
    causal: bool = False,
) -> ModalityTransformer:
    """Return the transformer of one modality.

    Args:
        sizes: Sizes and dropout rates.
        modalities: All modalities.
        name: The modality whose rate of attention dropout is used.
        copies: The width of its steps, in multiples of d_s.
        length: The number of steps; T_s by default.
        causal: Whether a step attends to no later step.
    """
    dropout = by_modality("attention_dropout", sizes.attention_dropout, modalities)[name]
    width = copies * sizes.width
    return ModalityTransformer(width, length or sizes.length, sizes, dropout, causal=causal)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `(N, T, D)` over the valid steps `(N, T)`; 0 without a valid step."""
    return blank(x, mask).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def blank(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` `(..., D)` with zeros where `mask` `(...)` is False, also in place of NaN."""
    return torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))


def _overlap(length: int, parts: int, like: Tensor) -> Tensor:
    """Return the overlap of each of `length` steps with each of `parts` equal parts of the axis."""
    # In units of 1 / (length * parts) of the axis, all borders are whole numbers.
    step = torch.arange(length, device=like.device) * parts
    part = torch.arange(parts, device=like.device).unsqueeze(1) * length
    shared = torch.minimum(step + parts, part + length) - torch.maximum(step, part)
    return shared.clamp_min(0).to(like.dtype)
