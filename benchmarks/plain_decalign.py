"""DecAlign's training step in plain torch, as a peer of the reference model.

It has one module for each modality and pair of modalities, torch's attention and dropout, and
losses written as their formulas. The transformers have two forms: "self", those of the reference
model, and "pairs", those of the authors' released code, which are MulT's: one for each ordered pair
of modalities, and one of twice the width for each modality, over the outputs of its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, permutations
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prototypes import plain_loss

__all__ = ["PlainDecAlign", "plain_objective"]


class PlainDecAlign(nn.Module):
    """The network, for features without masks, with the reference model's dropout of 0.1."""

    def __init__(
        self,
        modalities: Mapping[str, int],
        width: int,
        length: int,
        layers: int,
        form: Literal["self", "pairs"],
    ) -> None:
        super().__init__()
        names = list(modalities)
        self.form = form
        self.pairs = list(permutations(range(len(names)), 2))
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, width, 5, padding="same") for dim in modalities.values()
        )
        self.unique = nn.ModuleList(_encoder(width) for _ in names)
        self.common = _encoder(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        joint = width
        if form == "pairs":
            self.crossing = nn.ModuleList(_Transformer(width, length, layers) for _ in self.pairs)
            joint = width * (len(names) - 1)
        self.transformers = nn.ModuleList(_Transformer(joint, length, layers) for _ in names)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(len(names) * (joint + width), 1))

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """Return scores, unique and common features of all steps, and the mapped common means."""
        steps = [
            conv(x.transpose(1, 2)).transpose(1, 2)
            for conv, x in zip(self.convs, features, strict=True)
        ]
        unique = [encoder(x) for encoder, x in zip(self.unique, steps, strict=True)]
        common = [self.common(x) for x in steps]
        latents = [self.mlp(x.mean(1)) for x in common]
        inputs = unique
        if self.form == "pairs":
            crossed = {
                pair: transformer(unique[pair[0]], unique[pair[1]])
                for pair, transformer in zip(self.pairs, self.crossing, strict=True)
            }
            inputs = [
                torch.cat([crossed[pair] for pair in self.pairs if pair[0] == m], -1)
                for m in range(len(unique))
            ]
        refined = [t(x, x).mean(1) for t, x in zip(self.transformers, inputs, strict=True)]
        return self.head(torch.cat([*refined, *latents], -1)), unique, common, latents


def plain_objective(output: tuple[Tensor, ...], targets: Tensor, categories: int) -> Tensor:
    """Return the objective with the losses of the released code."""
    score, unique, common, latents = output
    loss = functional.l1_loss(score.squeeze(-1), targets)
    for u, c in zip(unique, common, strict=True):
        loss = loss + functional.cosine_similarity(u, c, dim=-1).square().mean()
    pooled = [u.mean(1) for u in unique]
    loss = loss + 0.05 * plain_loss(pooled, categories, 0.1, 1 / pooled[0].shape[-1])
    means = [c.mean(1) for c in common]
    for i, j in combinations(range(len(means)), 2):
        for a, b in zip(_moments(means[i]), _moments(means[j]), strict=True):
            loss = loss + 0.05 * (a - b).square().mean()
        x, y = latents[i], latents[j]
        mmd = _kernel(x, x).mean() + _kernel(y, y).mean() - 2 * _kernel(x, y).mean()
        loss = loss + 0.05 * mmd
    return loss


def _encoder(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, width),
        nn.LayerNorm(width),
    )


class _Transformer(nn.Module):
    def __init__(self, width: int, length: int, layers: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        self_attention = context is x
        x, context = self.dropout(x + self.position), self.dropout(context + self.position)
        for block in self.blocks:
            x = block(x, x if self_attention else context)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 8, dropout=0.1, batch_first=True)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        keys = self.key_norm(context)
        attended, _ = self.attention(self.query_norm(x), keys, keys, need_weights=False)
        x = x + self.dropout(attended)
        hidden = self.dropout(functional.relu(self.expand(self.norm(x))))
        return x + self.dropout(self.contract(hidden))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, covariance and skewness."""
    mean = x.mean(0)
    deviation = x - mean
    covariance = deviation.T @ deviation / len(x)
    scale = covariance.diagonal().sqrt() + 1e-6
    return mean, covariance, ((deviation / scale) ** 3).mean(0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (-(x[:, None] - y[None]).square().sum(-1) / 2).exp()
