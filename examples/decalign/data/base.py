"""The base class of all data modules: splits, batches and missing modalities."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.decalign.data.batch import Batch, GlobalOrder, Samples, make_loader
from examples.decalign.targets import Target

__all__ = ["SPLITS", "ModalityData"]

SPLITS = ("train", "valid", "test")


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
        """Return shuffled full batches; a small last batch would give noisy prototypes."""
        samples = self.splits["train"]
        _, ranks = self._rank_and_ranks()
        size = min(self.batch_size, len(samples) // ranks)
        return make_loader(samples, self._order(samples, size, shuffle=True))

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
        samples = self.splits[split]
        return make_loader(samples, self._order(samples, self.eval_batch_size, shuffle=False))

    def _order(self, samples: Samples, batch_size: int, *, shuffle: bool) -> GlobalOrder:
        rank, ranks = self._rank_and_ranks()
        return GlobalOrder(
            len(samples),
            batch_size,
            shuffle=shuffle,
            # Lightning's seed_everything stores the seed in this variable.
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            rank=rank,
            ranks=ranks,
        )

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
                missing = _random_mask(len(samples.targets), fraction, name)
                mask = samples.masks.get(name)
                if mask is None:
                    x = samples.features[name]
                    steps = x.shape[1] if x.is_floating_point() else x.shape[2]
                    mask = torch.ones(len(x), steps, dtype=torch.bool, device="cpu")
                samples.masks[name] = mask & ~missing.unsqueeze(1)


def _random_mask(count: int, fraction: float, name: str) -> Tensor:
    """Return a mask that is True at `fraction` of `count` places, the same for every seed."""
    generator = torch.Generator("cpu").manual_seed(sum(name.encode()))
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    order = torch.randperm(count, generator=generator, device="cpu")
    mask[order[: round(fraction * count)]] = True
    return mask


# The data are in memory or in a mapped file, so loading needs no worker processes.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
