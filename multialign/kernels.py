"""Kernels between samples: their bandwidths, and the sums that losses and tests need of them.

A Gaussian kernel has one bandwidth or several, a list of tensors. The energy kernel -|x - y| has an
empty list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from multialign._samples import Samples
from multialign._validation import check_choice, check_entries, check_positive
from multialign.costs import squared_euclidean_cost
from multialign.ops import energy_form, gaussian_form

__all__ = [
    "Bandwidth",
    "Kernel",
    "check_kernel",
    "is_held",
    "kernel_form",
    "kernel_matrix",
    "kernel_units",
    "median_distance",
]

# A kernel matrix of at most this many entries is built, with derivatives of every order; a larger
# one is streamed in blocks.
_DENSE_ENTRIES = 2**16
# The median distance is that of at most this many samples, evenly spaced among all.
_MEDIAN_SAMPLES = 2048
# Samples at this part of the largest squared distance count as equal.
_EQUAL = 1e-14

Bandwidth = float | Sequence[float] | Literal["median"]
Kernel = Literal["gaussian", "energy"]


def check_kernel(kernel: object, bandwidth: object) -> None:
    """Raise unless these are options of `mmd_loss`."""
    check_choice("kernel", kernel, ("gaussian", "energy"))
    if isinstance(bandwidth, str):
        check_choice("bandwidth given as a string", bandwidth, ("median",))
    elif isinstance(bandwidth, Sequence):
        if not bandwidth:
            raise ValueError("bandwidth must hold at least one number; got an empty sequence")
        for value in bandwidth:
            check_positive("each bandwidth", value)
    else:
        check_positive("bandwidth", bandwidth)


def is_held(entries: int) -> bool:
    """Return whether a kernel matrix of so many entries is built, rather than streamed."""
    return entries <= _DENSE_ENTRIES


def kernel_units(
    samples: Samples, kernel: Kernel, bandwidth: Bandwidth
) -> tuple[Samples, list[Tensor], Tensor]:
    """Return the samples in units of the kernel, its bandwidths, and the factor of its sums.

    Squares then stay in the dtype's range. The unit is a power of two, which rounds nothing: that
    of the first bandwidth, but for a factor below 2, and for "energy" that of the largest
    deviation from the origin. Bandwidths broadcast to `(*batch, N, M)`, and the factor is
    `(*batch)`, or a scalar.
    """
    first = samples.features[0]
    with torch.no_grad():
        if kernel == "energy":
            sigmas: list[Tensor] = []
            size = _deviation(samples)[..., None, None]
        else:
            sigmas = _bandwidths(bandwidth, samples)
            size = sigmas[0]
        unit = torch.exp2(torch.log2(size).floor())
    samples = samples._replace(features=[x / unit for x in samples.features])
    factor = unit[..., 0, 0] if kernel == "energy" else first.new_ones(())
    return samples, [sigma / unit for sigma in sigmas], factor


def kernel_matrix(x: Tensor, y: Tensor, sigmas: Sequence[Tensor]) -> Tensor:
    """Return the kernel between every two rows, `(*batch, N, M)`, averaged over `sigmas`.

    The energy kernel is in float64: the square root of a rounding is large.
    """
    if not sigmas:
        cost = squared_euclidean_cost(x.double(), y.double())
        equal = cost == 0  # where the square root has no derivative
        return -torch.where(equal, 0.0, torch.where(equal, 1.0, cost).sqrt())
    cost = squared_euclidean_cost(x, y)
    kernels = [torch.exp(cost / (-2 * sigma.square())) for sigma in sigmas]
    return torch.stack(kernels).mean(0) if len(kernels) > 1 else kernels[0]


def kernel_form(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    q: Tensor,
    sigmas: Sequence[Tensor],
    *,
    distinct: bool = False,
    held: bool | None = None,
) -> Tensor:
    """Return p^T K q, `(*batch)`, with K the kernel matrix.

    In float64, and from float64 sums over rows: MMD^2 is a small difference of such forms. If
    `distinct`, no sample of what is then one set is paired with itself.
    `held` says whether K is built; None: that `is_held` decides.
    """
    batch = p.shape[:-1]
    if not (is_held(p.numel() * q.shape[-1]) if held is None else held):
        flat = [t.reshape(-1, *t.shape[len(batch) :]) for t in (x, p)]
        # One tensor for both arguments marks the form as symmetric.
        other = flat if y is x else [t.reshape(-1, *t.shape[len(batch) :]) for t in (y, q)]
        if not sigmas:
            flat = [t.double() for t in flat]
            other = flat if y is x else [t.double() for t in other]
            return energy_form(flat[0], other[0], flat[1], other[1]).reshape(batch)
        precisions = [(0.5 / sigma.square()).expand(*batch, 1, 1).reshape(-1) for sigma in sigmas]
        form = gaussian_form(
            flat[0], other[0], flat[1], other[1], torch.stack(precisions, -1), distinct=distinct
        )
        return form.reshape(batch)
    kernel = kernel_matrix(x, y, sigmas)
    if distinct:
        # Subtract, so that an infinite sample still gives NaN.
        kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
    return (p.double() * (kernel @ q.to(kernel.dtype).unsqueeze(-1)).squeeze(-1)).sum(-1)


def median_distance(features: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """Return the median distance between two present samples of the union, `(*batch)`.

    It is 1 where it would be 0.
    """
    points = torch.cat(list(features), -2)
    present = torch.cat([mass != 0 for mass in masses], -1)
    if points.shape[-2] < 2:
        return points.new_ones(points.shape[:-2])
    stride = max(1, -(-points.shape[-2] // _MEDIAN_SAMPLES))
    points, present = points[..., ::stride, :], present[..., ::stride]
    check_entries(
        math.prod(points.shape[:-1]) * points.shape[-2],
        "give the bandwidth as a number, or smaller batches",
    )
    rows, columns = torch.triu_indices(
        points.shape[-2], points.shape[-2], offset=1, device=points.device
    )
    # In float64, and 0 where it is rounding: the distance of equal samples is no bandwidth.
    wide = points.double()
    squares = squared_euclidean_cost(wide, wide)
    equal = squares <= _EQUAL * squares.amax((-2, -1), keepdim=True)
    distances = torch.where(equal, 0.0, squares)[..., rows, columns].sqrt().to(points.dtype)
    counted = present[..., rows] & present[..., columns]
    # Pairs with an absent sample go last, where the middle of the others does not reach them.
    distances = torch.where(counted, distances, math.inf).sort(-1).values
    count = counted.sum(-1, keepdim=True)
    low = distances.gather(-1, ((count - 1) // 2).clamp_min(0)).squeeze(-1)
    high = distances.gather(-1, (count // 2).clamp_max(distances.shape[-1] - 1)).squeeze(-1)
    median = (low + high) / 2
    usable = (median != 0) & (count.squeeze(-1) > 0)
    return torch.where(usable, median, median.new_ones(()))


def _bandwidths(bandwidth: Bandwidth, samples: Samples) -> list[Tensor]:
    """Return each bandwidth, broadcastable to `(*batch, N, M)`."""
    if bandwidth == "median":
        return [median_distance(samples.features, samples.masses)[..., None, None]]
    values = bandwidth if isinstance(bandwidth, Sequence) else [bandwidth]
    # One that a user gives is a number of the dtype's range.
    return [samples.features[0].new_full((1, 1), float(value)) for value in values]


def _deviation(samples: Samples) -> Tensor:
    """Return the largest deviation of an entry from the first origin, `(*batch)`; 1 if it is 0."""
    pooled = torch.cat([samples.origins[0], *samples.features], -2)
    size = (pooled - samples.origins[0]).abs().amax((-2, -1))
    return torch.where(size == 0, 1.0, size)
