"""MISA (Hazarika et al., 2020) from the same parts and losses, as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from examples.decalign.dropout import Dropout
from examples.decalign.encoders import Encoder
from examples.decalign.network import (
    Network,
    Output,
    blank,
    convolve,
    make_convs,
    make_transformer,
    pool,
)
from examples.decalign.targets import Target
from multialign import CosineDecouplingLoss, GaussianMomentLoss

__all__ = ["MISA", "MISAObjective"]

# The weights of the publication for CMU-MOSI.
SIMILARITY, DIFFERENCE, RECONSTRUCTION = 1.0, 0.3, 1.0


class MISA(nn.Module):
    """Invariant and specific representations of each utterance, fused by one transformer.

    There are two differences from the publication: DecAlign's convolution replaces the recurrent
    networks, and the losses are multialign's (see `MISAObjective`).

    Args:
        modalities: d_m of each modality.
        num_outputs: C, or 1 for a score.
        network: Sizes and dropout rates; `context` and `pde` are not used.
    """

    def __init__(
        self, modalities: Mapping[str, int], num_outputs: int, network: Network | None = None
    ) -> None:
        super().__init__()
        network = network or Network()
        self.modalities = dict(modalities)
        width = network.width
        self.convs = make_convs(modalities, network)
        self.unique_encoders = nn.ModuleDict(
            {name: Encoder(width, network.relu_dropout) for name in modalities}
        )
        self.common_encoder = Encoder(width, network.relu_dropout)
        self.decoders = nn.ModuleDict({name: nn.Linear(width, width) for name in modalities})
        tokens = 2 * len(modalities)
        self.fusion = make_transformer(network, modalities, next(iter(modalities)), length=tokens)
        self.head = nn.Sequential(
            Dropout(network.output_dropout), nn.Linear(tokens * width, num_outputs)
        )

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network; see `convolve` for features and masks."""
        steps, valid = convolve(self.convs, features, masks)
        present = [mask.any(-1) for mask in valid]
        pooled = pool(steps, valid)
        unique = [
            blank(encoder(x), mask)
            for encoder, x, mask in zip(self.unique_encoders.values(), pooled, present, strict=True)
        ]
        common = [
            blank(self.common_encoder(x), mask) for x, mask in zip(pooled, present, strict=True)
        ]
        tokens = torch.stack([*unique, *common], 1)
        mask = torch.stack([*present, *present], 1)
        fused = blank(self.fusion.refine(self.fusion.embed(tokens), mask), mask)
        return Output(
            logits=self.head(fused.flatten(1)),
            present=present,
            unique=unique,
            common=common,
            pooled=pooled,
            rebuilt=[
                decoder(u + c)
                for decoder, u, c in zip(self.decoders.values(), unique, common, strict=True)
            ],
        )


class MISAObjective(nn.Module):
    """The losses of the task, similarity, difference and reconstruction.

    Similarity matches the moments of the common features; the publication uses more moments (five
    in its central moment discrepancy). Difference is the squared cosine between the unique and the
    common features of a modality, and between the unique features of two modalities; the
    publication uses products of whole batches.

    Args:
        target: The classes or the score to predict.
        score_loss: The loss of a score, "mse" or "l1".
        process_group: If given, similarity is that of all ranks' samples together.
    """

    def __init__(
        self, target: Target, score_loss: str = "mse", process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.target = target
        self.score_loss = score_loss
        self.similarity = GaussianMomentLoss(feature_reduction="mean", process_group=process_group)
        self.difference = CosineDecouplingLoss(form="squared")

    def forward(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms by name, unweighted, and their weighted sum as "loss"."""
        unique, common, present = output.unique, output.common, output.present
        pairs = list(combinations(range(len(unique)), 2))
        error = [
            (mask.unsqueeze(-1) * (x - y).square()).sum() / (mask.sum() * x.shape[-1]).clamp_min(1)
            for x, y, mask in zip(output.pooled, output.rebuilt, present, strict=True)
        ]
        terms = {
            "task": self.target.loss(output.logits, targets, self.score_loss),
            "similarity": self.similarity(common, present),
            "difference": self.difference(
                [*unique, *(unique[i] for i, _ in pairs)],
                [*common, *(unique[j] for _, j in pairs)],
                [*present, *(present[i] & present[j] for i, j in pairs)],
            ),
            "reconstruction": torch.stack(error).mean(),
        }
        terms["loss"] = (
            terms["task"]
            + SIMILARITY * terms["similarity"]
            + DIFFERENCE * terms["difference"]
            + RECONSTRUCTION * terms["reconstruction"]
        )
        return terms
