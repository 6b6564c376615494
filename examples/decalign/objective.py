"""DecAlign's objective: the task's loss and the alignment losses of multialign (Eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.nn.functional import all_gather

from examples.decalign.network import Output
from examples.decalign.switches import Switches
from examples.decalign.targets import Target
from multialign import CosineDecouplingLoss, GaussianMomentLoss, MMDLoss, PrototypeAlignmentLoss

__all__ = ["Losses", "Objective"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of Eq. 13 and the options of each loss; the defaults are the paper's.

    Args:
        alpha: Weight of the heterogeneous alignment.
        beta: Weight of the homogeneous alignment.
        gamma: Weight of the contrastive training.
        score: The task's loss of a score: "mse" as in the paper, "l1" as in the released code.
        decoupling: Options of :class:`multialign.CosineDecouplingLoss`. "signed" is Eq. 1 as
            printed, which rewards anti-parallel features rather than orthogonal ones.
        prototypes: Options of :class:`multialign.PrototypeAlignmentLoss`. `num_prototypes`
            defaults to the number of the task's categories, as in the paper.
        moments: Options of :class:`multialign.GaussianMomentLoss`.
        mmd: Options of :class:`multialign.MMDLoss`.
        contrastive: Options of `pytorch_metric_learning.losses.SupConLoss`.
    """

    alpha: float = 0.05
    beta: float = 0.05
    gamma: float = 0.05
    score: Literal["mse", "l1"] = "mse"
    decoupling: dict[str, Any] = field(default_factory=lambda: {"form": "signed"})
    prototypes: dict[str, Any] = field(
        default_factory=lambda: {"covariance_type": "full", "regularization": 1e-3}
    )
    moments: dict[str, Any] = field(default_factory=dict)
    mmd: dict[str, Any] = field(default_factory=dict)
    contrastive: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.1})


class Objective(nn.Module):
    r"""The objective of Eq. 13 and its terms.

    .. math:: L = L_\text{task} + L_\text{dec} + \alpha L_\text{hete} + \beta L_\text{homo}

    With contrastive training, :math:`\gamma L_\text{ct}` is added. A missing modality has weight 0
    in every term.

    Args:
        target: The classes or the score to predict.
        losses: Weights and options.
        switches: The terms to compute.
        process_group: If given, the gradients of all ranks average to those of one process with all
            samples; ranks must have equally many samples.
    """

    def __init__(
        self,
        target: Target,
        losses: Losses | None = None,
        switches: Switches | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        losses = losses or Losses()
        switches = switches or Switches()
        self.target = target
        self.losses = losses
        self.process_group = process_group
        group = {"process_group": process_group}
        prototypes = {"num_prototypes": len(target.categories), **losses.prototypes, **group}
        if not switches.proto_ot:
            prototypes["transport_weight"] = 0.0
        self.decoupling = None
        if switches.mfd:
            # `_decouple` takes the mean over processes.
            reduction = "mean" if process_group is None else "sum"
            self.decoupling = CosineDecouplingLoss(**losses.decoupling, reduction=reduction)
        self.prototypes = PrototypeAlignmentLoss(**prototypes) if switches.hete else None
        homo = switches.homo
        self.moments = (
            GaussianMomentLoss(**losses.moments, **group) if homo and switches.sem else None
        )
        self.mmd = MMDLoss(**losses.mmd, **group) if homo and switches.mmd else None
        self.contrastive = SupConLoss(**losses.contrastive) if switches.ct else None

    def forward(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms by name, unweighted, and their weighted sum as "loss"."""
        terms = {"task": self.target.loss(output.logits, targets, self.losses.score)}
        terms["loss"] = terms["task"]
        if self.decoupling is not None:
            terms["dec"] = self._decouple(output)
            terms["loss"] = terms["loss"] + terms["dec"]
        if self.prototypes is not None:
            solved = self.prototypes.solve(output.unique, output.present)
            terms["transport"] = solved.transport_loss
            terms["prototype"] = solved.prototype_loss
            terms["hete"] = solved.loss
            terms["loss"] = terms["loss"] + self.losses.alpha * terms["hete"]
        # Eq. 10 compares the common features, Eq. 11 the outputs of the distribution encoder.
        homo = {}
        if self.moments is not None:
            homo["sem"] = self.moments(output.common, output.present)
        if self.mmd is not None and output.latents is not None:
            homo["mmd"] = self.mmd(output.latents, output.present)
        if homo:
            terms |= homo
            terms["homo"] = torch.stack(list(homo.values())).sum()
            terms["loss"] = terms["loss"] + self.losses.beta * terms["homo"]
        if self.contrastive is not None:
            terms["ct"] = self._contrast(output, targets)
            terms["loss"] = terms["loss"] + self.losses.gamma * terms["ct"]
        return terms

    def _decouple(self, output: Output) -> Tensor:
        unique, common, present = output.unique_steps, output.common_steps, output.present
        if self.process_group is None:
            return self.decoupling(unique, common, present)
        counts = torch.stack([mask.sum() for mask in present]).to(output.logits.dtype)
        all_reduce(counts, group=self.process_group)
        # DDP averages over ranks; `ranks` times the sum over the total count then gives the mean.
        sums = [
            self.decoupling([u], [c], [mask])
            for u, c, mask in zip(unique, common, present, strict=True)
        ]
        ranks = self.process_group.size()
        return (ranks * torch.stack(sums) / counts.clamp_min(1)).sum()

    def _contrast(self, output: Output, targets: Tensor) -> Tensor:
        """Return the contrastive loss of the common features of all present modalities."""
        features = torch.stack(output.common)
        present = torch.stack(output.present)
        labels = self.target.category(targets).expand_as(present)
        if self.process_group is not None:
            features, present, labels = (
                torch.cat(all_gather(x.contiguous(), group=self.process_group), 1)
                for x in (features, present, labels)
            )
        return self.contrastive(features[present], labels[present])
