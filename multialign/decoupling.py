"""Cosine decoupling: push what is unique to a modality away from what it shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from multialign._samples import can_stack, fill_absent, reference_row, weigh
from multialign._validation import check_choice, check_tensors, check_weights, full_precision

__all__ = ["CosineDecouplingLoss", "cosine_decoupling_loss"]

Form = Literal["squared", "absolute", "signed"]
Reduction = Literal["mean", "sum", "none"]


def cosine_decoupling_loss(
    unique: Tensor | Sequence[Tensor],
    common: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    form: Form = "squared",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Measure how far the unique features of each modality are from orthogonal to its common ones.

    .. math::
        L = \sum_{m=1}^{M} \sum_n p_m^n \, \varphi(c_m^n), \qquad
        c_m^n = \frac{\langle u_m^n, v_m^n \rangle}{\|u_m^n\| \, \|v_m^n\|},

    where :math:`\varphi(c)` is :math:`c^2` ("squared"), :math:`|c|` ("absolute") or :math:`c`
    ("signed"), and :math:`p_m` are the weights of modality m divided by their sum. "signed" is
    Eq. 1 of :cite:t:`decalign:26` as printed; its minimum is reached by anti-parallel features,
    not by orthogonal ones, so it does not decouple. A zero vector has cosine 0 and zero gradient.

    Args:
        unique: M tensors :math:`(N_m, \dots)`; all dimensions after the first are one vector.
        common: M tensors of the same shapes.
        weights: None, or M tensors :math:`(N_m)` (or None), boolean or non-negative. A sample of
            weight 0 is absent, whatever stands in it.
        form: How a cosine is penalised.
        reduction: Over samples: "mean" is the weighted mean, "sum" the weighted sum, and "none"
            returns the weighted terms of each sample, summed over modalities (equal N needed).

    Returns:
        A scalar, or a tensor :math:`(N)` for ``reduction="none"``; dimensionless.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.

    References:
        Eq. 1 of :cite:t:`decalign:26`.

    Example:
        >>> import torch
        >>> from multialign import cosine_decoupling_loss
        >>> unique = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
        >>> common = [torch.tensor([[3.0, 0.0], [1.0, 0.0]])]
        >>> cosine_decoupling_loss(unique, common)
        tensor(0.5000)
    """
    _check_options(form, reduction)
    us = check_tensors("unique", unique, "(N, ...)", 2, 1)
    vs = check_tensors("common", common, "(N, ...)", 2, 1)
    _check_pairs(us, vs, reduction)
    checked = check_weights(weights, us, ())

    with full_precision(us[0]):
        us, vs = [u.flatten(1) for u in us], [v.flatten(1) for v in vs]
        masses, _, _ = weigh(us, checked)
        us, vs = (
            [
                x if weight is None else fill_absent(x, mass, reference_row(x, weight))
                for x, weight, mass in zip(xs, checked, masses, strict=True)
            ]
            for xs in (us, vs)
        )
        if reduction == "mean" and can_stack(us):
            us, vs, masses = [torch.stack(us)], [torch.stack(vs)], [torch.stack(masses)]
            checked = [None]
        terms = []
        for u, v, weight, mass in zip(us, vs, checked, masses, strict=True):
            cosine = _cosine(u, v)
            if form == "squared":
                cosine = cosine.square()
            elif form == "absolute":
                cosine = cosine.abs()
            if reduction == "mean":
                terms.append((mass * cosine).sum())
                continue
            if weight is not None:
                # An absent row has the cosine of another one, which may be NaN.
                cosine = torch.where(mass == 0, 0.0, weight * cosine)
            terms.append(cosine if reduction == "none" else cosine.sum())
        return torch.stack(terms).sum(0)


class CosineDecouplingLoss(nn.Module):
    r"""Loss that is 0 where unique and common features are orthogonal in every modality.

    .. math::
        L = \sum_{m=1}^{M} \operatorname{mean}_n \, \varphi\big(\cos(u_m^n, v_m^n)\big)

    Called ``(unique, common, weights=None)`` with M tensors :math:`(N_m, \dots)` each; see
    :func:`cosine_decoupling_loss` for shapes, weights and errors.

    Args:
        form: "squared", "absolute" or "signed" (Eq. 1 of :cite:t:`decalign:26` as printed, whose
            minimum is anti-parallel and not orthogonal).
        reduction: "mean", "sum" or "none", over samples.

    Example:
        >>> import torch
        >>> from multialign import CosineDecouplingLoss
        >>> loss = CosineDecouplingLoss()
        >>> same = [torch.ones(4, 3), torch.ones(4, 5)]
        >>> loss(same, same)
        tensor(2.)
    """

    def __init__(self, form: Form = "squared", reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(form, reduction)
        self.form = form
        self.reduction = reduction

    def forward(
        self,
        unique: Tensor | Sequence[Tensor],
        common: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of M pairs of feature sets."""
        return cosine_decoupling_loss(
            unique, common, weights, form=self.form, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"form={self.form!r}, reduction={self.reduction!r}"


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    """Return the cosines of the rows of two matrices, 0 with zero gradient for a zero row."""
    u, v = _rescale(u), _rescale(v)
    uu, vv = u.square().sum(-1), v.square().sum(-1)
    zero = (uu == 0) | (vv == 0)
    product = torch.where(zero, uu.new_zeros(()), (u * v).sum(-1))
    return product / torch.where(zero, uu.new_ones(()), uu * vv).sqrt()


def _rescale(x: Tensor) -> Tensor:
    """Divide each row by its largest entry: squares of tiny or huge rows leave the dtype's range.

    The cosine does not depend on the scale, so it is a constant for the gradient.
    """
    scale = x.detach().abs().amax(-1, keepdim=True)
    return x / torch.where(scale == 0, scale.new_ones(()), scale)


def _check_options(form: str, reduction: str) -> None:
    check_choice("form", form, ("squared", "absolute", "signed"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def _check_pairs(us: list[Tensor], vs: list[Tensor], reduction: str) -> None:
    if len(us) != len(vs):
        raise ValueError(
            f"unique and common must hold the same number of modalities; "
            f"got {len(us)} and {len(vs)}"
        )
    for m, (u, v) in enumerate(zip(us, vs, strict=True)):
        if u.shape != v.shape:
            raise ValueError(
                f"common[{m}] must have the shape of unique[{m}], {tuple(u.shape)}; "
                f"got {tuple(v.shape)}"
            )
        if u.shape[1:].numel() == 0:
            raise ValueError(f"unique[{m}] must have at least one feature; got {tuple(u.shape)}")
        if u.dtype != v.dtype:
            raise TypeError(
                f"common[{m}] must have the dtype of unique[{m}], {u.dtype}; got {v.dtype}"
            )
        if u.device != v.device:
            raise ValueError(
                f"common[{m}] must be on the device of unique[{m}], {u.device}; got {v.device}"
            )
    counts = [len(u) for u in us]
    if reduction == "none" and len(set(counts)) > 1:
        raise ValueError(f'reduction="none" needs modalities of equal N; got N = {counts}')
