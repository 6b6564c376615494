"""Costs between points and between Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multialign._validation import check_alike, check_entries, check_tensor, full_precision, lift
from multialign.ops.spectral import SquareRoot, nuclear_norms, square_root, take

__all__ = [
    "bures_wasserstein_cost",
    "costs_between_sets",
    "pairwise_bures_cost",
    "squared_euclidean_cost",
]

# Up to this many differences x_nd - y_md are formed one by one, which is exact. Beyond it the
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
        # The distance does not depend on the origin. Near the data the expansion loses no digits.
        origin = torch.cat([x.detach(), y.detach()], -2).mean(-2, keepdim=True)
        x, y = x - origin, y - origin
        squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        cost = torch.clamp_min(squares - 2 * (x @ y.mT), 0)
        if x.shape == y.shape:
            # Equal rows n = m have a distance of exactly 0, as above.
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
            means_i.numel() * means_j.shape[-2] * means_j.shape[-1],  # one matrix a pair
            "use diagonal covariances, fewer components, or projected features",
        )
        if covariances_i.ndim == means_i.ndim:
            covariances_i = torch.diag_embed(covariances_i)
        if covariances_j.ndim == means_j.ndim:
            covariances_j = torch.diag_embed(covariances_j)
        i, j = square_root(covariances_i), square_root(covariances_j)
        return cost + _bures(i, j).to(cost.dtype)


def pairwise_bures_cost(
    means: Tensor, covariances: Tensor, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """Return `bures_wasserstein_cost` of P pairs of sets, factoring each Gaussian once.

    Args:
        means: `(M, *batch, K, D)`.
        covariances: `(M, *batch, K, D)` or `(M, *batch, K, D, D)`.
        pairs: The numbers of two sets each.

    Returns:
        `(P, *batch, K, K)`.
    """
    left, right = zip(*pairs, strict=True)
    means_i, means_j = take(means, left), take(means, right)
    if covariances.ndim == means.ndim:
        i, j = take(covariances, left), take(covariances, right)
        return bures_wasserstein_cost(means_i, i, means_j, j)
    cost = squared_euclidean_cost(means_i, means_j)
    with full_precision(cost):
        roots = square_root(covariances)
        return cost + _bures(roots.take(left), roots.take(right)).to(cost.dtype)


def costs_between_sets(
    sets: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[int, int]]
) -> Sequence[Tensor]:
    """Return `bures_wasserstein_cost` of pairs of sets, each of means and covariances."""
    means, covariances = zip(*sets, strict=True)
    if len({x.shape for x in means}) == 1:
        return pairwise_bures_cost(torch.stack(means), torch.stack(covariances), pairs).unbind(0)
    return [bures_wasserstein_cost(*sets[i], *sets[j]) for i, j in pairs]


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


def _bures(i: SquareRoot, j: SquareRoot) -> Tensor:
    """Return Tr(S_i + S_j - 2 (S_i^1/2 S_j S_i^1/2)^1/2) for every two matrices."""
    bures = i.trace.unsqueeze(-1) + j.trace.unsqueeze(-2) - 2 * nuclear_norms(i, j)
    # Rounding may leave it just below 0. Its gradient is right there too, so it is kept.
    return bures + (bures.clamp_min(0) - bures).detach()
