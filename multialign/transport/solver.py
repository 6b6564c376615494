"""The public entry to the transport solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multialign._validation import full_precision
from multialign.ops import (
    Backend,
    Implementation,
    choose_backend,
    operator,
    register_batched_vmap,
    register_fake,
    solve_small,
)
from multialign.transport.convergence import ConvergenceWarning, warn_unless_converged
from multialign.transport.direct import solve_directly
from multialign.transport.forms.choose import FormName, make_form
from multialign.transport.implicit import log_total
from multialign.transport.newton import newton
from multialign.transport.options import Method, SolverOptions, default_tolerance
from multialign.transport.prepare import Arguments, check_arguments, prepare
from multialign.transport.problem import Problem, unflatten_problem
from multialign.transport.sinkhorn import Iterate, finish, sinkhorn
from multialign.transport.solution import TransportSolution

__all__ = ["ConvergenceWarning", "multi_marginal_sinkhorn", "solve", "solve_problem"]


def multi_marginal_sinkhorn(
    costs: Mapping[tuple[int, int], Tensor] | Tensor,
    marginals: Sequence[Tensor],
    epsilon: float | Tensor,
    *,
    marginal_relaxation: float | Sequence[float | None] | None = None,
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: Method = "auto",
    backend: Backend = "auto",
) -> TransportSolution:
    r"""Solve a multi-marginal entropic transport problem.

    .. math::
        T^\star = \arg\min_{T \ge 0} \; \langle T, C \rangle + \epsilon \sum_k T(k) \log T(k)
        \quad \text{with marginals } \nu_1, \dots, \nu_M,

    where :math:`C(k) = \sum_{(i,j)} C_{ij}(k_i, k_j)` over the pairs given, or any tensor. The plan
    of a large problem is never built: its marginals are summed out of the cost graph, in the log
    domain and by products of matrices. A step takes :math:`M K^2` operations for a chain, star or
    tree, :math:`M K^3` for a cycle, :math:`K^3` for three marginals and :math:`K^M` for a larger
    complete graph; memory is a few tables of :math:`K^2`. A full cost tensor takes :math:`K^M` of
    both. Arithmetic is in float64; for float32 input tables are float32 as long as their rounding
    is far below the tolerance, and the end is measured in float64.

    Args:
        costs: ``{(i, j): C_ij}`` with i < j and :math:`C_{ij}` of shape
            :math:`(*\text{batch}, K_i, K_j)`; a pair left out costs nothing. Or one tensor
            :math:`(*\text{batch}, K_1, \dots, K_M)`. A cost of infinity forbids its pair; a finite
            one is paid, however large, where it cannot be avoided.
        marginals: M tensors :math:`(*\text{batch}, K_i)`, non-negative, each divided by its sum.
            An atom of mass 0 is absent, whatever its costs; a marginal without mass is out, with
            all its costs.
        epsilon: > 0, a number or a tensor :math:`(*\text{batch})`, in cost units.
        marginal_relaxation: None for hard constraints, or :math:`\rho > 0`, a number or one (or
            None) for each marginal, in cost units: constraint i is replaced by the penalty
            :math:`\rho_i \operatorname{KL}(T_i | \nu_i)` with
            :math:`\operatorname{KL}(a | b) = \sum a \log(a / b) - a + b`. Marginals are then taken
            as given, not normalised; those with hard constraints must have equal mass. The entropy
            term is then :math:`\epsilon (\sum T \log T - \sum T + 1)`.
        tolerance: Largest L1 distance of the plan's marginals from those wanted, summed over them.
            None: 1e-6 in float64 and 1e-4 in float32. 0: `max_iterations` sweeps as they are, after
            which nothing is read and nobody warned, as a CUDA graph needs it; costs must then be
            finite.
        max_iterations: Where it stops without convergence.
        method: "sinkhorn" sweeps over the marginals; "newton", which is what "auto" takes, begins
            with sweeps as long as these pay, follows the solution down in :math:`\epsilon` by
            Newton steps, and needs few of them however small it is.
        backend: "triton" for the CUDA kernels, "native" for the compiled core (CPU tensors),
            "torch", or "auto": the kernels for CUDA tensors where triton is installed, the core
            for CPU tensors where it was built. The core takes small problems: up to 256 atoms of
            each of three marginals with costs of pairs, and plans of up to 2^18 entries. Whatever
            the core or the kernels do not take, torch does.

    Returns:
        The solution; batch dimensions are those of the arguments, broadcast.

    Raises:
        ValueError: A shape, device, count or option is wrong.
        TypeError: An argument has the wrong type, or dtypes differ.
        MemoryError: A full cost tensor of more than 2^28 entries.
        RuntimeError: The named backend cannot run here.

    Warns:
        ConvergenceWarning: Some problem did not reach the tolerance.

    References:
        Eq. 7-8 of :cite:t:`decalign:26`; :cite:t:`pass:15` for the problem, :cite:t:`benamou:15`
        for the sweeps, :cite:t:`haasler:21` for the use of the graph, :cite:t:`chizat:18` for
        `marginal_relaxation`.

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
    options = SolverOptions(
        tolerance=tolerance, max_iterations=max_iterations, method=method, backend=backend
    )
    return solve(check_arguments(costs, marginals, epsilon, marginal_relaxation), options)


def solve(
    arguments: Arguments,
    options: SolverOptions,
    *,
    dtype: torch.dtype | None = None,
    symmetric: bool = False,
    candidate: Sequence[Tensor] | None = None,
) -> TransportSolution:
    """Solve a problem: by the compiled core from its arguments on, or as `solve_problem` does.

    Args:
        arguments: The problem, checked.
        options: How to solve it.
        dtype: The dtype of the results; None: that of the marginals.
        symmetric: As in `solve_problem`.
        candidate: As in `solve_problem`.
    """
    if dtype is None:
        dtype = arguments.marginals[0].dtype
    found = None
    if options.tolerance != 0:
        found = solve_directly(arguments, options, dtype, symmetric=symmetric, candidate=candidate)
    if found is not None:
        return found
    with full_precision(arguments.epsilon):
        return solve_problem(
            prepare(arguments, dtype, reads=options.tolerance != 0),
            options,
            symmetric=symmetric,
            candidate=candidate,
        )


def solve_problem(
    problem: Problem,
    options: SolverOptions,
    *,
    symmetric: bool = False,
    candidate: Sequence[Tensor] | None = None,
    form: FormName = "auto",
) -> TransportSolution:
    """Solve a problem that has been checked.

    Args:
        problem: The problem.
        options: How to solve it.
        symmetric: Whether all variables have the same symmetric cost with each other. Where they
            have the same marginal too, one variable is solved for that stands for all.
        candidate: Potentials `(*batch, K_p)` in cost units, taken where the dual is larger there.
        form: The form of the plan.
    """
    backend = choose_backend(options.backend, problem.epsilon)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = default_tolerance(problem.dtype)
    with full_precision(problem.epsilon):
        iterate = Iterate(
            *_solve(
                *problem.detach().flatten(),
                "sinkhorn" if options.method == "sinkhorn" or tolerance == 0 else "newton",
                problem.dtype == torch.float32,
                tolerance,
                options.max_iterations,
                backend,
                symmetric,
                bool(problem.forbidden),
                list(problem.relaxed),
                form,
            )
        )
        if candidate is not None:
            iterate = _better(problem.detach(), iterate, candidate)
        return TransportSolution(problem, iterate, tolerance, form)


def _better(problem: Problem, iterate: Iterate, candidate: Sequence[Tensor]) -> Iterate:
    """Return the candidate's potentials for those of an iterate where their dual is larger."""
    epsilon = problem.epsilon.unsqueeze(-1)
    scaled = [
        torch.where(nu == 0, 0.0, (f.reshape(nu.shape) - offset) / epsilon)
        for f, nu, offset in zip(candidate, problem.marginals, problem.offsets, strict=True)
    ]
    potentials, wanted = torch.cat(scaled, -1), torch.cat(problem.marginals, -1)
    shift = log_total(problem, potentials, "auto") / len(scaled)
    potentials = potentials - shift.unsqueeze(-1)
    # Both plans sum to 1.
    higher = ((potentials - iterate.potentials) * wanted).sum(-1, keepdim=True) > 0
    return iterate._replace(potentials=torch.where(higher, potentials, iterate.potentials))


@operator(
    "solve_transport(Tensor[] costs, int[] scopes, Tensor[] marginals, "
    "Tensor epsilon, Tensor deviation, "
    "str method, bool single, float tolerance, int max_iterations, "
    "str backend, bool symmetric, bool forbids, int[] relaxed, str form) "
    "-> (Tensor, Tensor, Tensor)"
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
    backend: Implementation,
    symmetric: bool,
    forbids: bool,
    relaxed: list[int],
    form: FormName,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return potentials `(B, S)`, iterations and error.

    This is one operator, since the number of iterations depends on the data: torch.compile does not
    look inside, and torch.func.vmap makes one larger batch.
    """
    problem = unflatten_problem(costs, scopes, marginals, epsilon, deviation, forbids, relaxed)
    single = single and _multiplies_exactly(backend)
    if not len(epsilon):
        return torch.cat(problem.marginals, -1), epsilon.long(), epsilon.clone()
    if forbids:
        problem = problem.without_empty_masks()
    # In inference mode operations on small tensors take a tenth less time.
    with torch.inference_mode():
        iterate = None
        if form == "auto" and tolerance > 0:
            iterate = _solve_at_once(
                problem, method, tolerance, max_iterations, single, backend, symmetric
            )
        if iterate is None:
            backend = "torch" if backend == "native" else backend
            if tolerance == 0 and form == "auto":
                form = "pairwise"  # which reads nothing
            elif symmetric and all(torch.equal(nu, marginals[0]) for nu in marginals[1:]):
                problem = problem.folded()
            level = tolerance / problem.copies
            if method == "newton":
                iterate = newton(problem, level, max_iterations, single, backend, form)
            else:
                plan = make_form(problem, torch.float64, backend, form)
                iterate = sinkhorn(problem, plan, level, max_iterations)
    # Copies have the potential and the error of one each.
    count = problem.copies
    iterate = Iterate(
        iterate.potentials.repeat(1, count), iterate.iterations.clone(), count * iterate.error
    )
    if tolerance == 0 or epsilon.device.type != "cpu":  # there `converged` warns when it is read
        return iterate
    stopped = (iterate.error > tolerance) & (iterate.error < math.inf)
    if forbids:
        # Where nothing allowed meets the marginals the error may be NaN; so it is for NaN input.
        inputs = [*problem.costs.values(), *problem.marginals, epsilon.unsqueeze(-1)]
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in inputs]).all(0)
        stopped = stopped | (finite & ~iterate.error.isfinite())
    warn_unless_converged(stopped, iterate.error, iterate.iterations, tolerance)
    return iterate.potentials, iterate.iterations, iterate.error


@register_fake(_solve)
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
    backend: Implementation,
    symmetric: bool,
    forbids: bool,
    relaxed: list[int],
    form: FormName,
) -> tuple[Tensor, Tensor, Tensor]:
    own = marginals[:-1] if relaxed else marginals
    potentials = torch.empty_like(torch.cat(own, -1))
    return potentials, torch.empty_like(epsilon, dtype=torch.int64), torch.empty_like(epsilon)


register_batched_vmap(_solve)


def _solve_at_once(
    problem: Problem,
    method: str,
    tolerance: float,
    max_iterations: int,
    single: bool,
    backend: Implementation,
    symmetric: bool,
) -> Iterate | None:
    """Solve small problems in one call; None where nothing can, or where one is left unsolved."""
    ordinary = method == "newton" and not problem.forbidden and not problem.relaxed
    if backend == "torch" or (backend == "triton" and not ordinary):
        return None
    if symmetric and method != "newton":
        return None
    costs = [
        cost.masked_fill(problem.forbidden[scope], math.inf) if scope in problem.forbidden else cost
        for scope, cost in problem.costs.items()
    ]
    rho = None
    if problem.rho is not None:
        rho = dict(zip(problem.relaxed, problem.rho.unbind(-1), strict=True))
    found = solve_small(
        costs,
        list(problem.costs),
        problem.marginals,
        problem.epsilon,
        tolerance / 2 if backend == "triton" else tolerance,
        max_iterations,
        torch.float32 if single else torch.float64,
        backend,
        rho=rho,
        by_sweeps=method != "newton",
        symmetric=symmetric,
    )
    if found is None:
        return None
    form = make_form(problem, torch.float64, "torch")
    iterate = finish(problem, form, form.at(problem.epsilon), *found)
    more = (iterate.iterations < max_iterations) | ~iterate.error.isfinite()
    unsolved = ~(iterate.error <= tolerance) & more
    return None if bool(unsolved.any()) else iterate


def _multiplies_exactly(backend: Implementation) -> bool:
    """Whether products of float32 matrices are products in float32, which torch may be told not."""
    return backend == "triton" or torch.get_float32_matmul_precision() == "highest"
