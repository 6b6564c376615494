"""``python -m examples.decalign COMMAND``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

_PROGRAM = "python -m examples.decalign"
_DESCRIPTION = """DecAlign. The subcommands below run one training. The other commands are

table (Tables 1, 5, 6, 7), ablate (Table 2), sensitivity (Figure 5), figures (1, 3, 4, 5), table1,
convert (a pickle to a mapped file), make_sample (a small file in a data set's format) and
extract (features of raw text and sound); each has --help."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command given by `args`, or by the process's arguments."""
    args = list(sys.argv[1:] if args is None else args)
    name, rest = (args[0], args[1:]) if args else ("", [])
    # This small model is slower on two threads than on one. For BERT on a CPU, set the variable.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if name in ("convert", "make_sample"):
        from examples.decalign.data import files

        return getattr(files, name)(rest)
    if name == "extract":
        from examples.decalign import extract

        return extract.main(rest)
    if name in ("figures", "table1"):
        from examples.decalign import draw

        return getattr(draw, name)(rest)
    if name in ("table", "ablate", "sensitivity"):
        from examples.decalign import commands

        return getattr(commands, name)(rest)
    from examples.decalign.cli import DecAlignCLI

    DecAlignCLI(args, parser_kwargs={"prog": _PROGRAM, "description": _DESCRIPTION})
    return None


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A process that ends early breaks the connections of the others.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
