"""The Newton step of a small problem, on potentials that are tuples of four vectors."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["l1_error", "largest", "newton_step", "plus", "times"]


@triton.jit
def l1_error(m, nu, M: tl.constexpr):
    """Return the sum over the marginals of their L1 distance from those wanted."""
    error = tl.sum(tl.abs(m[2] - nu[2]), 0) + tl.sum(tl.abs(m[3] - nu[3]), 0)
    if M >= 3:
        error += tl.sum(tl.abs(m[1] - nu[1]), 0)
    if M >= 4:
        error += tl.sum(tl.abs(m[0] - nu[0]), 0)
    return error


@triton.jit
def _pair_products(pair, row, column):
    """Return pair @ column and pair.T @ row."""
    return tl.sum(pair * column[None, :], 1), tl.sum(pair * row[:, None], 0)


@triton.jit
def _hessian_product(v, diagonal, pairs, M: tl.constexpr):
    """Return [diagonal, P_pq] v."""
    v0, v1, v2, v3 = v
    y0 = diagonal[0] * v0
    y1 = diagonal[1] * v1
    y2, y3 = _pair_products(pairs[5], v2, v3)
    y2 += diagonal[2] * v2
    y3 += diagonal[3] * v3
    if M >= 3:
        by1, by2 = _pair_products(pairs[3], v1, v2)
        y1 += by1
        y2 += by2
        by1, by3 = _pair_products(pairs[4], v1, v3)
        y1 += by1
        y3 += by3
    if M >= 4:
        by0, by1 = _pair_products(pairs[0], v0, v1)
        y0 += by0
        y1 += by1
        by0, by2 = _pair_products(pairs[1], v0, v2)
        y0 += by0
        y2 += by2
        by0, by3 = _pair_products(pairs[2], v0, v3)
        y0 += by0
        y3 += by3
    return y0, y1, y2, y3


@triton.jit
def _inner(a, b, M: tl.constexpr):
    total = tl.sum(a[2] * b[2], 0) + tl.sum(a[3] * b[3], 0)
    if M >= 3:
        total += tl.sum(a[1] * b[1], 0)
    if M >= 4:
        total += tl.sum(a[0] * b[0], 0)
    return total


@triton.jit
def plus(a, b, factor):
    """Return a + factor b."""
    return (
        a[0] + factor * b[0],
        a[1] + factor * b[1],
        a[2] + factor * b[2],
        a[3] + factor * b[3],
    )


@triton.jit
def _scaled(a, b):
    """Return the elementwise product."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@triton.jit
def _inverse(x):
    """Return 1 / x, or 0 where x is 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def newton_step(m, nu, pairs, error, atoms, M: tl.constexpr):
    """Solve (H + lambda diag nu) dx = nu - m by conjugate gradients, preconditioned by diag nu.

    H has M - 1 null vectors, constants whose sum is 0; nu - m is orthogonal to them.
    """
    damping = tl.minimum(tl.maximum(0.1 * error, 1e-6), 1e-2)
    diagonal = plus(m, nu, damping)
    weights = (_inverse(nu[0]), _inverse(nu[1]), _inverse(nu[2]), _inverse(nu[3]))
    residual = plus(nu, m, -1.0)
    step = plus(residual, residual, -1.0)
    direction = _scaled(residual, weights)
    size = _inner(residual, direction, M)
    forcing = tl.minimum(0.03, error)
    enough = size * forcing * forcing
    count = 0
    while (size > enough) & (count < 2 * atoms):
        image = _hessian_product(direction, diagonal, pairs, M)
        length = size / _inner(direction, image, M)
        step = plus(step, direction, length)
        residual = plus(residual, image, -length)
        scaled = _scaled(residual, weights)
        smaller = _inner(residual, scaled, M)
        direction = plus(scaled, direction, smaller / size)
        size = smaller
        count += 1
    return step


@triton.jit
def largest(v):
    """Return the largest absolute entry."""
    last = tl.maximum(tl.max(tl.abs(v[2]), 0), tl.max(tl.abs(v[3]), 0))
    return tl.maximum(tl.max(tl.abs(v[0]), 0), tl.maximum(tl.max(tl.abs(v[1]), 0), last))


@triton.jit
def times(x, factor):
    """Return factor x."""
    return x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor
