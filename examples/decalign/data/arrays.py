"""Your own data: any named modalities from one file of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples.decalign.data.base import SPLITS, Batch, ModalityData, Samples, standardised
from examples.decalign.data.checks import (
    SchemaError,
    check_ids,
    check_labels,
    check_lengths,
    check_widths,
    numbers,
    own_steps,
    sequences,
)
from examples.decalign.data.reader import read_dataset
from examples.decalign.data.target import Target

__all__ = ["Arrays"]

ENDINGS = ("_lengths", "_mask")
OTHERS = ("labels", "split", "id")


class Arrays(ModalityData):
    """Named modalities from an `.npz`, a pickle of arrays, or the file that `convert` wrote.

    The file has an array for each modality, under any name: `(N, T, d)`, `(N, d)` for one step,
    or in a pickle a list of N arrays `(T, d)` of any lengths. `NAME_lengths` `(N)` or `NAME_mask`
    `(N, T)` tells the valid steps; a sample without one lacks the modality. `labels` `(N)` are
    classes (whole numbers from 0, or strings) or scores. Optional are `id` `(N)` and `split`
    `(N)`, one of "train", "valid" and "test". Instead of `split`, the file may hold one table for
    each split: nested dictionaries in a pickle, keys such as "train/text" in an `.npz`. A missing
    validation split is drawn from the training samples; without any split, both others are drawn.

    Args:
        path: The file.
        labels: Whether `labels` are "classes" or "scores".
        modalities: The modalities to use, in this order; by default all of them.
        categories: The names of the classes; by default their numbers or strings.
        bins: The number of categories that a score is cut into, for prototypes and figures.
        valid_fraction: The fraction of the training samples that is drawn for validation.
        test_fraction: The fraction of all samples that is drawn for the test.
        standardise: Whether features get mean 0 and deviation 1 over the training samples.
        batch_size: Samples in a training batch of each process.
        eval_batch_size: Samples in a batch of evaluation.
        missing: The fractions of samples that lack a modality, as `{"test": {"text": 0.5}}`.
    """

    def __init__(
        self,
        path: str,
        labels: Literal["classes", "scores"] = "classes",
        modalities: list[str] | None = None,
        categories: list[str] | None = None,
        bins: int = 5,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.2,
        standardise: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 512,
        missing: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, missing)
        self.path = Path(path)
        self.labels = labels
        self.chosen = modalities
        self.categories = categories
        self.bins = bins
        self.valid_fraction = valid_fraction
        self.test_fraction = test_fraction
        self.standardise = standardise
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        """The classes, or the score with the limits of all labels."""
        if self._target is None:
            _ = self.splits
        assert self._target is not None
        return self._target

    def load(self) -> dict[str, Samples]:
        """Read, check, split and standardise."""
        content = read_dataset(self.path)
        try:
            if not isinstance(content, Mapping):
                raise SchemaError(f"expected named arrays; got {type(content).__name__}")
            nested = {split: content[split] for split in SPLITS if split in content}
            tables = nested or {"": content}
            wrong = [split for split, table in tables.items() if not isinstance(table, Mapping)]
            if wrong or (nested and not {"train", "test"} <= nested.keys()):
                raise SchemaError(f"tables must be those of train and test; got {list(content)}")
            batches, ids = self._batches(tables)
            check_widths({split: batch.features for split, batch in batches.items()})
        except SchemaError as error:
            raise SchemaError(f"{self.path}: {error}") from None
        return standardised(batches, ids, list(batches["train"].features) * self.standardise)

    def _batches(
        self, tables: dict[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Batch], dict[str, list[str] | None]]:
        names = self._names(next(iter(tables.values())))
        self._target = None
        self._find_target(tables)
        read = {split: self._read(split, table, names) for split, table in tables.items()}
        # Of each split, the table that it is part of and its rows there.
        rows = {split: (split, torch.arange(len(read[split][0].targets))) for split in read}
        if "" in tables:
            rows = {k: ("", v) for k, v in self._rows(tables[""], read[""][0].targets).items()}
        if "valid" not in rows:
            table, train = rows["train"]
            train, valid = self._cut(train, read[table][0].targets, self.valid_fraction)
            rows |= {"train": (table, train), "valid": (table, valid)}
        batches: dict[str, Batch] = {}
        ids: dict[str, list[str] | None] = {}
        for split in SPLITS:
            table, chosen = rows[split]
            (features, masks, targets), known = read[table]
            batches[split] = Batch(
                {name: x[chosen] for name, x in features.items()},
                {name: x[chosen] for name, x in masks.items()},
                targets[chosen],
            )
            ids[split] = [known[n] if known else str(n) for n in chosen.tolist()]
        return batches, ids

    def _names(self, table: Mapping[str, Any]) -> list[str]:
        """Return the modalities of a table."""
        known = [k for k in table if k not in OTHERS and not k.endswith(ENDINGS)]
        names = self.chosen or known
        if unknown := [name for name in names if name not in known]:
            raise SchemaError(f"there is no modality {unknown[0]!r}; the file has {known}")
        if len(names) < 2:
            raise SchemaError(f"expected at least two modalities; the file has {sorted(table)}")
        return names

    def _find_target(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        for split, table in tables.items():
            if "labels" not in table:
                where = f"{split}/labels" if split else "labels"
                raise SchemaError(f"{where!r} is missing; there are {sorted(table)}")
        values = [np.asarray(table["labels"]).reshape(-1) for table in tables.values()]
        if self.labels == "scores":
            scores = [check_labels("'labels'", part, None, None).double() for part in values]
            low, high = (float(limit(torch.cat(scores))) for limit in (torch.amin, torch.amax))
            if not np.isfinite([low, high]).all() or low == high:
                raise SchemaError(f"'labels' must be different finite scores; got {low} to {high}")
            edges = np.linspace(low, high, self.bins + 1)
            names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
            self._target = Target(
                kind="score",
                categories=tuple(names),
                limits=(low, high),
                edges=tuple(map(float, edges[1:-1])),
                clipped=True,
            )
            return
        if values[0].dtype.kind in "US":
            found = sorted({str(x) for part in values for x in part})
        else:
            highest = max(int(check_labels("'labels'", x, None, None).max()) for x in values)
            found = [str(n) for n in range(max(highest + 1, 2))]
        names = self.categories or found
        if len(names) < len(found):
            raise SchemaError(f"'labels' has {len(found)} classes; categories names {len(names)}")
        self._target = Target(kind="class", categories=tuple(names))

    def _read(
        self, split: str, table: Mapping[str, Any], names: list[str]
    ) -> tuple[Batch, list[str] | None]:
        prefix = f"{split}/" if split else ""
        labels = table["labels"]
        if np.asarray(labels).dtype.kind in "US":
            texts = np.asarray(labels).reshape(-1)
            if self.labels == "scores":
                raise SchemaError(f"'{prefix}labels' must hold scores; got strings")
            order = {name: n for n, name in enumerate(self.target.categories)}
            if unknown := [str(x) for x in texts if str(x) not in order]:
                raise SchemaError(
                    f"'{prefix}labels' has {unknown[0]!r}; categories are {list(order)}"
                )
            labels = np.array([order[str(text)] for text in texts])
        targets = check_labels(f"'{prefix}labels'", labels, None, self.target)
        count = len(targets)
        features: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for name in names:
            where = f"'{prefix}{name}'"
            if name not in table:
                raise SchemaError(f"{where} is missing; there are {sorted(table)}")
            value = table[name]
            if not isinstance(value, (list, tuple)) and np.ndim(value) == 2:
                value = numbers(where, value).unsqueeze(1)
            features[name], ragged = sequences(where, value, count)
            mask = self._mask(where[1:-1], features[name], table, name, ragged)
            if mask is not None and not bool(mask.all()):
                masks[name] = mask
        ids = check_ids(f"'{prefix}id'", table["id"], count) if "id" in table else None
        return Batch(features, masks, targets), ids

    @staticmethod
    def _mask(
        where: str, x: Tensor, table: Mapping[str, Any], name: str, ragged: Tensor | None
    ) -> Tensor | None:
        if f"{name}_mask" in table:
            mask = numbers(f"'{where}_mask'", table[f"{name}_mask"])
            if mask.shape != x.shape[:2]:
                raise SchemaError(
                    f"'{where}_mask' has shape {tuple(mask.shape)}; expected {tuple(x.shape[:2])}"
                )
            return mask > 0
        lengths = table.get(f"{name}_lengths", ragged)
        if lengths is not None:
            return check_lengths(f"'{where}_lengths'", lengths, *x.shape[:2])
        # Zeros may be values in an array of one step; in a sequence they pad.
        return own_steps(x) if x.shape[1] > 1 else None

    def _rows(self, table: Mapping[str, Any], targets: Tensor) -> dict[str, Tensor]:
        """Return the rows of each split of a file without tables."""
        every = torch.arange(len(targets))
        if "split" not in table:
            train, test = self._cut(every, targets, self.test_fraction)
            return {"train": train, "test": test}
        split = np.array(check_ids("'split'", table["split"], len(targets)))
        if (unknown := set(split) - set(SPLITS)) or not {"train", "test"} <= set(split):
            got = sorted(map(str, unknown or set(split)))
            raise SchemaError(f"'split' must hold train, test and perhaps valid; got {got}")
        return {name: every[torch.from_numpy(split == name)] for name in SPLITS if name in split}

    def _cut(self, rows: Tensor, targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """Cut rows in two, the same for every seed; by class where each class has two samples."""
        labels = targets[rows]
        classes = labels.unique(return_counts=True)[1] if self.labels == "classes" else None
        fits = (
            classes is not None and int(classes.min()) > 1 and fraction * len(rows) > len(classes)
        )
        try:
            first, second = train_test_split(
                rows.numpy(),
                test_size=fraction,
                stratify=labels.numpy() if fits else None,
                random_state=0,
            )
        except ValueError:
            raise SchemaError(f"{len(rows)} samples are too few to cut off {fraction:g}") from None
        return torch.from_numpy(first), torch.from_numpy(second)
