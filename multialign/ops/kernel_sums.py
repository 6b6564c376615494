"""Sums over a kernel matrix K that is never held, and their gradients: p^T K q, and K q.

The kernel is Gaussian, with one or several precisions, or minus the distance, with none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multialign.ops.backend import choose_backend
from multialign.ops.operators import operator, register_batched_vmap, register_fake

__all__ = ["energy_form", "gaussian_form", "gaussian_matvec"]

# Side of a square block of the kernel matrix, which fits in the cache. The blocks of a batch have
# `_BLOCK_ENTRIES` entries together at most, unless they have the smallest side.
_BLOCK = 512
_BLOCK_ENTRIES = 2**20
_SMALLEST_BLOCK = 64

_FIRST_ONLY = (
    "a kernel matrix of so many entries is streamed and has first derivatives only; take fewer "
    'samples at once, or mmd_loss with estimator="random_features", which has them all'
)


def gaussian_form(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, *, distinct: bool = False
) -> Tensor:
    """Return sum_nm p_n q_m k(x_n, y_m), `(B)` in float64.

    k is the mean over s of exp(-c_s |x - y|^2), with c the `precisions`.

    Each block of the kernel matrix is computed once, for the value and the gradients together:
    memory is O((N + M) D). If `y` is `x` and `q` is `p`, one gradient is computed, not two. There
    are first derivatives only, and none by `precisions`, which are 1 / (2 sigma^2).

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        p: `(B, N)`.
        q: `(B, M)`.
        precisions: `(B, S)`.
        distinct: Leave out the pairs n = m.
    """
    if x is y and p is q:
        # x is both arguments, so its gradient doubles.
        results = _SymmetricForm.apply(x, p, precisions, distinct)
    else:
        results = _Form.apply(x, y, p, q, precisions, distinct)
    value: Tensor = results[0]
    return value


def energy_form(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return -sum_nm p_n q_m |x_n - y_m|, `(B)` in float64, as `gaussian_form`.

    The gradient at coincident points is 0.
    """
    return gaussian_form(x, y, p, q, x.new_empty(len(x), 0))


def gaussian_matvec(x: Tensor, q: Tensor, precisions: Tensor, *, distinct: bool = False) -> Tensor:
    """Return sum_m k(x_n, x_m) q_m, `(B, N)`, for k and arguments of `gaussian_form`."""
    result: Tensor = _Matvec.apply(x, q, precisions, distinct)
    return result


class _Form(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, distinct: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        value, by_x, by_p, by_y, by_q = _stream(x, y, p, q, precisions, True, distinct)
        return value, by_x, by_y, by_p, by_q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing does not let saved tensors be read again.
        saved = ctx.saved_tensors
        by_x, by_y, by_p, by_q = [
            _FirstOnly.apply(derivative, *saved[4:]) for derivative in saved[:4]
        ]
        grad = grad.to(by_x.dtype)
        row, matrix = grad[:, None], grad[:, None, None]
        return matrix * by_x, matrix * by_y, row * by_p, row * by_q, None, None


class _SymmetricForm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, p: Tensor, precisions: Tensor, distinct: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, by_x, by_p, _, _ = _stream(x, x, p, p, precisions, False, distinct)
        return value, by_x, by_p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        by_x, by_p, x, p = ctx.saved_tensors
        by_x, by_p = (_FirstOnly.apply(by, x, x, p, p) for by in (by_x, by_p))
        grad = 2 * grad.to(by_x.dtype)
        return grad[:, None, None] * by_x, grad[:, None] * by_p, None, None


class _Matvec(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Tensor, precisions: Tensor, distinct: bool) -> Tensor:
        sums: Tensor = _stream(x, x, q, q, precisions, False, distinct)[2]
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.distinct = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, precisions = ctx.saved_tensors
        return (*_MatvecGradient.apply(grad, x, q, precisions, ctx.distinct), None, None)


class _MatvecGradient(torch.autograd.Function):
    """The gradients of grad^T K q by x and q, which raise when they are differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, q: Tensor, precisions: Tensor, distinct: bool
    ) -> tuple[Tensor, Tensor]:
        _, by_x, _, by_y, by_q = _stream(x, x, grad, q, precisions, True, distinct)
        return by_x + by_y, by_q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(_FIRST_ONLY)


class _FirstOnly(torch.autograd.Function):
    """A derivative of a form that raises when it is differentiated again.

    Its own dependence on x, y, p and q is not recorded: a second derivative would be silently
    wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(_FIRST_ONLY)


@operator(
    "gaussian_form(Tensor x, Tensor y, Tensor p, Tensor q, Tensor precisions, "
    "bool both, bool distinct) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _stream(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, both: bool, distinct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the form and its derivatives by x and p and, if `both`, by y and q (else zeros).

    An operator of its own, so that torch.compile need not unroll the loop over blocks.
    """
    energy = precisions.shape[-1] == 0
    # The compiled kernel is Gaussian, and computes in float32.
    if not energy and x.dtype == torch.float32 and choose_backend("auto", x) == "triton":
        from multialign.ops import _triton

        return _triton.gaussian_form(x, y, p, q, precisions, both, distinct)

    origin = x.mean(-2, keepdim=True)
    x, y = x - origin, y - origin
    squares_x, squares_y = x.square().sum(-1), y.square().sum(-1)
    # Equal rows n = m have a distance of exactly 0.
    equal = (x == y).all(-1) if x.shape == y.shape else None
    # With a column of ones, one product with a block gives both sum q y and sum q.
    right = q.unsqueeze(-1) * torch.cat([y, torch.ones_like(q).unsqueeze(-1)], -1)
    left = p.unsqueeze(-1) * torch.cat([x, torch.ones_like(p).unsqueeze(-1)], -1)
    sums_x, sums_y = torch.zeros_like(p), torch.zeros_like(q)
    slopes_x, slopes_y = torch.zeros_like(left), torch.zeros_like(right)

    side = min(_BLOCK, max(_SMALLEST_BLOCK, math.isqrt(_BLOCK_ENTRIES // max(1, len(x)))))
    for i in range(0, x.shape[-2], side):
        rows = slice(i, i + side)
        for j in range(0, y.shape[-2], side):
            columns = slice(j, j + side)
            cost = squares_x[:, rows, None] + squares_y[:, None, columns]
            cost = cost.baddbmm_(x[:, rows], y[:, columns].mT, alpha=-2).clamp_min_(0)
            if i == j and equal is not None:
                cost.diagonal(dim1=-2, dim2=-1).masked_fill_(equal[:, rows], 0.0)
            kernel, slope = _energy(cost) if energy else _gaussian(cost, precisions)
            if i == j and distinct:
                kernel.diagonal(dim1=-2, dim2=-1).zero_()
                slope.diagonal(dim1=-2, dim2=-1).zero_()
            sums_x[:, rows] += (kernel @ q[:, columns, None]).squeeze(-1)
            slopes_x[:, rows] += slope @ right[:, columns]
            if both:
                sums_y[:, columns] += (p[:, None, rows] @ kernel).squeeze(-2)
                slopes_y[:, columns] += slope.mT @ left[:, rows]

    value = (p.double() * sums_x).sum(-1)
    # d k(x_n, y_m) / d x_n = slope (y_m - x_n)
    scale = 1 if energy else 2 * precisions[:, :1, None]
    by_x = scale * p.unsqueeze(-1) * (slopes_x[..., :-1] - slopes_x[..., -1:] * x)
    by_y = scale * q.unsqueeze(-1) * (slopes_y[..., :-1] - slopes_y[..., -1:] * y)
    return value, by_x, sums_x, by_y, sums_y


@register_fake(_stream)
def _(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, precisions: Tensor, both: bool, distinct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        p.new_empty(p.shape[:1], dtype=torch.float64),
        torch.empty_like(x),
        torch.empty_like(p),
        torch.empty_like(y),
        torch.empty_like(q),
    )


register_batched_vmap(_stream)


def _energy(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel -|x - y|, and its slope 1 / |x - y|, 0 at coincident points."""
    distance = cost.sqrt_()
    slope = distance.reciprocal().masked_fill_(distance == 0, 0.0)
    return distance.neg_(), slope


def _gaussian(cost: Tensor, precisions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel k, and -dk/dcost / c_0 (c_0 the first precision), which is its slope.

    With one precision both are one tensor, which overwrites `cost`.
    """
    first, *others = precisions.unbind(-1)
    if not others:
        kernel = cost.mul_(-first[:, None, None]).exp_()
        return kernel, kernel
    kernel = torch.zeros_like(cost)
    slope = torch.zeros_like(cost)
    for precision in (first, *others):
        part = (cost * -precision[:, None, None]).exp_()
        kernel += part
        slope += part.mul_((precision / first)[:, None, None])
    return kernel.div_(precisions.shape[-1]), slope.div_(precisions.shape[-1])
