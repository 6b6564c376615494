"""The DecAlign network: from named modalities to logits and the features to be aligned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from examples.decalign.encoders import DistributionEncoder, Encoder, TemporalConv, masked_mean
from examples.decalign.switches import Switches
from examples.decalign.transformer import ModalityTransformer

__all__ = ["DecAlign", "Network", "Output"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes and dropout rates; the names of Table 4 where they differ are in brackets.

    Args:
        width: d_s, the features of a step, the same for all modalities (DST feature dim).
        length: T_s, the steps of a sequence, the same for all modalities.
        kernel_size: Of the temporal convolutions.
        heads: Attention heads; they divide `width`.
        layers: Transformer blocks of each modality (nlevels).
        context: Where a transformer's keys and values come from: "self", its own modality, or
            "cross", the other modalities.
        pde: The distribution encoder: "gaussian" gives mean and log-variance, "mlp" a point.
        input_dropout: Of the raw features; a number, or one for each modality (text dropout).
        attention_dropout: Of attention weights; a number, or one for each modality.
        relu_dropout: Inside encoders and feed-forward layers.
        embedding_dropout: Of a transformer's input.
        residual_dropout: Of what each transformer layer adds.
        output_dropout: Of the head's input.
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
    """What the network computes for N samples; lists have one entry a modality."""

    logits: Tensor
    """`(N, C)`."""
    unique_steps: list[Tensor]
    """Modality-unique features, `(N, T_s, d_s)`; zeros at invalid steps."""
    common_steps: list[Tensor]
    """Modality-common features, likewise; the same tensors without decoupling."""
    unique: list[Tensor]
    """`unique_steps` averaged over the valid steps, `(N, d_s)`; zeros for a missing modality."""
    common: list[Tensor]
    """`common_steps` likewise."""
    latents: list[Tensor] | None
    """`common` through the distribution encoder, sampled in training; None without it."""
    present: list[Tensor]
    """`(N)`, whether the sample has the modality: the weights of every alignment loss."""


class DecAlign(nn.Module):
    """DecAlign for any number of named modalities, of which a sample may miss some.

    The head reads the transformers' outputs and the common features, the latter through the
    distribution encoder where there is one: an encoder that only the MMD sees could satisfy it by
    sending everything to one point. A missing modality contributes zeros.

    Args:
        modalities: d_m of each modality.
        num_classes: C.
        network: Sizes and dropout rates.
        switches: The parts to build; see there what each removes.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        num_classes: int,
        network: Network | None = None,
        switches: Switches | None = None,
    ) -> None:
        super().__init__()
        network = network or Network()
        switches = switches or Switches()
        if len(modalities) < 2:
            raise ValueError(f"modalities must name at least two; got {list(modalities)}")
        self.modalities = dict(modalities)
        self.context = network.context
        width = network.width
        input_dropout = _by_modality("input_dropout", network.input_dropout, modalities)
        attention_dropout = _by_modality("attention_dropout", network.attention_dropout, modalities)

        self.convs = nn.ModuleDict(
            {
                name: TemporalConv(
                    dim, width, network.length, network.kernel_size, input_dropout[name]
                )
                for name, dim in modalities.items()
            }
        )
        self.unique_encoders = nn.ModuleDict(
            {name: Encoder(width, network.relu_dropout) for name in modalities}
        )
        self.common_encoder = Encoder(width, network.relu_dropout) if switches.mfd else None
        self.transformers = nn.ModuleDict(
            {
                name: ModalityTransformer(
                    width,
                    network.length,
                    heads=network.heads,
                    layers=network.layers,
                    attention_dropout=attention_dropout[name],
                    relu_dropout=network.relu_dropout,
                    residual_dropout=network.residual_dropout,
                    embedding_dropout=network.embedding_dropout,
                )
                for name in modalities
            }
        )
        self.distribution_encoder = (
            DistributionEncoder(width, stochastic=network.pde == "gaussian")
            if switches.homo and switches.mmd
            else None
        )
        self.head = nn.Sequential(
            nn.Dropout(network.output_dropout),
            nn.Linear(2 * len(modalities) * width, num_classes),
        )

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network.

        Args:
            features: `(N, T_m, d_m)` of each modality; T_m is free.
            masks: `(N, T_m)`, the valid steps of some modalities, boolean; all are valid in the
                others. A sample without a valid step misses the modality, whatever stands there.
        """
        masks = masks or {}
        steps, valid = [], []
        for name in self.modalities:
            x = features[name]
            mask = masks.get(name, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
            x, mask = self.convs[name](x, mask)
            steps.append(x)
            valid.append(mask)

        unique_steps = [
            _blank(encoder(x), mask)
            for encoder, x, mask in zip(self.unique_encoders.values(), steps, valid, strict=True)
        ]
        common_steps = unique_steps
        if self.common_encoder is not None:
            common_steps = [
                _blank(self.common_encoder(x), mask) for x, mask in zip(steps, valid, strict=True)
            ]
        common = _pool(common_steps, valid)
        present = [mask.any(-1) for mask in valid]

        latents = None
        if self.distribution_encoder is not None:
            latents = []
            for x, there in zip(common, present, strict=True):
                distribution = self.distribution_encoder(x)
                latent = distribution.sample() if self.training else distribution.mean
                latents.append(_blank(latent, there))

        refined = self._refine(unique_steps, valid)
        logits = self.head(torch.cat([*refined, *(latents or common)], -1))
        return Output(
            logits=logits,
            unique_steps=unique_steps,
            common_steps=common_steps,
            unique=_pool(unique_steps, valid),
            common=common,
            latents=latents,
            present=present,
        )

    def _refine(self, steps: list[Tensor], valid: list[Tensor]) -> list[Tensor]:
        """Return each transformer's pooled output, `(N, d_s)`."""
        transformers = list(self.transformers.values())
        embedded = [t.embed(x) for t, x in zip(transformers, steps, strict=True)]
        refined = []
        for m, transformer in enumerate(transformers):
            context, context_mask = None, None
            if self.context == "cross":
                context = torch.cat(embedded[:m] + embedded[m + 1 :], 1)
                context_mask = torch.cat(valid[:m] + valid[m + 1 :], 1)
            refined.append(transformer(embedded[m], valid[m], context, context_mask))
        return refined


def _pool(steps: list[Tensor], valid: list[Tensor]) -> list[Tensor]:
    return [masked_mean(x, mask) for x, mask in zip(steps, valid, strict=True)]


def _blank(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with zeros where `mask`, which lacks its last dimension, is False."""
    return torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))


def _by_modality(
    name: str, value: float | Mapping[str, float], modalities: Mapping[str, int]
) -> Mapping[str, float]:
    """Return one `value` a modality, whichever way it was given."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(modalities, value)
    if value.keys() != modalities.keys():
        raise ValueError(f"{name} must name {list(modalities)}; got {list(value)}")
    return value
