"""MulT (Tsai et al., 2019) from the layers of DecAlign."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarking.model import Model, Sizes
from examples.decalign.data.target import Target
from examples.decalign.layers import blank, convolve, make_convs, make_transformer, masked_mean

__all__ = ["MulT"]


class Output(NamedTuple):
    """The logits `(N, C)`."""

    logits: Tensor


class MulT(Model):
    """The multimodal transformer: every modality attends to every other one.

    Each ordered pair has a crossmodal transformer. The outputs for a target modality are
    concatenated and pass through a transformer of that modality. The results of all modalities pass
    through a residual layer to the head. There is no alignment loss; attention aligns them.

    Differences from the publication: sequences are first resampled to T_s steps, as in DecAlign,
    and padding is masked; their convolutions have a bias and one kernel size; positions are
    learned, without a factor sqrt(d) on the features; queries and keys have a normalisation each;
    feed-forward layers are `expansion` times as wide (4 there); dropout has the rates of `sizes`;
    the last transformers are as deep as the others; the steps of their outputs are averaged
    instead of taking the last.

    Args:
        modalities: d_m of each modality, by name.
        target: The classes or the score to predict.
        sizes: Sizes and dropout rates.
        causal: Whether a step attends to no later step, as in the publication.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        target: Target,
        sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
        causal: bool = True,
    ) -> None:
        super().__init__(modalities, target)
        others = len(modalities) - 1
        self.convs = make_convs(modalities, sizes)
        self.crossmodal = nn.ModuleDict(
            {
                f"{source}_to_{name}": make_transformer(sizes, modalities, name, causal=causal)
                for name, source in permutations(modalities, 2)
            }
        )
        self.memories = nn.ModuleDict(
            {
                name: make_transformer(sizes, modalities, name, copies=others, causal=causal)
                for name in modalities
            }
        )
        width = len(modalities) * others * sizes.width
        self.residual = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(sizes.output_dropout),
            nn.Linear(width, width),
        )
        self.head = nn.Linear(width, target.num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Output:
        """Run the network on features `(N, T_m, d_m)` and masks `(N, T_m)`."""
        steps, valid = convolve(self.convs, features, masks)
        inputs = dict(zip(self.modalities, zip(steps, valid, strict=True), strict=True))
        pooled = []
        for name, (x, mask) in inputs.items():
            attended = []
            for source, (y, source_mask) in inputs.items():
                if source != name:
                    crossmodal = self.crossmodal[f"{source}_to_{name}"]
                    context = crossmodal.embed(y)
                    attended.append(crossmodal(crossmodal.embed(x), mask, context, source_mask))
            memory = self.memories[name]
            joined = memory.embed(blank(torch.cat(attended, -1), mask))
            pooled.append(masked_mean(memory(joined, mask), mask))
        joined = torch.cat(pooled, -1)
        return Output(self.head(joined + self.residual(joined)))

    def objective(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss of the task; L1 for a score, as in the publication."""
        task = self.target.loss(output.logits, targets, "l1")
        return {"task": task, "loss": task}
