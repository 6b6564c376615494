"""``python -m examples.decalign``: `table`, or one training's `fit`, `validate`, `test`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples.decalign import table
from examples.decalign.cli import DecAlignCLI

_DESCRIPTION = """DecAlign on real handwritten digits. Besides the subcommands below,
`table --config FILE` trains and evaluates the full model and its ablations over several seeds."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that `args`, or the process's own arguments, ask for."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["table"]:
        table.main(args[1:])
    else:
        DecAlignCLI(args, parser_kwargs={"description": _DESCRIPTION})


if __name__ == "__main__":
    main()
