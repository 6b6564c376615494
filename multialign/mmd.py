"""Maximum mean discrepancy between the modalities' distributions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from multialign._distributed import GroupModule, ProcessGroup, Ranks
from multialign._draws import normal
from multialign._samples import Samples, make_samples
from multialign._validation import (
    check_choice,
    check_count,
    check_entries,
    check_positive,
    check_samples,
    full_precision,
)
from multialign.costs import squared_euclidean_cost
from multialign.ops import gaussian_form

__all__ = ["MMDLoss", "mmd_loss"]

# A kernel matrix of at most this many entries is built, with derivatives of every order; a larger
# one is streamed in blocks.
_DENSE_ENTRIES = 2**16
# The median distance is that of at most this many samples, evenly spaced among all.
_MEDIAN_SAMPLES = 2048
# Samples at this part of the largest squared distance count as equal.
_EQUAL = 1e-14

# A kernel entry below this has no gradient to speak of, which is so from `_REACH` bandwidths on.
_NO_KERNEL = 1e-6
_REACH = math.sqrt(-2 * math.log(_NO_KERNEL))
# So many samples of each modality are looked at first; then so many of all, so many rows at once.
_FEW_ROWS = 16
_MANY_ROWS = 1024
_ROWS_AT_ONCE = 256

Bandwidth = float | Sequence[float] | Literal["median"]
Estimator = Literal["biased", "unbiased", "random_features"]


def mmd_loss(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    bandwidth: Bandwidth = "median",
    estimator: Estimator = "biased",
    num_features: int = 1024,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Compare every two modalities by their maximum mean discrepancy under a Gaussian kernel.

    .. math::
        L &= \frac{2}{M(M-1)} \sum_{i<j} \Big(\mathbb{E}\, k(x_i, x_i') + \mathbb{E}\, k(x_j, x_j')
            - 2\, \mathbb{E}\, k(x_i, x_j)\Big) \\
        k(x, y) &= \exp\Big(-\frac{\|x - y\|^2}{2 \sigma^2}\Big)

    The estimators of the squared discrepancy of two modalities:

    - "biased": the expectations run over all pairs of samples (V-statistic). Never negative, and 0
      for equal samples.
    - "unbiased": a sample is not paired with itself (U-statistic,
      :math:`\sum_{n \ne n'} w_n w_{n'} k / \sum_{n \ne n'} w_n w_{n'}`). Negative values are normal
      near equality. A modality with fewer than two samples of positive weight is out.
    - "random_features": the squared distance between mean random Fourier features. Never negative,
      linear in N, and equal to "biased" up to an error of the order of
      :math:`1/\sqrt{\mathrm{num\_features}}`. The frequencies are drawn anew at each call.

    Kernel matrices of more than 2^16 entries are never built: they are streamed in blocks, with
    memory O(N D), and then have first derivatives only.

    Args:
        features: M tensors :math:`(*\text{batch}, N_m, D)`, or one stacked tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative. A sample of weight 0 is absent; pairs with a modality that has no weight
            at all count 0.
        bandwidth: :math:`\sigma` in units of the features; or several, whose kernels are averaged;
            or "median", the median distance between two samples present in the union of all
            modalities (no gradient; 1 if that is 0). Of more than 2,048 samples together every
            second is taken for it, of more than 4,096 every third, and so on. A number far below
            the distances has no gradient: in 32 and more dimensions, 1.0 is one for normal samples.
        estimator: "biased", "unbiased" or "random_features".
        num_features: Number of random frequencies; each gives a sine and a cosine.
        generator: Draws the frequencies; None stands for torch's global generator.
        process_group: Given one, the loss is that of all ranks' samples together.

    Returns:
        A scalar, the mean over the batch; dimensionless, at most 2.

    Raises:
        ValueError: A shape, device, count or option is wrong, or "unbiased" meets N < 2.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        RuntimeError: :func:`torch.utils.checkpoint.checkpoint` repeats a draw from `generator`.
        MemoryError: The distances of "median", over the batch, are more than 2^28 entries.

    Warns:
        UserWarning: The bandwidth is a number under which every kernel entry between distinct
            samples is below 1e-6. This is looked at on the CPU, outside torch.compile, and among
            1,024 samples at most.

    References:
        Eq. 11-12 of :cite:t:`decalign:26`; :cite:t:`gretton:12`, Lemma 6 for the estimators;
        :cite:t:`rahimi:07` for the random features.

    Example:
        >>> import torch
        >>> from multialign import mmd_loss
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> y = torch.tensor([[2.0], [3.0], [4.0]])
        >>> mmd_loss([x, y], bandwidth=2.0)
        tensor(0.8415)
    """
    num_features = _check_options(bandwidth, estimator, num_features)
    ranks = Ranks(process_group)
    tensors, checked = ranks.gather(*check_samples(features, weights))
    if estimator == "unbiased":
        for m, x in enumerate(tensors):
            if x.shape[-2] < 2:
                raise ValueError(
                    f'estimator="unbiased" needs at least 2 samples of each modality; '
                    f"features[{m}] has N = {x.shape[-2]}"
                )

    with full_precision(tensors[0]):
        samples = make_samples(tensors, checked)
        sigmas = _bandwidths(bandwidth, samples)
        if bandwidth != "median":
            _warn_of_small_bandwidth(samples, sigmas)
        samples, sigmas = _in_units(samples, sigmas)
        if estimator == "random_features":
            first = samples.features[0]
            frequencies = normal([first.shape[-1], num_features], first, generator)
            (frequencies,) = ranks.broadcast([frequencies])
            loss = _random_feature_discrepancies(samples, sigmas, frequencies)
        else:
            loss = _kernel_discrepancies(samples, sigmas, unbiased=estimator == "unbiased")
        pairs = len(samples.features) * (len(samples.features) - 1) / 2
        return loss.mean() / pairs


class MMDLoss(GroupModule):
    r"""Loss that matches whole distributions across modalities: their squared MMD.

    .. math::
        L = \frac{2}{M(M-1)} \sum_{i<j} \operatorname{MMD}^2(x_i, x_j), \qquad
        k(x, y) = \exp\Big(-\frac{\|x - y\|^2}{2 \sigma^2}\Big)

    Called ``(features, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`mmd_loss` for the estimators, weights, units and errors.

    Args:
        bandwidth: :math:`\sigma` in units of the features, several of them, or "median".
        estimator: "biased", "unbiased" or "random_features".
        num_features: Number of random frequencies.
        generator: Draws the frequencies; None stands for torch's global generator.
        process_group: Given one, the loss is that of all ranks' samples together.

    References:
        Eq. 11-12 of :cite:t:`decalign:26`; :cite:t:`gretton:12`.

    Example:
        >>> import torch
        >>> from multialign import MMDLoss
        >>> loss = MMDLoss(bandwidth=[0.5, 1.0, 2.0])
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> loss([x, x])
        tensor(0.)
    """

    def __init__(
        self,
        bandwidth: Bandwidth = "median",
        estimator: Estimator = "biased",
        *,
        num_features: int = 1024,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(bandwidth, estimator, num_features)
        self.bandwidth = bandwidth
        self.estimator = estimator
        self.num_features = num_features
        self.generator = generator
        self.process_group = process_group

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M feature sets."""
        return mmd_loss(
            features,
            weights,
            bandwidth=self.bandwidth,
            estimator=self.estimator,
            num_features=self.num_features,
            generator=self.generator,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        text = f"bandwidth={self.bandwidth!r}, estimator={self.estimator!r}"
        if self.estimator == "random_features":
            text += f", num_features={self.num_features}"
        return text


def _in_units(samples: Samples, sigmas: list[Tensor]) -> tuple[Samples, list[Tensor]]:
    """Return features and bandwidths in units of the first bandwidth, but for a factor below 2.

    Squares of theirs then stay in the dtype's range. A power of two rounds nothing.
    """
    unit = torch.exp2(torch.log2(sigmas[0]).floor())
    features = [x / unit for x in samples.features]
    return samples._replace(features=features), [sigma / unit for sigma in sigmas]


def _kernel_discrepancies(samples: Samples, sigmas: list[Tensor], *, unbiased: bool) -> Tensor:
    """Return the sum of MMD^2 over pairs i < j, `(*batch)`."""
    present = samples.present
    within = []
    for x, mass in zip(samples.features, samples.masses, strict=True):
        total = _form(x, x, mass, mass, sigmas, distinct=unbiased)
        if unbiased:
            # Not 1 - sum w^2, which has no digits left where one sample has nearly all the weight.
            pairs = 2 * (mass[..., 1:] * mass[..., :-1].double().cumsum(-1)).sum(-1)
            several = (mass != 0).sum(-1) > 1
            total = torch.where(several, total / torch.where(several, pairs, 1.0), 0.0)
        within.append(total)
    if unbiased:
        counts = torch.stack([(mass != 0).sum(-1) for mass in samples.masses])
        present = present * (counts > 1)

    loss = samples.present.new_zeros(())
    for i, j in combinations(range(len(within)), 2):
        across = _form(
            samples.features[i],
            samples.features[j],
            samples.masses[i],
            samples.masses[j],
            sigmas,
        )
        loss = loss + present[i] * present[j] * (within[i] + within[j] - 2 * across)
    return loss.to(present.dtype)


def _form(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    q: Tensor,
    sigmas: list[Tensor],
    *,
    distinct: bool = False,
) -> Tensor:
    """Return p^T K q, `(*batch)`, with K the average over `sigmas` of the Gaussian kernels.

    In float64, and from float64 sums over rows: MMD^2 is a small difference of such forms. If
    `distinct`, no sample of what is then one set is paired with itself.
    """
    batch = p.shape[:-1]
    if p.numel() * q.shape[-1] > _DENSE_ENTRIES:
        flat = [t.reshape(-1, *t.shape[len(batch) :]) for t in (x, p)]
        # One tensor for both arguments marks the form as symmetric.
        other = flat if y is x else [t.reshape(-1, *t.shape[len(batch) :]) for t in (y, q)]
        precisions = [(0.5 / sigma.square()).expand(*batch, 1, 1).reshape(-1) for sigma in sigmas]
        form = gaussian_form(
            flat[0], other[0], flat[1], other[1], torch.stack(precisions, -1), distinct=distinct
        )
        return form.reshape(batch)
    cost = squared_euclidean_cost(x, y)
    kernels = [torch.exp(cost / (-2 * sigma.square())) for sigma in sigmas]
    kernel = torch.stack(kernels).mean(0) if len(kernels) > 1 else kernels[0]
    if distinct:
        # Subtract, so that an infinite sample still gives NaN.
        kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
    return (p.double() * (kernel @ q.unsqueeze(-1)).squeeze(-1)).sum(-1)


def _random_feature_discrepancies(
    samples: Samples, sigmas: list[Tensor], frequencies: Tensor
) -> Tensor:
    """Return the sum over pairs i < j of the squared distance of mean features, `(*batch)`."""
    # cos(w (x - y)) does not depend on the origin; large phases would lose their digits.
    origin = torch.cat([x.detach() for x in samples.features], -2).mean(-2, keepdim=True)
    embeddings = []
    for x, mass in zip(samples.features, samples.masses, strict=True):
        projection = (x - origin) @ frequencies
        phases = torch.cat([projection / sigma for sigma in sigmas], -1)
        waves = torch.cat([phases.cos(), phases.sin()], -1)
        embeddings.append((mass.unsqueeze(-2) @ waves).squeeze(-2))
    loss = frequencies.new_zeros(())
    for i, j in combinations(range(len(embeddings)), 2):
        distance = (embeddings[i] - embeddings[j]).square().sum(-1)
        loss = loss + samples.present[i] * samples.present[j] * distance
    return loss / (frequencies.shape[-1] * len(sigmas))


def _bandwidths(bandwidth: Bandwidth, samples: Samples) -> list[Tensor]:
    """Return each bandwidth, broadcastable to `(*batch, N, M)`."""
    first = samples.features[0]
    if bandwidth == "median":
        with torch.no_grad():
            return [_median_distance(samples)[..., None, None]]
    values = bandwidth if isinstance(bandwidth, Sequence) else [bandwidth]
    return [first.new_tensor(float(value)) for value in values]


def _warn_of_small_bandwidth(samples: Samples, sigmas: list[Tensor]) -> None:
    """Warn if all distinct samples are too far apart for the kernels: there is no gradient.

    Values are read on the CPU alone. A few samples show most often that there is no reason.
    """
    if torch.compiler.is_compiling() or sigmas[0].device.type != "cpu":
        return
    with torch.no_grad():
        reach = _REACH * torch.stack(sigmas).max()
        pooled = torch.cat(samples.features, -2)
        pooled = pooled[..., :: max(1, -(-pooled.shape[-2] // _MANY_ROWS)), :]
        few = torch.cat([x[..., :_FEW_ROWS, :] for x in samples.features], -2)
        try:
            close, apart = _compare_distances(few, few, reach)
            if close:
                return
            for rows in pooled.split(_ROWS_AT_ONCE, -2):
                close, others = _compare_distances(rows, pooled, reach)
                if close:
                    return
                apart = apart or others
        except RuntimeError:  # under torch.func.vmap no value can be read
            return
    if apart:
        warnings.warn(
            "the bandwidth is so small that every kernel entry between distinct samples is below "
            f"{_NO_KERNEL:g}, and the loss has no gradient; take "
            'bandwidth="median", or a number of the size of the distances between samples',
            stacklevel=3,
        )


def _compare_distances(x: Tensor, y: Tensor, reach: Tensor) -> tuple[bool, bool]:
    """Return whether any distinct samples are within reach, and whether any are not."""
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    close = bool(((distances > 0) & (distances <= reach)).any())
    return close, close or bool((distances > reach).any())


def _median_distance(samples: Samples) -> Tensor:
    """Return the median distance between two present samples of the union, `(*batch)`."""
    points = torch.cat(samples.features, -2)
    present = torch.cat([mass != 0 for mass in samples.masses], -1)
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


def _check_options(bandwidth: object, estimator: str, num_features: int) -> int:
    """Check the options and return num_features as an integer of Python."""
    check_choice("estimator", estimator, ("biased", "unbiased", "random_features"))
    if isinstance(bandwidth, str):
        check_choice("bandwidth given as a string", bandwidth, ("median",))
    elif isinstance(bandwidth, Sequence):
        if not bandwidth:
            raise ValueError("bandwidth must hold at least one number; got an empty sequence")
        for value in bandwidth:
            check_positive("each bandwidth", value)
    else:
        check_positive("bandwidth", bandwidth)
    return check_count("num_features", num_features)
