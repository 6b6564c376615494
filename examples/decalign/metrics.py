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
    """Return the metrics of a data set, to be updated with the results of `Target.predict`."""
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

    def transformed(
        metric: Metric,
        transform_scores: Callable[[Tensor], Tensor],
        transform_labels: Callable[[Tensor], Tensor],
    ) -> Metric:
        return LambdaInputTransformer(metric, transform_scores, transform_labels)

    def positive(scores: Tensor) -> Tensor:
        return (scores > 0).long()

    polarity = target.polarity
    nonzero = {"num_classes": 2, "ignore_index": IGNORED}
    return MetricCollection(
        {
            "mae": MeanAbsoluteError(),
            "corr": PearsonCorrCoef(),
            "acc2": transformed(MulticlassAccuracy(2, average="micro"), polarity, polarity),
            "f1": transformed(MulticlassF1Score(2, average="weighted"), polarity, polarity),
            "acc2_nonzero": transformed(
                MulticlassAccuracy(average="micro", **nonzero), positive, nonzero_polarity
            ),
            "f1_nonzero": transformed(
                MulticlassF1Score(average="weighted", **nonzero), positive, nonzero_polarity
            ),
            f"acc{count}": transformed(
                MulticlassAccuracy(count, average="micro"), target.category, target.category
            ),
        },
        compute_groups=False,
    )
