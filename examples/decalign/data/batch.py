"""Samples of named modalities in memory, and the order in which batches take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["Batch", "GlobalOrder", "Samples", "Scaling", "make_loader"]


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
        count, total, square = (
            torch.zeros(x.shape[-1], dtype=torch.float64, device="cpu") for _ in range(3)
        )
        pieces = list(zip(x.split(chunk), _split(mask, x, chunk), strict=True))
        for part, valid in pieces:
            usable = _valid_and_finite(part, valid)
            count += usable.sum((0, 1))
            total += torch.where(usable, part, 0).sum((0, 1), dtype=torch.float64)
        mean = total / count.clamp_min(1)
        # In a second pass, since the difference of two large sums would lose digits.
        for part, valid in pieces:
            distance = torch.where(_valid_and_finite(part, valid), part - mean, 0)
            square += distance.square().sum((0, 1))
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
        rows = torch.as_tensor(indices, device="cpu")
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


class GlobalOrder(Sampler[int]):
    """The order of one process's samples, such that all processes together take global batches.

    Each global batch is a section of one permutation, and process r of R takes its r-th part. The
    permutation depends on the seed and the epoch alone. R processes with batches of B therefore
    train on the same samples as one process with batches of R B, and a resumed training on the same
    samples as an uninterrupted one. Unshuffled, each process takes one of R contiguous parts.

    Args:
        count: The number of samples.
        batch_size: B; a shuffled epoch leaves out a remainder below R B.
        shuffle: Whether to shuffle.
        seed: The seed of the permutations.
        rank: r.
        ranks: R.
    """

    def __init__(
        self, count: int, batch_size: int, *, shuffle: bool, seed: int, rank: int, ranks: int
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._rows())

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows().tolist())

    def _rows(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.count, device="cpu").tensor_split(self.ranks)[self.rank]
        generator = torch.Generator("cpu").manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator, device="cpu")
        batches = self.count // (self.batch_size * self.ranks)
        order = order[: batches * self.batch_size * self.ranks]
        return order.view(batches, self.ranks, self.batch_size)[:, self.rank].reshape(-1)


def make_loader(samples: Samples, order: GlobalOrder) -> DataLoader[Batch]:
    """Return batches of `samples` in the given order."""
    return DataLoader(
        samples,
        batch_size=order.batch_size,
        sampler=order,
        collate_fn=_identity,
        # Without it, the loader draws from the global generator, and a resumed training differs.
        generator=torch.Generator("cpu"),
    )


def _identity(batch: Batch) -> Batch:
    return batch


def _split(mask: Tensor | None, x: Tensor, chunk: int) -> Sequence[Tensor | None]:
    return [None] * len(x.split(chunk)) if mask is None else mask.split(chunk)


def _valid_and_finite(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.isfinite() if mask is None else x.isfinite() & mask.unsqueeze(-1)
