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
from multialign._samples import Samples, can_stack, make_samples
from multialign._validation import check_choice, check_count, check_samples, full_precision
from multialign.kernels import (
    Bandwidth,
    Kernel,
    check_kernel,
    is_held,
    kernel_form,
    kernel_units,
)

__all__ = ["MMDLoss", "mmd_loss"]

# A kernel entry below this has no gradient to speak of, which is so from `_REACH` bandwidths on.
_NO_KERNEL = 1e-6
_REACH = math.sqrt(-2 * math.log(_NO_KERNEL))
# So many samples of each modality are looked at first; then so many of all, so many rows at once.
_FEW_ROWS = 16
_MANY_ROWS = 1024
_ROWS_AT_ONCE = 256

Estimator = Literal["biased", "unbiased", "random_features"]


def mmd_loss(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    bandwidth: Bandwidth = "median",
    estimator: Estimator = "biased",
    kernel: Kernel = "gaussian",
    num_features: int = 1024,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Compare every two modalities by their squared maximum mean discrepancy.

    .. math::
        L &= \frac{2}{M(M-1)} \sum_{i<j} \Big(\mathbb{E}\, k(x_i, x_i') + \mathbb{E}\, k(x_j, x_j')
            - 2\, \mathbb{E}\, k(x_i, x_j)\Big) \\
        k(x, y) &= \exp\Big(-\frac{\|x - y\|^2}{2 \sigma^2}\Big)

    With ``kernel="energy"``, :math:`k(x, y) = -\|x - y\|`, and the discrepancy is the energy
    distance of :cite:t:`szekely:04`. It has no bandwidth, and its gradient does not vanish however
    far the modalities are apart; at coincident points it is 0.

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
        kernel: "gaussian", or "energy", for which the bandwidth is ignored and "random_features"
            raises.
        num_features: Number of random frequencies; each gives a sine and a cosine.
        generator: Draws the frequencies; None stands for torch's global generator.
        process_group: Given one, the loss is that of all ranks' samples together.

    Returns:
        A scalar, the mean over the batch; dimensionless and at most 2, or for "energy" in units of
        the features.

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
        :cite:t:`rahimi:07` for the random features; :cite:t:`sejdinovic:13` for the energy
        distance as an MMD.

    Example:
        >>> import torch
        >>> from multialign import mmd_loss
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> y = torch.tensor([[2.0], [3.0], [4.0]])
        >>> mmd_loss([x, y], bandwidth=2.0)
        tensor(0.8415)
    """
    num_features = _check_options(bandwidth, estimator, kernel, num_features)
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
        if bandwidth != "median" and kernel == "gaussian":
            _warn_of_small_bandwidth(samples, bandwidth)
        samples, sigmas, factor = kernel_units(samples, kernel, bandwidth)
        if estimator == "random_features":
            first = samples.features[0]
            frequencies = normal([first.shape[-1], num_features], first, generator)
            (frequencies,) = ranks.broadcast([frequencies])
            loss = _random_feature_discrepancies(samples, sigmas, frequencies)
        else:
            loss = _kernel_discrepancies(samples, sigmas, unbiased=estimator == "unbiased")
        loss = (factor * loss).to(samples.present.dtype)
        pairs = len(samples.features) * (len(samples.features) - 1) / 2
        return loss.mean() / pairs


class MMDLoss(GroupModule):
    r"""Loss that matches whole distributions across modalities: their squared MMD.

    .. math::
        L = \frac{2}{M(M-1)} \sum_{i<j} \operatorname{MMD}^2(x_i, x_j), \qquad
        k(x, y) = \exp\Big(-\frac{\|x - y\|^2}{2 \sigma^2}\Big)
        \text{ or } -\|x - y\|

    Called ``(features, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)`; see
    :func:`mmd_loss` for the estimators, weights, units and errors.

    Args:
        bandwidth: :math:`\sigma` in units of the features, several of them, or "median".
        estimator: "biased", "unbiased" or "random_features".
        kernel: "gaussian", or "energy", which has no bandwidth.
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
        kernel: Kernel = "gaussian",
        *,
        num_features: int = 1024,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(bandwidth, estimator, kernel, num_features)
        self.bandwidth = bandwidth
        self.estimator = estimator
        self.kernel = kernel
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
            kernel=self.kernel,
            num_features=self.num_features,
            generator=self.generator,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        text = f"bandwidth={self.bandwidth!r}, estimator={self.estimator!r}"
        if self.kernel != "gaussian":
            text += f", kernel={self.kernel!r}"
        if self.estimator == "random_features":
            text += f", num_features={self.num_features}"
        return text


def _kernel_discrepancies(samples: Samples, sigmas: list[Tensor], *, unbiased: bool) -> Tensor:
    """Return the sum of MMD^2 over pairs i < j, `(*batch)`."""
    edges = list(combinations(range(len(samples.features)), 2))
    present = samples.present
    within, across = _kernel_forms(samples, edges, sigmas, distinct=unbiased)
    if unbiased:
        pairs, several = [], []
        for mass in samples.masses:
            # Not 1 - sum w^2, which has no digits left where one sample has nearly all the weight.
            pairs.append(2 * (mass[..., 1:] * mass[..., :-1].double().cumsum(-1)).sum(-1))
            several.append((mass != 0).sum(-1) > 1)
        counted = torch.stack(several)
        within = torch.where(counted, within / torch.where(counted, torch.stack(pairs), 1.0), 0.0)
        present = present * counted
    (here, there), (own, other) = (
        [torch.stack([x[edge[side]] for edge in edges]) for side in (0, 1)]
        for x in (present, within)
    )
    return (here * there * (own + other - 2 * across)).sum(0)


def _kernel_forms(
    samples: Samples, edges: Sequence[tuple[int, int]], sigmas: list[Tensor], *, distinct: bool
) -> tuple[Tensor, Tensor]:
    """Return p^T K q of each modality with itself, `(M, *batch)`, and of each edge."""
    xs, ps = samples.features, samples.masses
    count = len(xs)
    if not can_stack(xs):
        within = [
            kernel_form(x, x, p, p, sigmas, distinct=distinct) for x, p in zip(xs, ps, strict=True)
        ]
        across = [kernel_form(xs[i], xs[j], ps[i], ps[j], sigmas) for i, j in edges]
        return torch.stack(within), torch.stack(across)
    # What is true of one matrix is to be true of all.
    held = is_held(ps[0].numel() * ps[0].shape[-1])
    own = [] if distinct or not held else [(m, m) for m in range(count)]
    x, y, p, q = (
        torch.stack([one[pair[side]] for pair in [*own, *edges]])
        for one in (xs, ps)
        for side in (0, 1)
    )
    forms = kernel_form(x, y, p, q, sigmas, held=held)
    if own:
        return forms[:count], forms[count:]
    x, p = torch.stack(xs), torch.stack(ps)
    return kernel_form(x, x, p, p, sigmas, distinct=distinct, held=held), forms


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


def _warn_of_small_bandwidth(samples: Samples, bandwidth: float | Sequence[float]) -> None:
    """Warn if all distinct samples are too far apart for the kernels: there is no gradient.

    Values are read on the CPU alone. A few samples show most often that there is no reason.
    """
    if torch.compiler.is_compiling() or samples.present.device.type != "cpu":
        return
    with torch.no_grad():
        widest = max(bandwidth) if isinstance(bandwidth, Sequence) else bandwidth
        reach = _REACH * float(widest)
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


def _compare_distances(x: Tensor, y: Tensor, reach: float) -> tuple[bool, bool]:
    """Return whether any distinct samples are within reach, and whether any are not."""
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    close = bool(((distances > 0) & (distances <= reach)).any())
    return close, close or bool((distances > reach).any())


def _check_options(bandwidth: object, estimator: str, kernel: str, num_features: int) -> int:
    """Check the options and return num_features as an integer of Python."""
    check_choice("estimator", estimator, ("biased", "unbiased", "random_features"))
    check_kernel(kernel, bandwidth)
    if kernel == "energy" and estimator == "random_features":
        raise ValueError(
            'kernel="energy" has no random features, since -|x - y| is unbounded; '
            'take estimator="biased" or "unbiased"'
        )
    return check_count("num_features", num_features)
