"""Polar factors of products of two symmetric matrices with few distinct eigenvalues.

A covariance of few samples has few large eigenvalues, and all others equal its floor; its square
root R likewise. Where R_i is a multiple of the identity outside the span of p_i eigenvectors, and
R_j outside that of p_j, their product is one outside a space of p_i + p_j dimensions, so that its
singular values need a decomposition in that space alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multialign.ops.batching import register_batched_vmap

__all__ = ["polar_product"]

# Eigenvalues that differ by less are taken as equal, in units of the rounding of the entries.
_ROUNDINGS = 8
# Above this share of the dimensions a decomposition in the space is no faster than one in all.
_LARGEST_SHARE = 0.7


@torch.library.custom_op(
    "multialign::polar_product",
    mutates_args=(),
    schema=(
        "(Tensor product, Tensor values_i, Tensor vectors_i, Tensor values_j, Tensor vectors_j, "
        "float rounding, bool factors) -> (Tensor, Tensor)"
    ),
)
def polar_product(
    product: Tensor,
    values_i: Tensor,
    vectors_i: Tensor,
    values_j: Tensor,
    vectors_j: Tensor,
    rounding: float,
    factors: bool,
) -> tuple[Tensor, Tensor]:
    """Return nuclear norms and orthogonal polar factors of all products R_j R_i.

    An operator of its own: the dimension of the space is read from the data.

    Args:
        product: `(B, K_i, K_j, D, D)`, finite.
        values_i: Eigenvalues of R_i, `(B, K_i, D)`, ascending, non-negative.
        vectors_i: Its eigenvectors, `(B, K_i, D, D)`.
        values_j: Of R_j, `(B, K_j, D)`.
        vectors_j: `(B, K_j, D, D)`.
        rounding: Relative to the largest one, the error of the eigenvalues of R^2.
        factors: Whether the factors are wanted.

    Returns:
        `(B, K_i, K_j)` and `(B, K_i, K_j, D, D)`, or the latter empty.
    """
    dim = product.shape[-1]
    large_i, large_j = _large(values_i, rounding), _large(values_j, rounding)
    if large_i + large_j > _LARGEST_SHARE * dim:
        norms, polar = _polar(product, factors)
        return norms, product.new_empty(product.shape[0], 0) if polar is None else polar
    pair = product.shape[:-2]
    basis = torch.cat(
        [
            vectors_i[..., dim - large_i :].unsqueeze(-3).expand(*pair, dim, large_i),
            vectors_j[..., dim - large_j :].unsqueeze(-4).expand(*pair, dim, large_j),
        ],
        -1,
    )
    basis = torch.linalg.qr(basis).Q
    inside = basis.mT @ product @ basis
    norms, polar = _polar(inside, factors)
    norms = norms + _trace(product) - _trace(inside)
    if polar is None:
        return norms, product.new_empty(product.shape[0], 0)
    polar.diagonal(dim1=-2, dim2=-1).sub_(1)
    polar = basis @ polar @ basis.mT
    polar.diagonal(dim1=-2, dim2=-1).add_(1)
    return norms, polar


@polar_product.register_fake
def _(
    product: Tensor,
    values_i: Tensor,
    vectors_i: Tensor,
    values_j: Tensor,
    vectors_j: Tensor,
    rounding: float,
    factors: bool,
) -> tuple[Tensor, Tensor]:
    norms = product.new_empty(product.shape[:-2])
    return norms, torch.empty_like(product) if factors else product.new_empty(product.shape[0], 0)


register_batched_vmap(polar_product)


def _large(values: Tensor, rounding: float) -> int:
    """Return the largest number of eigenvalues that a matrix has above its least one."""
    if values.numel() == 0:
        return 0
    squares = values.square()
    above = squares[..., :1] + _ROUNDINGS * rounding * squares[..., -1:]
    return int((squares > above).sum(-1).max())


def _polar(matrix: Tensor, factors: bool) -> tuple[Tensor, Tensor | None]:
    if not factors:
        return torch.linalg.svdvals(matrix).sum(-1), None
    u, s, vh = torch.linalg.svd(matrix)
    return s.sum(-1), u @ vh


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
