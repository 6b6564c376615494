"""What iterations read of a plan: its sum, its marginals, and how these change.

In potentials x in units of epsilon, the dual of Eq. 7-8 is to maximise the concave function

    D(x) = sum_p <x_p, nu_p> - log Z(x),  Z(x) = sum_k exp(sum_p x_p(k_p) - C(k) / epsilon),

whose gradient is nu - m with m the marginals of the plan divided by Z. Minus its Hessian H has the
marginals on the diagonal and the pairwise marginals off it. (The Hessian of log Z has m m^T
subtracted, which acts on nothing that Newton's equation contains.)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multialign.transport.elimination import Beliefs
from multialign.transport.hessian import DenseHessian, Hessian, Scaling, dense, pairwise_hessian
from multialign.transport.problem import Problem

__all__ = [
    "Evaluation",
    "Plan",
    "difference_quotient",
    "distance",
    "is_dense",
    "make_hessian",
    "moved_by",
]

# Up to this many atoms, and entries over the batch, the Hessian is a matrix that is factored.
_DENSE_ATOMS = 512
_DENSE_ENTRIES = 2**24


class Evaluation(NamedTuple):
    """What is read of a plan at potentials x and epsilon."""

    log_total: Tensor
    """log Z, `(B,)`."""
    marginals: Tensor
    """m, `(B, S)` with S the sum of sizes."""
    hessian: Hessian
    plan: Tensor | None
    """The plan divided by Z, where it is kept whole."""


class Plan(Protocol):
    """A plan as a function of potentials x `(B, S)`, finite at absent atoms, and epsilon `(B,)`."""

    dtype: torch.dtype
    """That of its tables."""
    rounds: int
    """So often two sweeps take less time than a Newton step."""

    def evaluate(self, potentials: Tensor, epsilon: Tensor) -> Evaluation:
        """Return all that a Newton step needs."""

    def tangent(self, potentials: Tensor, epsilon: Tensor, now: Evaluation) -> Tensor:
        """Return -dm / d(1 / epsilon) at constant potentials, `(B, S)`."""

    def sweep(
        self, potentials: Tensor, epsilon: Tensor, times: int = 1, inner: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Set one potential after another so that its marginal is the one wanted.

        With each, the one before it (of the first: the last) is set again too, and both in turn
        `inner` times, on the table of these two that the first setting needs anyway. A plan that
        builds no such table leaves that out.

        Returns:
            The potentials, and how far each sweep moved them, `(B, times)`: the mean of |dx_p|
            under nu_p, summed over p. To first order it is the L1 error before the sweep.
        """

    def marginals(self, potentials: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Z `(B,)` and m `(B, S)`."""


def difference_quotient(
    plan: Plan, problem: Problem, potentials: Tensor, epsilon: Tensor, now: Evaluation
) -> Tensor:
    """Return the tangent, exact enough for a direction, at the price of one evaluation.

    The step moves no exponent of weight by more than about 1e-3.
    """
    step = 1e-3 * (epsilon / problem.deviation).clamp_max(1.0)
    _, moved = plan.marginals(potentials, epsilon / (1 + step))
    return (now.marginals - moved) * (epsilon / step).unsqueeze(-1)


def moved_by(potentials: Tensor, changes: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return potentials after changes `(B, times, S)`, and how far each moved them."""
    return potentials + changes.sum(1), distance(changes.transpose(0, 1), scaling).mT


def distance(change: Tensor, scaling: Scaling) -> Tensor:
    """Return how far a change `(*, B, S)` moves potentials, `(*, B)`."""
    far: Tensor = torch.linalg.vecdot(change.abs(), scaling.wanted)
    return far


def make_hessian(scaling: Scaling, found: Beliefs) -> Hessian:
    """Return H of a plan whose pairs are all known if it `is_dense`."""
    if is_dense(scaling):
        return DenseHessian(scaling, lambda: scaling.matrix(dense(found)))
    return pairwise_hessian(scaling, found)


def is_dense(scaling: Scaling) -> bool:
    """Return whether H is a matrix that is factored."""
    batch, atoms = scaling.root.shape
    return atoms <= _DENSE_ATOMS and batch * atoms**2 <= _DENSE_ENTRIES
