"""The DecAlign network, in the order of Section 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarking.model import Model, Sizes
from examples.decalign.data.target import Target
from examples.decalign.layers import (
    DistributionEncoder,
    Encoder,
    blank,
    convolve,
    make_convs,
    make_transformer,
    masked_mean,
)
from examples.decalign.objective import Losses, Objective, Switches

__all__ = ["Architecture", "DecAlign", "Output"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the paper and the released code do differently; the defaults are the paper's.

    Args:
        context: The source of a transformer's keys and values: "self", its own modality, or
            "cross", the other modalities.
        causal: Whether a step attends to no later step.
        encoder: The unique and common encoders: "mlp" with normalised output, or one matrix.
        conv_bias: Whether the temporal convolutions have a bias.
        pde: The distribution encoder: "gaussian" returns mean and log-variance, "mlp" a point.
        shared_pde: Whether all modalities share the distribution encoder.
        head: What the head reads beside the transformers' outputs: the "common" features, as in
            Sec. 3.4, or "latent", the outputs of the distribution encoder.
    """

    context: Literal["self", "cross"] = "self"
    causal: bool = False
    encoder: Literal["mlp", "linear"] = "mlp"
    conv_bias: bool = True
    pde: Literal["gaussian", "mlp"] = "gaussian"
    shared_pde: bool = True
    head: Literal["common", "latent"] = "common"


class Output(NamedTuple):
    """The output of the network for N samples; lists have one entry for each modality."""

    logits: Tensor
    """`(N, C)`, or `(N, 1)` for a score."""
    present: list[Tensor]
    """`(N)`, whether a sample has the modality; the weights of every alignment loss."""
    unique_steps: list[Tensor]
    """Modality-unique features, `(N, T_s, d_s)`; zeros at invalid steps."""
    common_steps: list[Tensor]
    """Modality-common features of the same shape; equal to `unique_steps` without decoupling."""
    unique: list[Tensor]
    """`unique_steps` averaged over the valid steps, `(N, d_s)`; zeros for a missing modality."""
    common: list[Tensor]
    """`common_steps` averaged in the same way."""
    latents: list[Tensor] | None
    """The output of the distribution encoder for `common`, sampled in training."""
    fused: Tensor
    """What the head reads, `(N, 2 M d_s)`."""


class DecAlign(Model):
    """DecAlign for any number of named modalities, of which a sample may lack some.

    A missing modality contributes zeros to the head, and nothing to any loss.

    Args:
        modalities: d_m of each modality, by name.
        target: The classes or the score to predict.
        sizes: Sizes and dropout rates.
        architecture: What the paper and the released code do differently.
        losses: Weights and options of the objective.
        switches: The parts of Table 2 that are on.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        target: Target,
        sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
        architecture: Architecture = Architecture(),
        losses: Losses = Losses(),  # noqa: B008
        switches: Switches = Switches(),  # noqa: B008
    ) -> None:
        super().__init__(modalities, target)
        self.architecture = architecture
        width = sizes.width

        def encoder() -> Encoder:
            return Encoder(width, sizes.relu_dropout, architecture.encoder)

        # Sec. 3.1: to T_s x d_s, then unique and common features.
        self.convs = make_convs(modalities, sizes, bias=architecture.conv_bias)
        self.unique_encoders = nn.ModuleDict({name: encoder() for name in modalities})
        self.common_encoder = encoder() if switches.mfd else None
        # Sec. 3.3: the distribution of the common features. (Sec. 3.2 has losses only.)
        self.pdes = None
        if switches.homo and (switches.mmd or architecture.head == "latent"):
            stochastic = architecture.pde == "gaussian"
            count = 1 if architecture.shared_pde else len(modalities)
            self.pdes = nn.ModuleList(
                DistributionEncoder(width, stochastic=stochastic) for _ in range(count)
            )
        # Sec. 3.4: one transformer for each modality, and the head.
        self.transformers = nn.ModuleDict(
            {
                name: make_transformer(sizes, modalities, name, causal=architecture.causal)
                for name in modalities
            }
        )
        self.head = nn.Sequential(
            nn.Dropout(sizes.output_dropout),
            nn.Linear(2 * len(modalities) * width, target.num_outputs),
        )
        self.losses = Objective(target, losses, switches, width, len(modalities))

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network on features `(N, T_m, d_m)` and masks `(N, T_m)`."""
        steps, valid = convolve(self.convs, features, masks)
        present = [mask.any(-1) for mask in valid]
        unique_steps, common_steps = self._decouple(steps, valid)
        unique, common = (
            [masked_mean(x, mask) for x, mask in zip(xs, valid, strict=True)]
            for xs in (unique_steps, common_steps)
        )
        latents = self._encode_distribution(common, present)
        refined = self._refine(unique_steps, valid)
        shared = common
        if latents is not None and self.architecture.head == "latent":
            shared = latents
        fused = torch.cat([*refined, *shared], -1)
        return Output(
            logits=self.head(fused),
            present=present,
            unique_steps=unique_steps,
            common_steps=common_steps,
            unique=unique,
            common=common,
            latents=latents,
            fused=fused,
        )

    def objective(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms of Eq. 13."""
        terms: dict[str, Tensor] = self.losses(output, targets)
        return terms

    def features(self, output: Output) -> dict[str, Tensor]:
        """Return the pooled unique and common features by modality."""
        return {
            f"{kind}/{name}": x
            for kind in ("unique", "common")
            for name, x in zip(self.modalities, getattr(output, kind), strict=True)
        }

    def _decouple(
        self, steps: list[Tensor], valid: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return unique and common features (Sec. 3.1)."""
        unique = [
            blank(encoder(x), mask)
            for encoder, x, mask in zip(self.unique_encoders.values(), steps, valid, strict=True)
        ]
        if self.common_encoder is None:
            return unique, unique
        encoder = self.common_encoder
        return unique, [blank(encoder(x), mask) for x, mask in zip(steps, valid, strict=True)]

    def _encode_distribution(
        self, common: list[Tensor], present: list[Tensor]
    ) -> list[Tensor] | None:
        """Return a sample of each distribution, or its mean in evaluation (Sec. 3.3)."""
        if self.pdes is None:
            return None
        latents = []
        for m, (x, mask) in enumerate(zip(common, present, strict=True)):
            distribution = self.pdes[m % len(self.pdes)](x)
            latent = distribution.sample() if self.training else distribution.mean
            latents.append(blank(latent, mask))
        return latents

    def _refine(self, steps: list[Tensor], valid: list[Tensor]) -> list[Tensor]:
        """Return each transformer's output, averaged over the valid steps (Sec. 3.4)."""
        transformers = list(self.transformers.values())
        embedded = [t.embed(x) for t, x in zip(transformers, steps, strict=True)]
        refined = []
        for m, transformer in enumerate(transformers):
            context, context_mask = None, None
            if self.architecture.context == "cross":
                context = torch.cat(embedded[:m] + embedded[m + 1 :], 1)
                context_mask = torch.cat(valid[:m] + valid[m + 1 :], 1)
            x = transformer(embedded[m], valid[m], context, context_mask)
            refined.append(masked_mean(x, valid[m]))
        return refined
