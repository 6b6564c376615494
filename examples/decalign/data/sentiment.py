"""CMU-MOSI, CMU-MOSEI, CH-SIMS and IEMOCAP, from files in the layout of MMSA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from examples.decalign.data.base import SPLITS, ModalityData
from examples.decalign.data.batch import Batch, Samples, Scaling
from examples.decalign.data.reader import read_dataset
from examples.decalign.targets import POLARITY, SENTIMENT, SIMS, Target

__all__ = ["CHSIMS", "IEMOCAP", "MOSEI", "MOSI", "DataWarning", "MMSAData", "SchemaError"]

MODALITIES = ("text", "audio", "vision")


class SchemaError(ValueError):
    """A key of the file is missing or has a wrong shape; the message names file and key."""


class DataWarning(UserWarning):
    """Entries of the file are not finite and are replaced by the mean."""


class MMSAData(ModalityData):
    """A file of three splits, each a table of features, labels and, where they vary, lengths.

    A split has "text", "audio" and "vision" `(N, T_m, d_m)`; "text_bert" `(N, 3, T)`, the token
    ids, attention mask and segments of BERT, if `text` is "tokens"; "regression_labels" or
    "classification_labels" `(N)`; optionally "audio_lengths", "vision_lengths", "text_lengths"
    `(N)`, "id", "raw_text". A modality without lengths that has as many steps as "text_bert" takes
    its attention mask. Any other ends with its last step that is not all zero.

    Args:
        path: The pickle, or the file that `convert` wrote.
        text: "features", or "tokens" for a text encoder that is trained too.
        labels: "scores" (regression) or "classes".
        standardise: The modalities whose features get mean 0 and deviation 1 over the training
            samples' valid steps; all of them by default.
        batch_size: As in `ModalityData`.
        eval_batch_size: As in `ModalityData`.
        missing: As in `ModalityData`.
    """

    scores: Target | None = SENTIMENT
    classes: Target = POLARITY

    def __init__(
        self,
        path: str,
        text: Literal["features", "tokens"] = "features",
        labels: Literal["scores", "classes"] = "scores",
        standardise: tuple[str, ...] = MODALITIES,
        batch_size: int = 32,
        eval_batch_size: int = 512,
        missing: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, missing)
        self.path = Path(path)
        self.text = text
        self.labels = labels
        self.standardise = standardise

    @property
    def target(self) -> Target:
        """A score or classes, according to `labels`."""
        return self.scores if self.labels == "scores" and self.scores else self.classes

    def load(self) -> dict[str, Samples]:
        """Read, check, clean and standardise."""
        try:
            return self._load()
        except SchemaError as error:
            raise SchemaError(f"{self.path}: {error}") from None

    def _load(self) -> dict[str, Samples]:
        tables = _check_file(read_dataset(self.path), self._keys())
        target = self.target
        batches = {}
        for split, table in tables.items():
            features = {name: table[self._keys()[name]] for name in MODALITIES}
            batches[split] = Batch(
                features=features,
                masks=_masks(table, features),
                targets=_check_targets(split, table[self._keys()["labels"]], target),
            )
        _report(batches)
        train = batches["train"]
        scaling = {
            name: Scaling.measure(x, train.masks.get(name))
            for name, x in train.features.items()
            if name in self.standardise and x.is_floating_point()
        }
        return {
            split: Samples(batch, scaling, ids=tables[split].get("id"))
            for split, batch in batches.items()
        }

    def _keys(self) -> dict[str, str]:
        """Return the key of the file for each modality and for the labels."""
        kind = "regression" if self.target.kind == "score" else "classification"
        text = "text_bert" if self.text == "tokens" else "text"
        return {
            "text": text,
            "audio": "audio",
            "vision": "vision",
            "labels": f"{kind}_labels",
        }


class MOSI(MMSAData):
    """CMU-MOSI: sentiment in [-3, 3]. As classes, negative and positive."""

    published = "mosi"


class MOSEI(MMSAData):
    """CMU-MOSEI: sentiment in [-3, 3]. As classes, negative and positive."""

    published = "mosei"


class CHSIMS(MMSAData):
    """CH-SIMS: sentiment in [-1, 1]. As classes, negative, neutral and positive."""

    published = "sims"
    scores = SIMS
    classes = Target(kind="class", categories=SIMS.categories)


class IEMOCAP(MMSAData):
    """IEMOCAP: six emotions of an utterance, in the released code's order; T = 1."""

    published = "iemocap"
    scores = None
    classes = Target(
        kind="class",
        categories=("happy", "sad", "neutral", "angry", "excited", "frustrated"),
    )


def _check_file(content: Any, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the splits with arrays as tensors; raise if a key is missing or has a wrong shape."""
    if not isinstance(content, Mapping):
        raise SchemaError(f"expected a mapping of splits; got {type(content).__name__}")
    tables: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        table = content.get(split)
        if not isinstance(table, Mapping):
            raise SchemaError(f"split {split!r} is missing; the file has {list(content)}")
        tables[split] = checked = {}
        count = None
        for key in keys.values():
            if key not in table:
                raise SchemaError(f"{split}[{key!r}] is missing; the split has {sorted(table)}")
            x = checked[key] = _as_tensor(split, key, table[key])
            if key.endswith("_labels"):
                shape = "(N)"
                fits = x.ndim == 1
            elif key == "text_bert":
                shape = "(N, 3, T)"
                fits = x.ndim == 3 and x.shape[1] == 3
            else:
                shape = "(N, T, d)"
                fits = x.ndim == 3 and min(x.shape[1:]) > 0
            count = len(x) if count is None else count
            if not fits or len(x) != count:
                raise SchemaError(
                    f"{split}[{key!r}] has shape {tuple(x.shape)}; expected {shape} with N = "
                    f"{count}, that of {split}[{next(iter(keys.values()))!r}]"
                )
        if count == 0:
            raise SchemaError(f"split {split!r} has no samples")
        for key in ("text_bert", "text_lengths", "audio_lengths", "vision_lengths"):
            if key in table:
                checked[key] = x = _as_tensor(split, key, table[key])
                if len(x) != count:
                    raise SchemaError(f"{split}[{key!r}] has {len(x)} entries; expected {count}")
        if "id" in table:
            checked["id"] = [str(name) for name in table["id"]]
            if len(checked["id"]) != count:
                raise SchemaError(
                    f"{split}['id'] has {len(checked['id'])} entries; expected {count}"
                )
    for key in (keys[name] for name in MODALITIES):
        if key == "text_bert":
            continue
        widths = {split: table[key].shape[2] for split, table in tables.items()}
        if len(set(widths.values())) > 1:
            raise SchemaError(f"{key!r} has other features in other splits: {widths}")
    return tables


def _as_tensor(split: str, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise SchemaError(f"{split}[{key!r}] must hold numbers; got {array.dtype}")
        # Pickled arrays may be read-only, and torch warns if a tensor shares their memory.
        value = torch.from_numpy(array if array.flags.writeable else array.copy())
    if key == "text_bert" or key.endswith("_lengths"):
        return value.long()
    return value.float() if value.is_floating_point() else value


def _check_targets(split: str, targets: Tensor, target: Target) -> Tensor:
    key = "regression_labels" if target.kind == "score" else "classification_labels"
    if target.kind == "score":
        if not bool((targets.abs() <= target.limit + 1e-3).all()):
            raise SchemaError(
                f"{split}[{key!r}] must lie in [{-target.limit}, {target.limit}]; "
                f"got {targets.min().item()} to {targets.max().item()}"
            )
        return targets.float()
    known = len(target.categories)
    if not bool(((targets >= 0) & (targets < known) & (targets == targets.floor())).all()):
        raise SchemaError(
            f"{split}[{key!r}] must be whole numbers from 0 to {known - 1} for "
            f"{', '.join(target.categories)}; got {targets.unique().tolist()[:10]}"
        )
    return targets.long()


def _masks(table: Mapping[str, Any], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of valid steps, for modalities with invalid steps."""
    masks = {}
    attention = table["text_bert"][:, 1] > 0 if "text_bert" in table else None
    for name, x in features.items():
        if not x.is_floating_point():
            masks[name] = x[:, 1] > 0
            continue
        steps = x.shape[1]
        lengths = table.get(f"{name}_lengths")
        if lengths is not None:
            if bool(((lengths < 0) | (lengths > steps)).any()):
                raise SchemaError(
                    f"'{name}_lengths' must lie in [0, {steps}], the steps of {name!r}; got "
                    f"{lengths.min().item()} to {lengths.max().item()}"
                )
            mask = torch.arange(steps, device="cpu") < lengths.unsqueeze(1)
        elif attention is not None and attention.shape[1] == steps:
            mask = attention
        else:
            nonzero = (x != 0).any(-1)
            # Valid up to the last step that is not all zero.
            mask = nonzero.flip(1).cummax(1).values.flip(1)
        if not bool(mask.all()):
            masks[name] = mask
    return masks


def _report(batches: Mapping[str, Batch]) -> None:
    """Warn of non-finite entries in valid steps, once for the whole file."""
    found = []
    for split, batch in batches.items():
        for name, x in batch.features.items():
            if not x.is_floating_point():
                continue
            bad = ~x.isfinite()
            if name in batch.masks:
                bad &= batch.masks[name].unsqueeze(-1)
            if count := int(bad.sum()):
                found.append(f"{split} {name} {count} of {x.numel()}")
    if found:
        warnings.warn(
            f"entries that are not finite are read as the modality's mean: {'; '.join(found)}",
            DataWarning,
            stacklevel=2,
        )
