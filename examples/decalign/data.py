"""Real handwritten digits, cut into three modalities of which none suffices alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["VIEWS", "Batch", "DigitsData", "Samples"]

Array = NDArray[np.float32]

TEST_FRACTION = 0.25
# The split is part of the data set: it does not follow the seed of a training.
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


VIEWS: dict[str, Callable[[Array], Array]] = {"upper": upper, "lower": lower, "coarse": coarse}


class Batch(NamedTuple):
    """N samples of named modalities."""

    features: dict[str, Tensor]
    """`(N, T_m, d_m)` each."""
    masks: dict[str, Tensor]
    """The valid steps, boolean `(N, T_m)`; a modality not named is complete."""
    targets: Tensor
    """`(N)`."""


class Samples(Dataset[Batch]):
    """Samples in memory, taken a batch at a time.

    Args:
        samples: All of them, as one batch.
    """

    def __init__(self, samples: Batch) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the samples `indices`: one indexing a tensor, and nothing left to collate."""
        rows = torch.as_tensor(indices)
        features, masks, targets = self.samples
        return Batch(
            {name: x[rows] for name, x in features.items()},
            {name: mask[rows] for name, mask in masks.items()},
            targets[rows],
        )


class DigitsData(lightning.LightningDataModule):
    """scikit-learn's `load_digits` (1,797 real 8 x 8 images) as three modalities.

    The test split is stratified and always the same. Each feature is standardised with the mean
    and deviation of the training samples alone.

    Args:
        batch_size: Samples in a batch of training.
        validation_fraction: Part of the samples outside the test split that is kept for
            validation; nothing is selected on it during training.
    """

    def __init__(self, batch_size: int = 128, validation_fraction: float = 0.1) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.splits: dict[str, Samples] = {}

    @property
    def modalities(self) -> dict[str, int]:
        """d_m of each modality, known before the data are read."""
        blank = np.zeros((1, 8, 8), dtype=np.float32)
        return {name: view(blank).shape[-1] for name, view in VIEWS.items()}

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    def setup(self, stage: str | None = None) -> None:
        """Read, cut, split and standardise; Lightning calls it before each stage."""
        digits = load_digits()
        images = digits.images.astype(np.float32)
        views = {name: view(images) for name, view in VIEWS.items()}
        rows = split_rows(digits.target, self.validation_fraction)
        for name, view in views.items():
            views[name] = standardise(view, rows["train"])
        for split, chosen in rows.items():
            self.splits[split] = Samples(
                Batch(
                    features={name: torch.from_numpy(view[chosen]) for name, view in views.items()},
                    masks={},
                    targets=torch.from_numpy(digits.target[chosen]),
                )
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled full batches: prototypes of a small remainder would be noise."""
        size = min(self.batch_size, len(self.splits["train"]))
        return _loader(self.splits["train"], size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation split as one batch."""
        return _loader(self.splits["validation"], len(self.splits["validation"]))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test split as one batch."""
        return _loader(self.splits["test"], len(self.splits["test"]))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in its order."""
        return self.test_dataloader()


def split_rows(
    targets: NDArray[np.int64], validation_fraction: float
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of "train", "validation" and "test", each stratified by class."""
    rest, test = train_test_split(
        np.arange(len(targets)),
        test_size=TEST_FRACTION,
        stratify=targets,
        random_state=SPLIT_SEED,
    )
    train, validation = train_test_split(
        rest, test_size=validation_fraction, stratify=targets[rest], random_state=SPLIT_SEED
    )
    return {"train": train, "validation": validation, "test": test}


def standardise(view: Array, train: NDArray[np.int64]) -> Array:
    """Return `view` with mean 0 and deviation 1 over the rows `train`, feature by feature."""
    mean, deviation = view[train].mean(0), view[train].std(0)
    # A pixel that is blank in every training image tells nothing.
    return np.where(deviation > 0, (view - mean) / np.where(deviation > 0, deviation, 1), 0)


def _loader(
    samples: Samples, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
) -> DataLoader[Batch]:
    return DataLoader(
        samples, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=_as_it_is
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
