"""Training and evaluation as a LightningModule: network, objective, metrics, optimiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed import ProcessGroup, group
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from examples.decalign.data import Batch
from examples.decalign.metrics import make_metrics
from examples.decalign.misa import MISA, MISAObjective
from examples.decalign.model import DecAlign
from examples.decalign.mult import MulT
from examples.decalign.network import Network, Output
from examples.decalign.objective import Losses, Objective
from examples.decalign.switches import Switches
from examples.decalign.targets import Target
from examples.decalign.text import Text, TextEncoder

__all__ = ["MultimodalTask"]

# Checkpoints hold the options, and Lightning loads them with `weights_only`.
torch.serialization.add_safe_globals([Network, Losses, Switches, Target, Text])


class MultimodalTask(lightning.LightningModule):
    """One training: a network on named modalities, its objective, metrics and optimiser.

    Args:
        modalities: d_m of each modality; the command line takes it from the data.
        target: The classes or the score; the command line takes it from the data.
        architecture: "decalign", or a baseline: "mult" with the loss of the task alone, or "misa"
            with losses of its own.
        network: Sizes and dropout rates.
        losses: Weights and options of DecAlign's losses.
        switches: The parts of Table 2 that are on.
        text: The text encoder, if a modality consists of token ids.
        learning_rate: The learning rate of Adam; the highest one if a schedule changes it.
        weight_decay: The weight decay of Adam.
        schedule: "onecycle" warms up and anneals over the whole training. "plateau", the paper's,
            divides by ten when the validation loss has not fallen for `patience` epochs. "constant"
            does not change the rate.
        patience: The patience of "plateau", in epochs.
    """

    def __init__(
        self,
        modalities: dict[str, int],
        target: Target,
        architecture: Literal["decalign", "mult", "misa"] = "decalign",
        network: Network = Network(),  # noqa: B008 (frozen)
        losses: Losses = Losses(),  # noqa: B008
        switches: Switches = Switches(),  # noqa: B008
        text: Text | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.005,
        schedule: Literal["onecycle", "plateau", "constant"] = "plateau",
        patience: int = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {
                "modalities": dict(modalities),
                "target": target,
                "architecture": architecture,
                "network": network,
                "losses": losses,
                "switches": switches,
                "text": text,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "schedule": schedule,
                "patience": patience,
            }
        )
        self.target = target
        self.architecture = architecture
        self.losses = losses
        self.switches = switches
        self.text = text
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.patience = patience
        self._plateau: ReduceLROnPlateau | None = None
        self._plateau_state: dict[str, Any] | None = None
        tokens = [name for name, width in modalities.items() if width == 0]
        if len(tokens) != (text is not None):
            raise ValueError(
                f"text must name the encoder of one modality of token ids; got {text} for {tokens}"
            )
        self.tokens = tokens[0] if tokens else None
        self.text_encoder = None if text is None else TextEncoder(text)
        if self.text_encoder is not None:
            modalities = {**modalities, self.tokens: self.text_encoder.width}
        self.network: nn.Module
        if architecture == "decalign":
            self.network = DecAlign(modalities, target.num_outputs, network, switches)
        else:
            baseline = {"mult": MulT, "misa": MISA}[architecture]
            self.network = baseline(modalities, target.num_outputs, network)
        self._sizes = {"num_features": network.width, "num_modalities": len(modalities)}
        self.objective = self._make_objective(None)
        metrics = make_metrics(target)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # Exact also if the processes evaluate unequal numbers of samples.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))

    def setup(self, stage: str) -> None:
        """Give the losses the process group, which exists from here on."""
        if self.trainer.world_size > 1:
            self.objective = self._make_objective(group.WORLD)

    def on_fit_start(self) -> None:
        """Give every process a different random seed.

        All processes begin with the same seed. Lightning sets it again only if there are several,
        so a single process may have drawn numbers since. The seed is therefore set here in any
        case; the first of several processes then draws the same numbers as a single one.
        """
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def forward(self, batch: Batch) -> Output:
        """Return the logits of a batch and the features behind them."""
        features, masks = batch.features, batch.masks
        if self.text_encoder is not None:
            states, mask = self.text_encoder(features[self.tokens])
            features = {**features, self.tokens: states}
            # The mask of the data marks the samples that lack the text.
            masks = {**masks, self.tokens: mask & masks.get(self.tokens, mask)}
        return self.network(features, masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the objective, and log each of its terms."""
        terms = self.objective(self(batch), batch.targets)
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        size = len(batch.targets)
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        self.log("loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the task's loss and the metrics of the validation split."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the task's loss and the metrics of the test split."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> Output:
        """Return the logits of a batch and the features behind them."""
        return self(batch)

    @property
    def _scales_gradients(self) -> bool:
        """Whether Lightning scales gradients; it cannot clip those of a fused optimiser then."""
        trainer = self._trainer
        return trainer is not None and isinstance(trainer.precision_plugin, MixedPrecision)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam and the schedule."""
        groups = [{"params": list(self.network.parameters())}]
        if self.text_encoder is not None and not self.text_encoder.frozen:
            rate = self.text.learning_rate or self.learning_rate
            groups.append({"params": list(self.text_encoder.parameters()), "lr": rate})
        optimizer = torch.optim.Adam(
            groups,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=not self._scales_gradients,
        )
        configuration: dict[str, Any] = {"optimizer": optimizer}
        if self.schedule == "onecycle":
            scheduler = OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=int(self.trainer.estimated_stepping_batches),
                cycle_momentum=False,
            )
            configuration["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}
        elif self.schedule == "plateau":
            self._plateau = ReduceLROnPlateau(optimizer, patience=self.patience)
        return configuration

    # Lightning would step the plateau schedule after it has saved the epoch's checkpoint, so a
    # resumed training would lack the last epoch's loss. The schedule is therefore stepped and saved
    # here.

    def on_train_epoch_end(self) -> None:
        """Step the plateau schedule with the epoch's validation loss."""
        loss = self.trainer.callback_metrics.get("val/loss")
        if self._plateau is not None and loss is not None:
            self._plateau.step(loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the plateau schedule."""
        if self._plateau is not None:
            checkpoint["plateau"] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the plateau schedule until the optimiser exists."""
        self._plateau_state = checkpoint.get("plateau")

    def on_train_start(self) -> None:
        """Restore the state of the plateau schedule."""
        if self._plateau is not None and self._plateau_state is not None:
            self._plateau.load_state_dict(self._plateau_state)

    def _make_objective(self, process_group: ProcessGroup | None) -> nn.Module:
        score = self.losses.score
        if self.architecture == "mult":
            return _TaskObjective(self.target, score)
        if self.architecture == "misa":
            return MISAObjective(self.target, score, process_group)
        losses = self.losses
        if losses.prototypes.get("momentum") is not None:
            # Running mixtures have their shapes from the beginning.
            losses = replace(losses, prototypes={**self._sizes, **losses.prototypes})
        return Objective(self.target, losses, self.switches, process_group)

    def _evaluate(
        self, batch: Batch, stage: str, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> None:
        logits = self(batch).logits
        size = len(batch.targets)
        loss = self.target.loss(logits, batch.targets, self.losses.score)
        # One entry for each sample, since torchmetrics 1.9 ignores weights if NaN is kept.
        mean_loss.update(loss.expand(size))
        self.log(f"{stage}/loss", mean_loss, batch_size=size)
        metrics.update(self.target.predict(logits).float(), batch.targets)
        self.log_dict(metrics, batch_size=size, prog_bar=stage == "val")


class _TaskObjective(nn.Module):
    """The task's loss alone."""

    def __init__(self, target: Target, score_loss: str) -> None:
        super().__init__()
        self.target = target
        self.score_loss = score_loss

    def forward(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        task = self.target.loss(output.logits, targets, self.score_loss)
        return {"task": task, "loss": task}
