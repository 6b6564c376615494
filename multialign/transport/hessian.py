"""Newton's equation H x = r of the dual, with a matrix that is factored or one that is applied.

Scaled by the square roots of the marginals, H has a diagonal of ones near the solution, and its
eigenvalues lie between 0 and M. Its null space holds the constants x_p with sum_p x_p = 0; a right
side of differences of marginals is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs

__all__ = [
    "AppliedHessian",
    "DenseHessian",
    "Hessian",
    "RingMatrix",
    "Scaling",
    "dense",
    "pairwise_hessian",
]

# Up to this many entries the matrix is factored where conjugate gradients are slow: with three
# marginals that costs about as much as the pairwise marginals did. So many of their steps are
# tried first.
_FACTORED_ENTRIES = 2**24
_TRIAL_STEPS = 40
# Up to this many entries the matrix is put together for them: one product instead of many.
_JOINED_ENTRIES = 2**21


class Hessian(Protocol):
    """The matrix H of a plan, `(B, S, S)` with S the sum of sizes."""

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve (H + damping diag(nu)) x = right, `(B, S)`, orthogonal to the constants.

        An iterative solution leaves at most `tolerance` `(B,)` of the right side, if it
        can within so many `steps`.
        """


class Scaling:
    """The scaling of H by the marginals wanted, and what fills its null space.

    Added to H is (root nu_p)(root nu_p)^T in the block of each p but the first. So the solution has
    a mean of 0 in these, and its constant in the first.
    """

    def __init__(self, marginals: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Prepare for equations solved in `dtype`."""
        self.sizes = [marginal.shape[-1] for marginal in marginals]
        self.wanted = torch.cat(list(marginals), -1)
        self.absent = self.wanted == 0
        self.root = self.wanted.sqrt().to(dtype)
        self.inverse = self.wanted.rsqrt().masked_fill_(self.absent, 0.0).to(dtype)
        self.slow = False
        """Whether conjugate gradients were slow already."""
        self._outer: Tensor | None = None
        self._gauge: Tensor | None = None

    def matrix(self, hessian: Tensor) -> Tensor:
        """Return the scaled matrix with ones on its diagonal and a full rank."""
        if self._outer is None or self._gauge is None:
            self._outer = self.inverse.unsqueeze(-1) * self.inverse.unsqueeze(-2)
            self._gauge = self.gauge()
        return torch.addcmul(self._gauge, self._outer, hessian)

    def gauge(self) -> Tensor:
        """Return what is added to the scaled matrix, `(B, S, S)`; of absent atoms a unit matrix."""
        gauge, start = torch.diag_embed(self.absent.to(self.root.dtype)), self.sizes[0]
        for root in self.root.split(self.sizes, -1)[1:]:
            own = slice(start, start + root.shape[-1])
            gauge[:, own, own].addcmul_(root.unsqueeze(-1), root.unsqueeze(-2))
            start += root.shape[-1]
        return gauge


class RingMatrix:
    """The scaled matrix of three marginals of K atoms each, its lower triangle put in place."""

    def __init__(self, scaling: Scaling) -> None:
        self._matrix = scaling.gauge()
        batch, atoms, _ = self._matrix.shape
        size = atoms // 3
        # Blocks (1, 0) and (2, 1), and block (2, 0).
        strides = (size * (atoms + 1), atoms**2, atoms, 1)
        self._below = self._matrix.as_strided((2, batch, size, size), strides, size * atoms)
        self._corner = self._matrix[:, -size:, :size]
        self._diagonal = self._matrix.diagonal(dim1=-2, dim2=-1)
        self._gauge, self._square = self._diagonal.clone(), scaling.inverse.square()
        inverse = scaling.inverse.view(batch, 3, size).transpose(0, 1)
        self._outer = inverse.unsqueeze(-2) * inverse.roll(-1, 0).unsqueeze(-1)

    def fill(self, tables: Tensor, marginals: Tensor) -> Tensor:
        """Return the matrix, from tables `(3, B, K, K)` over p and p + 1 (mod 3).

        It is the same storage each time.
        """
        torch.mul(tables[:2].mT, self._outer[:2], out=self._below)
        torch.mul(tables[2], self._outer[2].mT, out=self._corner)
        torch.addcmul(
            self._gauge, marginals.to(self._square.dtype), self._square, out=self._diagonal
        )
        return self._matrix


class DenseHessian:
    """H as a scaled matrix, of which the lower triangle is read; it is built if it is needed."""

    def __init__(self, scaling: Scaling, build: Callable[[], Tensor]) -> None:
        self._scaling, self._build = scaling, build

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve by a Cholesky factor; where rounding leaves none, by eigenvalues kept above 0."""
        inverse = self._scaling.inverse
        matrix, damping = self._build(), damping.to(inverse.dtype).unsqueeze(-1)
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        scaled = (inverse * right.to(inverse.dtype)).unsqueeze(-1)
        solution = torch.cholesky_solve(scaled, factor)
        if any(info.tolist()):
            values, vectors = torch.linalg.eigh(matrix.nan_to_num(0.0, 0.0, 0.0))
            values = torch.maximum(values, damping).unsqueeze(-1)
            other = vectors @ ((vectors.mT @ scaled) / values)
            solution = torch.where((info == 0).view(-1, 1, 1), solution, other)
        return inverse * solution.squeeze(-1)


class AppliedHessian:
    """H as what it does to a vector, for more atoms than a matrix could hold.

    With `build`, a matrix can be made of it.
    """

    def __init__(
        self,
        scaling: Scaling,
        times: Callable[[Tensor], Tensor],
        build: Callable[[], Tensor] | None = None,
    ) -> None:
        self._scaling, self._times, self._build = scaling, times, build

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve by conjugate gradients, or where these are slow and memory allows it, densely."""
        fits = len(right) * right.shape[-1] ** 2 <= _FACTORED_ENTRIES
        build = self._build if fits else None
        if build and self._scaling.slow:
            return DenseHessian(self._scaling, build).solve(right, damping, tolerance, steps)
        solution, solved = self._iterate(
            right, damping, tolerance, min(steps, _TRIAL_STEPS) if build else steps
        )
        if build and not solved:
            # It will not be better conditioned at a smaller epsilon.
            self._scaling.slow = True
            return DenseHessian(self._scaling, build).solve(right, damping, tolerance, steps)
        return solution

    def _iterate(
        self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int
    ) -> tuple[Tensor, bool]:
        inverse = self._scaling.inverse
        damping = damping.to(inverse.dtype).unsqueeze(-1)
        residual = inverse * right.to(inverse.dtype)
        solution = torch.zeros_like(residual)
        direction = residual
        square = residual.square().sum(-1, keepdim=True)
        enough = square * tolerance.to(inverse.dtype).unsqueeze(-1) ** 2
        tiny = torch.finfo(inverse.dtype).tiny
        for _ in range(steps):
            if not bool((square > enough).any()):
                return inverse * solution, True
            image = torch.addcmul(inverse * self._times(inverse * direction), damping, direction)
            curvature = (direction * image).sum(-1, keepdim=True)
            # What is solved already has nothing but rounding left.
            length = torch.where(curvature > 0, square / curvature, 0.0)
            solution = torch.addcmul(solution, length, direction)
            residual = torch.addcmul(residual, length, image, value=-1)
            before, square = square, residual.square().sum(-1, keepdim=True)
            direction = torch.addcmul(residual, square / before.clamp_min(tiny), direction)
        return inverse * solution, False


class PairwiseProduct:
    """H v by the pairwise marginals.

    For a variable j that was summed out as a leaf beside i, only the table (i, j) is known; given
    k_i, k_j depends on nothing else. So the mean of sum_p v_p given one variable, which is H v but
    for the marginal, is collected from the leaves and passed back to them.
    """

    def __init__(self, scaling: Scaling, found: Beliefs) -> None:
        self._scaling, self._found = scaling, found
        leaves = {step.variable for step in found.leaves}
        self._core = [p for p in sorted(found.marginals) if p not in leaves]
        entries = scaling.root.numel() * scaling.root.shape[-1]
        self._joined = not leaves and entries <= _JOINED_ENTRIES
        self._matrix: Tensor | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return H v, `(B, S)`."""
        if self._joined:
            if self._matrix is None:
                self._matrix = dense(self._found)
            return _times(self._matrix, vector)
        found, m = self._found, self._found.marginals
        v = dict(enumerate(vector.split(self._scaling.sizes, -1)))
        collected: dict[int, Tensor] = {}
        constant = vector.new_zeros((len(vector), 1))
        for j, neighbours, _ in found.leaves:
            for i in neighbours:
                collected[j] = _divide(_times(found.table(i, j), v[j]), m[i])
                v[i] = v[i] + collected[j]
            if not neighbours:
                collected[j] = (m[j] * v[j]).sum(-1, keepdim=True)
                constant = constant + collected[j]
        result: dict[int, Tensor] = {}
        for p in self._core:
            result[p] = m[p] * (v[p] + constant)
            for q in self._core:
                if q != p:
                    result[p] = result[p] + _times(found.table(p, q), v[q])
        for p in self._core:
            constant = constant + (m[p] * v[p]).sum(-1, keepdim=True)
        for j, neighbours, _ in reversed(found.leaves):
            result[j] = m[j] * v[j]
            if not neighbours:
                result[j] = result[j] + m[j] * (constant - collected[j])
            for i in neighbours:
                others = _divide(result[i], m[i]) - collected[j]
                result[j] = result[j] + _times(found.table(j, i), others)
        return torch.cat([result[p] for p in range(len(result))], -1)


def pairwise_hessian(scaling: Scaling, found: Beliefs) -> AppliedHessian:
    """Return H of a plan known by its pairwise marginals."""
    known = not found.leaves
    build = (lambda: scaling.matrix(dense(found))) if known else None
    return AppliedHessian(scaling, PairwiseProduct(scaling, found), build)


def dense(found: Beliefs) -> Tensor:
    """Return H as a matrix, where all pairs are known."""
    count = len(found.marginals)
    matrix = found.joined().diag_embed()
    ends = [0]
    for p in range(count):
        ends.append(ends[-1] + found.marginals[p].shape[-1])
    for (p, q), table in found.tables.items():
        matrix[:, ends[p] : ends[p + 1], ends[q] : ends[q + 1]] = table
        matrix[:, ends[q] : ends[q + 1], ends[p] : ends[p + 1]] = table.mT
    return matrix


def _times(table: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(table, vector.unsqueeze(-1)).squeeze(-1)


def _divide(x: Tensor, mass: Tensor) -> Tensor:
    """Return x / mass, or 0 where there is no mass."""
    return torch.where(mass == 0, 0.0, x / torch.where(mass == 0, 1.0, mass))
