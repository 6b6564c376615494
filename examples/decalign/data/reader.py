"""Reading a data set's file without running what it contains.

A pickle is a program: loading it calls any function that it names. MMSA's files hold numpy arrays
in dictionaries and lists. The reader here accepts the few names that these need, and refuses every
other name before any call. It also checks a file's arguments before it calls numpy, since an array
of objects made from bytes would be an array of pointers.
"""

from __future__ import annotations

import copyreg
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.benchmarking.storage import replacing

__all__ = ["RefusedPickleError", "convert", "read_dataset", "read_pickle", "write_dataset"]

Splits = dict[str, dict[str, Any]]
"""For each split, by key: an array, or a list of strings or numbers."""


class RefusedPickleError(pickle.UnpicklingError):
    """The file asks for something other than numpy arrays and plain containers."""


class _Dtype:
    """Replaces `numpy.dtype`, whose `__setstate__` does not check the file's content."""

    def __init__(self, code: str, *args: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSUO]\d*", code):
            raise RefusedPickleError(f"refused to load an array of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *fields = state
        if any(field is not None for field in fields[:3]):
            raise RefusedPickleError("refused to load an array of structures")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """Replaces `numpy.ndarray`, whose buffer a file could turn into pointers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, kind, fortran, content = state
        plain = (str, int, float, type(None), np.generic)
        if kind.dtype.hasobject:
            if not isinstance(content, list):
                raise RefusedPickleError("refused to load an array of objects from bytes")
            for element in content:
                if not isinstance(element, plain):
                    raise RefusedPickleError(
                        f"refused to load an array of {type(element).__name__}: expected numbers "
                        "or strings"
                    )
        super().__setstate__((version, shape, kind.dtype, fortran, content))


class _AllowedFunction:
    """A function that a file may call, but whose attributes it cannot set.

    Args:
        function: The function.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise RefusedPickleError("refused to change a function")


def _refuse_array(*args: object) -> None:
    raise RefusedPickleError("refused to call numpy.ndarray")


def _buffer(kind: type[bytes] | type[bytearray]) -> Callable[..., bytes | bytearray]:
    def make(content: object = b"", *encoding: str) -> bytes | bytearray:
        # `bytes(number)` would allocate that many bytes.
        if encoding and isinstance(content, str):
            return kind(content, "latin1")
        if not isinstance(content, (bytes, bytearray, list)):
            raise RefusedPickleError(f"refused to make {kind.__name__} of {type(content).__name__}")
        return kind(content)

    return make


def _reconstruct(*args: object) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _frombuffer(
    content: bytes, kind: _Dtype, shape: tuple[int, ...], order: Any, axes: Any = None
) -> np.ndarray:
    # `np.frombuffer` refuses arrays of objects.
    array = np.frombuffer(content, kind.dtype).reshape(shape, order=order)
    return array if axes is None else array.transpose(axes)


def _scalar(kind: _Dtype, content: bytes) -> np.generic:
    return np.frombuffer(content, kind.dtype, 1)[0]


# numpy 2 writes numpy._core, numpy 1 wrote numpy.core; `encode` is how protocol 2 stores bytes.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _AllowedFunction(_refuse_array),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _AllowedFunction(lambda text, encoding: text.encode("latin1")),
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _AllowedFunction(_buffer(bytes)),
    ("builtins", "bytearray"): _AllowedFunction(_buffer(bytearray)),
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED |= {
        (f"{_core}.multiarray", "_reconstruct"): _AllowedFunction(_reconstruct),
        (f"{_core}.multiarray", "scalar"): _AllowedFunction(_scalar),
        (f"{_core}.numeric", "_frombuffer"): _AllowedFunction(_frombuffer),
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Pickles by or for Python 2 name the module __builtin__.
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in _ALLOWED:
            raise RefusedPickleError(
                f"refused to load {module}.{name}: expected numpy arrays and plain containers alone"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise RefusedPickleError(
            f"refused to load the persistent object {pid!r}: expected numpy arrays and plain "
            "containers alone"
        )


def read_pickle(path: str | Path) -> Any:
    """Return the numpy arrays and plain containers of a pickle; refuse anything else by name.

    Raises:
        RefusedPickleError: The file has another name; nothing of that name is imported or called.
        pickle.UnpicklingError: The file is not a pickle, is cut off or is damaged.
    """
    # An extension code that an earlier load resolved would bypass `find_class`.
    copyreg.clear_extension_cache()
    with Path(path).open("rb") as file:
        try:
            return _Unpickler(file).load()
        except RefusedPickleError as error:
            raise RefusedPickleError(f"{path}: {error}") from None
        # Bytes that are not a pickle can raise any exception.
        except Exception as error:
            raise pickle.UnpicklingError(
                f"{path} is no whole pickle of arrays: {type(error).__name__}: {error}"
            ) from error


def read_dataset(path: str | Path) -> Splits:
    """Return what a pickle, an `.npz` or the file that `convert` made of one holds.

    Keys of an `.npz` such as "train/text" become tables; a key without "/" stays on top.

    The arrays of a converted file are memory-mapped, and read when they are used.

    Raises:
        FileNotFoundError: There is no such file.
        pickle.UnpicklingError: As in `read_pickle`.
        ValueError: An `.npz` or a converted file is cut off or foreign.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a data set's file; got {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_npz(path) if path.suffix == ".npz" else read_pickle(path)


def convert(source: str | Path, destination: str | Path) -> None:
    """Write a pickle as a safetensors file, which contains no code and is memory-mapped.

    DialogueRNN's tuple becomes tables of utterances, with the last tenth of its training dialogues
    as validation split.
    """
    splits: Any = read_dataset(source)
    if isinstance(splits, tuple) and len(splits) >= 9:
        splits = _read_dialogues(splits)
    if not isinstance(splits, dict) or not all(isinstance(t, dict) for t in splits.values()):
        hint = ""
        if isinstance(splits, list):
            hint = "; a list of examples, as MISA writes, must become arrays of one npz first"
        raise ValueError(f"{source} must hold a dictionary of splits, each a dictionary{hint}")
    write_dataset(splits, destination)


def _read_dialogues(content: tuple[Any, ...]) -> Splits:
    """Return the utterances of DialogueRNN's tuple (ids, speakers, labels, features by video)."""
    ids, _, labels, text, audio, vision = content[:6]
    train, test = (sorted(content[place]) for place in (-2, -1))
    cut = max(len(train) // 10, 1)
    splits: Splits = {}
    for split, videos in {"train": train[:-cut], "valid": train[-cut:], "test": test}.items():
        splits[split] = {
            "id": [str(name) for video in videos for name in ids[video]],
            "classification_labels": np.array([y for video in videos for y in labels[video]]),
        }
        for name, features in {"text": text, "audio": audio, "vision": vision}.items():
            rows = np.array([x for video in videos for x in features[video]], np.float32)
            splits[split][name] = rows[:, None]
    return splits


def write_dataset(splits: Splits, destination: str | Path) -> None:
    """Write splits as a safetensors file.

    Lists of strings become part of its header; all other values become arrays.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"destination must end in .safetensors; got {destination}")
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for split, table in splits.items():
        for key, value in table.items():
            array = np.asarray(value)
            if array.dtype.kind in "US":
                texts.setdefault(split, {})[key] = [str(text) for text in value]
            elif array.dtype.kind in "biuf":
                arrays[f"{split}/{key}"] = np.ascontiguousarray(array)
            else:
                raise ValueError(
                    f"{split}[{key!r}] must hold numbers or strings; got {array.dtype}"
                )
    with replacing(destination) as part:
        save_file(arrays, part, metadata={"texts": json.dumps(texts)})


def _read_npz(path: Path) -> Splits:
    splits: Splits = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                *table, key = name.split("/", 1)
                (splits.setdefault(table[0], {}) if table else splits)[key] = file[name]
    # Bytes that are not an archive can raise any exception.
    except Exception as error:
        raise ValueError(f"{path} is no whole npz of numbers and strings: {error}") from error
    return splits


def _read_safetensors(path: Path) -> Splits:
    splits: Splits = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                split, key = name.split("/", 1)
                splits.setdefault(split, {})[key] = file.get_tensor(name)
            texts = json.loads((file.metadata() or {}).get("texts", "{}"))
        for split, table in texts.items():
            splits.setdefault(split, {}).update(table)
    except Exception as error:
        raise ValueError(f"{path} is no whole file that `convert` wrote: {error}") from error
    return splits
