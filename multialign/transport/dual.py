"""The dual objective in potentials x in units of epsilon, balanced and relaxed.

Balanced, it is D(x) of forms/base.py. Where the constraint on marginal p is replaced by the penalty
rho_p KL(T_p | nu_p), the total mass of the plan is free, and

    D(x) = sum_p phi_p(x_p) - Z(x) + 1,  phi_p(x) = <(1 - exp(-r_p x)) / r_p, nu_p>,

with r_p = epsilon / rho_p, and <x, nu_p> for a hard constraint, the limit of infinite rho_p
:cite:`chizat:18`. Its gradient is nu_p exp(-r_p x_p) - T_p with T_p the marginal of the plan
itself; minus its Hessian is Z H with r_p nu_p exp(-r_p x_p) added to the diagonal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from multialign.transport.problem import Problem

__all__ = ["Dual", "DualPoint", "conjugate", "relaxed_marginals"]


_LEAST_TOTAL = 1e-100


class DualPoint(NamedTuple):
    """The dual at given potentials."""

    value: Tensor
    """D(x), `(B,)`."""
    gradient: Tensor
    """`(B, S)`."""
    total: Tensor | None
    """Z, `(B, 1)`, by which H is multiplied; None stands for 1."""
    diagonal: Tensor | None
    """What is added to the diagonal of H, `(B, S)`, in units of nu; None stands for nothing."""


class Dual:
    """The dual objective of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._wanted = torch.cat(problem.marginals, -1)
        self.is_relaxed = bool(problem.relaxed)

    def at(
        self, potentials: Tensor, epsilon: Tensor, log_total: Tensor, marginals: Tensor
    ) -> DualPoint:
        """Return the dual where the plan has the sum Z, and marginals `(B, S)` divided by it."""
        if not self.is_relaxed:
            value = torch.linalg.vecdot(potentials, self._wanted) - log_total
            return DualPoint(value, self._wanted - marginals, None, None)
        problem = replace(self._problem, epsilon=epsilon)
        total = log_total.exp().unsqueeze(-1)
        value = (self._wanted * conjugate(problem, potentials)).sum(-1) - total.squeeze(-1) + 1
        wanted = torch.cat(relaxed_marginals(problem, potentials), -1)
        rate = _rates(problem)
        # A plan may be nothing where every cost is far above rho: H is divided by its sum.
        scale = total.clamp_min(_LEAST_TOTAL)
        diagonal = rate * (-rate * potentials).exp() / scale
        return DualPoint(value, wanted - total * marginals, scale, diagonal)


def conjugate(problem: Problem, potentials: Tensor) -> Tensor:
    """Return (1 - exp(-r x)) / r for each potential, `(B, S)`: x where the constraint is hard."""
    if not problem.relaxed:
        return potentials
    rate = _rates(problem)
    hard = rate == 0
    safe = torch.where(hard, 1.0, rate)
    return torch.where(hard, potentials, -torch.expm1(-rate * potentials) / safe)


def relaxed_marginals(problem: Problem, potentials: Tensor) -> list[Tensor]:
    """Return what the plan's marginals have to be: nu exp(-r x), or nu of a hard constraint."""
    if not problem.relaxed:
        return problem.marginals
    decay = (-_rates(problem) * potentials).exp().split(problem.sizes, -1)
    return [nu * factor for nu, factor in zip(problem.marginals, decay, strict=True)]


def _rates(problem: Problem) -> Tensor:
    """Return r = epsilon / rho for each atom, `(B, S)`; 0 for a hard constraint."""
    assert problem.rho is not None
    rates = [torch.zeros_like(nu) for nu in problem.marginals]
    own = (problem.epsilon.unsqueeze(-1) / problem.rho).split(1, -1)
    for p, rate in zip(problem.relaxed, own, strict=True):
        rates[p] = rate.expand_as(rates[p])
    return torch.cat(rates, -1)
