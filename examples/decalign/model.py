"""The DecAlign network: from named modalities to logits and the features to be aligned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.decalign.dropout import Dropout
from examples.decalign.encoders import DistributionEncoder, Encoder
from examples.decalign.network import (
    Network,
    Output,
    blank,
    convolve,
    make_convs,
    make_transformer,
    pool,
)
from examples.decalign.switches import Switches

__all__ = ["DecAlign"]


class DecAlign(nn.Module):
    """DecAlign for any number of named modalities, of which a sample may lack some.

    The head takes the transformers' outputs and the common features, the latter through the
    distribution encoder if there is one. If only the MMD used this encoder, it could minimise the
    MMD by mapping all features to one point. A missing modality contributes zeros.

    Args:
        modalities: d_m of each modality.
        num_outputs: C, or 1 for a score.
        network: Sizes and dropout rates.
        switches: The parts to build.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        num_outputs: int,
        network: Network | None = None,
        switches: Switches | None = None,
    ) -> None:
        super().__init__()
        network = network or Network()
        switches = switches or Switches()
        self.modalities = dict(modalities)
        self.context = network.context
        width = network.width
        self.convs = make_convs(modalities, network)
        self.unique_encoders = nn.ModuleDict(
            {name: Encoder(width, network.relu_dropout) for name in modalities}
        )
        self.common_encoder = Encoder(width, network.relu_dropout) if switches.mfd else None
        self.transformers = nn.ModuleDict(
            {name: make_transformer(network, modalities, name) for name in modalities}
        )
        self.distribution_encoder = (
            DistributionEncoder(width, stochastic=network.pde == "gaussian")
            if switches.homo and switches.mmd
            else None
        )
        self.head = nn.Sequential(
            Dropout(network.output_dropout),
            nn.Linear(2 * len(modalities) * width, num_outputs),
        )

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network; see `convolve` for features and masks."""
        steps, valid = convolve(self.convs, features, masks)
        unique_steps = [
            blank(encoder(x), mask)
            for encoder, x, mask in zip(self.unique_encoders.values(), steps, valid, strict=True)
        ]
        common_steps = unique_steps
        if self.common_encoder is not None:
            common_steps = [
                blank(self.common_encoder(x), mask) for x, mask in zip(steps, valid, strict=True)
            ]
        common = pool(common_steps, valid)
        present = [mask.any(-1) for mask in valid]

        latents = None
        if self.distribution_encoder is not None:
            latents = []
            for x, mask in zip(common, present, strict=True):
                distribution = self.distribution_encoder(x)
                latent = distribution.sample() if self.training else distribution.mean
                latents.append(blank(latent, mask))

        refined = self._refine(unique_steps, valid)
        logits = self.head(torch.cat([*refined, *(latents or common)], -1))
        return Output(
            logits=logits,
            unique_steps=unique_steps,
            common_steps=common_steps,
            unique=pool(unique_steps, valid),
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
