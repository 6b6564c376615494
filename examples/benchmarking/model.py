"""What a model has to offer, and the list of all models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from examples.decalign.data.target import Target

__all__ = ["MODELS", "Model", "Sizes", "by_modality"]

MODELS: dict[str, str] = {
    "decalign": "examples.decalign.model.DecAlign",
    "mult": "examples.benchmarking.rivals.mult.MulT",
    "misa": "examples.benchmarking.rivals.misa.MISA",
}
"""The class of each model; `--model.network` takes the class."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and dropout rates; brackets give the names of Table 4 that differ.

    Args:
        width: d_s, the features of a step, the same for all modalities (DST feature dim).
        length: T_s, the steps of a sequence, the same for all modalities.
        kernel_size: The kernel size of the temporal convolutions; odd.
        heads: The number of attention heads; divides `width`.
        layers: The number of transformer blocks of each modality (nlevels).
        expansion: The width of feed-forward layers, in multiples of `width`.
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
    expansion: int = 2
    input_dropout: float | dict[str, float] = 0.0
    attention_dropout: float | dict[str, float] = 0.1
    relu_dropout: float = 0.1
    embedding_dropout: float = 0.1
    residual_dropout: float = 0.1
    output_dropout: float = 0.1


class Model(nn.Module):
    """A network on named modalities, with the objective that it is trained by.

    A subclass takes `modalities` and `target` first and its own typed options by keyword. Its
    `forward` takes the features `(N, T_m, d_m)` and the masks `(N, T_m)` by modality (a modality
    without a mask is valid everywhere, a sample without a valid step lacks it), and returns an
    object with `logits` `(N, target.num_outputs)`.

    Args:
        modalities: d_m of each modality, by name; at least two.
        target: The classes or the score to predict.
    """

    def __init__(self, modalities: Mapping[str, int], target: Target) -> None:
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"modalities must name at least two; got {list(modalities)}")
        self.modalities = dict(modalities)
        self.target = target

    def objective(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms by name, unweighted, and their weighted sum as "loss"."""
        task = self.target.loss(output.logits, targets)
        return {"task": task, "loss": task}

    def features(self, output: Any) -> dict[str, Tensor]:
        """Return the features `(N, d)` that figures show, as "unique/NAME" and "common/NAME"."""
        return {}


def by_modality(
    name: str, value: float | Mapping[str, float], modalities: Mapping[str, int]
) -> Mapping[str, float]:
    """Return a value for each modality, from one for all or a mapping."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(modalities, value)
    if value.keys() != modalities.keys():
        raise ValueError(f"{name} must name {list(modalities)}; got {list(value)}")
    return value
