"""Nuclear norms of products of symmetric matrices with few distinct eigenvalues.

A covariance of few samples has few large eigenvalues, and all others equal its floor; its square
root R likewise. Where R_i is a multiple of the identity outside the span of p_i eigenvectors, and
R_j outside that of p_j, their product is one outside a space of p_i + p_j dimensions. So its
singular values, and its orthogonal polar factor Q, need a decomposition in that space alone: with B
an orthonormal basis of it and P the polar factor there, Q = I + B (P - I) B^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.ops.batching import register_batched_vmap

__all__ = ["nuclear_norms", "nuclear_norms_backward"]

# Eigenvalues that differ by less are taken as equal, in units of the rounding of the entries.
_ROUNDINGS = 8
# Up to this share w of the dimensions the decomposition is one in the space; w + w^2 <= 1, so that
# B and P have room where Q would be.
_LARGEST_SHARE = 0.6
# Pairs are decomposed together whose spaces have equally many dimensions, up to a multiple of this.
_WIDTH_STEP = 8


@torch.library.custom_op(
    "multialign::nuclear_norms",
    mutates_args=(),
    schema=(
        "(Tensor root_i, Tensor values_i, Tensor vectors_i, Tensor root_j, Tensor values_j, "
        "Tensor vectors_j, float rounding, bool factors) -> (Tensor, Tensor)"
    ),
)
def nuclear_norms(
    root_i: Tensor,
    values_i: Tensor,
    vectors_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    vectors_j: Tensor,
    rounding: float,
    factors: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sums of the singular values of all products R_j R_i.

    An operator of its own: the dimension of each space is read from the data.

    Args:
        root_i: R_i, `(B, K_i, D, D)`, finite.
        values_i: Its eigenvalues, `(B, K_i, D)`, ascending, non-negative.
        vectors_i: Its eigenvectors, `(B, K_i, D, D)`.
        root_j: R_j, `(B, K_j, D, D)`.
        values_j: `(B, K_j, D)`.
        vectors_j: `(B, K_j, D, D)`.
        rounding: Relative to the largest one, the error of the eigenvalues of R^2.
        factors: Whether there will be a derivative.

    Returns:
        `(B, K_i, K_j)`, and the polar factors, `(B, K_i, K_j, D^2)`, for
        `nuclear_norms_backward` to read, or nothing.
    """
    dim = root_i.shape[-1]
    groups = _groups(values_i, values_j, rounding)
    # All eigenvectors of both, one a row, the last ones those of the largest eigenvalues.
    rows = torch.cat([vectors.mT.reshape(-1, dim) for vectors in (vectors_i, vectors_j)])
    norms = root_i.flatten(2) @ root_j.flatten(2).mT  # traces of the products
    kept = root_i.new_empty((*norms.shape, dim**2 if factors else 0))
    for width, count_i, where in groups:
        batch, k, l = where
        left, right = root_j[batch, l], root_i[batch, k]
        if width == dim:
            norms[where], polar = _polar(left @ right, factors)
            if polar is not None:
                kept[where] = polar.flatten(1)
            continue
        # As many eigenvectors of R_i as are large, the rest of R_j.
        turn = torch.arange(width, device=rows.device)
        i = (batch * root_i.shape[1] + k) * dim + dim - count_i
        j = (batch * root_j.shape[1] + l) * dim + dim - width + values_i.numel()
        first = torch.where(turn < count_i.unsqueeze(-1), i.unsqueeze(-1), j.unsqueeze(-1))
        basis = torch.linalg.qr(rows[first + turn].mT).Q
        inside = (basis.mT @ left) @ (right @ basis)
        total, polar = _polar(inside, factors)
        norms[where] += total - inside.diagonal(dim1=-2, dim2=-1).sum(-1)
        if polar is not None:
            polar.diagonal(dim1=-2, dim2=-1).sub_(1)
            packed = torch.cat([basis.flatten(1), polar.flatten(1)], 1)
            kept[(*where, slice(packed.shape[1]))] = packed
    return norms, kept


@nuclear_norms.register_fake
def _(
    root_i: Tensor,
    values_i: Tensor,
    vectors_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    vectors_j: Tensor,
    rounding: float,
    factors: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*values_i.shape[:2], values_j.shape[1])
    dim = values_i.shape[-1]
    return root_i.new_empty(shape), root_i.new_empty((*shape, dim**2 if factors else 0))


@torch.library.custom_op(
    "multialign::nuclear_norms_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor root_i, Tensor values_i, Tensor root_j, Tensor values_j, "
        "Tensor kept, float rounding) -> (Tensor, Tensor)"
    ),
)
def nuclear_norms_backward(
    grad: Tensor,
    root_i: Tensor,
    values_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    kept: Tensor,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives by R_i and R_j, given those by the norms, `grad` `(B, K_i, K_j)`.

    The derivative by a product R_j R_i is its polar factor Q.
    """
    dim = root_i.shape[-1]
    # The part of Q that is the identity.
    by_i = (grad @ root_j.flatten(2)).view_as(root_i)
    by_j = (grad.mT @ root_i.flatten(2)).view_as(root_j)
    flat_i, flat_j = by_i.flatten(0, 1), by_j.flatten(0, 1)
    for width, _, where in _groups(values_i, values_j, rounding):
        batch, k, l = where
        weight = grad[where][:, None, None]
        packed = kept[where]
        if width == dim:
            outer = weight * (packed.view(-1, dim, dim) - torch.eye(dim).to(packed))
            part_i, part_j = root_j[batch, l] @ outer, outer @ root_i[batch, k]
        else:
            basis = packed[:, : dim * width].view(-1, dim, width)
            inner = packed[:, dim * width : (dim + width) * width].view(-1, width, width)
            outer = (weight * inner) @ basis.mT
            part_i = (root_j[batch, l] @ basis) @ outer
            part_j = basis @ (outer @ root_i[batch, k])
        flat_i.index_add_(0, batch * root_i.shape[1] + k, part_i)
        flat_j.index_add_(0, batch * root_j.shape[1] + l, part_j)
    return by_i, by_j


@nuclear_norms_backward.register_fake
def _(
    grad: Tensor,
    root_i: Tensor,
    values_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    kept: Tensor,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(root_i), torch.empty_like(root_j)


register_batched_vmap(nuclear_norms)
register_batched_vmap(nuclear_norms_backward)


class _Group(NamedTuple):
    """Pairs whose spaces have the same number of dimensions."""

    width: int
    count_i: Tensor
    """How many of them are for the eigenvectors of R_i, `(P,)`."""
    where: tuple[Tensor, ...]
    """Indices into `(B, K_i, K_j)`, `(P,)` each."""


def _groups(values_i: Tensor, values_j: Tensor, rounding: float) -> Iterator[_Group]:
    dim = values_i.shape[-1]
    large_i, large_j = _large(values_i, rounding), _large(values_j, rounding)
    widths = large_i.unsqueeze(-1) + large_j.unsqueeze(-2)
    widths = (widths.clamp_min(1) + _WIDTH_STEP - 1) // _WIDTH_STEP * _WIDTH_STEP
    widths = torch.where(widths > _LARGEST_SHARE * dim, dim, widths)
    for width in widths.unique().tolist():
        batch, k, l = where = (widths == width).nonzero(as_tuple=True)
        yield _Group(width, large_i[batch, k], where)


def _large(values: Tensor, rounding: float) -> Tensor:
    """Return how many eigenvalues each matrix has above its least one."""
    squares = values.square()
    above = squares[..., :1] + _ROUNDINGS * rounding * squares[..., -1:]
    return (squares > above).sum(-1)


def _polar(matrix: Tensor, factors: bool) -> tuple[Tensor, Tensor | None]:
    if not factors:
        return torch.linalg.svdvals(matrix).sum(-1), None
    u, s, vh = torch.linalg.svd(matrix)
    return s.sum(-1), u @ vh
