"""MulT (Tsai et al., 2019) from the same parts, as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor, nn

from examples.decalign.dropout import Dropout
from examples.decalign.encoders import masked_mean
from examples.decalign.network import (
    Network,
    Output,
    blank,
    convolve,
    make_convs,
    make_transformer,
)

__all__ = ["MulT"]


class MulT(nn.Module):
    """The multimodal transformer: every modality attends to every other one.

    Each ordered pair has a crossmodal transformer. The outputs for a target modality are
    concatenated and pass through a transformer of that modality. The results of all modalities pass
    through a residual layer to the head. There is no alignment loss; attention aligns them.

    There are two differences from the publication: sequences are averaged over the valid steps
    instead of taking the last step, and they are first resampled to T_s steps, as in DecAlign.

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
        others = len(modalities) - 1
        self.convs = make_convs(modalities, network)
        self.crossmodal = nn.ModuleDict(
            {
                f"{source}_to_{target}": make_transformer(network, modalities, target)
                for target, source in permutations(modalities, 2)
            }
        )
        self.memories = nn.ModuleDict(
            {
                name: make_transformer(network, modalities, name, copies=others)
                for name in modalities
            }
        )
        width = len(modalities) * others * network.width
        self.residual = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            Dropout(network.output_dropout),
            nn.Linear(width, width),
        )
        self.head = nn.Linear(width, num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network; see `convolve` for features and masks."""
        steps, valid = convolve(self.convs, features, masks)
        names = list(self.modalities)
        pooled = []
        for m, name in enumerate(names):
            attended = []
            for other, source in enumerate(names):
                if other != m:
                    transformer = self.crossmodal[f"{source}_to_{name}"]
                    attended.append(
                        transformer.refine(
                            transformer.embed(steps[m]),
                            valid[m],
                            transformer.embed(steps[other]),
                            valid[other],
                        )
                    )
            memory = self.memories[name]
            joined = blank(torch.cat(attended, -1), valid[m])
            pooled.append(masked_mean(memory.refine(memory.embed(joined), valid[m]), valid[m]))
        joined = torch.cat(pooled, -1)
        return Output(
            logits=self.head(joined + self.residual(joined)),
            present=[mask.any(-1) for mask in valid],
        )
