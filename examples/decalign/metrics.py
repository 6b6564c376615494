"""The metrics of the paper, from torchmetrics.

Scores (MOSI, MOSEI, CH-SIMS): mean absolute error, Pearson's correlation, and accuracies of what
the score says. The literature counts two classes in two ways, and both are here: "acc2" and "f1"
tell negative from non-negative over all samples (CH-SIMS: positive from the rest), "acc2_nonzero"
and "f1_nonzero" leave out the samples whose label is 0. F1 is weighted by class. "acc3" is
CH-SIMS's negative, neutral, positive; "acc7" the nearest whole number.

Classes (IEMOCAP, digits): "accuracy", which is WAcc of Eq. 14 with a class's recall as its
accuracy, since weighting recalls by the classes' sizes counts the hits; and "weighted_f1" (WAF1,
Eq. 15).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import LambdaInputTransformer

from examples.decalign.targets import Target

__all__ = ["make_metrics"]

IGNORED = -1


def make_metrics(target: Target) -> MetricCollection:
    """Return the metrics of a data set; they are updated with what `Target.predict` returns."""
    count = len(target.categories)
    if target.kind == "class":
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "weighted_f1": MulticlassF1Score(count, average="weighted"),
            }
        )

    def nonzero_polarity(scores: Tensor) -> Tensor:
        return torch.where(scores == 0, IGNORED, target.polarity(scores))

    def reading(
        metric: Metric, read: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor]
    ) -> Metric:
        return LambdaInputTransformer(metric, read, truth)

    def positive(scores: Tensor) -> Tensor:
        return (scores > 0).long()

    polarity = target.polarity
    nonzero = {"num_classes": 2, "ignore_index": IGNORED}
    return MetricCollection(
        {
            "mae": MeanAbsoluteError(),
            "corr": PearsonCorrCoef(),
            "acc2": reading(MulticlassAccuracy(2, average="micro"), polarity, polarity),
            "f1": reading(MulticlassF1Score(2, average="weighted"), polarity, polarity),
            "acc2_nonzero": reading(
                MulticlassAccuracy(average="micro", **nonzero), positive, nonzero_polarity
            ),
            "f1_nonzero": reading(
                MulticlassF1Score(average="weighted", **nonzero), positive, nonzero_polarity
            ),
            f"acc{count}": reading(
                MulticlassAccuracy(count, average="micro"), target.category, target.category
            ),
        },
        compute_groups=False,
    )
