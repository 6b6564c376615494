"""``python -m examples.decalign``: `table`, or one training's `fit`, `validate`, `test`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from threadpoolctl import threadpool_limits

from examples.decalign import table
from examples.decalign.cli import DecAlignCLI

_PROGRAM = "python -m examples.decalign"
_DESCRIPTION = """DecAlign on real handwritten digits. Besides the subcommands below,
`table --config FILE` trains and evaluates the full model and its ablations over several seeds."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that `args`, or the process's own arguments, ask for."""
    args = list(sys.argv[1:] if args is None else args)
    # So small a model loses more by waiting for a second thread than it gains from one.
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if args[:1] == ["table"]:
            table.main(args[1:])
        else:
            DecAlignCLI(args, parser_kwargs={"prog": _PROGRAM, "description": _DESCRIPTION})


if __name__ == "__main__":
    main()
