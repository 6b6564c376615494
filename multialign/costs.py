"""Costs between points and between Gaussians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign._validation import check_alike, check_entries, check_tensor, full_precision, lift
from multialign.ops import nuclear_norms, nuclear_norms_backward

__all__ = ["bures_wasserstein_cost", "squared_euclidean_cost"]

# Up to this many differences x_nd - y_md are formed one by one, which is exact; beyond it the
# square is expanded into a matrix product, which is faster and needs no (N, M, D) intermediate.
_DIRECT_ENTRIES = 2**17


def squared_euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the squared Euclidean distance between every two rows, never negative.

    .. math:: C(n, m) = \|x_n - y_m\|^2

    There is no factor 1/2.

    Args:
        x: :math:`(*\text{batch}, N, D)`.
        y: :math:`(*\text{batch}, M, D)`.

    Returns:
        :math:`(*\text{batch}, N, M)`, in squared units of the points.

    Raises:
        ValueError: The batch or feature dimensions differ, or the devices.
        TypeError: An argument is no floating-point tensor, or the dtypes differ.

    References:
        The cost of :cite:t:`feydy:19`, twice theirs.

    Example:
        >>> import torch
        >>> from multialign import squared_euclidean_cost
        >>> origin = torch.zeros(1, 2)
        >>> squared_euclidean_cost(origin, torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  1.]])
    """
    x = lift(check_tensor("x", x, "(*batch, N, D)", 2))
    y = lift(check_tensor("y", y, "(*batch, M, D)", 2))
    check_alike("x and y", [x, y], ["x", "y"])
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x (*batch, N, D) and y (*batch, M, D) must agree in batch and D; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.numel() * y.shape[-2] <= _DIRECT_ENTRIES:
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    with full_precision(x):
        # The distance does not depend on the origin; near the data the expansion loses no digits.
        origin = torch.cat([x.detach(), y.detach()], -2).mean(-2, keepdim=True)
        x, y = x - origin, y - origin
        squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        cost = torch.clamp_min(squares - 2 * (x @ y.mT), 0)
        if (
            x.shape == y.shape
        ):  # between equal rows at one place it is 0 to the last digit, as above
            cost = cost.masked_fill(torch.diag_embed((x == y).all(-1)), 0.0)
        return cost


def bures_wasserstein_cost(
    means_i: Tensor, covariances_i: Tensor, means_j: Tensor, covariances_j: Tensor
) -> Tensor:
    r"""Return the squared 2-Wasserstein distance between every two Gaussians of two sets.

    .. math::
        C(k, l) = \|\mu_i^k - \mu_j^l\|^2 + \operatorname{Tr}\Big(\Sigma_i^k + \Sigma_j^l
            - 2 \big((\Sigma_i^k)^{1/2} \Sigma_j^l (\Sigma_i^k)^{1/2}\big)^{1/2}\Big)

    For diagonal covariances the trace is :math:`\sum_d (\sigma_{i,d}^k - \sigma_{j,d}^l)^2` in
    standard deviations. Full matrices are factored in float64, whatever the dtype. Gradients are
    finite at equal, repeated and zero eigenvalues: in a direction in which a covariance vanishes,
    where the derivative of its square root is infinite, that part of the gradient is 0.

    Args:
        means_i: :math:`(*\text{batch}, K_i, D)`.
        covariances_i: :math:`(*\text{batch}, K_i, D)` (diagonals) or
            :math:`(*\text{batch}, K_i, D, D)`, symmetric positive semi-definite.
        means_j: :math:`(*\text{batch}, K_j, D)`.
        covariances_j: As `covariances_i`, with :math:`K_j`.

    Returns:
        :math:`(*\text{batch}, K_i, K_j)`, >= 0, in squared units of the means.

    Raises:
        ValueError: Shapes do not fit together, or devices differ.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: With full matrices, batch K_i K_j D^2 is more than 2^28 entries.

    References:
        Eq. 6 of :cite:t:`decalign:26`; :cite:t:`bhatia:19`.

    Example:
        >>> import torch
        >>> from multialign import bures_wasserstein_cost
        >>> mean, variance = torch.zeros(1, 2), torch.ones(1, 2)
        >>> bures_wasserstein_cost(mean, variance, mean + 1.0, 4.0 * variance)
        tensor([[4.]])
    """
    means_i, covariances_i = _check_gaussians("i", means_i, covariances_i)
    means_j, covariances_j = _check_gaussians("j", means_j, covariances_j)
    check_alike(
        "means and covariances",
        [means_i, covariances_i, means_j, covariances_j],
        ["means_i", "covariances_i", "means_j", "covariances_j"],
    )
    cost = squared_euclidean_cost(means_i, means_j)
    with full_precision(cost):
        if covariances_i.ndim == covariances_j.ndim == means_i.ndim:
            # sum_d (s_i - s_j)^2, small differences of large deviations included
            return cost + squared_euclidean_cost(_sqrt(covariances_i), _sqrt(covariances_j))
        check_entries(
            means_i.numel() * means_j.shape[-2] * means_j.shape[-1],  # a matrix for each pair
            "use diagonal covariances, fewer components, or projected features",
        )
        if covariances_i.ndim == means_i.ndim:
            covariances_i = torch.diag_embed(covariances_i)
        if covariances_j.ndim == means_j.ndim:
            covariances_j = torch.diag_embed(covariances_j)
        i, j = (_factor(covariances) for covariances in (covariances_i, covariances_j))
        return cost + _bures(i, j).to(cost.dtype)


def pairwise_bures_cost(
    means: Tensor, covariances: Tensor, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """Return `bures_wasserstein_cost` of P pairs of M sets of K Gaussians, each factored once.

    Args:
        means: `(M, *batch, K, D)`.
        covariances: `(M, *batch, K, D)` or `(M, *batch, K, D, D)`.
        pairs: Which sets.

    Returns:
        `(P, *batch, K, K)`.
    """
    left, right = zip(*pairs, strict=True)
    means_i, means_j = _take(means, left), _take(means, right)
    if covariances.ndim == means.ndim:
        i, j = _take(covariances, left), _take(covariances, right)
        return bures_wasserstein_cost(means_i, i, means_j, j)
    cost = squared_euclidean_cost(means_i, means_j)
    with full_precision(cost):
        factored = _factor(covariances)
        return cost + _bures(factored.take(left), factored.take(right)).to(cost.dtype)


def _take(x: Tensor, entries: Sequence[int]) -> Tensor:
    """Return some entries of the first dimension; unlike indexing, no index goes to the device."""
    return torch.stack([x[entry] for entry in entries])


def _check_gaussians(name: str, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    means = lift(check_tensor(f"means_{name}", means, f"(*batch, K_{name}, D)", 2))
    covariances = lift(
        check_tensor(f"covariances_{name}", covariances, f"(*batch, K_{name}, D[, D])", 2)
    )
    if covariances.shape not in (means.shape, (*means.shape, means.shape[-1])):
        raise ValueError(
            f"covariances_{name} must have shape {tuple(means.shape)} (diagonals) or "
            f"{(*means.shape, means.shape[-1])}; got {tuple(covariances.shape)}"
        )
    return means, covariances


def _sqrt(x: Tensor) -> Tensor:
    """Return the square root of x >= 0, with gradient 0 at 0."""
    zero = x == 0
    return torch.where(zero, x, torch.where(zero, x.new_ones(()), x).sqrt())


class _Factored(NamedTuple):
    """Positive semi-definite matrices S and their roots R, in float64."""

    trace: Tensor
    """Of S, `(*batch, K)`."""
    root: Tensor
    """`(*batch, K, D, D)`."""
    values: Tensor
    """Eigenvalues of R, `(*batch, K, D)`, ascending; without gradient, like the next."""
    vectors: Tensor
    """Its eigenvectors, `(*batch, K, D, D)`."""
    rounding: float
    """The relative rounding error that the entries came with."""

    def take(self, entries: Sequence[int]) -> _Factored:
        """Return some entries of the first batch dimension."""
        trace, root, values, vectors = (_take(part, entries) for part in self[:4])
        return _Factored(trace, root, values, vectors, self.rounding)


def _factor(covariances: Tensor) -> _Factored:
    rounding = torch.finfo(covariances.dtype).eps
    covariances = covariances.double()
    trace = covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
    root, values, vectors = _MatrixSqrt.apply(covariances)
    return _Factored(trace, root, values, vectors, rounding)


def _bures(i: _Factored, j: _Factored) -> Tensor:
    """Return Tr(S_i + S_j - 2 (S_i^1/2 S_j S_i^1/2)^1/2) for every two matrices."""
    # The last trace is the sum of the singular values of S_j^1/2 S_i^1/2: no square is formed
    # and undone, so that small eigenvalues keep their digits.
    needed = torch.is_grad_enabled() and (i.root.requires_grad or j.root.requires_grad)
    fidelity, _ = _NuclearNorm.apply(*i[1:4], *j[1:4], max(i.rounding, j.rounding), needed)
    bures: Tensor = i.trace.unsqueeze(-1) + j.trace.unsqueeze(-2) - 2 * fidelity
    # Rounding may leave it just below 0. Its gradient there is as good as above, so it is kept.
    return bures + (bures.clamp_min(0) - bures).detach()


# Derivatives of the functions of matrices below are written with functions that are themselves
# differentiable, so that derivatives of every order exist. None divides by a difference of
# eigenvalues: repeated ones are as good as any.


class _MatrixSqrt(torch.autograd.Function):
    """Principal square root R of a symmetric positive semi-definite matrix.

    With it come the eigenvalues and eigenvectors of R, without gradient.
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


class _NuclearNorm(torch.autograd.Function):
    """Sums of the singular values of the products R_j R_i of every two of two sets of roots.

    The gradient of each by the product is its polar factor. The second result is for the backward
    pass alone.
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
        parts = root_i, values_i, vectors_i, root_j, values_j, vectors_j
        norms, kept = nuclear_norms(
            *(part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in parts),
            rounding,
            needed,
        )
        poison = poison_i[..., 0] + poison_j[..., 0].mT
        return norms.reshape(poison.shape) + poison, kept.reshape((*poison.shape, kept.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], *inputs[3:5], output[1])
        ctx.rounding, ctx.known = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        root_i, values_i, root_j, values_j, kept = ctx.saved_tensors
        (root_i, poison_i), (root_j, poison_j) = _poison(root_i), _poison(root_j)
        # A cost that is not finite has no gradient; it must not spoil those of the others.
        grad = torch.where(grad == 0, grad, grad + poison_i[..., 0] + poison_j[..., 0].mT)
        if torch.is_grad_enabled() or not ctx.known:
            factor = _PolarFactor.apply(root_j.unsqueeze(-4) @ root_i.unsqueeze(-3))
            factor = grad[..., None, None] * factor
            by_i = (root_j.unsqueeze(-4) @ factor).sum(-3)
            by_j = (factor @ root_i.unsqueeze(-3)).sum(-4)
        else:
            batch = grad.shape[:-2]
            parts = grad, root_i, values_i, root_j, values_j, kept
            by_i, by_j = nuclear_norms_backward(
                *(part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in parts),
                ctx.rounding,
            )
            by_i, by_j = by_i.reshape(root_i.shape), by_j.reshape(root_j.shape)
        return by_i, None, None, by_j, None, None, None, None


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
    """Return eigenvalues, eigenvectors and what to add to a result to keep it non-finite."""
    matrix, poison = _poison(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors, poison


def _poison(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Replace matrices that LAPACK would refuse; return them with NaN for those, 0 for the rest."""
    poison = (0 * matrix.detach()).sum((-2, -1), keepdim=True)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(poison == 0, matrix, identity), poison
