"""The commands about files: `convert` and `make_sample`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.decalign.data import reader, sample

__all__ = ["convert", "make_sample"]


def convert(args: Sequence[str] | None = None) -> None:
    """Write a pickle as a safetensors file."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign convert",
        description="Write a data set's pickle once as a safetensors file, which contains no code "
        "and is mapped into memory when it is read.",
    )
    parser.add_argument("source", type=Path, help="the pickle")
    parser.add_argument("destination", type=Path, help="a file that ends in .safetensors")
    options = parser.parse_args(args)
    reader.convert(options.source, options.destination)
    print(f"Written: {options.destination}")


def make_sample(args: Sequence[str] | None = None) -> None:
    """Write a small file in the format of a data set."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign make_sample",
        description="Write a small pickle of random numbers in the format of a data set.",
    )
    parser.add_argument("name", choices=sample.FORMATS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--sizes", nargs=3, type=int, default=[64, 32, 32])
    parser.add_argument("--steps", type=int, help="maximum for each modality")
    parser.add_argument("--features", type=int, help="maximum for each modality")
    parser.add_argument("--vocabulary", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(args))
    sample.make_sample(options.pop("name"), options.pop("path"), **options)
