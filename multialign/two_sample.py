"""The kernel two-sample test: whether two sets of samples have one distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multialign._draws import uniform
from multialign._samples import make_samples
from multialign._validation import check_count, check_entries, check_samples, full_precision
from multialign.kernels import Bandwidth, Kernel, check_kernel, kernel_matrix, kernel_units

__all__ = ["MMDTest", "mmd_test"]

# Entries of a block of rows of the kernel matrix.
_BLOCK_ENTRIES = 2**20
# Statistics this close, relative to the largest kernel entry, are equal but for rounding.
_EQUAL = 1e-12


class MMDTest(NamedTuple):
    """Result of a two-sample test, :func:`mmd_test`.

    Example:
        >>> import torch
        >>> from multialign import mmd_test
        >>> statistic, p_value = mmd_test(torch.zeros(4, 1), torch.zeros(5, 1))
        >>> p_value
        tensor(1.)
    """

    statistic: Tensor
    """The squared MMD between the two sets, `(*batch)`."""
    p_value: Tensor
    """`(*batch)`: small where the sets differ more than chance explains."""


def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = "median",
    kernel: Kernel = "gaussian",
    permutations: int = 1000,
    generator: torch.Generator | None = None,
) -> MMDTest:
    r"""Test whether two sets of samples come from one distribution, by permutations.

    The statistic is the biased estimate of the squared MMD, as :func:`mmd_loss` has it. Under the
    hypothesis that x and y have one distribution, any other division of the pooled samples into
    sets of N and M is as likely. With B random divisions,

    .. math::
        p = \frac{1 + \#\{b : \operatorname{MMD}^2_b \ge \operatorname{MMD}^2\}}{1 + B},

    and rejecting where :math:`p \le \alpha` is wrong with probability at most :math:`\alpha`, at
    any N and M. The samples of a set have to be independent of each other: rows of one recording
    are not, nor is row n of x of row n of y where both come from one sample. There are no weights,
    since weighted samples are not exchangeable: leave absent rows out.

    The kernel matrix is computed once, in float64 and in blocks of rows, for all divisions; memory
    is O((B + D) (N + M)). The result has no gradient.

    Args:
        x: :math:`(*\text{batch}, N, D)`.
        y: :math:`(*\text{batch}, M, D)`.
        bandwidth: As in :func:`mmd_loss`. "median" is that of the pooled samples, which no
            division changes.
        kernel: "gaussian", or "energy" for the test of the energy distance, which needs no
            bandwidth.
        permutations: B. The smallest p-value is 1 / (1 + B).
        generator: Draws the divisions, the same for each problem of a batch; None stands for
            torch's global generator.

    Returns:
        Statistic and p-value, :math:`(*\text{batch})` each; both NaN where a sample is not finite.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.
        MemoryError: B (N + M), or the distances of "median", are more than 2^28 entries.

    References:
        :cite:t:`gretton:12`; :cite:t:`szekely:04` for the energy distance; :cite:t:`phipson:10` for
        the 1 in the p-value.

    Example:
        >>> import torch
        >>> from multialign import mmd_test
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 50, 3, generator=generator)
        >>> mmd_test(x, y + 1.0, generator=generator).p_value
        tensor(0.0010)
    """
    check_kernel(kernel, bandwidth)
    permutations = check_count("permutations", permutations)
    samples, _ = check_samples([x, y], None)
    for name, one in zip(("x", "y"), samples, strict=True):
        if one.shape[-2] == 0:
            raise ValueError(f"{name} must have at least one sample; got N = 0")
    counts = [one.shape[-2] for one in samples]
    check_entries((permutations + 1) * sum(counts), "take fewer permutations, or fewer samples")

    with torch.no_grad(), full_precision(samples[0]):
        wide = make_samples([one.double() for one in samples], [None, None])
        wide, sigmas, factor = kernel_units(wide, kernel, bandwidth)
        pooled = torch.cat(wide.features, -2)
        signs = _divisions(counts, permutations, pooled, generator)
        statistics, largest = _statistics(pooled, signs, sigmas)
        observed = statistics[..., :1]
        reached = statistics[..., 1:] >= observed - _EQUAL * largest.unsqueeze(-1)
        p_value = (1 + reached.sum(-1)) / (1 + permutations)
        p_value = torch.where(observed.squeeze(-1).isfinite(), p_value.double(), torch.nan)
        statistic = factor * observed.squeeze(-1)
        return MMDTest(statistic.to(samples[0].dtype), p_value.to(samples[0].dtype))


def _divisions(
    counts: list[int], permutations: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return 1/N and -1/M for the members of each set, `(1 + B, N + M)`: as given, and permuted."""
    signs = torch.cat([like.new_full((n,), s / n) for n, s in zip(counts, (1, -1), strict=True)])
    orders = uniform((permutations, len(signs)), like, generator).argsort(-1)
    return torch.cat([signs.unsqueeze(0), signs[orders]])


def _statistics(pooled: Tensor, signs: Tensor, sigmas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return s^T K s for each row s of `signs`, `(*batch, 1 + B)`, and the largest entry of K."""
    *batch, count, _ = pooled.shape
    rows = max(1, _BLOCK_ENTRIES // (count * max(1, pooled[..., 0, 0].numel())))
    total = pooled.new_zeros(*batch, len(signs))
    largest = pooled.new_zeros(batch)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        kernel = kernel_matrix(pooled[..., block, :], pooled, sigmas)
        total += ((signs[:, block] @ kernel) * signs).sum(-1)
        largest = torch.maximum(largest, kernel.abs().amax((-2, -1)))
    return total, largest
