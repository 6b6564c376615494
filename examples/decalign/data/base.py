"""The base class of all data modules: samples of named modalities in three splits."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.decalign.data.target import Target

__all__ = ["SPLITS", "Batch", "DataWarning", "ModalityData", "Samples", "Scaling", "standardised"]

SPLITS = ("train", "valid", "test")


class DataWarning(UserWarning):
    """Entries of a file are not used as they stand; the message counts them."""


class Batch(NamedTuple):
    """N samples of named modalities."""

    features: dict[str, Tensor]
    """`(N, T_m, d_m)` each, or token ids `(N, 3, T_m)`."""
    masks: dict[str, Tensor]
    """The valid steps, boolean `(N, T_m)`; all steps are valid in a modality without a mask."""
    targets: Tensor
    """`(N)`."""


class Scaling(NamedTuple):
    """Mean and deviation of one modality over the valid steps of the training samples."""

    mean: Tensor
    """`(d_m)`, or `(T_m, d_m)` where each step is scaled separately."""
    deviation: Tensor
    """The same shape; 0 for a constant feature."""

    @classmethod
    def measure(cls, x: Tensor, mask: Tensor | None = None, chunk: int = 4096) -> Scaling:
        """Measure the valid, finite entries of `(N, T, d)`, in pieces of `chunk` samples."""
        count, total, square = (torch.zeros(x.shape[-1], dtype=torch.float64) for _ in range(3))
        masks = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        pieces = [
            (part, part.isfinite() & valid.unsqueeze(-1))
            for part, valid in zip(x.split(chunk), masks.split(chunk), strict=True)
        ]
        for part, usable in pieces:
            count += usable.sum((0, 1))
            total += torch.where(usable, part, 0).sum((0, 1), dtype=torch.float64)
        mean = total / count.clamp_min(1)
        # In a second pass, since the difference of two large sums would lose digits.
        for part, usable in pieces:
            square += torch.where(usable, part - mean, 0).square().sum((0, 1))
        return cls(mean.to(x.dtype), (square / count.clamp_min(1)).sqrt().to(x.dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Return `x` scaled to mean 0 and deviation 1; constant features become 0."""
        varies = self.deviation > 0
        scaled = (x - self.mean) / torch.where(varies, self.deviation, 1)
        return torch.where(varies, scaled, 0)


class Samples(Dataset[Batch]):
    """Samples in memory or in a memory-mapped file, taken a batch at a time.

    Entries that are not finite are replaced by the modality's mean (by 0 without scaling).

    Args:
        samples: All samples, as one batch; its features may be memory-mapped.
        scaling: The scaling of some modalities, applied when samples are read.
        ids: The name of each sample; by default its number.
    """

    def __init__(
        self,
        samples: Batch,
        scaling: Mapping[str, Scaling] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.samples = samples
        self.scaling = dict(scaling or {})
        self.ids = list(ids) if ids is not None else [str(n) for n in range(len(self))]

    def __len__(self) -> int:
        return len(self.samples.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the samples `indices` as a batch, with one indexing operation for each tensor."""
        rows = torch.as_tensor(indices)
        features, masks, targets = self.samples
        return Batch(
            {name: self._read(name, x[rows]) for name, x in features.items()},
            {name: mask[rows] for name, mask in masks.items()},
            targets[rows],
        )

    def all(self) -> Batch:
        """Return every sample as one batch."""
        return self.__getitems__(range(len(self)))

    def _read(self, name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        scaling = self.scaling.get(name)
        scaled = x if scaling is None else scaling.apply(x)
        return torch.where(x.isfinite(), scaled, 0)


class ModalityData(lightning.LightningDataModule):
    """Named modalities in three splits, read once and kept.

    Args:
        batch_size: Samples in a training batch of each process.
        eval_batch_size: Samples in a batch of evaluation.
        missing: For some splits, the fraction of samples that lack a modality, as
            `{"test": {"text": 0.5}}`. It is the same samples for every seed.
    """

    published: str | None = None
    """The name of this data set in the paper's tables."""

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 512,
        missing: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.missing = missing or {}
        self._splits: dict[str, Samples] | None = None

    @abstractmethod
    def load(self) -> dict[str, Samples]:
        """Read and return the splits "train", "valid" and "test"."""

    @property
    @abstractmethod
    def target(self) -> Target:
        """The classes or the score to predict."""

    @property
    def splits(self) -> dict[str, Samples]:
        """The samples of each split, read when first asked for."""
        if self._splits is None:
            self._splits = self.load()
            self._remove_missing(self._splits)
        return self._splits

    @property
    def modalities(self) -> dict[str, int]:
        """d_m of each modality; 0 for token ids, whose features a text encoder computes."""
        features = self.splits["train"].samples.features
        return {name: x.shape[-1] if x.is_floating_point() else 0 for name, x in features.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled full batches; a small last batch would give noisy prototypes.

        The order depends on seed and epoch alone, and the batches of all processes together are
        those of one process with batches as large as all of theirs.
        """
        samples = self.splits["train"]
        rank, ranks = self._rank_and_ranks()
        # Lightning's seed_everything stores the seed in this variable.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        order: Any = DistributedSampler(samples, ranks, rank, seed=seed, drop_last=True)
        size = min(self.batch_size, len(samples) // ranks)
        return _loader(samples, size, order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation split, in its order."""
        return self._in_order("valid")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in its order."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in its order."""
        return self._in_order("test")

    def _in_order(self, split: str) -> DataLoader[Batch]:
        """Return every sample once; process r of R takes samples r, r + R, and so on."""
        samples = self.splits[split]
        rank, ranks = self._rank_and_ranks()
        return _loader(samples, self.eval_batch_size, range(rank, len(samples), ranks))

    def _rank_and_ranks(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _remove_missing(self, splits: dict[str, Samples]) -> None:
        for split, fractions in self.missing.items():
            if split not in splits:
                raise ValueError(f"missing must name splits of {list(splits)}; got {split!r}")
            samples = splits[split].samples
            for name, fraction in fractions.items():
                if name not in samples.features:
                    known = list(samples.features)
                    raise ValueError(f"missing must name modalities of {known}; got {name!r}")
                x = samples.features[name]
                steps = x.shape[1] if x.is_floating_point() else x.shape[2]
                mask = samples.masks.get(name, torch.ones(len(x), steps, dtype=torch.bool))
                generator = torch.Generator().manual_seed(sum(name.encode()))
                order = torch.randperm(len(x), generator=generator)
                mask = mask.clone()
                mask[order[: round(fraction * len(x))]] = False
                samples.masks[name] = mask


def standardised(
    batches: Mapping[str, Batch],
    ids: Mapping[str, Sequence[str] | None],
    names: Sequence[str],
) -> dict[str, Samples]:
    """Return samples with the modalities `names` scaled by the training split.

    Warn of valid entries that are not finite, once for all splits.
    """
    found = []
    for split, batch in batches.items():
        for name, x in batch.features.items():
            if x.is_floating_point():
                bad = ~x.isfinite()
                if name in batch.masks:
                    bad &= batch.masks[name].unsqueeze(-1)
                if count := int(bad.sum()):
                    found.append(f"{split} {name} {count} of {x.numel()}")
    if found:
        text = f"entries that are not finite are read as the modality's mean: {'; '.join(found)}"
        warnings.warn(text, DataWarning, stacklevel=2)
    train = batches["train"]
    scaling = {
        name: Scaling.measure(x, train.masks.get(name))
        for name, x in train.features.items()
        if name in names and x.is_floating_point()
    }
    return {split: Samples(batch, scaling, ids[split]) for split, batch in batches.items()}


def _loader(
    samples: Samples, batch_size: int, order: Any, drop_last: bool = False
) -> DataLoader[Batch]:
    # The samples are indexed by whole batches, so there is nothing to collate.
    return DataLoader(
        samples, batch_size=batch_size, sampler=order, collate_fn=_identity, drop_last=drop_last
    )


def _identity(batch: Batch) -> Batch:
    return batch


# The data are in memory or in a mapped file, so loading needs no worker processes.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
