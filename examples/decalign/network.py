"""The common parts of all networks: sizes, output, convolutions and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from examples.decalign.encoders import TemporalConv, masked_mean
from examples.decalign.transformer import ModalityTransformer

__all__ = ["Network", "Output", "blank", "convolve", "make_convs", "make_transformer", "pool"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes and dropout rates; brackets give the names of Table 4 that differ.

    Args:
        width: d_s, the features of a step, the same for all modalities (DST feature dim).
        length: T_s, the steps of a sequence, the same for all modalities.
        kernel_size: The kernel size of the temporal convolutions.
        heads: The number of attention heads; divides `width`.
        layers: The number of transformer blocks of each modality (nlevels).
        context: The source of a transformer's keys and values: "self", its own modality, or
            "cross", the other modalities.
        pde: The distribution encoder: "gaussian" returns mean and log-variance, "mlp" a point.
        input_dropout: The rate for raw features; a number, or one for each modality (text dropout).
        attention_dropout: The rate for attention weights; a number, or one for each modality.
        relu_dropout: The rate inside encoders and feed-forward layers.
        embedding_dropout: The rate for a transformer's input.
        residual_dropout: The rate for the output of each attention and feed-forward layer.
        output_dropout: The rate for the head's input.
    """

    width: int = 32
    length: int = 8
    kernel_size: int = 5
    heads: int = 8
    layers: int = 4
    context: Literal["self", "cross"] = "self"
    pde: Literal["gaussian", "mlp"] = "gaussian"
    input_dropout: float | dict[str, float] = 0.0
    attention_dropout: float | dict[str, float] = 0.1
    relu_dropout: float = 0.1
    embedding_dropout: float = 0.1
    residual_dropout: float = 0.1
    output_dropout: float = 0.1


class Output(NamedTuple):
    """The output of a network for N samples; lists have one entry for each modality.

    A field is None if the network does not compute it.
    """

    logits: Tensor
    """`(N, C)`, or `(N, 1)` for a score."""
    present: list[Tensor]
    """`(N)`, whether a sample has the modality; the weights of every alignment loss."""
    unique_steps: list[Tensor] | None = None
    """Modality-unique features, `(N, T_s, d_s)`; zeros at invalid steps."""
    common_steps: list[Tensor] | None = None
    """Modality-common features of the same shape; equal to `unique_steps` without decoupling."""
    unique: list[Tensor] | None = None
    """`unique_steps` averaged over the valid steps, `(N, d_s)`; zeros for a missing modality."""
    common: list[Tensor] | None = None
    """`common_steps` averaged in the same way."""
    latents: list[Tensor] | None = None
    """The output of the distribution encoder for `common`, sampled in training."""
    pooled: list[Tensor] | None = None
    """The convolved steps, averaged in the same way."""
    rebuilt: list[Tensor] | None = None
    """MISA's reconstruction of `pooled` from `unique` and `common`."""


def make_convs(modalities: Mapping[str, int], network: Network) -> nn.ModuleDict:
    """Return the convolution of each modality to T_s x d_s."""
    if len(modalities) < 2:
        raise ValueError(f"modalities must name at least two; got {list(modalities)}")
    dropout = _by_modality("input_dropout", network.input_dropout, modalities)
    return nn.ModuleDict(
        {
            name: TemporalConv(
                dim, network.width, network.length, network.kernel_size, dropout[name]
            )
            for name, dim in modalities.items()
        }
    )


def convolve(
    convs: nn.ModuleDict, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the steps `(N, T_s, d_s)` of each modality and which of them are valid.

    Args:
        convs: From `make_convs`.
        features: `(N, T_m, d_m)` of each modality, with any T_m.
        masks: The valid steps of some modalities, boolean `(N, T_m)`; all steps of the others are
            valid. A sample without a valid step lacks the modality; its features have no effect.
    """
    masks = masks or {}
    steps, valid = [], []
    for name, conv in convs.items():
        x = features[name]
        mask = masks.get(name, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        x, mask = conv(x, mask)
        steps.append(x)
        valid.append(mask)
    return steps, valid


def make_transformer(
    network: Network,
    modalities: Mapping[str, int],
    name: str,
    *,
    copies: int = 1,
    length: int | None = None,
) -> ModalityTransformer:
    """Return the transformer of one modality.

    Args:
        network: Sizes and dropout rates.
        modalities: All modalities.
        name: The modality whose rate of attention dropout is used.
        copies: The width of its steps, in multiples of d_s.
        length: The number of steps; T_s by default.
    """
    dropout = _by_modality("attention_dropout", network.attention_dropout, modalities)
    return ModalityTransformer(
        copies * network.width,
        length or network.length,
        heads=network.heads,
        layers=network.layers,
        attention_dropout=dropout[name],
        relu_dropout=network.relu_dropout,
        residual_dropout=network.residual_dropout,
        embedding_dropout=network.embedding_dropout,
    )


def pool(steps: Sequence[Tensor], valid: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean over each modality's valid steps; 0 without a valid step."""
    return [masked_mean(x, mask) for x, mask in zip(steps, valid, strict=True)]


def blank(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` `(..., D)` with zeros where `mask` `(...)` is False."""
    return torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))


def _by_modality(
    name: str, value: float | Mapping[str, float], modalities: Mapping[str, int]
) -> Mapping[str, float]:
    """Return a value for each modality, from one for all or a mapping."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(modalities, value)
    if value.keys() != modalities.keys():
        raise ValueError(f"{name} must name {list(modalities)}; got {list(value)}")
    return value
