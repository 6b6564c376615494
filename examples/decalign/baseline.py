"""What a linear model makes of the same data: logistic regression on views and on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from examples.decalign.data import DigitsData, Samples

__all__ = ["logistic_scores"]


def logistic_scores(data: DigitsData) -> dict[str, dict[str, float]]:
    """Return accuracy and weighted F1 on the test split, of all views together and of each.

    Trained on the rows the network trains on. The fit is deterministic: it has no seeds.
    """
    data.setup()
    views = list(data.modalities)
    names = {"logistic": views} | {f"logistic_{view}": [view] for view in views}
    return {name: _score(data, chosen) for name, chosen in names.items()}


def _score(data: DigitsData, views: Sequence[str]) -> dict[str, float]:
    x, y = _table(data.splits["train"], views)
    model = LogisticRegression(max_iter=5000).fit(x, y)
    x, y = _table(data.splits["test"], views)
    predicted = model.predict(x)
    return {
        "accuracy": float(accuracy_score(y, predicted)),
        "weighted_f1": float(f1_score(y, predicted, average="weighted")),
    }


def _table(split: Samples, views: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    features = [split.samples.features[view].flatten(1).numpy() for view in views]
    return np.concatenate(features, 1), split.samples.targets.numpy()
