"""Nuclear norms of products of symmetric matrices with few distinct eigenvalues.

A covariance of few samples has few large eigenvalues, and all others equal its floor; its square
root R likewise. Where R_i is a multiple of the identity outside the span of p_i eigenvectors, and
R_j outside that of p_j, both and their product are outside a space of p_i + p_j dimensions. So its
singular values, and its orthogonal polar factor Q, need a decomposition in that space alone: with
the columns of B an orthonormal basis of it, S_i and S_j the matrices there and P the polar factor
of S_j S_i,

    R_i B = B S_i,  R_j B = B S_j,  Q = I + B (P - I) B^T.

The eigenvectors A in question give B and, as A = B T is its QR decomposition, S_i and S_j: each is
the least eigenvalue times I, plus T D T^T with D what its large eigenvalues are above that.
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
# Up to this share w of the dimensions the decomposition is one in the space; w + 2 w^2 <= 1, so
# that B, S_j (P - I) and (P - I) S_i have room where Q would be.
_LARGEST_SHARE = 0.5
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
    norms = root_i.flatten(2) @ root_j.flatten(2).mT  # traces of the products
    kept = root_i.new_empty((*norms.shape, dim**2 if factors else 0))
    # All eigenvectors of both, one a row, and what their eigenvalues are above the least one.
    rows = torch.cat([vectors.mT.reshape(-1, dim) for vectors in (vectors_i, vectors_j)])
    above = torch.cat([(x - x[..., :1]).flatten() for x in (values_i, values_j)])
    flat_norms, flat_kept = norms.view(-1), kept.flatten(0, 2)
    for width, pair, i, j, large_i in _groups(values_i, values_j, rounding):
        if width == dim:
            product = root_j.flatten(0, 1)[j] @ root_i.flatten(0, 1)[i]
            flat_norms[pair], polar = _polar(product, factors)
            if polar is not None:
                flat_kept[pair] = polar.flatten(1)
            continue
        # The eigenvectors of R_i that are large, and the rest of R_j: the last ones of each.
        turn = torch.arange(width, device=rows.device)
        first = (i + 1) * dim - large_i, values_i.numel() + (j + 1) * dim - width
        of_i = turn < large_i.unsqueeze(-1)
        chosen = torch.where(of_i, first[0].unsqueeze(-1), first[1].unsqueeze(-1)) + turn
        basis, triangle = torch.linalg.qr(rows[chosen].mT)
        excess = above[chosen].unsqueeze(-2)
        within = []
        for least, own in (
            (values_i.flatten(0, 1)[i, 0], of_i),
            (values_j.flatten(0, 1)[j, 0], ~of_i),
        ):
            inside = (triangle * (excess * own.unsqueeze(-2))) @ triangle.mT
            inside.diagonal(dim1=-2, dim2=-1).add_(least.unsqueeze(-1))
            within.append(inside)
        inside = within[1] @ within[0]
        total, polar = _polar(inside, factors)
        flat_norms[pair] += total - inside.diagonal(dim1=-2, dim2=-1).sum(-1)
        if polar is not None:
            polar.diagonal(dim1=-2, dim2=-1).sub_(1)
            parts = basis, within[1] @ polar, polar @ within[0]
            packed = torch.cat([part.flatten(1) for part in parts], 1)
            flat_kept[pair, : packed.shape[1]] = packed
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
    for width, pair, i, j, _ in _groups(values_i, values_j, rounding):
        weight, packed = grad.flatten()[pair, None, None], kept.flatten(0, 2)
        if width == dim:
            outer = weight * (
                packed[pair].view(-1, dim, dim)
                - torch.eye(dim, dtype=kept.dtype, device=kept.device)
            )
            flat_i += _sums(root_j.flatten(0, 1)[j], outer, i, len(flat_i))
            flat_j += _sums(outer, root_i.flatten(0, 1)[i], j, len(flat_j))
        else:
            sizes = [dim * width, width**2, width**2]
            parts = packed[:, : sum(sizes)][pair].split(sizes, 1)
            basis, core_i, core_j = (part.unflatten(1, (-1, width)) for part in parts)
            flat_i += _sums(basis @ (weight * core_i), basis.mT, i, len(flat_i))
            flat_j += _sums(basis @ (weight * core_j), basis.mT, j, len(flat_j))
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
    pair: Tensor
    """Which of B K_i K_j pairs, `(P,)`."""
    i: Tensor
    """Which of B K_i matrices R_i."""
    j: Tensor
    """Which of B K_j matrices R_j."""
    large_i: Tensor
    """How many of the dimensions are for the eigenvectors of R_i."""


def _groups(values_i: Tensor, values_j: Tensor, rounding: float) -> Iterator[_Group]:
    count_i, count_j, dim = values_i.shape[1], values_j.shape[1], values_i.shape[-1]
    large_i, large_j = _large(values_i, rounding), _large(values_j, rounding)
    widths = large_i.unsqueeze(-1) + large_j.unsqueeze(-2)
    widths = (widths.clamp_min(1) + _WIDTH_STEP - 1) // _WIDTH_STEP * _WIDTH_STEP
    widths = torch.where(widths > _LARGEST_SHARE * dim, dim, widths).flatten()
    for width in widths.unique().tolist():
        (pair,) = (widths == width).nonzero(as_tuple=True)
        i = pair // count_j
        j = i // count_i * count_j + pair % count_j
        yield _Group(width, pair, i, j, large_i.flatten()[i])


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


def _sums(left: Tensor, right: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Return the sum of the products of P matrices each for all that have the same owner.

    One product of blocks side by side, for each owner, rather than P and their sum: nothing of the
    size of all products is made, and the order of the sum is always the same.
    """
    counts = owner.bincount(minlength=owners)
    order = owner.argsort(stable=True)
    turn = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    # Which matrices each owner has; the last one, which is 0, where it has fewer.
    table = owner.new_full((owners, int(counts.max())), len(owner))
    table[owner[order], turn] = order
    left, right = (torch.cat([x, x.new_zeros(1, *x.shape[1:])])[table] for x in (left, right))
    return left.transpose(1, 2).flatten(2) @ right.flatten(1, 2)
