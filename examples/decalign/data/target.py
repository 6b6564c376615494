"""The target of a data set: classes, or a score with its categories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

__all__ = ["POLARITY", "SENTIMENT", "SIMS", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A classification, or the regression of a score that also has categories.

    Args:
        kind: "class" or "score".
        categories: The names of the categories. Those of a score are in rising order; their number
            is the paper's number of prototypes.
        limits: The lowest and the highest score.
        edges: The edges between the categories of a score; each belongs to the category below.
            Without edges, the category is the whole number nearest to the score.
        zero: Whether a score of 0 counts as "positive" or "negative" in a binary accuracy.
        clipped: Whether predicted scores are clipped to the limits.
    """

    kind: Literal["class", "score"]
    categories: tuple[str, ...]
    limits: tuple[float, float] = (-1.0, 1.0)
    edges: tuple[float, ...] = ()
    zero: Literal["positive", "negative"] = "positive"
    clipped: bool = False

    @property
    def num_outputs(self) -> int:
        """The number of outputs of the network: one for a score, or one for each class."""
        return 1 if self.kind == "score" else len(self.categories)

    @property
    def signed(self) -> bool:
        """Whether the score may be negative or positive."""
        return self.kind == "score" and self.limits[0] < 0 < self.limits[1]

    def category(self, scores: Tensor) -> Tensor:
        """Return the index of each score's category; classes are returned unchanged."""
        if self.kind == "class":
            return scores
        if self.edges:
            return torch.bucketize(scores, scores.new_tensor(self.edges))
        low, high = self.limits
        return (scores.clamp(low, high).round() - low).long()

    def polarity(self, scores: Tensor) -> Tensor:
        """Return 1 where a score is positive and 0 where it is negative."""
        return (scores >= 0 if self.zero == "positive" else scores > 0).long()

    def predict(self, logits: Tensor) -> Tensor:
        """Return scores or classes, `(N)`, from the network's `(N, num_outputs)`."""
        if self.kind == "class":
            return logits.argmax(-1)
        return logits.squeeze(-1).clamp(*self.limits) if self.clipped else logits.squeeze(-1)

    def loss(self, logits: Tensor, targets: Tensor, score_loss: str = "mse") -> Tensor:
        """Return cross-entropy, or for a score "mse" (the paper) or "l1"."""
        if self.kind == "class":
            return cross_entropy(logits, targets)
        distance = mse_loss if score_loss == "mse" else l1_loss
        return distance(logits.squeeze(-1), targets.to(logits.dtype))


SENTIMENT = Target(
    kind="score",
    limits=(-3.0, 3.0),
    categories=("-3", "-2", "-1", "0", "+1", "+2", "+3"),
)
"""CMU-MOSI and CMU-MOSEI: seven categories, which are whole numbers."""

SIMS = Target(
    kind="score",
    limits=(-1.0, 1.0),
    edges=(-0.1, 0.1),
    categories=("negative", "neutral", "positive"),
    zero="negative",
    clipped=True,
)
"""CH-SIMS: three classes, of which neutral is (-0.1, 0.1]; predictions are clipped, as by MMSA."""

POLARITY = Target(kind="class", categories=("negative", "positive"))
"""Sentiment as two classes."""
