"""Samples of M modalities: weighed, pooled over ranks, and with their absent rows filled.

A row of weight 0 is absent, whatever stands in it. It is replaced by a present row of its modality,
as a constant. No loss depends on which row that is: its mass is 0. But no NaN of an absent row
reaches a value or a gradient, and a row close to the data costs no range and no digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from multialign._distributed import ALONE, Ranks

__all__ = [
    "Samples",
    "can_stack",
    "fill_absent",
    "make_samples",
    "pad_rows",
    "reference_row",
    "take_rows",
    "weigh",
]


# On a CPU, stacks of more entries leave the cache and cost memory.
_STACKED_ENTRIES = 2**15


class Samples(NamedTuple):
    """The samples that this rank has of M modalities."""

    features: list[Tensor]
    """M tensors `(*batch, N_m, D)`, float32 or float64; absent rows are the origin."""
    masses: list[Tensor]
    """M tensors `(*batch, N_m)`: weights that sum to 1 over all ranks, or to 0."""
    present: Tensor
    """`(M, *batch)`: 1 where any rank has a sample of the modality, else 0."""
    origins: Tensor
    """`(M, *batch, 1, D)`: one present row of each modality, constant, the same on all ranks.

    Measured from it a constant feature is exactly 0, and a large offset costs no digits. A modality
    without samples has the origin of the first one that has some.
    """
    weighted: bool
    """Whether this rank was given weights."""
    complete: bool
    """Whether all rows of all ranks are present, and each modality has some."""


def make_samples(
    features: Sequence[Tensor], weights: Sequence[Tensor | None], ranks: Ranks = ALONE
) -> Samples:
    """Return samples from checked features `(*batch, N_m, D)` and weights `(*batch, N_m)`."""
    weighted = any(weight is not None for weight in weights)
    if ranks.group is None and not weighted and all(x.shape[-2] > 0 for x in features):
        return Samples(
            features=list(features),
            masses=[x.new_full(x.shape[:-1], 1 / x.shape[-2]) for x in features],
            present=features[0].new_ones(len(features), *features[0].shape[:-2]),
            origins=torch.stack([reference_row(x, None) for x in features]),
            weighted=False,
            complete=True,
        )
    masses, totals, pooled = weigh(features, weights, ranks)
    rows = [reference_row(x, weight) for x, weight in zip(features, weights, strict=True)]
    present = (pooled != 0).to(pooled.dtype)  # 1 for NaN, which must reach the result
    origins = ranks.first_rows(torch.stack(rows), totals != 0)
    first = present.argmax(0, keepdim=True)[..., None, None].expand_as(origins[:1])
    origins = torch.where(present[..., None, None] == 0, origins.gather(0, first), origins)
    filled = [
        x if weight is None else fill_absent(x, mass, origin)
        for x, weight, mass, origin in zip(features, weights, masses, origins, strict=True)
    ]
    return Samples(filled, masses, present, origins, weighted, complete=False)


def weigh(
    features: Sequence[Tensor], weights: Sequence[Tensor | None], ranks: Ranks = ALONE
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return masses, this rank's total weights `(M, *batch)`, and those of all ranks."""
    given = [
        x.new_ones(x.shape[:-1]) if weight is None else weight
        for x, weight in zip(features, weights, strict=True)
    ]
    totals = torch.stack([weight.sum(-1) for weight in given])
    (pooled,) = ranks.sum([totals])
    divisors = torch.where(pooled == 0, 1.0, pooled).unsqueeze(-1)
    masses = [weight / divisor for weight, divisor in zip(given, divisors, strict=True)]
    return masses, totals, pooled


def reference_row(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the row of most weight, `(*batch, 1, D)`, as a constant; zeros where there is none."""
    if x.shape[-2] == 0:
        return x.new_zeros(*x.shape[:-2], 1, x.shape[-1])
    if weight is None:
        return x.detach()[..., :1, :]
    most, index = weight.detach().max(-1, keepdim=True)
    return torch.where(most.unsqueeze(-1) == 0, 0.0, take_rows(x.detach(), index))


def fill_absent(x: Tensor, mass: Tensor, row: Tensor) -> Tensor:
    """Return `x` with `row` `(*batch, 1, D)` in place of the rows of mass 0."""
    # torch.where, not a product: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(mass.unsqueeze(-1) == 0, row, x)


def can_stack(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors have one shape, and one operation on their stack pays for the copy.

    On a CPU it does so as long as the stack fits in the cache.
    """
    first = tensors[0]
    alike = all(x.shape == first.shape for x in tensors)
    small = first.device.type != "cpu" or len(tensors) * first.numel() <= _STACKED_ENTRIES
    return alike and small


def pad_rows(samples: Samples, count: int) -> Samples:
    """Give each modality at least `count` rows; the new ones are absent."""
    missing = [max(0, count - x.shape[-2]) for x in samples.features]
    if not any(missing):
        return samples
    features = [
        torch.cat([x, origin.expand(*x.shape[:-2], n, x.shape[-1])], -2)
        for x, origin, n in zip(samples.features, samples.origins, missing, strict=True)
    ]
    masses = [functional.pad(mass, (0, n)) for mass, n in zip(samples.masses, missing, strict=True)]
    return samples._replace(features=features, masses=masses, complete=False)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` `(*batch, K)` of `x` `(*batch, N, D)`."""
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
