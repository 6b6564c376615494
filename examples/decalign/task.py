"""Training and evaluation of DecAlign as a LightningModule."""

from __future__ import annotations

from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from examples.decalign.data import Batch
from examples.decalign.model import DecAlign, Network, Output
from examples.decalign.objective import Losses, Objective
from examples.decalign.switches import Switches

__all__ = ["DecAlignTask"]

# Checkpoints hold the options, and Lightning reads them back with `weights_only`.
torch.serialization.add_safe_globals([Network, Losses, Switches])


class DecAlignTask(lightning.LightningModule):
    """DecAlign as a classifier: network, objective, metrics and optimiser.

    Args:
        modalities: d_m of each modality; the command line takes it from the data.
        num_classes: C; likewise.
        network: Sizes and dropout rates.
        losses: Weights and options of the losses.
        switches: The parts of Table 2 that are on.
        learning_rate: Of Adam; the highest one where a schedule changes it.
        weight_decay: Of Adam.
        schedule: "onecycle" warms up and anneals over the whole training; "plateau" is the
            paper's, which divides by ten when the validation loss has not fallen for `patience`
            epochs; "constant".
        patience: Of "plateau", in epochs.
    """

    def __init__(
        self,
        modalities: dict[str, int],
        num_classes: int,
        network: Network = Network(),  # noqa: B008 (frozen)
        losses: Losses = Losses(),  # noqa: B008
        switches: Switches = Switches(),  # noqa: B008
        learning_rate: float = 5e-5,
        weight_decay: float = 0.005,
        schedule: Literal["onecycle", "plateau", "constant"] = "plateau",
        patience: int = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.patience = patience
        self.network = DecAlign(modalities, num_classes, network, switches)
        self.objective = Objective(num_classes, losses, switches)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "weighted_f1": MulticlassF1Score(num_classes, average="weighted"),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, batch: Batch) -> Output:
        """Return the logits of a batch and the features behind them."""
        return self.network(batch.features, batch.masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return Eq. 13, and log each of its terms."""
        return self._compare(batch, self(batch), "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the terms and the metrics of the validation split."""
        output = self(batch)
        self._compare(batch, output, "val")
        self.val_metrics.update(output.logits, batch.targets)
        self.log_dict(self.val_metrics, prog_bar=True, batch_size=len(batch.targets))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the metrics of the test split."""
        self.test_metrics.update(self(batch).logits, batch.targets)
        self.log_dict(self.test_metrics, batch_size=len(batch.targets))

    def predict_step(self, batch: Batch, batch_idx: int) -> Output:
        """Return the logits of a batch and the features behind them."""
        return self(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam and the schedule."""
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        chosen: dict[str, Any] = {"optimizer": optimizer}
        if self.schedule == "onecycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=self.learning_rate,
                total_steps=int(self.trainer.estimated_stepping_batches),
                cycle_momentum=False,
            )
            chosen["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}
        elif self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=self.patience
            )
            chosen["lr_scheduler"] = {"scheduler": scheduler, "monitor": "val/loss"}
        return chosen

    def _compare(self, batch: Batch, output: Output, stage: str) -> Tensor:
        terms = self.objective(output, batch.targets)
        values = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(values, batch_size=len(batch.targets))
        return terms["loss"]
