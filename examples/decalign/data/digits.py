"""Handwritten digits, cut into several views as modalities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples.decalign.data.base import Batch, ModalityData, Samples, Scaling
from examples.decalign.data.target import Target

__all__ = ["VIEWS", "DigitsData", "split_rows"]

Array = NDArray[np.float32]

TEST_FRACTION = 0.25
# The split is part of the data set, and does not depend on the seed of a training.
SPLIT_SEED = 0


def upper(images: Array) -> Array:
    """Return the upper half of `(N, 8, 8)` images, row by row: `(N, 4, 8)`."""
    return images[:, :4]


def lower(images: Array) -> Array:
    """Return the lower half, column by column: `(N, 8, 4)`."""
    return images[:, 4:].transpose(0, 2, 1)


def coarse(images: Array) -> Array:
    """Return the whole image at half the resolution, as one step: `(N, 1, 16)`."""
    return images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 1, 16)


def left(images: Array) -> Array:
    """Return the left half, column by column: `(N, 4, 8)`."""
    return images[:, :, :4].transpose(0, 2, 1)


def right(images: Array) -> Array:
    """Return the right half, row by row: `(N, 8, 4)`."""
    return images[:, :, 4:]


def profile(images: Array) -> Array:
    """Return the sums of rows and of columns, as two steps: `(N, 2, 8)`."""
    return np.stack([images.sum(2), images.sum(1)], 1)


VIEWS: dict[str, Callable[[Array], Array]] = {
    view.__name__: view for view in (upper, lower, coarse, left, right, profile)
}


class DigitsData(ModalityData):
    """scikit-learn's `load_digits` (1,797 real 8 x 8 images) as several modalities.

    The test split is stratified and always the same. Each feature is standardised with the mean
    and deviation of the training samples alone.

    Args:
        views: The modalities: "upper", "lower", "coarse", "left", "right", "profile".
        validation_fraction: The fraction of the samples outside the test split that is used for
            validation; training selects nothing on it.
        batch_size: Samples in a training batch of each process.
        eval_batch_size: Samples in a batch of evaluation.
        missing: The fractions of samples that lack a modality, as `{"test": {"upper": 0.5}}`.
    """

    def __init__(
        self,
        views: tuple[str, ...] = ("upper", "lower", "coarse"),
        validation_fraction: float = 0.1,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        missing: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, missing)
        if unknown := set(views) - set(VIEWS):
            raise ValueError(f"views must be among {list(VIEWS)}; got {sorted(unknown)}")
        self.views = views
        self.validation_fraction = validation_fraction

    @property
    def target(self) -> Target:
        """Ten classes."""
        return Target(kind="class", categories=tuple("0123456789"))

    def load(self) -> dict[str, Samples]:
        """Cut the images into views, split the samples, and standardise the features."""
        digits = load_digits()
        images = digits.images.astype(np.float32)
        views = {name: torch.from_numpy(VIEWS[name](images).copy()) for name in self.views}
        rows = split_rows(digits.target, self.validation_fraction)
        scaling = {}
        for name, view in views.items():
            train = view[rows["train"]]
            # Each pixel is standardised separately, also along the sequence.
            pixels = Scaling.measure(train.reshape(len(train), 1, -1))
            scaling[name] = Scaling(*(x.view(view.shape[1:]) for x in pixels))
        return {
            split: Samples(
                Batch(
                    features={name: view[chosen] for name, view in views.items()},
                    masks={},
                    targets=torch.from_numpy(digits.target[chosen]),
                ),
                scaling,
                ids=[str(row) for row in chosen],
            )
            for split, chosen in rows.items()
        }


def split_rows(
    targets: NDArray[np.int64], validation_fraction: float
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of "train", "valid" and "test", each stratified by class."""
    rest, test = train_test_split(
        np.arange(len(targets)),
        test_size=TEST_FRACTION,
        stratify=targets,
        random_state=SPLIT_SEED,
    )
    train, valid = train_test_split(
        rest, test_size=validation_fraction, stratify=targets[rest], random_state=SPLIT_SEED
    )
    return {"train": train, "valid": valid, "test": test}
