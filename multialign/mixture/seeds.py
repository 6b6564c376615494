"""The mixtures that EM starts from: components at samples drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import threshold

from multialign._draws import normal, uniform
from multialign._samples import Samples, take_rows
from multialign.costs import squared_euclidean_cost
from multialign.mixture.options import FitOptions
from multialign.mixture.parameters import (
    Parameters,
    Standardised,
    stack_modalities,
    unstack_modalities,
)

__all__ = ["core_draws", "draw_means", "start_parameters"]

# Of the sum of weights times squared distances, per dimension: the rounding of a distance of 0.
_ROUNDING = 1e-14
# Sums that differ by less, relatively, are equal.
_TIE = 1e-9
# Of the variance, what components begin with at least: that of samples all drawn may be 0.
_LEAST_SHARE = 1e-3


def start_parameters(means: Tensor, data: Standardised, options: FitOptions) -> Parameters:
    """Return a mixture of the given means and equal weights.

    Its variances are those of the data, for "kmeans++" times the part that is left around the
    nearest mean: wider components would all begin with about the same posteriors. For "full" the
    covariances are diagonals, `(*batch, K, D)`; see `with_matrices`.
    """
    *batch, count, _ = means.shape
    variance = data.variance
    if options.init == "kmeans++" and count > 1:
        nearest = squared_euclidean_cost(data.x, means).amin(-1)
        (left,) = options.ranks.sum([(data.mass * nearest).sum(-1)])
        total = variance.sum((-2, -1))
        share = (left / torch.where(total == 0, 1.0, total)).clamp(_LEAST_SHARE, 1.0)
        variance = share[..., None, None] * variance
    variance = variance + data.floor
    if options.covariance_type == "spherical":
        covariances = variance.mean(-1).expand(*batch, count)
    elif options.covariance_type == "tied":
        covariances = torch.diag_embed(variance.squeeze(-2))
    else:
        covariances = variance.expand_as(means)
    return Parameters(means.new_full((*batch, count), 1 / count), means, covariances)


def draw_means(
    data: Sequence[Standardised],
    stacks: Sequence[Sequence[int]],
    sizes: Sequence[int],
    counts: Sequence[int],
    weighted: bool,
    options: FitOptions,
) -> list[Tensor]:
    """Return K_m rows of each modality, `(*batch, K_m, D)`, stacked as the data are.

    The first rank draws them among the samples of all ranks; a row has gradient on its own rank.
    `stacks` says which modalities each of `data` is, `sizes` how many of their rows are no padding,
    and `weighted` whether this rank was given weights.
    """
    ranks = options.ranks
    pairs = list(zip(data, stacks, strict=True))
    features = [x for own, stack in pairs for x in unstack_modalities(own.x, len(stack))]
    masses = [mass for own, stack in pairs for mass in unstack_modalities(own.mass, len(stack))]
    if any(x.shape[-2] > size for x, size in zip(features, sizes, strict=True)):
        features = [x[..., :size, :] for x, size in zip(features, sizes, strict=True)]
        masses = [mass[..., :size] for mass, size in zip(masses, sizes, strict=True)]
    gathered = ranks.gather_on_first(features, masses, weighted)
    if ranks.is_first:
        chosen = _draw_together(
            gathered.features, gathered.masses, gathered.weighted, counts, options
        )
    else:
        batch, device = features[0].shape[:-2], features[0].device
        chosen = [torch.empty(*batch, k, dtype=torch.long, device=device) for k in counts]
    if ranks.group is None:
        return [
            take_rows(own.x, stack_modalities([chosen[m] for m in stack])) for own, stack in pairs
        ]

    chosen = [i - start for i, start in zip(ranks.broadcast(chosen), gathered.starts, strict=True)]
    here = [(i >= 0) & (i < size) for i, size in zip(chosen, sizes, strict=True)]
    means = []
    for own, stack in pairs:
        index = stack_modalities([chosen[m] for m in stack]).clamp(0, own.x.shape[-2] - 1)
        mine = stack_modalities([here[m] for m in stack]).unsqueeze(-1)
        means.append(torch.where(mine, take_rows(own.x, index), 0.0))
    return ranks.sum(means)


def core_draws(
    samples: Samples, counts: Sequence[int], options: FitOptions
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the random numbers that `draw_means` draws, for the compiled core.

    These are a direction and uniform numbers for the modalities together, where they are paired,
    and for each alone, where that may be needed.
    """
    features = samples.features
    *batch, _, dim = features[0].shape
    like, count = features[0].new_empty((), dtype=torch.float64), max(counts)

    def draw(first: Sequence[int], size: int, count: int) -> tuple[Tensor, Tensor]:
        direction = normal([size], like, options.generator).expand(*batch, size)
        shape = [*first, *batch, count, _candidates(count)]
        return direction, uniform(shape, like, options.generator)

    if len(features) == 1 or len({x.shape[-2] for x in features}) > 1:
        return [], [x for k in counts for x in draw([], dim, k)]
    paired = draw([], len(features) * dim, count)
    if not samples.weighted:
        return [*paired], []
    direction, uniforms = draw([len(features)], dim, count)
    return [*paired], [x for own in uniforms.unbind(0) for x in (direction, own)]


def _candidates(count: int) -> int:
    """Return how many samples are tried for each of `count` seeds, as scikit-learn does."""
    return 2 + int(math.log(count))


def _draw_together(
    features: Sequence[Tensor],
    masses: Sequence[Tensor],
    weighted: bool,
    counts: Sequence[int],
    options: FitOptions,
) -> list[Tensor]:
    """Return the indices `(*batch, K_m)` of each modality's seeds.

    Modalities of equal size are paired: the same rows seed all of them.
    """
    sizes = {x.shape[-2] for x in features}
    if len(features) == 1 or len(sizes) > 1 or sizes == {0}:
        return [
            _draw(x, mass, count, options)
            for x, mass, count in zip(features, masses, counts, strict=True)
        ]
    # Standardised, all modalities have the same spread, and count alike.
    joint = _joint_mass(masses) if weighted else masses[0]
    paired = _draw(torch.cat(list(features), -1), joint, max(counts), options)
    if not weighted:
        return [paired[..., :count] for count in counts]
    # Without a complete row there is nothing to pair.
    unpaired = _draw(torch.stack(list(features)), torch.stack(list(masses)), max(counts), options)
    chosen = torch.where(joint.sum(-1, keepdim=True) > 0, paired, unpaired)
    return [index[..., :count] for index, count in zip(chosen, counts, strict=True)]


def _joint_mass(masses: Sequence[Tensor]) -> Tensor:
    """Return the weights of the complete rows; a modality absent altogether does not count."""
    joint = torch.ones_like(masses[0])
    for mass in masses:
        # Relative to the largest weight: a product of many masses 1/N would leave the range.
        most = mass.amax(-1, keepdim=True)
        joint = joint * torch.where(most == 0, 1.0, mass / most)
    return joint.detach()


def _draw(x: Tensor, mass: Tensor, count: int, options: FitOptions) -> Tensor:
    """Return the indices `(*batch, count)` of samples to start from.

    "random" draws without replacement while there are samples left; for "kmeans++" see `_draw_far`.
    The draw is by the samples' order along a random direction, so that it does not depend on the
    order of the batch.
    """
    if x.shape[-2] == 0:
        return torch.zeros(*x.shape[:-2], count, dtype=torch.long, device=x.device)
    generator = options.generator
    with torch.no_grad():
        direction = normal([x.shape[-1]], x, generator)
        order = (x @ direction).argsort(-1)
        x, mass = take_rows(x, order), mass.gather(-1, order)
        draw = _draw_distinct if options.init == "random" else _draw_far
        return order.gather(-1, draw(x, mass, count, generator))


def _draw_far(x: Tensor, mass: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw by greedy k-means++.

    The first sample is drawn by weight. Then candidates are drawn with probability proportional to
    weight times squared distance to the nearest sample taken, and the one is taken that leaves the
    least sum of these products.
    """
    *batch, rows, dim = x.shape
    draws = uniform([*batch, count, _candidates(count)], x, generator).unbind(-2)
    # Squared distances times masses are one product: |y|^2 - 2 x y + |x|^2.
    square, ones = x.square().sum(-1, keepdim=True), x.new_ones(*batch, rows, 1)
    left = torch.cat([-2 * x, square, ones], -1)
    right = (mass.unsqueeze(-1) * torch.cat([x, ones, square], -1)).mT
    first = mass.cumsum(-1)
    row = _pick(first, draws[0][..., :1])
    chosen, chance = [row], (take_rows(left, row) @ right).squeeze(-2)
    for draw in draws[1:]:
        # Equal samples are at a distance of rounding, which counts as 0.
        chance = threshold(chance, _ROUNDING * dim, 0.0)
        cumulative = chance.cumsum(-1)
        # With fewer distinct samples than components, draw any of them.
        cumulative = torch.where(cumulative[..., -1:] == 0, first, cumulative)
        row = _pick(cumulative, draw)
        left_over = torch.minimum(chance.unsqueeze(-2), take_rows(left, row) @ right)
        sums = left_over.sum(-1)
        # The last two samples of a cluster leave the same sum, up to rounding: take the first.
        least = (1 + _TIE) * sums.amin(-1, keepdim=True)
        best = (sums <= least).byte().argmax(-1, keepdim=True)
        chosen.append(row.gather(-1, best))
        chance = left_over.gather(-2, best.unsqueeze(-1).expand(*batch, 1, rows)).squeeze(-2)
    return torch.cat(chosen, -1)


def _pick(cumulative: Tensor, draws: Tensor) -> Tensor:
    """Return indices drawn with probabilities whose cumulative sums, up to a factor, are given."""
    row = torch.searchsorted(cumulative, draws * cumulative[..., -1:], right=True)
    return row.clamp_max(cumulative.shape[-1] - 1)


def _draw_distinct(
    x: Tensor, mass: Tensor, count: int, generator: torch.Generator | None
) -> Tensor:
    # Exponential races: the order of arrival of clocks with rates `mass` is a weighted draw
    # without replacement. Absent samples never arrive.
    clocks = uniform(mass.shape, mass, generator)
    order = torch.where(mass > 0, -torch.log1p(-clocks) / mass, math.inf).argsort(-1)
    there = (mass > 0).sum(-1, keepdim=True).clamp_min(1)
    turns = torch.arange(count, device=mass.device).expand(*mass.shape[:-1], count)
    return order.gather(-1, turns % there)
