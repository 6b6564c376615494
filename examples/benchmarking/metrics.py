"""The metrics of the paper, from torchmetrics.

Scores (MOSI, MOSEI, CH-SIMS) have the mean absolute error, Pearson's correlation, and accuracies of
the score's category. The literature counts two classes in two ways, and both are computed: "acc2"
and "f1" distinguish negative from non-negative over all samples (CH-SIMS: positive from the rest);
"acc2_nonzero" and "f1_nonzero" leave out the samples of label 0. F1 is weighted by class. "acc3" is
for negative, neutral and positive of CH-SIMS, "acc7" for the nearest whole number.

Classes (IEMOCAP, digits) have "accuracy" and "weighted_f1" (WAF1, Eq. 15). The accuracy equals WAcc
of Eq. 14 if a class's accuracy is its recall: recalls weighted by class sizes count the right
predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import LambdaInputTransformer

from examples.decalign.data.target import Target

__all__ = ["make_metrics"]

IGNORED = -1


def make_metrics(target: Target) -> MetricCollection:
    """Return the metrics of a data set, to be updated with the results of `Target.predict`."""
    count = len(target.categories)
    if target.kind == "class":
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "weighted_f1": MulticlassF1Score(count, average="weighted"),
            }
        )

    def binary(metric: type[Metric], average: str, nonzero: bool) -> Metric:
        def predicted(scores: Tensor) -> Tensor:
            return (scores > 0).long() if nonzero else target.polarity(scores)

        def labelled(scores: Tensor) -> Tensor:
            polarity = target.polarity(scores)
            return torch.where(scores == 0, IGNORED, polarity) if nonzero else polarity

        ignored = IGNORED if nonzero else None
        made = metric(num_classes=2, average=average, ignore_index=ignored)
        return LambdaInputTransformer(made, predicted, labelled)

    metrics: dict[str, Metric] = {"mae": MeanAbsoluteError(), "corr": PearsonCorrCoef()}
    if target.signed:
        for ending, nonzero in (("", False), ("_nonzero", True)):
            metrics[f"acc2{ending}"] = binary(MulticlassAccuracy, "micro", nonzero)
            metrics[f"f1{ending}"] = binary(MulticlassF1Score, "weighted", nonzero)
    metrics[f"acc{count}"] = LambdaInputTransformer(
        MulticlassAccuracy(count, average="micro"), target.category, target.category
    )
    return MetricCollection(metrics, compute_groups=False)
