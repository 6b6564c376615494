"""Hilbert-Schmidt independence of the unique and the common features of each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from multialign._distributed import GroupModule, ProcessGroup, Ranks
from multialign._samples import make_samples
from multialign._validation import (
    check_alike,
    check_choice,
    check_positive,
    check_tensors,
    check_weights,
    full_precision,
)
from multialign.costs import squared_euclidean_cost
from multialign.kernels import is_held, median_distance
from multialign.ops import gaussian_form, gaussian_matvec

__all__ = ["HSICLoss", "hsic_loss"]

Width = float | Literal["median"]
Estimator = Literal["biased", "unbiased"]

# The unbiased estimator divides by n - 3.
_FEWEST = 4
# A criterion of a side with itself below this is rounding: the side is constant.
_CONSTANT = 1e-30
_CONSTANT_STREAMED = 1e-13


def hsic_loss(
    unique: Tensor | Sequence[Tensor],
    common: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    bandwidth: Width | Sequence[Width] = "median",
    estimator: Estimator = "biased",
    normalize: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Measure how much the unique features of each modality depend on its common ones.

    With the Gaussian kernel matrices K of the unique and L of the common features of a modality,
    centred by its normalised weights p,

    .. math::
        L = \sum_{m=1}^{M} \operatorname{HSIC}(u_m, v_m), \qquad
        \operatorname{HSIC}(u, v) = \sum_{n, n'} p_n p_{n'} \bar K_{n n'} \bar L_{n n'}.

    With equal weights this is :math:`\operatorname{tr}(K H L H) / N^2`. In the population it is 0
    if and only if u and v are independent; a cosine of 0 says much less. The estimators:

    - "biased": the above, a V-statistic. Never negative, and of the order of 1/N for independent
      features.
    - "unbiased": the U-statistic of :cite:t:`song:12`. Of independent features its mean is 0, and
      negative values are normal. A modality with fewer than four samples is out.

    Kernel matrices of more than 2^16 entries are never built: they are streamed in blocks, with
    memory O(N D), and then have first derivatives only. Sums are in float64.

    Args:
        unique: M tensors :math:`(*\text{batch}, N_m, D_m)`, or one stacked tensor.
        common: M tensors :math:`(*\text{batch}, N_m, D_m')`.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative; boolean alone for "unbiased". A sample of weight 0 is absent, and a
            modality without weight counts 0.
        bandwidth: :math:`\sigma` of both kernels in units of the features; or "median", for each
            side the median distance between its samples, as in :func:`mmd_loss`; or a pair of
            these, for the unique and the common side.
        estimator: "biased" or "unbiased".
        normalize: Divide by :math:`\sqrt{\operatorname{HSIC}(u, u) \operatorname{HSIC}(v, v)}`,
            which gives the centred kernel alignment (CKA), at most 1. A constant side has the value
            0 with zero gradient.
        process_group: Given one, the loss is that of all ranks' samples together.

    Returns:
        A scalar, the mean over the batch; dimensionless.

    Raises:
        ValueError: A shape, device, count or option is wrong, or "unbiased" meets N < 4.
        TypeError: An argument is no floating-point tensor, dtypes differ, or "unbiased" is given
            weights that are not boolean.
        MemoryError: The distances of "median", over the batch, are more than 2^28 entries.

    References:
        :cite:t:`gretton:07` for the V-statistic (:cite:t:`gretton:05` divides by
        :math:`(N-1)^2`); :cite:t:`song:12`; :cite:t:`cortes:12` for the alignment.

    Example:
        >>> import torch
        >>> from multialign import cosine_decoupling_loss, hsic_loss
        >>> angle = torch.linspace(0, 6.2832, 101)[:-1]
        >>> unique = torch.stack([angle.cos(), 0 * angle], 1)
        >>> common = torch.stack([0 * angle, angle.sin()], 1)
        >>> cosine_decoupling_loss([unique], [common])
        tensor(0.)
        >>> hsic_loss([unique], [common], normalize=True)
        tensor(0.0657)
    """
    widths = _check_options(bandwidth, estimator, normalize)
    us = check_tensors("unique", unique, "(*batch, N, D)", 2, 1)
    vs = check_tensors("common", common, "(*batch, N, D)", 2, 1)
    _check_pairs(us, vs)
    unbiased = estimator == "unbiased"
    if unbiased:
        _check_boolean(weights)
    checked = check_weights(weights, us, us[0].shape[:-2])
    ranks = Ranks(process_group)

    with full_precision(us[0]):
        terms = []
        for m, (u, v, weight) in enumerate(zip(us, vs, checked, strict=True)):
            rows, given = ranks.gather([torch.cat([u, v], -1)], [weight])
            if unbiased and rows[0].shape[-2] < _FEWEST:
                raise ValueError(
                    f'estimator="unbiased" needs at least {_FEWEST} samples of each modality; '
                    f"unique[{m}] has N = {rows[0].shape[-2]}"
                )
            samples = make_samples(rows, given)
            x, mass = samples.features[0].double(), samples.masses[0].double()
            sides = x.split([u.shape[-1], v.shape[-1]], -1)
            scaled = [_in_bandwidths(s, mass, w) for s, w in zip(sides, widths, strict=True)]
            terms.append(_criterion(scaled, mass, unbiased, normalize))
        return torch.stack(terms).sum(0).mean().to(us[0].dtype)


class HSICLoss(GroupModule):
    r"""Loss that is 0, up to its estimate, where unique and common features are independent.

    .. math::
        L = \sum_{m=1}^{M} \sum_{n, n'} p_n p_{n'} \bar K_{n n'} \bar L_{n n'}

    Called ``(unique, common, weights=None)`` with M tensors :math:`(*\text{batch}, N_m, D)` each,
    whose D may differ; see :func:`hsic_loss` for kernels, weights, units and errors.

    Args:
        bandwidth: :math:`\sigma` in units of the features, "median", or a pair of these.
        estimator: "biased" or "unbiased".
        normalize: Whether to divide by the criteria of each side with itself (CKA).
        process_group: Given one, the loss is that of all ranks' samples together.

    References:
        :cite:t:`gretton:07`; :cite:t:`song:12`.

    Example:
        >>> import torch
        >>> from multialign import HSICLoss
        >>> loss = HSICLoss(bandwidth=1.0, normalize=True)
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
        >>> loss([x], [x])
        tensor(1.)
    """

    def __init__(
        self,
        bandwidth: Width | Sequence[Width] = "median",
        estimator: Estimator = "biased",
        normalize: bool = False,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(bandwidth, estimator, normalize)
        self.bandwidth = bandwidth
        self.estimator = estimator
        self.normalize = normalize
        self.process_group = process_group

    def forward(
        self,
        unique: Tensor | Sequence[Tensor],
        common: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M pairs of feature sets."""
        return hsic_loss(
            unique,
            common,
            weights,
            bandwidth=self.bandwidth,
            estimator=self.estimator,
            normalize=self.normalize,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"bandwidth={self.bandwidth!r}, estimator={self.estimator!r}, "
            f"normalize={self.normalize!r}"
        )


def _in_bandwidths(x: Tensor, mass: Tensor, width: Width) -> Tensor:
    """Return one side in units of its bandwidth, which carries no gradient."""
    if isinstance(width, str):
        with torch.no_grad():
            median = median_distance([x], [mass])
        return x / median[..., None, None]
    return x / width


def _criterion(sides: Sequence[Tensor], mass: Tensor, unbiased: bool, normalize: bool) -> Tensor:
    """Return HSIC or CKA of two sides in units of their bandwidths, `(*batch)`."""
    streamed = not is_held(mass.numel() * mass.shape[-1])
    sums = _Streamed(sides, mass, unbiased) if streamed else _Held(sides, mass, unbiased)
    both = sums.criterion(0, 1)
    if not normalize:
        return both
    least = _CONSTANT_STREAMED if streamed else _CONSTANT
    own = torch.stack([sums.criterion(i, i) for i in (0, 1)])
    constant = (own <= least).any(0)
    roots = torch.where(constant, 1.0, own).sqrt()
    zero = 0 * own.detach().sum(0)  # NaN where the other side is
    return torch.where(constant, zero, both / (roots[0] * roots[1]))


class _Sums:
    """Sums over the kernel matrices of two sides, without the diagonal if `distinct`."""

    def __init__(self, sides: Sequence[Tensor], mass: Tensor, distinct: bool) -> None:
        self.sides, self.distinct = sides, distinct
        # The weights of "unbiased" are those of a mask.
        self.weights = (mass != 0).double() if distinct else mass
        self.rows = [self.row_sums(i) for i in (0, 1)]

    def row_sums(self, i: int) -> Tensor:
        """Return sum_n' p_n' K_nn', `(*batch, N)`."""
        raise NotImplementedError

    def product(self, i: int, j: int) -> Tensor:
        """Return sum_nn' p_n p_n' K_nn' L_nn', `(*batch)`."""
        raise NotImplementedError

    def criterion(self, i: int, j: int) -> Tensor:
        """Return HSIC of sides i and j, `(*batch)`."""
        p, a, b = self.weights, self.rows[i], self.rows[j]
        product, cross = self.product(i, j), (p * a * b).sum(-1)
        totals = (p * a).sum(-1) * (p * b).sum(-1)
        if not self.distinct:
            return product - 2 * cross + totals
        n = p.sum(-1)
        enough = n >= _FEWEST
        n = torch.where(enough, n, float(_FEWEST))
        value = product + totals / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)
        return torch.where(enough, value / (n * (n - 3)), 0.0)


class _Held(_Sums):
    """Sums of matrices that are built.

    They hold the kernel minus 1, exact where it is close to 1: centring removes any constant. Then
    the diagonal is 0 by itself.
    """

    def __init__(self, sides: Sequence[Tensor], mass: Tensor, distinct: bool) -> None:
        self.matrices = [torch.expm1(squared_euclidean_cost(x, x) / -2) for x in sides]
        super().__init__(sides, mass, distinct)

    def row_sums(self, i: int) -> Tensor:
        return (self.matrices[i] @ self.weights.unsqueeze(-1)).squeeze(-1)

    def product(self, i: int, j: int) -> Tensor:
        products = (self.matrices[i] * self.matrices[j]) @ self.weights.unsqueeze(-1)
        return (self.weights * products.squeeze(-1)).sum(-1)


class _Streamed(_Sums):
    """Sums of matrices that are never held."""

    def row_sums(self, i: int) -> Tensor:
        x, p = self._flat(self.sides[i]), self._flat_weights()
        return gaussian_matvec(x, p, self._precisions(x), distinct=self.distinct).view_as(
            self.weights
        )

    def product(self, i: int, j: int) -> Tensor:
        # The product of two Gaussian kernels is the Gaussian kernel of both sides together.
        x, p = self._flat(torch.cat([self.sides[i], self.sides[j]], -1)), self._flat_weights()
        form = gaussian_form(x, x, p, p, self._precisions(x), distinct=self.distinct)
        return form.view(self.weights.shape[:-1])

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[-2:])

    def _flat_weights(self) -> Tensor:
        return self.weights.reshape(-1, self.weights.shape[-1])

    def _precisions(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 1), 0.5)


def _check_options(bandwidth: object, estimator: str, normalize: object) -> list[Width]:
    """Check the options and return the bandwidth of each side."""
    check_choice("estimator", estimator, ("biased", "unbiased"))
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False; got {normalize!r}")
    if isinstance(bandwidth, Sequence) and not isinstance(bandwidth, str):
        if len(bandwidth) != 2:
            raise ValueError(
                "bandwidth must be a number, 'median', or a pair of these, for the unique and the "
                f"common side; got {len(bandwidth)} values"
            )
        return [_check_width(f"bandwidth[{i}]", width) for i, width in enumerate(bandwidth)]
    return [_check_width("bandwidth", bandwidth)] * 2


def _check_width(name: str, width: object) -> Width:
    if isinstance(width, str):
        check_choice(f"{name} given as a string", width, ("median",))
        return "median"
    return check_positive(name, width)


def _check_pairs(us: list[Tensor], vs: list[Tensor]) -> None:
    if len(us) != len(vs):
        raise ValueError(
            f"unique and common must hold the same number of modalities; "
            f"got {len(us)} and {len(vs)}"
        )
    check_alike(
        "unique and common",
        [*us, *vs],
        [f"{name}[{m}]" for name in ("unique", "common") for m in range(len(us))],
    )
    for m, (u, v) in enumerate(zip(us, vs, strict=True)):
        if u.shape[:-2] != us[0].shape[:-2]:
            raise ValueError(
                f"unique[{m}] must have the batch dimensions of unique[0], "
                f"{tuple(us[0].shape[:-2])}; got {tuple(u.shape[:-2])}"
            )
        if v.shape[:-1] != u.shape[:-1]:
            raise ValueError(
                f"common[{m}] must have shape {(*u.shape[:-1], 'D')}, with the batch and N of "
                f"unique[{m}]; got {tuple(v.shape)}"
            )
        if 0 in (u.shape[-1], v.shape[-1]):
            raise ValueError(
                f"unique[{m}] and common[{m}] must have at least one feature; "
                f"got D = {u.shape[-1]} and {v.shape[-1]}"
            )


def _check_boolean(weights: object) -> None:
    """Raise unless weights are a mask: samples are counted, and cannot count in part."""
    given = weights if isinstance(weights, Sequence) else [weights]
    for m, weight in enumerate(given):
        if isinstance(weight, Tensor) and weight.dtype != torch.bool:
            raise TypeError(
                f'weights[{m}] must be boolean with estimator="unbiased", which counts samples; '
                f'got {weight.dtype}. Give weights != 0, or take estimator="biased"'
            )
