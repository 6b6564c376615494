"""MISA (Hazarika et al., 2020) from the layers of DecAlign and the losses of multialign."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarking.model import Model, Sizes
from examples.decalign.data.target import Target
from examples.decalign.layers import (
    Encoder,
    blank,
    convolve,
    make_convs,
    make_transformer,
    masked_mean,
)
from multialign import CosineDecouplingLoss, GaussianMomentLoss

__all__ = ["MISA"]


class Output(NamedTuple):
    """The output for N samples; lists have one entry for each modality."""

    logits: Tensor
    """`(N, C)`."""
    present: list[Tensor]
    """`(N)`, whether a sample has the modality."""
    unique: list[Tensor]
    """Specific representations, `(N, d_s)`."""
    common: list[Tensor]
    """Invariant representations, `(N, d_s)`."""
    pooled: list[Tensor]
    """The utterance vectors, `(N, d_s)`."""
    rebuilt: list[Tensor]
    """Their reconstructions."""


class MISA(Model):
    """Invariant and specific representations of each utterance, fused by one transformer.

    Differences from the publication: the mean over time of DecAlign's convolution replaces the
    last states of two stacked recurrent networks, or BERT; encoders have two layers, the decoders
    one; the transformer has as many layers and heads as `sizes` says, with learned positions (one
    layer without positions there) and normalised inputs; similarity compares three moments (five
    there, by CMD) of all pairs; difference is the squared cosine of each sample's representations
    (products of whole batches there); the head is one layer.

    Args:
        modalities: d_m of each modality, by name.
        target: The classes or the score to predict.
        sizes: Sizes and dropout rates.
        similarity: The weight of the similarity; as in the publication for CMU-MOSI, like the next.
        difference: The weight of the difference.
        reconstruction: The weight of the reconstruction.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        target: Target,
        sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
        similarity: float = 1.0,
        difference: float = 0.3,
        reconstruction: float = 1.0,
    ) -> None:
        super().__init__(modalities, target)
        width, rate = sizes.width, sizes.relu_dropout
        self.convs = make_convs(modalities, sizes)
        self.unique_encoders = nn.ModuleDict({name: Encoder(width, rate) for name in modalities})
        self.common_encoder = Encoder(width, rate)
        self.decoders = nn.ModuleDict({name: nn.Linear(width, width) for name in modalities})
        tokens = 2 * len(modalities)
        self.fusion = make_transformer(sizes, modalities, next(iter(modalities)), length=tokens)
        self.head = nn.Sequential(
            nn.Dropout(sizes.output_dropout), nn.Linear(tokens * width, target.num_outputs)
        )
        self.weights = {
            "similarity": similarity,
            "difference": difference,
            "reconstruction": reconstruction,
        }
        self.moments = GaussianMomentLoss(feature_reduction="mean")
        self.cosines = CosineDecouplingLoss(form="squared")

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network on features `(N, T_m, d_m)` and masks `(N, T_m)`."""
        steps, valid = convolve(self.convs, features, masks)
        present = [mask.any(-1) for mask in valid]
        pooled = [masked_mean(x, mask) for x, mask in zip(steps, valid, strict=True)]
        unique = [
            blank(encoder(x), mask)
            for encoder, x, mask in zip(self.unique_encoders.values(), pooled, present, strict=True)
        ]
        common = [
            blank(self.common_encoder(x), mask) for x, mask in zip(pooled, present, strict=True)
        ]
        mask = torch.stack([*present, *present], 1)
        tokens = self.fusion.embed(torch.stack([*unique, *common], 1))
        fused = blank(self.fusion(tokens, mask), mask)
        pairs = zip(self.decoders.values(), unique, common, strict=True)
        return Output(
            logits=self.head(fused.flatten(1)),
            present=present,
            unique=unique,
            common=common,
            pooled=pooled,
            rebuilt=[decoder(u + c) for decoder, u, c in pairs],
        )

    def objective(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the losses of the task, similarity, difference and reconstruction."""
        unique, common, present = output.unique, output.common, output.present
        pairs = list(combinations(range(len(unique)), 2))
        error = [
            (mask.unsqueeze(-1) * (x - y).square()).sum() / (mask.sum() * x.shape[-1]).clamp_min(1)
            for x, y, mask in zip(output.pooled, output.rebuilt, present, strict=True)
        ]
        terms = {
            "task": self.target.loss(output.logits, targets),
            "similarity": self.moments(common, present),
            # Unique features differ from common ones, and from those of other modalities.
            "difference": self.cosines(
                [*unique, *(unique[i] for i, _ in pairs)],
                [*common, *(unique[j] for _, j in pairs)],
                [*present, *(present[i] & present[j] for i, j in pairs)],
            ),
            "reconstruction": torch.stack(error).mean(),
        }
        weighted = [weight * terms[name] for name, weight in self.weights.items()]
        return {**terms, "loss": terms["task"] + torch.stack(weighted).sum()}

    def features(self, output: Output) -> dict[str, Tensor]:
        """Return the unique and common features by modality."""
        return {
            f"{kind}/{name}": x
            for kind in ("unique", "common")
            for name, x in zip(self.modalities, getattr(output, kind), strict=True)
        }
