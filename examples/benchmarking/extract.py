"""The command `extract`: features of raw text and sound, and of the files of visual tools.

The input is a table of utterances, a CSV file with the columns

- `id`, `split` ("train", "valid" or "test") and `label` (a score, or the number of a class);
- `text`, the transcript;
- `audio`, the path of a 16-bit PCM WAV file;
- `vision`, the path of a CSV file with a row for each frame. Of a file of OpenFace, the columns of
  action units are used (`AU*_r`, `AU*_c`); of any other tool, all numeric columns. A NumPy file
  (`.npy`, `(T, d)` or `(d)`), the format of MA-Net's features, is read unchanged.

Paths are relative to the table. The output is a safetensors file in the layout that the data
modules read. It holds text as hidden states and, for an encoder that is trained, as token ids. The
defaults are the paper's extractors, except that wav2vec 2.0 replaces COVAREP, a MATLAB program; the
paper uses it for IEMOCAP.
"""

from __future__ import annotations

import argparse
import csv
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from tqdm.auto import tqdm

from examples.decalign.data.base import SPLITS
from examples.decalign.data.reader import write_dataset

__all__ = ["SoundEncoder", "TextFeatures", "main", "read_vision", "read_wave"]

Array = NDArray[np.float32]
COLUMNS = ("id", "split", "label", "text", "audio", "vision")


class TextFeatures:
    """The last hidden states of a pretrained text encoder, and its token ids.

    Args:
        name: A folder, or a name on the hub: BERT, DeBERTa and others.
        steps: The number of tokens to which an utterance is truncated or padded.
        device: The device of the encoder.
    """

    def __init__(self, name: str, steps: int, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).eval().to(device)
        self.steps = steps
        self.device = device

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Return states `(N, T, d)`, zeros in padding, and ids, mask and segments `(N, 3, T)`."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.steps,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            states = self.model(**tokens.to(self.device)).last_hidden_state.cpu()
        mask = mask.cpu()
        segments = tokens.get("token_type_ids", torch.zeros_like(mask)).cpu()
        states = states * mask.unsqueeze(-1)
        ids = torch.stack([tokens["input_ids"].cpu(), mask, segments], 1)
        return states.float().numpy(), ids.numpy()


class SoundEncoder:
    """The last hidden states of wav2vec 2.0, about 50 for each second.

    Args:
        name: A folder, or a name on the hub.
        device: The device of the encoder.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoFeatureExtractor, AutoModel

        self.extractor = AutoFeatureExtractor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).eval().to(device)
        self.device = device

    def __call__(self, path: str | Path) -> Array:
        """Return the states `(T, d)` of a file."""
        rate = self.extractor.sampling_rate
        sound = read_wave(path, rate)
        values = self.extractor(sound, sampling_rate=rate, return_tensors="pt")["input_values"]
        with torch.inference_mode():
            states = self.model(values.to(self.device)).last_hidden_state
        return np.asarray(states[0].float().cpu())


def read_wave(path: str | Path, rate: int) -> Array:
    """Return the mean of the channels of a 16-bit WAV file in [-1, 1), resampled to `rate`."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.getnframes()
            content = file.readframes(frames)
    except (EOFError, wave.Error) as error:
        raise ValueError(f"{path} is no whole WAV file: {error or 'it ends early'}") from error
    if width != 2:
        raise ValueError(f"{path} must hold 16-bit samples; got {8 * width}-bit")
    if len(content) != 2 * channels * frames:
        raise ValueError(f"{path} is no whole WAV file: it ends before its {frames} samples do")
    sound = np.frombuffer(content, "<i2").reshape(-1, channels).mean(1) / 2**15
    if own != rate:
        sound = resample_poly(sound, rate, own)
    return sound.astype(np.float32)


def read_vision(path: str | Path) -> Array:
    """Return the features `(T, d)` in the file of a visual tool."""
    path = Path(path)
    if path.suffix == ".npy":
        # Without pickles, that is, without arrays of objects.
        try:
            with path.open("rb") as file:
                features = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no whole array of numbers: {error}") from error
        return np.atleast_2d(features).astype(np.float32)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    if not rows:
        raise ValueError(f"{path} has no frames")
    columns = [name for name in rows[0] if name.strip().startswith("AU")]
    columns = columns or [name for name in rows[0] if _is_number(rows[0][name])]
    if not columns:
        raise ValueError(f"{path} has no numeric columns; got {list(rows[0])}")
    return np.array([[float(row[name]) for name in columns] for row in rows], np.float32)


def main(args: Sequence[str] | None = None) -> None:
    """Extract the features of a table of utterances."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, help="the CSV file")
    parser.add_argument("destination", type=Path, help="a file that ends in .safetensors")
    parser.add_argument("--text", default="bert-base-uncased", help="BERT, DeBERTa, ...")
    parser.add_argument("--audio", default="facebook/wav2vec2-base-960h", help="wav2vec 2.0")
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of text; others are averaged to it"
    )
    parser.add_argument(
        "--utterance", action="store_true", help="average over time, as for IEMOCAP: T = 1"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    rows = _read_table(options.table)
    text = TextFeatures(options.text, options.steps, options.device)
    sound = SoundEncoder(options.audio, options.device)
    folder = options.table.parent
    tables: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        if not chosen:
            raise ValueError(f"{options.table} has no rows of the split {split!r}")
        states, tokens = zip(
            *(text(texts) for texts in _batches(chosen, "text", options.batch_size, split)),
            strict=True,
        )
        table = tables[split] = {
            "id": [row["id"] for row in chosen],
            "raw_text": [row["text"] for row in chosen],
            "text": np.concatenate(states),
            "text_bert": np.concatenate(tokens),
            **_labels(chosen),
        }
        readers: dict[str, Callable[[Path], Array]] = {"audio": sound, "vision": read_vision}
        for name, read in readers.items():
            sequences = [
                read(folder / row[name])
                for row in tqdm(chosen, desc=f"{split} {name}", leave=False)
            ]
            table[name], lengths = _pad(sequences, options.steps)
            table[f"{name}_lengths"] = lengths
        if options.utterance:
            _average(table)
    write_dataset(tables, options.destination)
    print(f"Written: {options.destination}")


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}; missing: {missing}")
    return rows


def _labels(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return labels as scores, and as classes if all are whole numbers of at least 0."""
    scores = np.array([float(row["label"]) for row in rows])
    labels: dict[str, Any] = {"regression_labels": scores.astype(np.float32)}
    if (scores >= 0).all() and (scores == np.floor(scores)).all():
        labels["classification_labels"] = scores.astype(np.int64)
    return labels


def _batches(
    rows: Sequence[dict[str, str]], name: str, size: int, split: str
) -> Iterator[list[str]]:
    for start in tqdm(range(0, len(rows), size), desc=f"{split} {name}", leave=False):
        yield [row[name] for row in rows[start : start + size]]


def _pad(sequences: Sequence[Array], steps: int) -> tuple[Array, NDArray[np.int64]]:
    """Return padded sequences and their lengths; longer ones are averaged over equal parts."""
    short = [x if len(x) <= steps else _shorten(x, steps) for x in sequences]
    padded = np.zeros((len(short), steps, short[0].shape[1]), np.float32)
    for row, x in zip(padded, short, strict=True):
        row[: len(x)] = x
    return padded, np.array([len(x) for x in short])


def _shorten(x: Array, steps: int) -> Array:
    return np.stack([part.mean(0) for part in np.array_split(x, steps)])


def _average(table: dict[str, Any]) -> None:
    """Replace every modality by its mean over the valid steps."""
    lengths = {"text": table.pop("text_bert")[:, 1].sum(1)}
    lengths |= {name: table.pop(f"{name}_lengths") for name in ("audio", "vision")}
    for name, length in lengths.items():
        total = table[name].sum(1, keepdims=True)
        table[name] = total / np.maximum(length, 1)[:, None, None].astype(np.float32)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
