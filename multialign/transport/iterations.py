"""Iterations for the dual problem, without gradient.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu_p - m_p with m_p the marginals of the plan divided by Z. Adding a constant to
any x_p changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.transport.elimination import (
    Factors,
    Scope,
    log_marginal,
    probabilities,
    stack_blocks,
)
from multialign.transport.problem import Problem, cost_deviation, log_marginals

__all__ = ["Iterate", "dual_hessian", "newton_step", "sinkhorn_step", "solve", "solve_hessian"]

# On the way to the final epsilon a level is left at this L1 error, or after so many steps.
_LEVEL_ERROR = 1e-2
_LEVEL_STEPS = 50
# The error of a Sinkhorn sweep is read at the first steps and then every so many.
_CHECK_EVERY = 10
# A Newton step moves no potential by more than this, in units of epsilon.
_LONGEST_STEP = 3.0
_ARMIJO = 1e-4
_HALVINGS = 8


class Iterate(NamedTuple):
    """Where the iterations ended."""

    potentials: list[Tensor]
    """M tensors `(B, K_p)` in units of epsilon; the plan sums to 1."""
    iterations: Tensor
    """`(B,)`."""
    error: Tensor
    """`(B,)`: sum over p of the L1 distance of the plan's marginal from nu_p."""


Step = Callable[[Problem, Tensor, Tensor], Tensor]


@torch.no_grad()
def solve(problem: Problem, step: Step, tolerance: float, max_iterations: int) -> Iterate:
    """Follow the solution from a large epsilon down to the wanted one, then on to `tolerance`.

    Each problem of the batch has its own epsilon and its own end.
    """
    target = problem.epsilon
    deviation = cost_deviation(problem)
    epsilon = torch.maximum(target, 2 * deviation)
    potentials = torch.cat([torch.zeros_like(marginal) for marginal in problem.marginals], -1)
    potentials = _sinkhorn_sweep(problem, potentials, epsilon)
    iterations = torch.zeros_like(target, dtype=torch.int64)
    level_steps = torch.zeros_like(iterations)
    active = torch.ones_like(target, dtype=torch.bool)
    error = torch.full_like(target, torch.inf)

    for count in range(1, max_iterations + 1):
        moved = step(problem, potentials, epsilon)
        potentials = torch.where(active.unsqueeze(-1), moved, potentials)
        iterations = iterations + active
        level_steps = level_steps + 1
        if step is sinkhorn_step and count > 4 and count % _CHECK_EVERY and count < max_iterations:
            continue
        error = torch.where(active, marginal_error(problem, potentials, epsilon), error)
        arrived = epsilon <= target
        # A non-finite error never falls again: there is nothing to wait for.
        active = active & error.isfinite() & ~(arrived & (error <= tolerance))
        if not bool(active.any()):
            break
        onward = active & ~arrived & ((error <= _LEVEL_ERROR) | (level_steps >= _LEVEL_STEPS))
        lower = torch.where(onward, torch.maximum(target, epsilon / 2), epsilon)
        # The potentials in cost units, epsilon x, are what stays the same.
        potentials = potentials * (epsilon / lower).unsqueeze(-1)
        level_steps = torch.where(onward, 0, level_steps)
        epsilon = lower

    # Problems that ran out of iterations on the way are stated at the epsilon asked for.
    potentials = potentials * (epsilon / target).unsqueeze(-1)
    potentials = _normalise(problem, potentials)
    error = marginal_error(problem, potentials, target)
    return Iterate(_split(problem, potentials), iterations, error)


def sinkhorn_step(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    """Return the potentials after one sweep, each set to match its marginal given the others.

    References:
        :cite:t:`benamou:15`, Section 4.
    """
    return _sinkhorn_sweep(problem, potentials, epsilon)


def newton_step(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    """Return the potentials after a safeguarded Newton step on the dual and a Sinkhorn sweep.

    Where no step length makes enough progress, the sweep alone, which always does, is the step.
    """
    marginals, hessian = dual_hessian(problem, potentials, epsilon)
    wanted = torch.cat(problem.marginals, -1)
    gradient = wanted - marginals
    error = gradient.abs().sum(-1)
    damping = error.clamp(1e-13, 1e-2)
    direction = solve_hessian(problem, hessian, gradient, damping)
    longest = direction.abs().amax(-1, keepdim=True)
    direction = direction * (_LONGEST_STEP / longest).clamp_max(1.0)
    slope = (gradient * direction).sum(-1)
    start = _dual(problem, potentials, epsilon)
    # Below this, differences of the dual are rounding.
    slack = 1e-14 * (1 + start.abs())

    accepted = torch.zeros_like(start, dtype=torch.bool)
    result = potentials
    length = 1.0
    for _ in range(_HALVINGS):
        trial = potentials + length * direction
        enough = _dual(problem, trial, epsilon) >= start + _ARMIJO * length * slope - slack
        result = torch.where((enough & ~accepted).unsqueeze(-1), trial, result)
        accepted = accepted | enough
        if bool(accepted.all()):
            break
        length /= 2
    return _sinkhorn_sweep(problem, result, epsilon)


def marginal_error(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    """Return the L1 distance of all marginals of the plan from those wanted, `(B,)`."""
    factors = problem.factors(_split(problem, potentials), epsilon)
    found = probabilities(factors, [(p,) for p in range(len(problem.marginals))])
    return (
        torch.cat([m - nu for m, nu in zip(found, problem.marginals, strict=True)], -1)
        .abs()
        .sum(-1)
    )


def dual_hessian(problem: Problem, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Return the marginals `(B, S)` and minus the Hessian `(B, S, S)`, S the sum of sizes.

    Its blocks are the marginals on the diagonal and the pairwise marginals off it, of the plan
    scaled to sum to 1. (The Hessian of log Z has m m^T subtracted, which acts on nothing that
    Newton's equation contains.)
    """
    count = len(problem.marginals)
    pairs = list(combinations(range(count), 2))
    factors = problem.factors(_split(problem, potentials), epsilon)
    tables = dict(zip(pairs, _scaled_probabilities(factors, pairs), strict=True))
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


def solve_hessian(problem: Problem, hessian: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    """Solve hessian @ x = gradient on the complement of the constants, `(B, S)`.

    Scaled by the square roots of the marginals the matrix has a diagonal of ones; its null space,
    where sum_p x_p = 0 for constants x_p, is filled in, and `damping` `(B,)` added.
    """
    wanted = torch.cat(problem.marginals, -1)
    zero = wanted == 0
    scale = torch.where(zero, 0.0, torch.where(zero, 1.0, wanted).rsqrt())
    scaled = scale.unsqueeze(-1) * hessian * scale.unsqueeze(-2)
    count = len(problem.marginals)
    roots = [marginal.sqrt() for marginal in problem.marginals]
    gauge = stack_blocks(
        [
            [
                ((p == q) - 1 / count) * a.unsqueeze(-1) * b.unsqueeze(-2)
                for q, b in enumerate(roots)
            ]
            for p, a in enumerate(roots)
        ]
    )
    diagonal = damping.unsqueeze(-1) + zero
    factor, info = torch.linalg.cholesky_ex(scaled + gauge + torch.diag_embed(diagonal))
    factor = torch.where((info == 0)[:, None, None], factor, torch.nan)
    solution = torch.cholesky_solve((scale * gradient).unsqueeze(-1), factor).squeeze(-1)
    return scale * solution


def _sinkhorn_sweep(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    blocks = list(_split(problem, potentials))
    wanted = log_marginals(problem)
    for p, (x, log_nu) in enumerate(zip(blocks, wanted, strict=True)):
        found = log_marginal(problem.factors(blocks, epsilon), (p,))
        absent = problem.marginals[p] == 0
        blocks[p] = torch.where(absent, x, x + torch.where(absent, 0.0, log_nu - found))
    return torch.cat(blocks, -1)


def _dual(problem: Problem, potentials: Tensor, epsilon: Tensor) -> Tensor:
    factors = problem.factors(_split(problem, potentials), epsilon)
    wanted = torch.cat(problem.marginals, -1)
    return (potentials * wanted).sum(-1) - log_marginal(factors, ())


def _normalise(problem: Problem, potentials: Tensor) -> Tensor:
    """Shift the potentials so that the plan sums to 1."""
    factors = problem.factors(_split(problem, potentials), problem.epsilon)
    total = log_marginal(factors, ()) / len(problem.marginals)
    return potentials - total.unsqueeze(-1)


def _scaled_probabilities(factors: Factors, keeps: Sequence[Scope]) -> list[Tensor]:
    tables = probabilities(factors, keeps)
    total = tables[0].flatten(1).sum(-1)
    return [table / total.reshape(-1, *[1] * (table.ndim - 1)) for table in tables]


def _split(problem: Problem, potentials: Tensor) -> list[Tensor]:
    return list(potentials.split(problem.sizes, -1))
