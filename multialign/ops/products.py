"""Products of matrices of logarithms, by ordinary matrix products where their range suffices.

With row maxima a_i of A and column maxima b_k of B taken out,

    log sum_j exp(A_ij + B_jk) = log sum_j exp(A_ij - a_i) exp(B_jk - b_k) + a_i + b_k

is one matrix product. Some of its terms, or all, may be below the exponent range. So the factors
are scaled to use the whole range. Terms that underflow are dropped, and their sum has a bound. An
entry that is not well above this bound is summed term by term, unless the weight that will be added
to it shows that it cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import threshold

from multialign.ops.backend import Implementation
from multialign.ops.reference import logsumexp, real

__all__ = ["LogProduct", "StreamedProduct", "log_matmul_reduce", "log_matvec", "log_product"]

# Largest relative error from dropped terms.
_LOSS = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-7}
# Probabilities below this are set to 0: their products would be denormal, which is slow.
_NEGLIGIBLE = {torch.float64: 1e-60, torch.complex128: 1e-60, torch.float32: 1e-18}
# Terms that term-by-term sums hold at once.
_CHUNK_ENTRIES = 2**22


def log_matvec(a: Tensor, x: Tensor, backend: Implementation) -> Tensor:
    """Return log sum_j exp(a_ij + x_j), `(B, I)`, of `a` `(B, I, J)` and `x` `(B, J)`.

    The kernel reads `a` once and writes no table. It has no gradient.
    """
    if backend == "triton":
        from multialign.ops import _triton

        sums: Tensor = _triton.log_matvec(a, x)
        return sums
    return logsumexp(a + x.unsqueeze(-2), -1)


def log_matmul_reduce(a: Tensor, b: Tensor, weight: Tensor, backend: Implementation) -> Tensor:
    """Return log sum_jk exp(a_ij + b_jk + weight_ik), `(B, I)`.

    It is the message of two of three marginals with three pairwise costs to the third. The kernel
    writes no table over i and k. It has no gradient.

    Args:
        a: `(B, I, J)`.
        b: `(B, J, K)`.
        weight: `(B, I, K)`.
        backend: The implementation.
    """
    if backend == "triton":
        from multialign.ops import _triton

        sums: Tensor = _triton.log_matmul_reduce(a, b, weight)
        return sums
    return logsumexp(LogProduct(a, b, weight, sums=(-1,)).values + weight, -1)


def log_product(
    a: Tensor, b: Tensor, weight: Tensor | None, backend: Implementation
) -> LogProduct | StreamedProduct:
    """Multiply `a` `(B, I, J)` and `b` `(B, J, K)`; see `LogProduct` for `weight`."""
    return StreamedProduct(a, b) if backend == "triton" else LogProduct(a, b, weight)


class StreamedProduct:
    """The same as `LogProduct`, by a kernel that is right at any range; without gradient."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        from multialign.ops import _triton

        self._a, self._b, self._multiply = a, b, _triton.log_matmul
        self.values: Tensor = _triton.log_matmul(a, b)

    def spread(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Distribute weights of the entries (i, k) over j; see `LogProduct.spread`."""
        ratio = torch.where(joint == 0, -math.inf, joint.log() - self.values)
        left = (self._a + self._multiply(ratio, self._b.mT)).exp()
        return left, (self._b + self._multiply(self._a.mT, ratio)).exp()


class LogProduct:
    """The product of two matrices of logarithms, with the shares of its terms; without gradient.

    Attributes:
        values: `(B, I, K)`, the logarithm of sum_j exp(a_ij + b_jk).
    """

    values: Tensor

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        *,
        sums: Sequence[Literal[-1, -2]] = (-1, -2),
    ) -> None:
        """Multiply `a` `(B, I, J)` and `b` `(B, J, K)`.

        `weight` `(B, I, K)` will be added to the result, and exponentials summed along `sums`:
        entries that cannot matter to these sums may be wrong. With None, all are right.
        """
        self._a, self._b = a, b
        self._shift, floor, bound = _limits(a.dtype, a.shape[-1])
        top_a, top_b = _maximum(a, -1) - self._shift, _maximum(b, -2) - self._shift
        self._left = _cut(a - top_a, floor, -math.inf).exp_()
        self._right = _cut(b - top_b, floor, -math.inf).exp_()
        self._mass = self._left @ self._right
        self._unresolved: Tensor | None = None
        self._entries: tuple[Tensor, ...] = ()
        tops = top_a + top_b
        self.values = self._mass.log() + tops
        unresolved = real(self._mass) < bound
        if not bool(unresolved.any()):
            return
        self._unresolved = unresolved
        relevant = unresolved & self._relevant(tops, bound, weight, sums)
        entries = relevant.nonzero(as_tuple=True)
        if len(entries[0]):
            self._entries = entries
            exact = torch.cat([logsumexp(terms, -1) for terms, *_ in self._terms()])
            self.values.index_put_(entries, exact)

    def spread(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Distribute weights of the entries (i, k) over j, in proportion to the terms of each sum.

        Returns:
            sum_k joint_ik p(j | i, k), `(B, I, J)`, and sum_i joint_ik p(j | i, k), `(B, J, K)`,
            with p(j | i, k) = exp(a_ij + b_jk - values_ik).
        """
        scale = math.exp(-self._shift)
        ratio = _cut(joint, _NEGLIGIBLE[joint.dtype], 0.0)
        if self._unresolved is None:
            ratio = ratio / (self._mass * scale)
        else:
            mass = torch.where(self._unresolved, 1.0, self._mass)
            ratio = torch.where(self._unresolved, 0.0, ratio / (mass * scale))
        left = self._left * (ratio @ self._right.mT) * scale
        right = self._right * (self._left.mT @ ratio) * scale
        if not self._entries:
            return left, right
        rows, columns = left.flatten(0, 1), right.mT.flatten(0, 1)
        for terms, b, i, k in self._terms():
            shares = (terms - logsumexp(terms, -1).unsqueeze(-1)).exp()
            share = joint[b, i, k].unsqueeze(-1) * shares
            rows = rows.index_add(0, b * left.shape[1] + i, share)
            columns = columns.index_add(0, b * right.shape[2] + k, share)
        return rows.view_as(left), columns.unflatten(0, (len(left), -1)).mT

    def _relevant(
        self, tops: Tensor, bound: float, weight: Tensor | None, sums: Sequence[int]
    ) -> Tensor:
        """Return which unresolved entries can matter."""
        nonempty = _live(self._a, -1) & _live(self._b, -2)
        if weight is None:
            return nonempty
        weight = real(weight)
        least = real(self.values) + weight
        least = reduce(torch.minimum, [logsumexp(least, dim).unsqueeze(dim) for dim in sums])
        most = (real(self._mass) + bound * _LOSS[weight.dtype]).log() + tops + weight
        size = max(weight.shape[-2:])
        return nonempty & (most > least + math.log(_LOSS[weight.dtype] / size))

    def _terms(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the terms of the entries that are summed term by term, and their indices."""
        b_rows = self._b.mT
        step = max(1, _CHUNK_ENTRIES // b_rows.shape[-1])
        for b, i, k in zip(*[index.split(step) for index in self._entries], strict=True):
            yield self._a[b, i] + b_rows[b, k], b, i, k


def _maximum(x: Tensor, dim: int) -> Tensor:
    """Return the largest entry along `dim`, or the least number where all are -inf."""
    return real(x).amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).min)


def _live(x: Tensor, dim: int) -> Tensor:
    return real(x).amax(dim, keepdim=True) > -math.inf


def _cut(x: Tensor, floor: float, value: float) -> Tensor:
    """Return x with `value` for what is below the floor."""
    if x.is_complex():
        return torch.where(x.real > floor, x, value)
    return threshold(x, floor, value)


@lru_cache
def _limits(dtype: torch.dtype, terms: int) -> tuple[float, float, float]:
    """Return the shift of the exponents, their floor, and the least mass to be trusted.

    Factors lie between exp(floor) and exp(shift), or are 0. A term is dropped if one of its factors
    is below the floor, so the dropped terms add up to less than terms * exp(shift + floor).
    """
    shift = (math.log(torch.finfo(dtype).max) - math.log(terms)) / 2 - 1
    floor = math.log(torch.finfo(dtype).tiny) / 2
    return shift, floor, terms * math.exp(shift + floor) / _LOSS[dtype]
