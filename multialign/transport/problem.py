"""The transport problem, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from multialign.ops import log
from multialign.transport.elimination import Scope

__all__ = ["Problem", "along", "unflatten_problem"]


@dataclass(frozen=True)
class Problem:
    """Eq. 7-8 for B problems of the same shape, all in float64.

    The cost is the sum of the tables in `costs` and of the vectors in `offsets`.
    """

    costs: Mapping[Scope, Tensor]
    """Costs `(B, K_i, K_j)` by (i, j), or one table over all variables; finite, near 0."""
    offsets: list[Tensor]
    """M vectors `(B, K_p)`: the parts of the cost that depend on one variable alone."""
    marginals: list[Tensor]
    """M vectors `(B, K_p)` that sum to 1."""
    epsilon: Tensor
    """`(B,)`."""
    deviation: Tensor
    """`(B,)`: the standard deviation of the cost under independent marginals."""
    batch: torch.Size
    """The shape that B flattens."""
    dtype: torch.dtype
    """The dtype of the results."""
    copies: int = 1
    """If more: one marginal, and the cost of one pair, stand for this many variables alike."""
    relaxed: tuple[int, ...] = ()
    """The marginals that are penalised. If there are any, all marginals are as given, and nothing
    is moved into offsets."""
    rho: Tensor | None = None
    """`(B, R)`: the weights of their penalties."""
    forbidden: Mapping[Scope, Tensor] = field(default_factory=dict)
    """Masks of the entries that no plan may use; their costs are 0. Tables without any are left
    out, where that is known."""

    @property
    def sizes(self) -> list[int]:
        """The number of atoms of each marginal."""
        return [marginal.shape[-1] for marginal in self.marginals]

    @property
    def edges(self) -> list[Scope]:
        """The variables of each cost table."""
        return list(self.costs)

    def unaries(self, potentials: Tensor) -> list[Tensor]:
        """Split potentials `(B, S)` by variable, with -inf at atoms of mass 0.

        Such an atom has no plan, whatever its potential is.
        """
        return [
            torch.where(marginal == 0, -math.inf, x)
            for x, marginal in zip(potentials.split(self.sizes, -1), self.marginals, strict=True)
        ]

    def pairs(self, epsilon: Tensor) -> dict[Scope, Tensor]:
        """Return -C / epsilon by the variables of each cost table, -inf where it is forbidden."""
        pairs = {
            scope: cost / -epsilon.reshape(len(epsilon), *[1] * len(scope))
            for scope, cost in self.costs.items()
        }
        for scope, mask in self.forbidden.items():
            pairs[scope] = pairs[scope].masked_fill(mask, -math.inf)
        return pairs

    def log_marginals(self) -> list[Tensor]:
        """Return log nu_p, -inf at absent atoms."""
        return [log(marginal) for marginal in self.marginals]

    def folded(self) -> Problem:
        """Return the problem as that of copies of one variable; they have to be alike."""
        masks = list(self.forbidden.values())
        return replace(
            self,
            costs={(0, 1): next(iter(self.costs.values()))},
            forbidden=dict.fromkeys([(0, 1)] * bool(masks), *masks[:1]),
            offsets=self.offsets[:1],
            marginals=self.marginals[:1],
            copies=len(self.marginals),
        )

    def without_empty_masks(self) -> Problem:
        """Return the same problem without masks of nothing; this reads their values."""
        masks = {scope: mask for scope, mask in self.forbidden.items() if bool(mask.any())}
        return replace(self, forbidden=masks)

    def detach(self) -> Problem:
        """Return the same problem without gradient."""
        return replace(
            self,
            costs={scope: cost.detach() for scope, cost in self.costs.items()},
            offsets=[offset.detach() for offset in self.offsets],
            marginals=[marginal.detach() for marginal in self.marginals],
            epsilon=self.epsilon.detach(),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """Return the same problem on a device, with results of a dtype."""
        return replace(
            self,
            costs={scope: cost.to(device) for scope, cost in self.costs.items()},
            offsets=[offset.to(device) for offset in self.offsets],
            marginals=[marginal.to(device) for marginal in self.marginals],
            epsilon=self.epsilon.to(device),
            deviation=self.deviation.to(device),
            dtype=dtype,
        )

    def flatten(self) -> tuple[list[Tensor], list[int], list[Tensor], Tensor, Tensor]:
        """Return costs, their variables one after another, marginals, epsilon and deviation.

        After the marginals stands rho, if any marginal is relaxed.

        An operator takes these; `unflatten_problem` turns them back. A forbidden entry is infinite.
        """
        scopes = [variable for scope in self.costs for variable in scope]
        costs = [
            cost.masked_fill(self.forbidden[scope], math.inf) if scope in self.forbidden else cost
            for scope, cost in self.costs.items()
        ]
        marginals = [*self.marginals, *([] if self.rho is None else [self.rho])]
        return costs, scopes, marginals, self.epsilon, self.deviation

    def unflatten(self, x: Tensor) -> Tensor:
        """Give a result `(B, ...)` its batch shape, and its dtype if it is floating point."""
        x = x.reshape((*self.batch, *x.shape[1:]))
        return x.to(self.dtype) if x.is_floating_point() else x


def unflatten_problem(
    costs: Sequence[Tensor],
    scopes: Sequence[int],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    deviation: Tensor,
    forbids: bool,
    relaxed: Sequence[int],
) -> Problem:
    """Return the problem that was flattened, as far as its solution needs it.

    `forbids` says whether entries may be infinite, `relaxed` which marginals are penalised.
    """
    variables = iter(scopes)
    tables = {tuple(next(variables) for _ in cost.shape[1:]): cost for cost in costs}
    forbidden = {scope: cost == math.inf for scope, cost in tables.items()} if forbids else {}
    return Problem(
        costs={
            scope: cost.masked_fill(forbidden[scope], 0.0) if forbids else cost
            for scope, cost in tables.items()
        },
        offsets=[],
        marginals=list(marginals[:-1] if relaxed else marginals),
        epsilon=epsilon,
        deviation=deviation,
        batch=epsilon.shape,
        dtype=epsilon.dtype,
        relaxed=tuple(relaxed),
        rho=marginals[-1] if relaxed else None,
        forbidden=forbidden,
    )


def along(vector: Tensor, variable: int, scope: Scope) -> Tensor:
    """Shape `(B, K)` of one variable to broadcast against a table over `scope`."""
    shape = [vector.shape[-1] if v == variable else 1 for v in scope]
    return vector.reshape(len(vector), *shape)
