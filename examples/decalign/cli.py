"""The command line of one training: LightningCLI with YAML configuration files."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from examples.decalign.data import DigitsData
from examples.decalign.task import DecAlignTask

__all__ = ["DecAlignCLI"]


class DecAlignCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; the modalities come from the data.

    Args:
        args: The arguments; None stands for the process's own.
        **kwargs: As in LightningCLI.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        # The data lie in memory: there is nothing for a worker to load.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Between Lightning and torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        super().__init__(
            DecAlignTask,
            DigitsData,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data say how many modalities and classes there are."""
        for name in ("modalities", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` alone; Lightning would also look at the calling process's."""
        self.config = parser.parse_args(args)
