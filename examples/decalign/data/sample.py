"""Small files in the format of each data set, to run every command without the data.

The numbers are random: labels, and features that depend linearly on the label, with noise. Results
on them say nothing about the data sets.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

__all__ = ["FORMATS", "make_sample"]

Format = Literal["mosi", "mosei", "sims", "iemocap"]

# Steps and features of text, audio and vision as in the public files, and the range of the labels.
FORMATS: dict[str, dict[str, Any]] = {
    "mosi": {"shapes": ((50, 768), (50, 5), (50, 20)), "limit": 3, "aligned": True},
    "mosei": {"shapes": ((50, 768), (50, 74), (50, 35)), "limit": 3, "aligned": True},
    "sims": {"shapes": ((39, 768), (400, 33), (55, 709)), "limit": 1, "aligned": False},
    "iemocap": {"shapes": ((1, 1024), (1, 512), (1, 1024)), "limit": None, "aligned": True},
}
CLASSES = 6


def make_sample(
    name: Format,
    path: str | Path,
    *,
    sizes: tuple[int, int, int] = (64, 32, 32),
    steps: int | None = None,
    features: int | None = None,
    vocabulary: int = 100,
    seed: int = 0,
) -> None:
    """Write a small pickle in the layout of `name`.

    Args:
        name: "mosi", "mosei" (aligned), "sims" (unaligned) or "iemocap" (one step).
        path: The file to write.
        sizes: The numbers of samples of the training, validation and test split.
        steps: The maximum for each modality.
        features: The maximum for each modality.
        vocabulary: Token ids lie below this number.
        seed: The seed of the random numbers.
    """
    generator = np.random.default_rng(seed)
    form = FORMATS[name]
    shapes = [(min(t, steps or t), min(d, features or d)) for t, d in form["shapes"]]
    # The dependence of each modality's features on the label is the same in all splits.
    loadings = [generator.normal(size=width) for _, width in shapes]
    content = {
        split: _draw_split(generator, form, shapes, loadings, size, vocabulary)
        for split, size in zip(("train", "valid", "test"), sizes, strict=True)
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        pickle.dump(content, file, protocol=4)


def _draw_split(
    generator: Generator,
    form: dict[str, Any],
    shapes: list[tuple[int, int]],
    loadings: list[np.ndarray],
    size: int,
    vocabulary: int,
) -> dict[str, Any]:
    table: dict[str, Any] = {
        "id": [f"sample$_${n}" for n in range(size)],
        "raw_text": ["words" for _ in range(size)],
    }
    if form["limit"] is None:
        classes = generator.integers(CLASSES, size=size)
        labels = classes - (CLASSES - 1) / 2
        table["classification_labels"] = classes
    else:
        limit = form["limit"]
        labels = np.round(generator.uniform(-limit, limit, size=size), 1)
        table["regression_labels"] = labels.astype(np.float32)
        table["classification_labels"] = (labels > 0).astype(np.int64)
        table["annotations"] = ["Positive" if y > 0 else "Negative" for y in labels]

    longest = max(steps for steps, _ in shapes)
    lengths = generator.integers(max(longest // 2, 1), longest + 1, size=size)
    names = ("text", "audio", "vision")
    for name, (steps, width), loading in zip(names, shapes, loadings, strict=True):
        x = 0.5 * generator.normal(size=(size, steps, width)) + labels[:, None, None] * loading
        valid = np.minimum(lengths, steps)
        x[np.arange(steps) >= valid[:, None]] = 0
        table[name] = x.astype(np.float32)
        if not form["aligned"] and name != "text":
            table[f"{name}_lengths"] = valid.tolist()
    # COVAREP's features are logarithms, and not finite for silence.
    table["audio"][0, 0, 0] = -np.inf
    table["audio"][1, 0, -1] = np.nan

    if form["limit"] is not None:
        steps = shapes[0][0]
        mask = np.arange(steps) < np.minimum(lengths, steps)[:, None]
        # Token ids increase with the label.
        share = (labels + form["limit"]) / (2 * form["limit"])
        tokens = np.clip(share[:, None] + 0.1 * generator.normal(size=mask.shape), 0, 1)
        tokens = 4 + np.round(tokens * (vocabulary - 5))
        table["text_bert"] = np.stack(
            [np.where(mask, tokens, 0), mask, np.zeros_like(mask)], 1
        ).astype(np.float32)
    return table
