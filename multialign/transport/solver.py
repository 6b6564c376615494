"""The public entry to the transport solver."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from multialign._validation import check_choice, check_count, check_positive, full_precision
from multialign.ops import Backend, choose_backend, register_batched_vmap
from multialign.transport.iterations import Iterate, newton, sinkhorn
from multialign.transport.problem import Problem, make_problem, unflatten_problem
from multialign.transport.solution import TransportSolution

__all__ = ["ConvergenceWarning", "Method", "check_solver_options", "multi_marginal_sinkhorn"]

Method = Literal["sinkhorn", "newton", "auto"]


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped at its largest number of iterations."""


def multi_marginal_sinkhorn(
    costs: Mapping[tuple[int, int], Tensor] | Tensor,
    marginals: Sequence[Tensor],
    epsilon: float | Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: Method = "auto",
    backend: Backend = "auto",
) -> TransportSolution:
    r"""Solve a multi-marginal entropic transport problem.

    .. math::
        T^\star = \arg\min_{T \ge 0} \; \langle T, C \rangle + \epsilon \sum_k T(k) \log T(k)
        \quad \text{with marginals } \nu_1, \dots, \nu_M,

    where :math:`C(k) = \sum_{(i,j)} C_{ij}(k_i, k_j)` over the pairs given, or any tensor. All
    arithmetic is in the log domain and in float64. The plan is never built: its marginals are
    summed out of the cost graph, which takes tables of :math:`K^2` entries for chains, stars and
    trees, :math:`K^3` for cycles and :math:`K^M` for complete graphs and full tensors.

    Args:
        costs: ``{(i, j): C_ij}`` with i < j and :math:`C_{ij}` of shape
            :math:`(*\text{batch}, K_i, K_j)`; a pair left out costs nothing. Or one tensor
            :math:`(*\text{batch}, K_1, \dots, K_M)`.
        marginals: M tensors :math:`(*\text{batch}, K_i)`, non-negative, each divided by its sum.
            An atom of mass 0 is absent, whatever its costs; a marginal without mass is out, with
            all its costs.
        epsilon: > 0, a number or a tensor :math:`(*\text{batch})`, in cost units.
        tolerance: Largest L1 distance of the plan's marginals from those wanted, summed over them.
            None: 1e-6 in float64 and 1e-4 in float32.
        max_iterations: Where it stops without convergence.
        method: "sinkhorn" sweeps over the marginals; "newton" solves with a matrix over all atoms
            at each step, and takes few steps however small :math:`\epsilon` is; "auto" takes
            "newton" up to 512 atoms in all (and 2^24 entries of that matrix over the batch).
        backend: "torch" or "auto". "triton" is not available in this version.

    Returns:
        The solution; batch dimensions are those of the arguments, broadcast.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument has the wrong type, or dtypes differ.
        MemoryError: A table of more than 2^28 entries would be needed.
        NotImplementedError: ``backend="triton"``.

    Warns:
        ConvergenceWarning: Some problem did not reach the tolerance.

    References:
        Eq. 7-8 of :cite:t:`decalign:26`; :cite:t:`pass:15` for the problem, :cite:t:`benamou:15`
        for the sweeps, :cite:t:`haasler:21` for the use of the graph.

    Example:
        >>> import torch
        >>> from multialign import multi_marginal_sinkhorn, squared_euclidean_cost
        >>> points = [torch.tensor([[0.0], [1.0]]) + shift for shift in (0.0, 0.1, 0.2)]
        >>> costs = {
        ...     (i, j): squared_euclidean_cost(points[i], points[j])
        ...     for i, j in [(0, 1), (0, 2), (1, 2)]
        ... }
        >>> solution = multi_marginal_sinkhorn(costs, [torch.ones(2)] * 3, epsilon=1.0)
        >>> solution.pairwise_marginal(0, 2)
        tensor([[0.4037, 0.0963],
                [0.0963, 0.4037]])
    """
    check_solver_options(tolerance, max_iterations, method, backend)
    problem = make_problem(costs, marginals, epsilon)
    return solve_problem(problem, tolerance, max_iterations, method, backend)


def solve_problem(
    problem: Problem,
    tolerance: float | None,
    max_iterations: int,
    method: Method,
    backend: Backend,
) -> TransportSolution:
    """Solve a problem that has been checked."""
    choose_backend(backend, problem.epsilon)
    if tolerance is None:
        tolerance = 1e-6 if problem.dtype == torch.float64 else 1e-4
    with full_precision(problem.epsilon):
        iterate = Iterate(
            *_solve(
                *problem.detach().flatten(),
                "sinkhorn" if method == "sinkhorn" else "newton",
                problem.dtype == torch.float32,
                tolerance,
                max_iterations,
            )
        )
        return TransportSolution(problem, iterate, tolerance)


@torch.library.custom_op(
    "multialign::solve_transport",
    mutates_args=(),
    schema=(
        "(Tensor[] costs, int[] scopes, Tensor[] marginals, Tensor epsilon, Tensor deviation, "
        "str method, bool single, float tolerance, int max_iterations) -> (Tensor, Tensor, Tensor)"
    ),
)
def _solve(
    costs: list[Tensor],
    scopes: list[int],
    marginals: list[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    method: str,
    single: bool,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return potentials `(B, S)`, iterations and error.

    An operator of its own, since how often it iterates depends on the data: torch.compile takes it
    as it is, and torch.func.vmap as one larger batch.
    """
    problem = unflatten_problem(costs, scopes, marginals, epsilon, deviation)
    if method == "sinkhorn":
        iterate = sinkhorn(problem, tolerance, max_iterations)
    else:
        iterate = newton(problem, tolerance, max_iterations, single)
    stopped = iterate.error.isfinite() & (iterate.error > tolerance)
    if bool(stopped.any()):
        warnings.warn(
            f"{int(stopped.sum())} of {stopped.numel()} transport problems did not reach "
            f"tolerance {tolerance:g} in {int(iterate.iterations[stopped].max())} iterations; "
            f"largest error {float(iterate.error[stopped].max()):.2g}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return iterate.potentials, iterate.iterations, iterate.error


@_solve.register_fake
def _(
    costs: list[Tensor],
    scopes: list[int],
    marginals: list[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    method: str,
    single: bool,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    potentials = torch.empty_like(torch.cat(marginals, -1))
    return potentials, torch.empty_like(epsilon, dtype=torch.int64), torch.empty_like(epsilon)


register_batched_vmap(_solve)


def check_solver_options(
    tolerance: float | None, max_iterations: int, method: str, backend: str
) -> None:
    """Raise unless the options of the solver are valid."""
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    check_choice("method", method, ("sinkhorn", "newton", "auto"))
    check_choice("backend", backend, ("auto", "torch", "triton"))
