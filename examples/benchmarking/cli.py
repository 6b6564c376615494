"""The command line: one training by LightningCLI, and the commands on several trainings."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

import multialign
from examples.benchmarking.model import MODELS
from examples.benchmarking.results import Results
from examples.benchmarking.storage import Checkpoints, write_atomically
from examples.benchmarking.training import Training
from examples.decalign.data import ModalityData

__all__ = ["COMMANDS", "TrainingCLI", "console", "main"]

PROGRAM = "python -m examples.decalign"
COMMANDS = {
    "fit": "train and evaluate one model; started again, go on, or longer (--trainer.max_epochs)",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split, into a folder of its own",
    "predict": "write a checkpoint's predictions and features, into a folder of its own",
    "table": "train several models over seeds; print them beside baselines and the paper's rows",
    "ablate": "Table 2: what each part contributes, with paired intervals",
    "sensitivity": "Figure 5: F1 over a grid of alpha and beta",
    "figures": "draw Figures 1, 3, 4, 5 from the runs in a folder",
    "table1": "print Table 1 from the outputs of table",
    "convert": "write a pickle as a memory-mapped file without code",
    "make_sample": "write a small file in a data set's format",
    "extract": "compute features of raw text, sound and video",
}
# Options that may change when a run goes on.
FREE = ("trainer.max_epochs", "trainer.enable_", "trainer.logger", "select", "ckpt_path")
PACKAGES = (
    *("torch", "lightning", "torchmetrics", "transformers"),
    *("pytorch-metric-learning", "scikit-learn", "numpy"),
)


def console(args: Sequence[str] | None = None) -> None:
    """Run a command; end with one line on an error, or with its traceback after `--debug`."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    warnings.showwarning = _show_warning
    try:
        main([arg for arg in args if arg != "--debug"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (ValueError, OSError, ImportError)) or "Unpickling" in str(
            type(error)
        )
        name = "" if known else f"{type(error).__name__}: "
        sys.exit(f"error: {name}{text}" + ("" if debug else " (--debug shows the traceback)"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A process that ends early breaks the connections of the others.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(args: Sequence[str]) -> None:
    """Run the command given by `args`."""
    name, rest = (args[0], list(args[1:])) if args else ("--help", [])
    if name in ("-h", "--help"):
        lines = [f"  {command:<12} {text}" for command, text in COMMANDS.items()]
        print(f"usage: {PROGRAM} COMMAND [--debug] ...\n\ncommands:", *lines, sep="\n")
        print("\nCOMMAND --help lists the options; --debug shows the traceback of an error.")
        return
    if name not in COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}; got {name!r}")
    # This small model is slower on two threads than on one. For BERT on a CPU, set the variable.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if name in ("fit", "validate", "test", "predict"):
        TrainingCLI(list(args), parser_kwargs={"prog": PROGRAM})
    elif name == "extract":
        importlib.import_module("examples.benchmarking.extract").main(rest)
    else:
        getattr(importlib.import_module("examples.benchmarking.commands"), name)(rest)


class TrainingCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``; the modalities come from the data.

    The folder of a run is `trainer.default_root_dir`. `fit` goes on with a run in that folder if it
    had the same options but for `max_epochs`, and evaluates the test split at the end.

    Args:
        args: The arguments; those of the process if None.
        **kwargs: As in LightningCLI.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        for path in MODELS.values():
            importlib.import_module(path.rpartition(".")[0])  # so that class names are known
        for message in (
            # A resumed run has checkpoints in its folder, and one may be evaluated elsewhere.
            "Checkpoint directory .* exists and is not empty",
            "The dirpath has changed from",
            # Nothing is logged more often than once an epoch.
            "The number of training batches",
            # Lightning uses a deprecated name of torch.
            ".*LeafSpec.* is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        super().__init__(
            Training,
            ModalityData,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=None,
            # The data modules assign the samples to processes.
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
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
        """Do not change the configuration by a checkpoint's options."""

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
            return
        if self.subcommand != "predict":
            self.options.verbose = False  # 16 digits
        if self.options.ckpt_path is None:
            if not last.is_file():
                raise FileNotFoundError(
                    f"ckpt_path must name a checkpoint where {last} does not exist"
                )
            self.options.ckpt_path = str(last)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that writes the folder, with a CSV log by default."""
        callbacks = self._get(self.config_init, "trainer.callbacks", default=None) or []
        plugins = self._get(self.config_init, "trainer.plugins", default=None) or []
        if self._get(self.config_init, "trainer.logger", default=None) in (None, True):
            fits = self.subcommand == "fit"
            kwargs["logger"] = CSVLogger(self.folder, name="logs") if fits else False
        output = self.folder
        if self.subcommand in ("validate", "test", "predict"):
            parent = self.folder / "evaluations"
            output = parent / str(1 + sum(1 for _ in parent.glob("*")))
        return super().instantiate_trainer(
            callbacks=[*callbacks, Results(output), *_checkpoints(self.folder)],
            plugins=[*(plugins if isinstance(plugins, list) else [plugins]), Checkpoints()],
            default_root_dir=self.folder,
            **kwargs,
        )

    def after_fit(self) -> None:
        """Evaluate the test split."""
        best = str(self.folder / "checkpoints" / "best.ckpt")
        chosen = best if self.options.select == "best" else None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=chosen, verbose=False)
        self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=chosen, return_predictions=False
        )

    @rank_zero_only
    def _record(self) -> None:
        """Write configuration and versions; refuse a folder with another configuration."""
        config = self._parser(self.subcommand).dump(self.options)
        path = self.folder / "config.yaml"
        if path.is_file():
            old, new = (_flat(yaml.safe_load(text)) for text in (path.read_text(), config))
            changed = sorted(
                key
                for key in old.keys() | new.keys()
                if old.get(key) != new.get(key) and not key.startswith(FREE)
            )
            if changed:
                key = changed[0]
                raise FileExistsError(
                    f"{path} is of a run with other options ({key}: {old.get(key)} there, "
                    f"{new.get(key)} here): give another --trainer.default_root_dir or remove that "
                    "folder"
                )
        write_atomically(path, config)
        environment = json.dumps(_environment(self.options), indent=2) + "\n"
        write_atomically(self.folder / "environment.json", environment)


def _checkpoints(folder: Path) -> list[ModelCheckpoint]:
    shared: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    return [
        ModelCheckpoint(filename="best", monitor="val/loss", **shared),
        ModelCheckpoint(filename="last", **shared),
    ]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested options by their dotted names."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _environment(options: Any) -> dict[str, Any]:
    """Return everything besides the configuration that results depend on."""
    environment: dict[str, Any] = {
        "seed": options.seed_everything,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "multialign": multialign.__version__,
        "commit": _commit(),
        "command": sys.argv,
    }
    for package in PACKAGES:
        try:
            environment[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            environment[package] = None
    path = options.data.init_args.get("path")
    if path is not None and Path(path).is_file():
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        environment["data"] = f"sha256:{digest.hexdigest()}"
    return environment


def _commit() -> str | None:
    """Return the commit of the working tree, marked "-dirty" if changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
