"""Checks of what a data set's file holds; every error names the key and what is expected."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.decalign.data.base import DataWarning
from examples.decalign.data.target import Target

__all__ = [
    "SchemaError",
    "check_ids",
    "check_labels",
    "check_lengths",
    "check_widths",
    "numbers",
    "own_steps",
    "read_mask",
    "sequences",
]


class SchemaError(ValueError):
    """A key of the file is missing or has a wrong shape; the message names file and key."""


def numbers(where: str, value: Any) -> Tensor:
    """Return numbers as a tensor, whatever holds them."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise SchemaError(
            f"{where} must be an array of numbers; its rows differ in shape"
        ) from None
    if array.dtype.kind not in "biuf":
        what = type(value).__name__ if array.dtype.kind == "O" else str(array.dtype)
        raise SchemaError(f"{where} must hold numbers; got {what}")
    # Pickled arrays may be read-only, and torch warns if a tensor shares their memory.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def sequences(where: str, value: Any, count: int | None) -> tuple[Tensor, Tensor | None]:
    """Return features `(N, T, d)`, and the lengths `(N)` of a list of ragged arrays."""
    lengths = None
    if isinstance(value, (list, tuple)) and len({np.shape(x)[:1] for x in value}) > 1:
        rows = [numbers(f"{where}[{n}]", x) for n, x in enumerate(value)]
        shapes = {tuple(x.shape[1:]) for x in rows}
        if len(shapes) > 1 or any(x.ndim != 2 for x in rows):
            raise SchemaError(f"{where} must be a list of arrays (T, d) of one d; got {shapes}")
        lengths = torch.tensor([len(x) for x in rows])
        value = torch.nn.utils.rnn.pad_sequence([x.float() for x in rows], batch_first=True)
    x = numbers(where, value).float()
    wrong = count is not None and len(x) != count if x.ndim else True
    if x.ndim != 3 or min(x.shape[1:]) == 0 or wrong:
        expected = "" if count is None else f" with N = {count}"
        raise SchemaError(f"{where} has shape {tuple(x.shape)}; expected (N, T, d){expected}")
    return x, lengths


def check_lengths(where: str, value: Any, count: int, steps: int) -> Tensor:
    """Return the mask `(N, T)` of lengths `(N)`."""
    lengths = numbers(where, value)
    if lengths.shape != (count,):
        raise SchemaError(f"{where} has shape {tuple(lengths.shape)}; expected ({count},)")
    if bool(((lengths < 0) | (lengths > steps) | (lengths != lengths.floor())).any()):
        raise SchemaError(
            f"{where} must be whole numbers in [0, {steps}], the steps; got "
            f"{lengths.min().item()} to {lengths.max().item()}"
        )
    return torch.arange(steps) < lengths.unsqueeze(1)


def check_ids(where: str, value: Any, count: int) -> list[str]:
    """Return the names of the samples."""
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != count:
        got = f"{len(value)} entries" if hasattr(value, "__len__") else repr(value)
        raise SchemaError(f"{where} has {got}; expected a list of {count} names")
    return [str(name) for name in value]


def check_labels(where: str, value: Any, count: int | None, target: Target | None) -> Tensor:
    """Return the labels `(N)`; trailing dimensions of one entry are dropped.

    Args:
        where: The key, for errors.
        value: The labels.
        count: N, if known.
        target: The scores or classes that they must be; any number if None.
    """
    labels = numbers(where, value)
    if labels.ndim == 0 or labels.shape[1:].numel() != 1 or len(labels) != (count or len(labels)):
        expected = "(N,)" if count is None else f"({count},)"
        raise SchemaError(f"{where} has shape {tuple(labels.shape)}; expected {expected}")
    labels = labels.flatten()
    if target is None:
        return labels
    if target.kind == "score":
        low, high = target.limits
        if not bool(((labels >= low - 1e-3) & (labels <= high + 1e-3)).all()):
            raise SchemaError(
                f"{where} must lie in [{low:g}, {high:g}]; "
                f"got {labels.min().item()} to {labels.max().item()}"
            )
        return labels.float()
    known = len(target.categories)
    if not bool(((labels >= 0) & (labels < known) & (labels == labels.floor())).all()):
        raise SchemaError(
            f"{where} must be whole numbers from 0 to {known - 1} for "
            f"{', '.join(target.categories)}; got {labels.unique().tolist()[:10]}"
        )
    return labels.long()


def check_widths(features: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise if a modality has other features in other splits."""
    for name, x in features["train"].items():
        widths = {split: table[name].shape[2] for split, table in features.items()}
        if x.is_floating_point() and len(set(widths.values())) > 1:
            raise SchemaError(f"{name!r} has other features in other splits: {widths}")


def own_steps(x: Tensor) -> Tensor:
    """Return the steps `(N, T)` from the first to the last that is not all zero."""
    nonzero = (x != 0).any(-1)
    return nonzero.cummax(1).values & nonzero.flip(1).cummax(1).values.flip(1)


def read_mask(
    where: str, x: Tensor, lengths: Any, attention: Tensor | None = None
) -> Tensor | None:
    """Return the valid steps of one modality, or None if all are valid.

    They come from `lengths`, else from the attention mask of an aligned text, unless it would drop
    steps that are not zero, else from the first to the last step that is not zero.
    """
    if lengths is not None:
        mask = check_lengths(f"{where}_lengths", lengths, *x.shape[:2])
    elif attention is not None and attention.shape == x.shape[:2]:
        own = (x != 0).any(-1)
        share = (own & ~attention).sum().item() / max(int(own.sum()), 1)
        mask = attention if share == 0 else own_steps(x)
        if share > 0:
            warnings.warn(
                f"{where}: the text's attention mask would drop {100 * share:.0f} % of the steps "
                "that are not zero; its own steps are taken instead",
                DataWarning,
                stacklevel=2,
            )
    else:
        mask = own_steps(x)
    return None if bool(mask.all()) else mask
