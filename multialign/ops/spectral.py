"""Square roots of positive semi-definite matrices, and nuclear norms of products of two roots.

A covariance of few samples has few large eigenvalues, and all others equal its floor; its square
root R likewise. If R_i is a multiple of the identity outside the span of p_i eigenvectors, and R_j
outside that of p_j, then so are both, and their product, outside a space of p_i + p_j dimensions.
The singular values of R_j R_i and its orthogonal polar factor Q need a decomposition in that space
alone: with the columns of B an orthonormal basis of it, S_i and S_j the matrices there and P the
polar factor of S_j S_i,

    R_i B = B S_i,  R_j B = B S_j,  Q = I + B (P - I) B^T.

B comes from the QR decomposition A = B T of these eigenvectors, and so do S_i and S_j: each is the
least eigenvalue times I, plus T D T^T with D the excess of the large eigenvalues over it.

The derivatives are written in functions that are themselves differentiable, so that derivatives of
every order exist. None divides by a difference of eigenvalues: repeated ones do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign.ops.operators import operator, register_batched_vmap, register_fake

__all__ = ["SquareRoot", "nuclear_norms", "square_root", "take"]

# Eigenvalues that differ by less count as equal, in units of the rounding of the entries.
_ROUNDINGS = 8
# The space may have up to this share w of all dimensions. With w + 2 w^2 <= 1 the entries of B,
# S_j (P - I) and (P - I) S_i fit where those of Q would be.
_LARGEST_SHARE = 0.5
# Widths of spaces are rounded up to a multiple of this; pairs of the same width are one batch.
_WIDTH_STEP = 8


class SquareRoot(NamedTuple):
    """Principal square roots R of positive semi-definite matrices S, in float64."""

    trace: Tensor
    """Of S, `(*batch, K)`."""
    root: Tensor
    """`(*batch, K, D, D)`."""
    values: Tensor
    """Eigenvalues of R, `(*batch, K, D)`, ascending; without gradient."""
    vectors: Tensor
    """Eigenvectors of R, `(*batch, K, D, D)`; without gradient."""
    rounding: float
    """Relative rounding error of the entries of S."""

    def take(self, entries: Sequence[int]) -> SquareRoot:
        """Return some entries of the first batch dimension."""
        trace, root, values, vectors = (take(part, entries) for part in self[:4])
        return SquareRoot(trace, root, values, vectors, self.rounding)


def take(x: Tensor, entries: Sequence[int]) -> Tensor:
    """Return some entries of the first dimension; unlike indexing, no index goes to the device."""
    return torch.stack([x[entry] for entry in entries])


def square_root(matrices: Tensor) -> SquareRoot:
    """Return the square roots of symmetric positive semi-definite `(*batch, K, D, D)`.

    A direction in which a matrix vanishes has a gradient of 0.
    """
    rounding = torch.finfo(matrices.dtype).eps
    matrices = matrices.double()
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    root, values, vectors = _MatrixSqrt.apply(matrices)
    return SquareRoot(trace, root, values, vectors, rounding)


def nuclear_norms(i: SquareRoot, j: SquareRoot) -> Tensor:
    """Return the sums of the singular values of R_j R_i for every two roots, `(*batch, K_i, K_j)`.

    That is Tr (S_i^1/2 S_j S_i^1/2)^1/2, the fidelity of S_i and S_j. No square is formed and
    undone, so that small eigenvalues keep their digits.
    """
    needed = torch.is_grad_enabled() and (i.root.requires_grad or j.root.requires_grad)
    norms: Tensor = _NuclearNorm.apply(*i[1:4], *j[1:4], max(i.rounding, j.rounding), needed)[0]
    return norms


# -- Functions of one matrix ----------------------------------------------------------------------


class _MatrixSqrt(torch.autograd.Function):
    """Principal square root R of a symmetric positive semi-definite matrix.

    The eigenvalues and eigenvectors of R come with it, without gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors, poison = _eigh(matrix)
        values = values.clamp_min(0).sqrt()
        return (vectors * values.unsqueeze(-2)) @ vectors.mT + poison, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Tensor:
        # R R = S gives dR R + R dR = dS.
        root, values, vectors = ctx.saved_tensors
        grad = (grad + grad.mT) / 2
        if torch.is_grad_enabled():
            result: Tensor = _Lyapunov.apply(root, grad)
            return result
        return _solve_lyapunov(values, vectors, grad)


class _Lyapunov(torch.autograd.Function):
    """Solution X of A X + X A = B for symmetric positive semi-definite A.

    In the eigenvectors of A it is B_kl / (a_k + a_l): for A = S^1/2 this is the divided difference
    of the square root :cite:`bhatia:97`. Where a_k + a_l vanishes, X_kl is 0 (pseudo-inverse).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        values, vectors, poison = _eigh(a)
        return _solve_lyapunov(values.clamp_min(0), vectors, b) + poison

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # dA X + A dX + dX A + X dA = dB, and the solution operator is its own adjoint.
        a, x = ctx.saved_tensors
        grad_b: Tensor = _Lyapunov.apply(a, grad)
        return -(grad_b @ x.mT + x.mT @ grad_b), grad_b


def _solve_lyapunov(values: Tensor, vectors: Tensor, b: Tensor) -> Tensor:
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    # An eigenvalue of S that is 0 up to rounding, D eps |S|, has a root of sqrt(D eps |S|).
    rounding = 2 * (values.shape[-1] * torch.finfo(values.dtype).eps) ** 0.5
    floor = rounding * values.amax(-1)[..., None, None]
    vanishing = sums <= floor
    ratio = vectors.mT @ b @ vectors / torch.where(vanishing, sums.new_ones(()), sums)
    ratio = torch.where(vanishing, sums.new_zeros(()), ratio)
    return vectors @ ratio @ vectors.mT


class _PolarFactor(torch.autograd.Function):
    """Orthogonal factor Q of a square matrix M = Q H with H symmetric positive semi-definite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        matrix, poison = _poison(matrix)
        u, _, vh = torch.linalg.svd(matrix)
        factor: Tensor = u @ vh + poison
        return factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Q^T dQ = W is skew, and Q^T dM - dM^T Q = W H + H W.
        matrix, factor = ctx.saved_tensors
        stretch = factor.mT @ matrix
        w: Tensor = _Lyapunov.apply((stretch + stretch.mT) / 2, factor.mT @ grad)
        result: Tensor = factor @ (w - w.mT)
        return result


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues, eigenvectors, and the `_poison` to add to a result."""
    matrix, poison = _poison(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors, poison


def _poison(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Replace matrices that are not finite, which LAPACK would refuse, by the identity.

    Returns:
        The matrices, and what makes their results non-finite again: NaN for these, 0 for the rest.
    """
    poison = (0 * matrix.detach()).sum((-2, -1), keepdim=True)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(poison == 0, matrix, identity), poison


# -- Nuclear norms --------------------------------------------------------------------------------


class _NuclearNorm(torch.autograd.Function):
    """Nuclear norms of the products R_j R_i, whose gradient by a product is its polar factor.

    The second result is for the backward pass alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        root_i: Tensor,
        values_i: Tensor,
        vectors_i: Tensor,
        root_j: Tensor,
        values_j: Tensor,
        vectors_j: Tensor,
        rounding: float,
        needed: bool,
    ) -> tuple[Tensor, Tensor]:
        batch = root_i.shape[:-3]
        (root_i, poison_i), (root_j, poison_j) = _poison(root_i), _poison(root_j)
        i, j = (
            [part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in parts]
            for parts in ((root_i, values_i, vectors_i), (root_j, values_j, vectors_j))
        )
        norms, factors = _norms(i, j, rounding, needed)
        poison = poison_i[..., 0] + poison_j[..., 0].mT
        factors = factors.reshape((*poison.shape, factors.shape[-1]))
        return norms.reshape(poison.shape) + poison, factors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], *inputs[3:5], output[1])
        ctx.rounding, ctx.has_factors = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        root_i, values_i, root_j, values_j, factors = ctx.saved_tensors
        (root_i, poison_i), (root_j, poison_j) = _poison(root_i), _poison(root_j)
        # A norm that is not finite has a gradient of NaN, unless nothing depends on it.
        grad = torch.where(grad == 0, grad, grad + poison_i[..., 0] + poison_j[..., 0].mT)
        if torch.is_grad_enabled() or not ctx.has_factors:
            factor = _PolarFactor.apply(root_j.unsqueeze(-4) @ root_i.unsqueeze(-3))
            factor = grad[..., None, None] * factor
            by_i = (root_j.unsqueeze(-4) @ factor).sum(-3)
            by_j = (factor @ root_i.unsqueeze(-3)).sum(-4)
        else:
            batch = grad.shape[:-2]
            parts = grad, root_i, values_i, root_j, values_j, factors
            by_i, by_j = _norms_backward(
                *(part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in parts),
                ctx.rounding,
            )
            by_i, by_j = by_i.reshape(root_i.shape), by_j.reshape(root_j.shape)
        return by_i, None, None, by_j, None, None, None, None


@operator("nuclear_norms(Tensor[] i, Tensor[] j, float rounding, bool needed) -> (Tensor, Tensor)")
def _norms(
    i: list[Tensor], j: list[Tensor], rounding: float, needed: bool
) -> tuple[Tensor, Tensor]:
    """Return the nuclear norms of all products R_j R_i.

    An operator of its own: the dimension of each space is read from the data.

    Args:
        i: R_i, `(B, K_i, D, D)`, finite; its eigenvalues, `(B, K_i, D)`, ascending, non-negative;
            its eigenvectors, `(B, K_i, D, D)`.
        j: The same of R_j, with K_j.
        rounding: Of the eigenvalues of R^2, relative to the largest one.
        needed: Whether `_norms_backward` will need the polar factors.

    Returns:
        `(B, K_i, K_j)`, and the polar factors, packed in `(B, K_i, K_j, D^2)`, or nothing.
    """
    (root_i, values_i, vectors_i), (root_j, values_j, vectors_j) = i, j
    dim = root_i.shape[-1]
    norms = root_i.flatten(2) @ root_j.flatten(2).mT  # traces of the products
    factors = root_i.new_empty((*norms.shape, dim**2 if needed else 0))
    # All eigenvectors of both, one a row, and the excess of their eigenvalues over the least one.
    rows = torch.cat([vectors.mT.reshape(-1, dim) for vectors in (vectors_i, vectors_j)])
    excess = torch.cat([(x - x[..., :1]).flatten() for x in (values_i, values_j)])
    flat_norms, flat_factors = norms.view(-1), factors.flatten(0, 2)
    for width, pair, at_i, at_j, large_i in _groups(values_i, values_j, rounding):
        if width == dim:
            product = root_j.flatten(0, 1)[at_j] @ root_i.flatten(0, 1)[at_i]
            flat_norms[pair], polar = _polar(product, needed)
            if polar is not None:
                flat_factors[pair] = polar.flatten(1)
            continue
        # The last `large_i` eigenvectors of R_i, and as many of R_j as make up the width.
        number = torch.arange(width, device=rows.device)
        first = (at_i + 1) * dim - large_i, values_i.numel() + (at_j + 1) * dim - width
        of_i = number < large_i.unsqueeze(-1)
        chosen = torch.where(of_i, first[0].unsqueeze(-1), first[1].unsqueeze(-1)) + number
        basis, triangle = torch.linalg.qr(rows[chosen].mT)
        diagonal = excess[chosen].unsqueeze(-2)
        within = []
        for least, own in (
            (values_i.flatten(0, 1)[at_i, 0], of_i),
            (values_j.flatten(0, 1)[at_j, 0], ~of_i),
        ):
            inside = (triangle * (diagonal * own.unsqueeze(-2))) @ triangle.mT
            inside.diagonal(dim1=-2, dim2=-1).add_(least.unsqueeze(-1))
            within.append(inside)
        inside = within[1] @ within[0]
        total, polar = _polar(inside, needed)
        flat_norms[pair] += total - inside.diagonal(dim1=-2, dim2=-1).sum(-1)
        if polar is not None:
            polar.diagonal(dim1=-2, dim2=-1).sub_(1)
            parts = basis, within[1] @ polar, polar @ within[0]
            packed = torch.cat([part.flatten(1) for part in parts], 1)
            flat_factors[pair, : packed.shape[1]] = packed
    return norms, factors


@register_fake(_norms)
def _(i: list[Tensor], j: list[Tensor], rounding: float, needed: bool) -> tuple[Tensor, Tensor]:
    root, dim = i[0], i[0].shape[-1]
    shape = (*root.shape[:2], j[0].shape[1])
    return root.new_empty(shape), root.new_empty((*shape, dim**2 if needed else 0))


@operator(
    "nuclear_norms_backward(Tensor grad, Tensor root_i, Tensor values_i, "
    "Tensor root_j, Tensor values_j, "
    "Tensor factors, float rounding) -> (Tensor, Tensor)"
)
def _norms_backward(
    grad: Tensor,
    root_i: Tensor,
    values_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    factors: Tensor,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives by R_i and R_j, given those by the norms, `grad` `(B, K_i, K_j)`."""
    dim = root_i.shape[-1]
    # First for the identity in each polar factor, then for the rest of it.
    by_i = (grad @ root_j.flatten(2)).view_as(root_i)
    by_j = (grad.mT @ root_i.flatten(2)).view_as(root_j)
    flat_i, flat_j = by_i.flatten(0, 1), by_j.flatten(0, 1)
    for width, pair, at_i, at_j, _ in _groups(values_i, values_j, rounding):
        weight, packed = grad.flatten()[pair, None, None], factors.flatten(0, 2)
        if width == dim:
            identity = torch.eye(dim, dtype=factors.dtype, device=factors.device)
            rest = weight * (packed[pair].view(-1, dim, dim) - identity)
            flat_i += _sums_by_owner(root_j.flatten(0, 1)[at_j], rest, at_i, len(flat_i))
            flat_j += _sums_by_owner(rest, root_i.flatten(0, 1)[at_i], at_j, len(flat_j))
        else:
            sizes = [dim * width, width**2, width**2]
            parts = packed[:, : sum(sizes)][pair].split(sizes, 1)
            basis, core_i, core_j = (part.unflatten(1, (-1, width)) for part in parts)
            flat_i += _sums_by_owner(basis @ (weight * core_i), basis.mT, at_i, len(flat_i))
            flat_j += _sums_by_owner(basis @ (weight * core_j), basis.mT, at_j, len(flat_j))
    return by_i, by_j


@register_fake(_norms_backward)
def _(
    grad: Tensor,
    root_i: Tensor,
    values_i: Tensor,
    root_j: Tensor,
    values_j: Tensor,
    factors: Tensor,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(root_i), torch.empty_like(root_j)


register_batched_vmap(_norms)
register_batched_vmap(_norms_backward)


class _Group(NamedTuple):
    """Pairs whose spaces have the same number of dimensions."""

    width: int
    pair: Tensor
    """Positions among the B K_i K_j pairs, `(P,)`."""
    i: Tensor
    """Positions among the B K_i matrices R_i."""
    j: Tensor
    """Positions among the B K_j matrices R_j."""
    large_i: Tensor
    """How many of the dimensions are for eigenvectors of R_i."""


def _groups(values_i: Tensor, values_j: Tensor, rounding: float) -> Iterator[_Group]:
    count_i, count_j, dim = values_i.shape[1], values_j.shape[1], values_i.shape[-1]
    large_i, large_j = _large_counts(values_i, rounding), _large_counts(values_j, rounding)
    widths = large_i.unsqueeze(-1) + large_j.unsqueeze(-2)
    widths = (widths.clamp_min(1) + _WIDTH_STEP - 1) // _WIDTH_STEP * _WIDTH_STEP
    widths = torch.where(widths > _LARGEST_SHARE * dim, dim, widths).flatten()
    for width in widths.unique().tolist():
        (pair,) = (widths == width).nonzero(as_tuple=True)
        i = pair // count_j
        j = i // count_i * count_j + pair % count_j
        yield _Group(width, pair, i, j, large_i.flatten()[i])


def _large_counts(values: Tensor, rounding: float) -> Tensor:
    """Return how many eigenvalues of each matrix are above its least one."""
    squares = values.square()
    least = squares[..., :1] + _ROUNDINGS * rounding * squares[..., -1:]
    return (squares > least).sum(-1)


def _polar(matrix: Tensor, needed: bool) -> tuple[Tensor, Tensor | None]:
    """Return nuclear norms and, if `needed`, polar factors."""
    if not needed:
        return torch.linalg.svdvals(matrix).sum(-1), None
    u, s, vh = torch.linalg.svd(matrix)
    return s.sum(-1), u @ vh


def _sums_by_owner(left: Tensor, right: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Return for each owner the sum of the products `left @ right` that it owns.

    It is one product of blocks side by side for each owner, rather than P products and their sum:
    no tensor has the size of all products, and the order of a sum is always the same.
    """
    counts = owner.bincount(minlength=owners)
    order = owner.argsort(stable=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(owner), device=owner.device) - first[owner[order]]
    # The products of each owner; where it has fewer, the number of a last one, which is 0.
    table = owner.new_full((owners, int(counts.max())), len(owner))
    table[owner[order], column] = order
    left, right = (torch.cat([x, x.new_zeros(1, *x.shape[1:])])[table] for x in (left, right))
    return left.transpose(1, 2).flatten(2) @ right.flatten(1, 2)
