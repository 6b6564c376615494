"""Newton's equation H x = r of the dual, with a matrix that is factored or one that is applied.

Scaled by the square roots of the marginals, H has a diagonal of ones near the solution, and its
eigenvalues lie between 0 and M. Its null space holds the constants x_p with sum_p x_p = 0; a right
side of differences of marginals is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, combinations, pairwise
from typing import Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs, Edge

__all__ = [
    "AppliedHessian",
    "DenseHessian",
    "Hessian",
    "ScaledMatrix",
    "Scaling",
    "pairwise_hessian",
]

# Up to this many entries the matrix is factored where conjugate gradients are slow: with three
# marginals that costs about as much as the pairwise marginals did. First this many of their steps
# are tried.
_FACTORED_ENTRIES = 2**24
_TRIAL_STEPS = 40
# On an accelerator, whether all are solved is read this seldom; a problem that is solved waits.
_UNREAD_STEPS = 8


# Far above the rounding that takes away a factor, and far below ones on the diagonal.
_MORE_DAMPING = 1e-6


class Hessian(Protocol):
    """The matrix H of a plan, `(B, S, S)` with S the sum of sizes."""

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve (H + diag(damping nu)) x = right, `(B, S)`, orthogonal to the constants.

        `damping` is `(B, 1)` or `(B, S)`.

        An iterative solution leaves at most `tolerance` `(B,)` of the right side, if it can within
        `steps` steps.
        """


class Scaling:
    """The scaling of H by the marginals wanted, and what fills its null space.

    Added to H is (root nu_p)(root nu_p)^T in the block of each hard p but the first. So the
    solution has a mean of 0 in these, and its constant in the first.
    """

    def __init__(
        self, marginals: Sequence[Tensor], dtype: torch.dtype, relaxed: Sequence[int] = ()
    ) -> None:
        """Prepare for equations solved in `dtype`.

        A marginal that is relaxed has no constant in the null space.
        """
        self._marginals, self._dtype = list(marginals), dtype
        self._hard = [p for p in range(len(marginals)) if p not in relaxed]
        self._parts: dict[tuple[int, ...], Scaling] = {}
        self.sizes = [marginal.shape[-1] for marginal in marginals]
        self.wanted = torch.cat(list(marginals), -1)
        self.absent = self.wanted == 0
        self.root = self.wanted.sqrt().to(dtype)
        self.inverse = self.wanted.rsqrt().masked_fill_(self.absent, 0.0).to(dtype)
        self.slow = False
        """Whether conjugate gradients were slow for these marginals before."""

    def matrix(self, hessian: Tensor) -> Tensor:
        """Return the scaled matrix with ones on its diagonal and a full rank."""
        return torch.addcmul(self.gauge, self._outer, hessian)

    @cached_property
    def gauge(self) -> Tensor:
        """What is added to the scaled matrix, `(B, S, S)`; of absent atoms a unit matrix."""
        gauge = torch.diag_embed(self.absent.to(self.root.dtype))
        ends = list(accumulate(self.sizes, initial=0))
        for p in self._hard[1:]:
            own = slice(ends[p], ends[p + 1])
            root = self.root[:, own]
            gauge[:, own, own].addcmul_(root.unsqueeze(-1), root.unsqueeze(-2))
        return gauge

    @cached_property
    def _outer(self) -> Tensor:
        return self.inverse.unsqueeze(-1) * self.inverse.unsqueeze(-2)

    def part(self, *variables: int) -> Scaling:
        """Return the scaling for some of the variables, the same each time."""
        if variables not in self._parts:
            marginals = [self._marginals[p] for p in variables]
            self._parts[variables] = Scaling(marginals, self._dtype)
        return self._parts[variables]


class ScaledMatrix:
    """The scaled matrix of a plan whose pairs are all known, in storage that is filled in place.

    Below the diagonal it is whole; above, it is not written.
    """

    def __init__(self, scaling: Scaling) -> None:
        self._matrix = scaling.gauge.clone()
        self._diagonal = self._matrix.diagonal(dim1=-2, dim2=-1)
        self._gauge, self._square = self._diagonal.clone(), scaling.inverse.square()
        ends = list(accumulate(scaling.sizes, initial=0))
        blocks = [slice(*end) for end in pairwise(ends)]
        inverse = scaling.inverse.split(scaling.sizes, -1)
        self._below = {
            (p, q): (
                self._matrix[:, blocks[q], blocks[p]],
                inverse[q].unsqueeze(-1) * inverse[p].unsqueeze(-2),
            )
            for p, q in combinations(range(len(blocks)), 2)
        }

    def fill(self, marginals: Tensor, tables: Mapping[Edge, Tensor]) -> Tensor:
        """Return the matrix of marginals `(B, S)` and pairwise marginals; the storage is reused."""
        for edge, (block, outer) in self._below.items():
            torch.mul(tables[edge].mT, outer, out=block)
        marginals = marginals.to(self._square.dtype)
        torch.addcmul(self._gauge, marginals, self._square, out=self._diagonal)
        return self._matrix


class DenseHessian:
    """H as a scaled matrix, of which the lower triangle is read; it is built when it is needed."""

    def __init__(self, scaling: Scaling, build: Callable[[], Tensor]) -> None:
        self._scaling, self._build = scaling, build

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve by a Cholesky factor; where rounding leaves none, by eigenvalues kept above 0."""
        inverse = self._scaling.inverse
        matrix, damping = self._build(), damping.to(inverse.dtype)
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        scaled = (inverse * right.to(inverse.dtype)).unsqueeze(-1)
        solution = torch.cholesky_solve(scaled, factor)
        if inverse.device.type != "cpu":
            # Reading `info` would wait. A factor of a matrix that is damped more takes over there.
            matrix.diagonal(dim1=-2, dim2=-1).add_(_MORE_DAMPING)
            other = torch.cholesky_solve(scaled, torch.linalg.cholesky_ex(matrix)[0])
            solution = torch.where((info == 0).view(-1, 1, 1), solution, other)
        elif any(info.tolist()):
            values, vectors = torch.linalg.eigh(matrix.nan_to_num(0.0, 0.0, 0.0))
            values = torch.maximum(values, damping.amin(-1, keepdim=True)).unsqueeze(-1)
            other = vectors @ ((vectors.mT @ scaled) / values)
            solution = torch.where((info == 0).view(-1, 1, 1), solution, other)
        return inverse * solution.squeeze(-1)


class AppliedHessian:
    """H as a product with a vector, for more atoms than a matrix could hold.

    `build` makes the scaled matrix of it, which takes as long as `trial` steps.
    """

    def __init__(
        self,
        scaling: Scaling,
        times: Callable[[Tensor], Tensor],
        build: Callable[[], Tensor],
        trial: int = 0,
    ) -> None:
        self._scaling, self._times, self._build = scaling, times, build
        self._trial = max(_TRIAL_STEPS, trial)

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve by conjugate gradients, or where these are slow and memory allows it, densely."""
        fits = len(right) * right.shape[-1] ** 2 <= _FACTORED_ENTRIES
        direct = DenseHessian(self._scaling, self._build)
        # On an accelerator a factor takes less time than the launches of so many steps.
        if fits and (self._scaling.slow or right.device.type != "cpu"):
            return direct.solve(right, damping, tolerance, steps)
        solution, solved = self._iterate(
            right, damping, tolerance, min(steps, self._trial) if fits else steps
        )
        if fits and not solved:
            # H is no better conditioned at a smaller epsilon.
            self._scaling.slow = True
            return direct.solve(right, damping, tolerance, steps)
        return solution

    def _iterate(
        self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int
    ) -> tuple[Tensor, bool]:
        inverse = self._scaling.inverse
        damping = damping.to(inverse.dtype)
        residual = inverse * right.to(inverse.dtype)
        solution = torch.zeros_like(residual)
        direction = residual
        square = residual.square().sum(-1, keepdim=True)
        enough = square * tolerance.to(inverse.dtype).unsqueeze(-1) ** 2
        tiny = torch.finfo(inverse.dtype).tiny
        every = 1 if inverse.device.type == "cpu" else _UNREAD_STEPS
        for step in range(steps):
            if step % every == 0 and not bool((square > enough).any()):
                return inverse * solution, True
            image = torch.addcmul(inverse * self._times(inverse * direction), damping, direction)
            curvature = (direction * image).sum(-1, keepdim=True)
            # A problem that is solved has a direction of nothing but rounding.
            going = curvature > 0 if every == 1 else (curvature > 0) & (square > enough)
            length = torch.where(going, square / curvature, 0.0)
            solution = torch.addcmul(solution, length, direction)
            residual = torch.addcmul(residual, length, image, value=-1)
            before, square = square, residual.square().sum(-1, keepdim=True)
            direction = torch.addcmul(residual, square / before.clamp_min(tiny), direction)
        return inverse * solution, False


class BranchedHessian:
    """H of a plan of which some variables were summed out as leaves, by a form of its inverse.

    Given its neighbour i, a leaf j depends on no other variable. With P the table (i, j), E_i the
    unit matrix in the rows of i and r_i = E_i^T r,

        H^-1 = H_core^-1 + sum_j Q_j S_j^-1 Q_j^T,  Q_j = E_j - E_i diag(1 / m_i) P,
        S_j = diag(m_j) - P^T diag(1 / m_i) P

    (for a leaf without a neighbour, Q_j = E_j and S_j = diag(m_j)): the inverse of a covariance
    with conditional independences :cite:`lauritzen:96`, which the second moments of the indicators
    of k_1, ..., k_M have. So every table is inverted alone. However inexactly that is done, the
    direction is one of ascent.
    """

    def __init__(self, scaling: Scaling, found: Beliefs) -> None:
        self._scaling, self._found = scaling, found
        leaves = {step.variable for step in found.leaves}
        self._core = tuple(p for p in sorted(found.marginals) if p not in leaves)

    def solve(self, right: Tensor, damping: Tensor, tolerance: Tensor, steps: int) -> Tensor:
        """Solve it; damping is added to all marginals in the formula."""
        scaling, m = self._scaling, self._found.marginals
        dtype, count = scaling.root.dtype, len(scaling.sizes)
        more = damping.to(dtype) * scaling.root.square()
        more = more.masked_fill(scaling.absent, 1.0).split(scaling.sizes, -1)
        mass = [m[p] + more[p] for p in range(count)]
        # Products of smaller entries would be denormal, and slow.
        least = torch.finfo(dtype).tiny ** 0.5
        # H times a vector of ones is M times the marginals.
        parts = list(right.to(dtype).split(scaling.sizes, -1))
        sums = torch.stack([part.sum(-1, keepdim=True) for part in parts])
        parts = [
            part - total * m[p] for p, (part, total) in enumerate(zip(parts, sums, strict=True))
        ]
        result = [(sums.mean(0) / count).expand_as(part) for part in parts]
        for j, neighbours, _ in self._found.leaves:
            if not neighbours:
                result[j] = result[j] + parts[j] / mass[j]
            for i in neighbours:
                table = torch.threshold(self._found.table(i, j), least, 0.0)
                reduced = parts[j] - _times(table.mT, parts[i] / mass[i])
                conditional = self._conditional(j, table, mass[i])
                own = conditional.solve(reduced, damping, tolerance, steps)
                result[j] = result[j] + own
                result[i] = result[i] - _times(table, own) / mass[i]
        if self._core:
            core = self._scaling.part(*self._core)
            joined = torch.cat([parts[p] for p in self._core], -1)
            inner = _core_hessian(core, self._found.part(self._core))
            blocks = inner.solve(joined, damping, tolerance, steps).split(core.sizes, -1)
            for p, block in zip(self._core, blocks, strict=True):
                result[p] = result[p] + block
        return torch.cat(result, -1)

    def _conditional(self, j: int, table: Tensor, mass: Tensor) -> AppliedHessian:
        """Return S_j."""
        scaling, marginal = self._scaling.part(j), self._found.marginals[j]

        def times(vector: Tensor) -> Tensor:
            return marginal * vector - _times(table.mT, _times(table, vector) / mass)

        def build() -> Tensor:
            root = table * mass.rsqrt().unsqueeze(-1)
            matrix = torch.bmm(root.mT, -root)
            matrix.diagonal(dim1=-2, dim2=-1).add_(marginal)
            # S_j takes constants to 0.
            ones = scaling.root.unsqueeze(-1) * scaling.root.unsqueeze(-2)
            return scaling.matrix(matrix) + ones

        return AppliedHessian(scaling, times, build, table.shape[-1] // 16)


def pairwise_hessian(scaling: Scaling, found: Beliefs) -> Hessian:
    """Return H of a plan known by its pairwise marginals."""
    return BranchedHessian(scaling, found) if found.leaves else _core_hessian(scaling, found)


def _core_hessian(scaling: Scaling, found: Beliefs) -> AppliedHessian:
    m = found.marginals

    def times(vector: Tensor) -> Tensor:
        v = vector.split(scaling.sizes, -1)
        result = [m[p] * v[p] for p in range(len(m))]
        for (i, j), table in found.tables.items():
            result[i] = result[i] + _times(table, v[j])
            result[j] = result[j] + _times(table.mT, v[i])
        return torch.cat(result, -1)

    def build() -> Tensor:
        return ScaledMatrix(scaling).fill(found.joined(), found.tables)

    return AppliedHessian(scaling, times, build)


def _times(table: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(table, vector.unsqueeze(-1)).squeeze(-1)
