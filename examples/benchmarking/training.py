"""Training and evaluation as a LightningModule: network, objective, metrics, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.distributed import group
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from examples.benchmarking.metrics import make_metrics
from examples.benchmarking.model import Model
from examples.benchmarking.text import Text, TextEncoder
from examples.decalign.data import Batch, Target
from examples.decalign.model import DecAlign

__all__ = ["Training"]


class Training(lightning.LightningModule):
    """One training: a network on named modalities, its objective, metrics and optimiser.

    Args:
        modalities: d_m of each modality; the command line takes it from the data.
        target: The classes or the score; the command line takes it from the data.
        network: The class of the model and its options, such as
            `--model.network=DecAlign --model.network.sizes.width=64`.
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
        network: Callable[[dict[str, int], Target], Model] = DecAlign,
        text: Text | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.005,
        schedule: Literal["onecycle", "plateau", "constant"] = "plateau",
        patience: int = 5,
    ) -> None:
        super().__init__()
        self.target = target
        self.text = text
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.patience = patience
        tokens = [name for name, width in modalities.items() if width == 0]
        if len(tokens) != (text is not None):
            raise ValueError(
                f"text must name the encoder of one modality of token ids; got {text} for {tokens}"
            )
        self.tokens = tokens[0] if tokens else None
        self.text_encoder = None if text is None else TextEncoder(text)
        if self.text_encoder is not None:
            modalities = {**modalities, self.tokens: self.text_encoder.width}
        self.network = network(modalities, target)
        metrics = make_metrics(target)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # Exact also if the processes evaluate unequal numbers of samples.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))

    def setup(self, stage: str) -> None:
        """Give the losses the process group, which exists from here on."""
        if self.trainer.world_size > 1:
            for module in self.network.modules():
                if hasattr(module, "process_group"):
                    module.process_group = group.WORLD

    def forward(self, batch: Batch) -> Any:
        """Return the network's output for a batch."""
        features, masks = batch.features, batch.masks
        if self.text_encoder is not None:
            states, mask = self.text_encoder(features[self.tokens])
            features = {**features, self.tokens: states}
            # The mask of the data marks the samples that lack the text.
            masks = {**masks, self.tokens: mask & masks.get(self.tokens, mask)}
        return self.network(features, masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the objective, and log each of its terms."""
        terms = self.network.objective(self(batch), batch.targets)
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        size = len(batch.targets)
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return terms["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the task's loss and the metrics of the validation split."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the task's loss and the metrics of the test split."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the prediction for each sample, and its features."""
        output = self(batch)
        return {
            "prediction": self.target.predict(output.logits).float(),
            **self.network.features(output),
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam and the schedule."""
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        if self.text_encoder is not None and not self.text_encoder.frozen:
            rate = self.text.learning_rate or self.learning_rate
            groups.append({"params": list(self.text_encoder.parameters()), "lr": rate})
        # Lightning cannot clip the gradients of a fused optimiser where it scales them.
        scaled = self._trainer and isinstance(self._trainer.precision_plugin, MixedPrecision)
        optimizer = torch.optim.Adam(
            groups, lr=self.learning_rate, weight_decay=self.weight_decay, fused=not scaled
        )
        if self.schedule == "constant":
            return {"optimizer": optimizer}
        if self.schedule == "plateau":
            plateau = ReduceLROnPlateau(optimizer, patience=self.patience)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"},
            }
        cycle = OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a cycle end with this training, which may be longer than that of the checkpoint."""
        for state in checkpoint.get("lr_schedulers", []):
            for name in ("total_steps", "_schedule_phases"):
                state.pop(name, None)

    def _evaluate(
        self, batch: Batch, stage: str, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> None:
        logits = self(batch).logits
        size = len(batch.targets)
        # One entry for each sample, since torchmetrics 1.9 ignores weights if NaN is kept.
        mean_loss.update(self.target.loss(logits, batch.targets).expand(size))
        self.log(f"{stage}/loss", mean_loss, batch_size=size)
        metrics.update(self.target.predict(logits).float(), batch.targets)
        self.log_dict(metrics, batch_size=size, prog_bar=stage == "val")
