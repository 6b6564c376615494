"""The command line of one training: LightningCLI, YAML files, and the folder of the run."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import multialign
from examples.decalign.callbacks import (
    EpochLog,
    MetricsWriter,
    PredictionWriter,
    RandomState,
)
from examples.decalign.data import ModalityData
from examples.decalign.storage import Checkpoints, write_atomically
from examples.decalign.task import MultimodalTask

__all__ = ["DecAlignCLI"]

PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "transformers",
    "pytorch-metric-learning",
    "scikit-learn",
    "numpy",
)


class DecAlignCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; the modalities come from the data.

    The folder of a run is `trainer.default_root_dir`. `fit` continues a run in that folder if it
    had the same options, and evaluates the test split at the end.

    Args:
        args: The arguments; those of the process if None.
        **kwargs: As in LightningCLI.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        # A resumed run has checkpoints in its folder.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        # A checkpoint may be evaluated in another folder.
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
        # Lightning uses a deprecated name of torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        super().__init__(
            MultimodalTask,
            ModalityData,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=None,
            trainer_defaults={
                "logger": False,
                "num_sanity_val_steps": 0,
                # `GlobalOrder` assigns the samples to processes.
                "use_distributed_sampler": False,
            },
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take modalities and target from the data; add `--select`."""
        for name in ("modalities", "target"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.add_argument(
            "--select",
            choices=["last", "best"],
            default="last",
            help="the epoch that fit evaluates: the last, or that of the lowest validation loss",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` only; Lightning would also parse the arguments of the process."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do not change the configuration.

        Lightning would add a checkpoint's options to it, some of which come from the data and are
        not arguments.
        """

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.options.trainer.default_root_dir or "runs/default")

    @property
    def options(self) -> Any:
        """The configuration of the command."""
        return self.config.get(str(self.subcommand), self.config)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to resume or to evaluate."""
        if self.subcommand is None:
            return
        last = self.folder / "checkpoints" / "last.ckpt"
        if self.subcommand == "fit":
            self._record()
            if last.is_file():
                self.options.ckpt_path = str(last)
        elif self.options.ckpt_path is None:
            if not last.is_file():
                raise FileNotFoundError(
                    f"ckpt_path must name a checkpoint where {last} does not exist"
                )
            self.options.ckpt_path = str(last)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer with the callbacks that write the folder."""
        callbacks = self._get(self.config_init, "trainer.callbacks", default=None) or []
        plugins = self._get(self.config_init, "trainer.plugins", default=None) or []
        return super().instantiate_trainer(
            callbacks=[*callbacks, *_callbacks(self.folder)],
            plugins=[*(plugins if isinstance(plugins, list) else [plugins]), Checkpoints()],
            default_root_dir=self.folder,
            **kwargs,
        )

    def after_fit(self) -> None:
        """Evaluate the test split."""
        chosen = None
        if self.options.select == "best":
            chosen = str(self.folder / "checkpoints" / "best.ckpt")
        shown = self.trainer.progress_bar_callback is not None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=chosen, verbose=shown)
        self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=chosen, return_predictions=False
        )

    @rank_zero_only
    def _record(self) -> None:
        """Write configuration and versions; refuse a folder with another configuration."""
        parser = self._parser(self.subcommand)
        config = parser.dump(self.options)
        path = self.folder / "config.yaml"
        if path.is_file() and path.read_text() != config:
            raise FileExistsError(
                f"{path} is of a run with other options: give another --trainer.default_root_dir "
                "or remove that folder"
            )
        write_atomically(path, config)
        environment = self.folder / "environment.json"
        write_atomically(environment, json.dumps(_environment(self.options), indent=2) + "\n")


def _callbacks(folder: Path) -> list[Any]:
    """Return the callbacks of the folder, checkpoints last: they save the others' state."""
    checkpoints = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    return [
        RandomState(),
        EpochLog(folder / "log.csv"),
        MetricsWriter(folder / "metrics.json"),
        PredictionWriter(folder),
        ModelCheckpoint(filename="best", monitor="val/loss", **checkpoints),
        ModelCheckpoint(filename="last", **checkpoints),
    ]


def _environment(options: Any) -> dict[str, Any]:
    """Return everything besides the configuration that results depend on."""
    environment: dict[str, Any] = {
        "seed": options.seed_everything,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "multialign": multialign.__version__,
    }
    for package in PACKAGES:
        try:
            environment[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            environment[package] = None
    environment["commit"] = _commit()
    path = options.data.init_args.get("path")
    if path is not None and Path(path).is_file():
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        environment["data"] = f"sha256:{digest.hexdigest()}"
    environment["command"] = sys.argv
    return environment


def _commit() -> str | None:
    """Return the commit of the working tree, marked "-dirty" if changed; None outside git."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
