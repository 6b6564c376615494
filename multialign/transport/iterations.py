"""Iterations for the dual problem, without gradient.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu - m with m the marginals of the plan divided by Z. Adding a constant to any x_p
changes nothing.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import join, log_marginal, probabilities, stack_blocks
from multialign.transport.problem import Problem, cost_deviation, log_marginals

__all__ = ["Iterate", "dual_hessian", "newton", "sinkhorn", "solve_hessian"]

# The first epsilon, in standard deviations of the cost: there the plan is nearly a product.
_FIRST_EPSILON = 2.0

# Newton: on the way, a level is left for an epsilon this much smaller at an L1 error of at most
# (target epsilon / deviation of the cost)^2, within bounds. A plan falls apart as epsilon falls,
# and mass that is in the wrong part by then takes a detour of many steps.
_LEVEL_FACTOR = 4.0
_LEVEL_POWER = 2.0
_LEVEL_ERRORS = (1e-8, 0.1)
# A step moves no potential by more than this, in units of epsilon.
_LONGEST_STEP = 10.0
_ARMIJO = 1e-4
_HALVINGS = 10
# At the last level, so many steps in a row without a smaller error are the end: rounding.
_PATIENCE = 50
# Up to this many multiplications for its Hessian a plan is kept whole, in a few operations a step.
_JOINT_WORK = 2**21

# Sinkhorn: a level is left at this L1 error or after so many sweeps.
_SWEEP_ERROR = 1e-2
_SWEEP_FACTOR = 2.0
_LEVEL_SWEEPS = 50
# The error of a sweep is read at the first ones and then every so many.
_CHECK_EVERY = 10


class Iterate(NamedTuple):
    """Where the iterations ended."""

    potentials: list[Tensor]
    """M tensors `(B, K_p)` in units of epsilon; the plan sums to 1."""
    iterations: Tensor
    """`(B,)`."""
    error: Tensor
    """`(B,)`: sum over p of the L1 distance of the plan's marginal from nu_p."""


@torch.no_grad()
def sinkhorn(problem: Problem, tolerance: float, max_iterations: int) -> Iterate:
    """Sweep over the marginals, setting each potential to match its own given the others.

    On the way epsilon falls from a large value to the one wanted. Each problem of the batch has its
    own epsilon and its own end.

    References:
        :cite:t:`benamou:15`, Section 4.
    """
    target, epsilon = problem.epsilon, _first_epsilon(problem)
    potentials = torch.zeros_like(torch.cat(problem.marginals, -1))
    iterations = torch.zeros_like(target, dtype=torch.int64)
    level_sweeps = torch.zeros_like(iterations)
    active = torch.ones_like(target, dtype=torch.bool)

    for count in range(1, max_iterations + 1):
        swept = _sweep(problem, potentials, epsilon)
        potentials = torch.where(active.unsqueeze(-1), swept, potentials)
        iterations = iterations + active
        level_sweeps = level_sweeps + 1
        if count > 4 and count % _CHECK_EVERY:
            continue
        error = _marginal_error(problem, potentials, epsilon)
        arrived = epsilon <= target
        # A non-finite error never falls again: there is nothing to wait for.
        active = active & error.isfinite() & ~(arrived & (error <= tolerance))
        if not bool(active.any()):
            break
        ready = (error <= _SWEEP_ERROR) | (level_sweeps >= _LEVEL_SWEEPS)
        onward = active & ~arrived & ready
        lower = torch.where(onward, torch.maximum(target, epsilon / _SWEEP_FACTOR), epsilon)
        # The potentials in cost units, epsilon x, are what stays the same.
        potentials = potentials * (epsilon / lower).unsqueeze(-1)
        level_sweeps = torch.where(onward, 0, level_sweeps)
        epsilon = lower
    return _finish(problem, potentials, epsilon, iterations)


@torch.no_grad()
def newton(problem: Problem, tolerance: float, max_iterations: int) -> Iterate:
    """Follow the solution down in epsilon by its tangent, with Newton steps on the dual.

    One linear solve a step: for the Newton direction, and where the error is small enough already,
    for the tangent dx / d(1 / epsilon) as well, along which epsilon falls. Steps at constant
    epsilon are safeguarded by a line search, and by a Sinkhorn sweep where that fails.
    """
    target, epsilon = problem.epsilon, _first_epsilon(problem)
    depth = _FIRST_EPSILON * target / epsilon
    level_error = (depth**_LEVEL_POWER).clamp(*_LEVEL_ERRORS)
    wanted = torch.cat(problem.marginals, -1)
    system = _Newton(problem)
    tables: _Tables = _Joint(problem) if _fits(problem) else _Eliminated(problem)
    potentials = torch.zeros_like(wanted)
    iterations = torch.zeros_like(target, dtype=torch.int64)
    active = torch.ones_like(target, dtype=torch.bool)
    best = torch.full_like(target, math.inf)
    stalled = torch.zeros_like(iterations)

    for count in range(max_iterations + 1):
        marginals, hessian = tables.derivatives(potentials, epsilon)
        gradient = wanted - marginals
        error = gradient.abs().sum(-1)
        arrived = epsilon <= target
        stalled = torch.where(arrived & (error >= best), stalled + 1, 0)
        best = torch.where(arrived, torch.minimum(best, error), best)
        finished = (arrived & (error <= tolerance)) | (stalled >= _PATIENCE)
        active = active & error.isfinite() & ~finished
        if count == max_iterations or not bool(active.any()):
            break
        iterations = iterations + active

        onward = active & ~arrived & (error <= level_error)
        right = gradient
        lower = epsilon
        if bool(onward.any()):
            lower = torch.where(onward, torch.maximum(target, epsilon / _LEVEL_FACTOR), epsilon)
            rise = (1 / lower - 1 / epsilon).unsqueeze(-1)
            right = gradient + rise * tables.tangent(potentials, epsilon, marginals)
        direction = system.solve(hessian, right, damping=error.clamp(1e-13, 1e-2))
        ahead = potentials + direction
        searching = active & ~onward
        if bool(searching.any()):
            found = _line_search(
                problem, tables, potentials, epsilon, direction, gradient, searching
            )
            ahead = torch.where(searching.unsqueeze(-1), found, ahead)
        potentials = torch.where(active.unsqueeze(-1), ahead, potentials)
        epsilon = lower
    return _finish(problem, potentials, epsilon, iterations)


def dual_hessian(problem: Problem, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Return the marginals `(B, S)` and minus the Hessian `(B, S, S)`, S the sum of sizes.

    Its blocks are the marginals on the diagonal and the pairwise marginals off it. (The Hessian of
    log Z has m m^T subtracted, which acts on nothing that Newton's equation contains.)
    """
    count = len(problem.marginals)
    pairs = list(combinations(range(count), 2))
    factors = problem.factors(_split(problem, potentials), epsilon)
    tables = dict(zip(pairs, probabilities(factors, pairs), strict=True))
    marginals = [tables[(p, p + 1)].sum(2) for p in range(count - 1)]
    marginals.append(tables[(count - 2, count - 1)].sum(1))
    blocks = [
        [
            torch.diag_embed(marginals[p])
            if p == q
            else tables[(p, q)]
            if p < q
            else tables[(q, p)].mT
            for q in range(count)
        ]
        for p in range(count)
    ]
    return torch.cat(marginals, -1), stack_blocks(blocks)


def solve_hessian(problem: Problem, hessian: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """Solve hessian @ x = right on the complement of the constants, `(B, S)`."""
    return _Newton(problem).solve(hessian, right, damping)


class _Newton:
    """Newton's equation, with its null space filled in.

    Scaled by the square roots of the marginals the matrix has a diagonal of ones. Its null space
    holds the constants x_p with sum_p x_p = 0.
    """

    def __init__(self, problem: Problem) -> None:
        wanted = torch.cat(problem.marginals, -1)
        absent = wanted == 0
        self.scale = torch.where(absent, 0.0, torch.where(absent, 1.0, wanted).rsqrt())
        self.scales = self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        count = len(problem.marginals)
        same = torch.block_diag(*[m.new_ones(m.shape[-1], m.shape[-1]) for m in problem.marginals])
        root = wanted.sqrt()
        gauge = (same - 1 / count) * root.unsqueeze(-1) * root.unsqueeze(-2)
        self.constant = gauge + torch.diag_embed(absent.to(root.dtype))

    def solve(self, hessian: Tensor, right: Tensor, damping: Tensor) -> Tensor:
        matrix = self.scales * hessian + self.constant
        # In place: another matrix of this size would be made only to add to the diagonal.
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        factor, info = torch.linalg.cholesky_ex(matrix)
        factor = torch.where((info == 0)[:, None, None], factor, torch.nan)
        solution = torch.cholesky_solve((self.scale * right).unsqueeze(-1), factor)
        return self.scale * solution.squeeze(-1)


class _Tables(Protocol):
    """What Newton reads of the plan."""

    def dual(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        """Return D, `(B,)`."""

    def derivatives(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return marginals and minus the Hessian of the plan scaled to sum to 1."""

    def tangent(self, potentials: Tensor, epsilon: Tensor, marginals: Tensor) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials, `(B, S)`."""


class _Joint:
    """A plan small enough to be kept whole, as one vector of n entries."""

    def __init__(self, problem: Problem) -> None:
        everything = tuple(range(len(problem.sizes)))
        masks = {
            (p,): torch.where(nu == 0, -math.inf, 0.0) for p, nu in enumerate(problem.marginals)
        }
        mask = join(list(masks.items()), everything)
        self.mask = mask.flatten(1)
        cost = join([*problem.costs.items(), (everything, torch.zeros_like(mask))], everything)
        self.cost = cost.flatten(1)
        self.wanted = torch.cat(problem.marginals, -1)
        # Which entry of the plan belongs to which atom of each marginal, `(n, S)`.
        atoms = torch.cartesian_prod(*[torch.arange(size) for size in problem.sizes])
        first = torch.tensor([0, *problem.sizes[:-1]]).cumsum(0)
        atoms = (atoms + first).to(self.cost.device)
        self.incidence = self.cost.new_zeros(len(atoms), sum(problem.sizes)).scatter_(1, atoms, 1.0)

    def dual(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        total = self._exponent(potentials, epsilon).logsumexp(-1)
        return (potentials * self.wanted).sum(-1) - total

    def derivatives(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        plan = self._exponent(potentials, epsilon).softmax(-1)
        hessian = (plan.unsqueeze(-2) * self.incidence.mT) @ self.incidence
        return hessian.diagonal(dim1=-2, dim2=-1), hessian

    def tangent(self, potentials: Tensor, epsilon: Tensor, marginals: Tensor) -> Tensor:
        plan = self._exponent(potentials, epsilon).softmax(-1)
        excess = self.cost - (plan * self.cost).sum(-1, keepdim=True)
        return (plan * excess) @ self.incidence

    def _exponent(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        fixed = self.mask - self.cost / epsilon.unsqueeze(-1)
        return torch.addmm(fixed, potentials, self.incidence.mT)


class _Eliminated:
    """A plan known through its marginals alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.deviation = cost_deviation(problem)

    def dual(self, potentials: Tensor, epsilon: Tensor) -> Tensor:
        wanted = torch.cat(self.problem.marginals, -1)
        return (potentials * wanted).sum(-1) - _log_total(self.problem, potentials, epsilon)

    def derivatives(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        potentials = _normalise(self.problem, potentials, epsilon)
        return dual_hessian(self.problem, potentials, epsilon)

    def tangent(self, potentials: Tensor, epsilon: Tensor, marginals: Tensor) -> Tensor:
        # A difference quotient: exact enough for a direction, at the price of one evaluation. The
        # step moves no exponent of weight by more than about 1e-3.
        step = 1e-3 * (epsilon / self.deviation).clamp_max(1.0)
        nearby = epsilon / (1 + step)
        potentials = _normalise(self.problem, potentials, nearby)
        moved = torch.cat(_marginals(self.problem, potentials, nearby), -1)
        return (marginals - moved) * (epsilon / step).unsqueeze(-1)


def _fits(problem: Problem) -> bool:
    work = math.prod(problem.sizes) * sum(problem.sizes) ** 2
    return work * problem.epsilon.numel() <= _JOINT_WORK


def _line_search(
    problem: Problem,
    tables: _Tables,
    potentials: Tensor,
    epsilon: Tensor,
    direction: Tensor,
    gradient: Tensor,
    searching: Tensor,
) -> Tensor:
    """Return the first of ever shorter steps that raises the dual enough, or a Sinkhorn sweep.

    Problems that are not `searching` are not waited for.
    """
    longest = direction.abs().amax(-1, keepdim=True)
    direction = direction * (_LONGEST_STEP / longest).clamp_max(1.0)
    slope = (gradient * direction).sum(-1)
    start = tables.dual(potentials, epsilon)
    # Differences of the dual below this are rounding.
    slack = 1e-14 * (1 + start.abs())
    accepted = ~searching
    result = potentials
    length = 1.0
    for _ in range(_HALVINGS):
        trial = potentials + length * direction
        enough = tables.dual(trial, epsilon) >= start + _ARMIJO * length * slope - slack
        result = torch.where((enough & ~accepted).unsqueeze(-1), trial, result)
        accepted = accepted | enough
        if bool(accepted.all()):
            return result
        length /= 2
    swept = _sweep(problem, potentials, epsilon)
    return torch.where(accepted.unsqueeze(-1), result, swept)


def _sweep(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    blocks = _split(problem, potentials)
    wanted = log_marginals(problem)
    for p, (x, log_nu) in enumerate(zip(list(blocks), wanted, strict=True)):
        found = log_marginal(problem.factors(blocks, epsilon), (p,))
        absent = problem.marginals[p] == 0
        blocks[p] = torch.where(absent, x, x + torch.where(absent, 0.0, log_nu - found))
    return torch.cat(blocks, -1)


def _first_epsilon(problem: Problem) -> Tensor:
    return torch.maximum(problem.epsilon, _FIRST_EPSILON * cost_deviation(problem))


def _finish(problem: Problem, potentials: Tensor, epsilon: Tensor, iterations: Tensor) -> Iterate:
    """State the result at the epsilon asked for, which may not have been reached."""
    target = problem.epsilon
    potentials = potentials * (epsilon / target).unsqueeze(-1)
    potentials = _normalise(problem, potentials, target)
    error = _marginal_error(problem, potentials, target)
    return Iterate(_split(problem, potentials), iterations, error)


def _normalise(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    """Shift the potentials so that the plan sums to 1."""
    total = _log_total(problem, potentials, epsilon) / len(problem.marginals)
    return potentials - total.unsqueeze(-1)


def _log_total(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    return log_marginal(problem.factors(_split(problem, potentials), epsilon), ())


def _marginals(problem: Problem, potentials: Tensor, epsilon: Tensor) -> list[Tensor]:
    factors = problem.factors(_split(problem, potentials), epsilon)
    return probabilities(factors, [(p,) for p in range(len(problem.marginals))])


def _marginal_error(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    """Return the L1 distance of all marginals of the plan from those wanted, `(B,)`."""
    found = torch.cat(_marginals(problem, potentials, epsilon), -1)
    return (found - torch.cat(problem.marginals, -1)).abs().sum(-1)


def _split(problem: Problem, potentials: Tensor) -> list[Tensor]:
    return list(potentials.split(problem.sizes, -1))
