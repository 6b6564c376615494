"""Linear models on the same data: on one modality each, and on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV

from examples.decalign.data import Batch, ModalityData
from examples.decalign.encoders import masked_mean
from examples.decalign.metrics import make_metrics

__all__ = ["linear_scores"]


def linear_scores(data: ModalityData) -> dict[str, dict[str, float]]:
    """Return the metrics on the test split of a logistic or ridge regression.

    The features are those of the network, flattened if a modality has no mask and averaged over the
    valid steps otherwise. The fit is deterministic and takes no seed. Token ids are left out.
    """
    views = [name for name, width in data.modalities.items() if width > 0]
    splits = {name: data.splits[name].all() for name in ("train", "test")}
    names = {"linear": views} | {f"linear_{view}": [view] for view in views}
    return {name: _score(data, splits, chosen) for name, chosen in names.items()}


def _score(data: ModalityData, splits: dict[str, Batch], views: Sequence[str]) -> dict[str, float]:
    target = data.target
    model: Any = LogisticRegression(max_iter=5000)
    if target.kind == "score":
        model = RidgeCV(alphas=np.logspace(-2, 4, 13))
    model.fit(_table(splits["train"], views), splits["train"].targets.numpy())
    predicted = torch.as_tensor(model.predict(_table(splits["test"], views)))
    metrics = make_metrics(target)
    metrics.update(predicted.to(splits["test"].targets.dtype), splits["test"].targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def _table(batch: Batch, views: Sequence[str]) -> NDArray[np.float32]:
    columns = []
    for view in views:
        x, mask = batch.features[view], batch.masks.get(view)
        columns.append(x.flatten(1) if mask is None else masked_mean(x, mask))
    return torch.cat(columns, 1).numpy()
