"""Baselines of scikit-learn on the concatenated features, tuned by cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.svm import SVC, SVR

from examples.benchmarking.metrics import make_metrics
from examples.decalign.data import Batch, ModalityData
from examples.decalign.layers import masked_mean

__all__ = ["baseline_scores"]

FOLDS = 5
STRENGTHS = [float(f"1e{n}") for n in range(-4, 3)]
FOREST = {"min_samples_leaf": [1, 3, 10]}
MACHINE = {"C": [0.1, 1.0, 10.0], "gamma": ["scale", "auto"]}
CLASSES: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "logistic": (LogisticRegression(max_iter=1000), {"C": STRENGTHS}),
    "SVC": (SVC(), MACHINE),
    "random forest": (RandomForestClassifier(200, random_state=0), FOREST),
}
SCORES: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "ridge": (Ridge(), {"alpha": [10.0**n for n in range(-2, 6)]}),
    "SVR": (SVR(), MACHINE),
    "random forest": (RandomForestRegressor(200, random_state=0), FOREST),
}


def baseline_scores(
    data: ModalityData, *, single: bool = True
) -> dict[str, tuple[dict[str, float], dict[str, Any]]]:
    """Return the test metrics of each baseline, and the options that cross-validation chose.

    The features are those of the network, flattened if a modality has no mask and averaged over the
    valid steps otherwise. Token ids are left out. The folds are of the training split alone.

    Args:
        data: The data.
        single: Whether to fit the linear model on each modality alone too.
    """
    views = [name for name, width in data.modalities.items() if width > 0]
    splits = {name: data.splits[name].all() for name in ("train", "test")}
    models = CLASSES if data.target.kind == "class" else SCORES
    linear = next(iter(models))
    jobs = {name: (name, views) for name in models}
    if single:
        jobs |= {f"{linear}, {view}": (linear, [view]) for view in views}
    return {
        title: _fit(data, splits, models[name], chosen) for title, (name, chosen) in jobs.items()
    }


def _fit(
    data: ModalityData,
    splits: dict[str, Batch],
    model: tuple[Any, dict[str, list[Any]]],
    views: Sequence[str],
) -> tuple[dict[str, float], dict[str, Any]]:
    target = data.target
    labels = splits["train"].targets.numpy()
    folds: Any = KFold(FOLDS, shuffle=True, random_state=0)
    if target.kind == "class" and np.unique(labels, return_counts=True)[1].min() >= FOLDS:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    score = "accuracy" if target.kind == "class" else "neg_mean_absolute_error"
    search = GridSearchCV(*model, scoring=score, cv=folds)
    with warnings.catch_warnings():
        # The weakest regularisation may not converge, and is then not the best.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(_table(splits["train"], views), labels)
    predicted = torch.as_tensor(search.predict(_table(splits["test"], views)))
    if target.clipped:
        predicted = predicted.clamp(*target.limits)
    metrics = make_metrics(target)
    metrics.update(predicted.to(splits["test"].targets.dtype), splits["test"].targets)
    return {name: float(value) for name, value in metrics.compute().items()}, search.best_params_


def _table(batch: Batch, views: Sequence[str]) -> NDArray[np.float32]:
    columns = []
    for view in views:
        x, mask = batch.features[view], batch.masks.get(view)
        columns.append(x.flatten(1) if mask is None else masked_mean(x, mask))
    return torch.cat(columns, 1).numpy()
