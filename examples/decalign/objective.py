"""DecAlign's objective, Eq. 1 to 13: the task's loss and the alignment losses of multialign."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn

from examples.decalign.data.target import Target
from multialign import CosineDecouplingLoss, GaussianMomentLoss, MMDLoss, PrototypeAlignmentLoss

__all__ = [
    "MMD",
    "Contrastive",
    "Decoupling",
    "Losses",
    "Moments",
    "Objective",
    "Prototypes",
    "Switches",
]


@dataclass(frozen=True, kw_only=True)
class Decoupling:
    """Options of Eq. 1.

    Args:
        form: "signed" is Eq. 1 as printed, which rewards anti-parallel features; "squared" and
            "absolute" reward orthogonal ones.
        modalities: Whether Eq. 1 is the "sum" over modalities, as printed, or the "mean".
    """

    form: Literal["signed", "squared", "absolute"] = "signed"
    modalities: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Options of Eq. 2-9, see :class:`multialign.PrototypeAlignmentLoss`.

    Args:
        num_prototypes: K; the number of the task's categories if None, as in the paper.
        covariance_type: The covariances of the mixtures.
        em_iterations: The number of EM steps.
        regularization: What covariances get on their diagonal, in parts of the variance, since a
            component of fewer samples than features has a singular covariance.
        epsilon: The weight of the entropy, lambda in Eq. 7.
        objective: "transport" is the first term of Eq. 9, "regularized" the value of Eq. 7.
        matching: "index" compares with the prototype of the same number, "plan" with its image.
        cost_reduction: Whether squared distances are summed, or divided by d_s.
        differentiate: The EM steps that carry gradients.
        momentum: If given, mixtures run over batches with this rate.
    """

    num_prototypes: int | None = None
    covariance_type: Literal["diag", "full", "tied", "spherical"] = "full"
    em_iterations: int = 10
    regularization: float = 1e-3
    epsilon: float = 0.1
    objective: Literal["transport", "regularized"] = "transport"
    matching: Literal["index", "plan"] = "index"
    cost_reduction: Literal["sum", "mean"] = "sum"
    differentiate: Literal["unroll", "last", "none"] = "unroll"
    momentum: float | None = None


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Options of Eq. 10.

    Args:
        feature_reduction: Whether squared differences are summed over features or averaged.
        of: The features that are compared: "common", as in the paper, or "latent".
    """

    feature_reduction: Literal["sum", "mean"] = "sum"
    of: Literal["common", "latent"] = "common"


@dataclass(frozen=True, kw_only=True)
class MMD:
    """Options of Eq. 11-12, see :class:`multialign.MMDLoss`.

    Args:
        bandwidth: sigma, or "median".
        estimator: The estimator of the expectations.
    """

    bandwidth: float | Literal["median"] = "median"
    estimator: Literal["biased", "unbiased"] = "biased"


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Options of the supervised contrastive loss (Khosla et al., 2020).

    Args:
        temperature: The temperature of the similarities.
        of: The features that are contrasted: the "common" features of all modalities, or "fused",
            what the head reads, as in the released code.
    """

    temperature: float = 0.1
    of: Literal["common", "fused"] = "common"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of Eq. 13 and the options of each loss; the defaults are the paper's.

    Args:
        alpha: Weight of the heterogeneous alignment.
        beta: Weight of the homogeneous alignment.
        gamma: Weight of the contrastive training.
        score: The task's loss of a score.
        decoupling: Options of Eq. 1.
        prototypes: Options of Eq. 2-9.
        moments: Options of Eq. 10.
        mmd: Options of Eq. 11-12.
        contrastive: Options of the contrastive training.
    """

    alpha: float = 0.05
    beta: float = 0.05
    gamma: float = 0.05
    score: Literal["mse", "l1"] = "mse"
    decoupling: Decoupling = Decoupling()
    prototypes: Prototypes = Prototypes()
    moments: Moments = Moments()
    mmd: MMD = MMD()
    contrastive: Contrastive = Contrastive()


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Parts of DecAlign (Table 2). False removes a part: its computation, not only its weight.

    Args:
        mfd: Decoupling. Without it there is no common encoder and no Eq. 1; both branches use the
            unique encoder of each modality.
        hete: Prototype alignment of the unique features, Eq. 2-9. The transformers are part of the
            fusion (Sec. 3.4) and stay.
        homo: Everything of Sec. 3.3: the distribution encoder, Eq. 10 and Eq. 11-12.
        proto_ot: The transport term of Eq. 9; the sample-to-prototype term stays.
        sem: Moment matching, Eq. 10.
        mmd: Distribution matching, Eq. 11-12, with the distribution encoder.
        ct: Contrastive training, off by default. Table 2 has a column for it, but Eq. 13 has no
            term and the paper no formula.
    """

    mfd: bool = True
    hete: bool = True
    homo: bool = True
    proto_ot: bool = True
    sem: bool = True
    mmd: bool = True
    ct: bool = False


class Objective(nn.Module):
    r"""The objective of Eq. 13 and its terms.

    .. math:: L = L_\text{task} + L_\text{dec} + \alpha L_\text{hete} + \beta L_\text{homo}

    With contrastive training, :math:`\gamma L_\text{ct}` is added. A missing modality has weight 0
    in every term.

    Args:
        target: The classes or the score to predict.
        losses: Weights and options.
        switches: The terms to compute.
        width: d_s, which running mixtures need.
        num_modalities: M, which running mixtures need.
    """

    def __init__(
        self,
        target: Target,
        losses: Losses = Losses(),
        switches: Switches = Switches(),
        width: int | None = None,
        num_modalities: int | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.options = losses
        self.decoupling, self.prototypes, self.moments, self.mmd, self.contrastive = [None] * 5
        if switches.mfd:
            self.decoupling = CosineDecouplingLoss(form=losses.decoupling.form)
        if switches.hete:
            options: dict[str, Any] = asdict(losses.prototypes)
            options["num_prototypes"] = options["num_prototypes"] or len(target.categories)
            if not switches.proto_ot:
                options["transport_weight"] = 0.0
            if options["momentum"] is not None:
                options |= {"num_features": width, "num_modalities": num_modalities}
            self.prototypes = PrototypeAlignmentLoss(**options)
        if switches.homo and switches.sem:
            self.moments = GaussianMomentLoss(feature_reduction=losses.moments.feature_reduction)
        if switches.homo and switches.mmd:
            self.mmd = MMDLoss(**asdict(losses.mmd))
        if switches.ct:
            self.contrastive = SupConLoss(temperature=losses.contrastive.temperature)

    def forward(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms by name, unweighted, and their weighted sum as "loss"."""
        options, present = self.options, output.present
        terms = {"task": self.target.loss(output.logits, targets, options.score)}
        loss = terms["task"]
        if self.decoupling is not None:  # Eq. 1
            terms["dec"] = self.decoupling(output.unique_steps, output.common_steps, present)
            if options.decoupling.modalities == "mean":
                terms["dec"] = terms["dec"] / len(present)
            loss = loss + terms["dec"]
        if self.prototypes is not None:  # Eq. 2-9
            solved = self.prototypes.solve(output.unique, present)
            terms["transport"] = solved.transport_loss
            terms["prototype"] = solved.prototype_loss
            terms["hete"] = solved.loss
            loss = loss + options.alpha * terms["hete"]
        homo = {}
        if self.moments is not None:  # Eq. 10
            latent = options.moments.of == "latent" and output.latents is not None
            homo["sem"] = self.moments(output.latents if latent else output.common, present)
        if self.mmd is not None:  # Eq. 11-12
            homo["mmd"] = self.mmd(output.latents, present)
        if homo:
            terms |= homo
            terms["homo"] = torch.stack(list(homo.values())).sum()
            loss = loss + options.beta * terms["homo"]
        if self.contrastive is not None:
            terms["ct"] = self._contrast(output, targets)
            loss = loss + options.gamma * terms["ct"]
        return {**terms, "loss": loss}  # Eq. 13

    def _contrast(self, output: Any, targets: Tensor) -> Tensor:
        labels = self.target.category(targets)
        if self.options.contrastive.of == "fused":
            loss: Tensor = self.contrastive(output.fused, labels)
            return loss
        features, present = torch.stack(output.common), torch.stack(output.present)
        loss = self.contrastive(features[present], labels.expand_as(present)[present])
        return loss
