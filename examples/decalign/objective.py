"""What DecAlign minimises: the task's loss and the alignment losses of multialign (Eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.decalign.model import Output
from examples.decalign.switches import Switches
from multialign import CosineDecouplingLoss, GaussianMomentLoss, MMDLoss, PrototypeAlignmentLoss

__all__ = ["Losses", "Objective"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of Eq. 13 and the options of each loss; the defaults are the paper's.

    Args:
        alpha: Weight of the heterogeneous alignment.
        beta: Weight of the homogeneous alignment.
        decoupling: Options of :class:`multialign.CosineDecouplingLoss`. "signed" is Eq. 1 as
            printed, which rewards anti-parallel features rather than orthogonal ones.
        prototypes: Options of :class:`multialign.PrototypeAlignmentLoss`. `num_prototypes`
            defaults to the number of classes, as in the paper.
        moments: Options of :class:`multialign.GaussianMomentLoss`.
        mmd: Options of :class:`multialign.MMDLoss`.
    """

    alpha: float = 0.05
    beta: float = 0.05
    decoupling: dict[str, Any] = field(default_factory=lambda: {"form": "signed"})
    prototypes: dict[str, Any] = field(default_factory=lambda: {"covariance_type": "full"})
    moments: dict[str, Any] = field(default_factory=dict)
    mmd: dict[str, Any] = field(default_factory=dict)


class Objective(nn.Module):
    r"""The objective of Eq. 13 and its terms.

    .. math:: L = L_\text{task} + L_\text{dec} + \alpha L_\text{hete} + \beta L_\text{homo}

    with cross-entropy as :math:`L_\text{task}`. A missing modality has weight 0 in every term.

    Args:
        num_classes: C, and the number of prototypes unless the options say otherwise.
        losses: Weights and options.
        switches: The terms to compute; see there.
    """

    def __init__(
        self, num_classes: int, losses: Losses | None = None, switches: Switches | None = None
    ) -> None:
        super().__init__()
        losses = losses or Losses()
        switches = switches or Switches()
        self.alpha = losses.alpha
        self.beta = losses.beta
        prototypes = {"num_prototypes": num_classes, **losses.prototypes}
        if not switches.proto_ot:
            prototypes["transport_weight"] = 0.0
        self.decoupling = CosineDecouplingLoss(**losses.decoupling) if switches.mfd else None
        self.prototypes = PrototypeAlignmentLoss(**prototypes) if switches.hete else None
        homo = switches.homo
        self.moments = GaussianMomentLoss(**losses.moments) if homo and switches.sem else None
        self.mmd = MMDLoss(**losses.mmd) if homo and switches.mmd else None

    def forward(self, output: Output, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms by name, unweighted, and their weighted sum as "loss"."""
        terms = {"task": cross_entropy(output.logits, targets)}
        terms["loss"] = terms["task"]
        if self.decoupling is not None:
            terms["dec"] = self.decoupling(output.unique_steps, output.common_steps, output.present)
            terms["loss"] = terms["loss"] + terms["dec"]
        if self.prototypes is not None:
            solved = self.prototypes.solve(output.unique, output.present)
            terms["transport"] = solved.transport_loss
            terms["prototype"] = solved.prototype_loss
            terms["hete"] = solved.loss
            terms["loss"] = terms["loss"] + self.alpha * terms["hete"]
        # Eq. 10 compares the common features themselves, Eq. 11 what the distribution encoder
        # makes of them.
        homo = {}
        if self.moments is not None:
            homo["sem"] = self.moments(output.common, output.present)
        if self.mmd is not None and output.latents is not None:
            homo["mmd"] = self.mmd(output.latents, output.present)
        if homo:
            terms |= homo
            terms["homo"] = torch.stack(list(homo.values())).sum()
            terms["loss"] = terms["loss"] + self.beta * terms["homo"]
        return terms
