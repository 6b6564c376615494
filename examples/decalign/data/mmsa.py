"""CMU-MOSI, CMU-MOSEI, CH-SIMS and IEMOCAP, from files in the layout of MMSA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from examples.decalign.data.base import SPLITS, Batch, ModalityData, Samples, standardised
from examples.decalign.data.checks import (
    SchemaError,
    check_ids,
    check_labels,
    check_widths,
    numbers,
    read_mask,
    sequences,
)
from examples.decalign.data.reader import read_dataset
from examples.decalign.data.target import POLARITY, SENTIMENT, SIMS, Target

__all__ = ["CHSIMS", "IEMOCAP", "MOSEI", "MOSI", "MMSAData"]

MODALITIES = ("text", "audio", "vision")


class MMSAData(ModalityData):
    """A file of three splits, each a table of features, labels and, where they vary, lengths.

    A split has "text", "audio" and "vision" `(N, T_m, d_m)`, or lists of N arrays `(T, d_m)`;
    "text_bert" `(N, 3, T)`, the token ids, attention mask and segments of BERT, if `text` is
    "tokens"; "regression_labels" or "classification_labels" `(N)`; optionally "audio_lengths",
    "vision_lengths", "text_lengths" `(N)`, "id", "raw_text". A modality without lengths that has as
    many steps as "text_bert" takes its attention mask, unless that would drop steps that are not
    zero. Any other begins and ends with a step that is not all zero.

    Args:
        path: The pickle, or the file that `convert` wrote.
        text: "features", or "tokens" for a text encoder that is trained too.
        labels: "scores" (regression) or "classes".
        standardise: The modalities whose features get mean 0 and deviation 1 over the training
            samples' valid steps; all of them by default.
        batch_size: Samples in a training batch of each process.
        eval_batch_size: Samples in a batch of evaluation.
        missing: The fractions of samples that lack a modality, as `{"test": {"text": 0.5}}`.
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
        content = read_dataset(self.path)
        try:
            if not isinstance(content, Mapping):
                raise SchemaError(
                    f"expected a mapping of splits; got {type(content).__name__} (`convert` reads "
                    "DialogueRNN's tuple; write other layouts as one npz for the class Arrays)"
                )
            batches, ids = {}, {}
            for split in SPLITS:
                if not isinstance(content.get(split), Mapping):
                    raise SchemaError(f"split {split!r} is missing; the file has {list(content)}")
                batches[split], ids[split] = self._read_split(split, content[split])
            check_widths({split: batch.features for split, batch in batches.items()})
        except SchemaError as error:
            raise SchemaError(f"{self.path}: {error}") from None
        return standardised(batches, ids, self.standardise)

    def _read_split(self, split: str, table: Mapping[str, Any]) -> tuple[Batch, list[str] | None]:
        def get(key: str) -> Any:
            if key not in table:
                raise SchemaError(f"{split}[{key!r}] is missing; the split has {sorted(table)}")
            return table[key]

        kind = "regression" if self.target.kind == "score" else "classification"
        key = f"{kind}_labels"
        targets = check_labels(f"{split}[{key!r}]", get(key), None, self.target)
        count = len(targets)
        if count == 0:
            raise SchemaError(f"split {split!r} has no samples")
        tokens = None
        if self.text == "tokens" or "text_bert" in table:
            tokens = _tokens(f"{split}['text_bert']", get("text_bert"), count)
        attention = None if tokens is None else tokens[:, 1] > 0
        features: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for name in MODALITIES:
            if name == "text" and self.text == "tokens":
                features[name], masks[name] = tokens, attention
                continue
            x, ragged = sequences(f"{split}[{name!r}]", get(name), count)
            lengths = table.get(f"{name}_lengths", ragged)
            mask = read_mask(f"{split} {name}", x, lengths, attention)
            features[name] = x
            if mask is not None:
                masks[name] = mask
        ids = check_ids(f"{split}['id']", table["id"], count) if "id" in table else None
        return Batch(features, masks, targets), ids


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


def _tokens(where: str, value: Any, count: int) -> Tensor:
    x = numbers(where, value)
    if x.ndim != 3 or x.shape[1] != 3 or len(x) != count:
        raise SchemaError(
            f"{where} has shape {tuple(x.shape)}; expected (N, 3, T) with N = {count}: token ids, "
            "attention mask and segments"
        )
    return x.long()
