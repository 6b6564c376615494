"""The transport problem: checked, masked, centred, and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from multialign._validation import (
    check_alike,
    check_positive,
    check_tensor,
    lift,
)
from multialign.ops import log
from multialign.transport.elimination import Scope, check_table

__all__ = ["Problem", "along", "make_problem", "unflatten_problem"]

# Tables up to this size are centred several at once, in fewer operations.
_SMALL_ENTRIES = 2**14


@dataclass(frozen=True)
class Problem:
    """Eq. 7-8 for B problems of the same shape, all in float64.

    The cost is the sum of the tables in `costs` and of the vectors in `offsets`.
    """

    costs: Mapping[Scope, Tensor]
    """Centred costs `(B, K_i, K_j)` by (i, j), or one table over all variables."""
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
    """If more: one marginal, and the cost of one pair, stand for so many variables alike."""

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
        """Return -C / epsilon by the variables of each cost table."""
        return {
            scope: cost / -epsilon.reshape(len(epsilon), *[1] * len(scope))
            for scope, cost in self.costs.items()
        }

    def log_marginals(self) -> list[Tensor]:
        """Return log nu_p, -inf at absent atoms."""
        return [log(marginal) for marginal in self.marginals]

    def folded(self) -> Problem:
        """Return the problem as that of copies of one variable; they have to be alike."""
        return replace(
            self,
            costs={(0, 1): next(iter(self.costs.values()))},
            offsets=self.offsets[:1],
            marginals=self.marginals[:1],
            copies=len(self.marginals),
        )

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

        These are what an operator can take; `unflatten_problem` is the way back.
        """
        scopes = [variable for scope in self.costs for variable in scope]
        return list(self.costs.values()), scopes, self.marginals, self.epsilon, self.deviation

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
) -> Problem:
    """Return the problem that was flattened, as far as its solution needs it."""
    variables = iter(scopes)
    return Problem(
        costs={tuple(next(variables) for _ in cost.shape[1:]): cost for cost in costs},
        offsets=[],
        marginals=list(marginals),
        epsilon=epsilon,
        deviation=deviation,
        batch=epsilon.shape,
        dtype=epsilon.dtype,
    )


def make_problem(
    costs: Mapping[tuple[int, int], Tensor] | Tensor,
    marginals: Sequence[Tensor],
    epsilon: float | Tensor,
    dtype: torch.dtype | None = None,
) -> Problem:
    """Check the arguments of `multi_marginal_sinkhorn` and put them in order.

    `dtype` is that of the results; None: that of the marginals.
    """
    weights = _check_marginals(marginals)
    tables = _check_costs(costs, weights)
    labels = [
        *(f"costs[{scope}]" if isinstance(costs, Mapping) else "costs" for scope in tables),
        *(f"marginals[{p}]" for p in range(len(weights))),
    ]
    check_alike("costs and marginals", [*tables.values(), *weights], labels)
    epsilon = _check_epsilon(epsilon, weights[0].device)
    batch = _common_batch(tables, weights, epsilon)
    for scope in tables:
        if len(scope) > 2:
            check_table(batch.numel() * math.prod(weights[p].shape[-1] for p in scope))

    def flat(x: Tensor, dims: int) -> Tensor:
        shape = x.shape[x.ndim - dims :]
        if x.ndim - dims != len(batch) or x.shape[: len(batch)] != batch:
            x = x.expand((*batch, *shape))
        return x.double().reshape((batch.numel(), *shape))

    normalised, absent = _normalise([flat(weight, 1) for weight in weights])
    flat_costs = {scope: flat(table, len(scope)) for scope, table in tables.items()}
    centred, offsets, variance = _centre(flat_costs, normalised, absent)
    return Problem(
        costs=centred,
        offsets=offsets,
        marginals=normalised,
        epsilon=flat(epsilon, 0),
        deviation=variance.sqrt(),
        batch=batch,
        dtype=weights[0].dtype if dtype is None else dtype,
    )


def _check_marginals(marginals: Sequence[Tensor]) -> list[Tensor]:
    expected = "a sequence of at least 2 tensors (*batch, K_i)"
    if isinstance(marginals, Tensor) or not isinstance(marginals, Sequence):
        raise TypeError(f"marginals must be {expected}; got {type(marginals).__name__}")
    if len(marginals) < 2:
        raise ValueError(f"marginals must be {expected}; got {len(marginals)}")
    checked = []
    for i, marginal in enumerate(marginals):
        marginal = lift(check_tensor(f"marginals[{i}]", marginal, "(*batch, K)", 1))
        if marginal.shape[-1] == 0:
            raise ValueError(f"marginals[{i}] must have at least one entry; got K = 0")
        checked.append(marginal)
    return checked


def _check_costs(costs: object, weights: list[Tensor]) -> dict[Scope, Tensor]:
    sizes = [weight.shape[-1] for weight in weights]
    count = len(sizes)
    if isinstance(costs, Tensor):
        table = lift(check_tensor("costs", costs, "(*batch, K_1, ..., K_M)", count))
        if table.shape[table.ndim - count :] != tuple(sizes):
            raise ValueError(
                f"costs must end in the sizes of the marginals, {tuple(sizes)}; "
                f"got {tuple(table.shape)}"
            )
        return {tuple(range(count)): table}
    if not isinstance(costs, Mapping):
        raise TypeError(
            f"costs must be a mapping {{(i, j): tensor}} or one tensor (*batch, K_1, ..., K_M); "
            f"got {type(costs).__name__}"
        )
    tables: dict[Scope, Tensor] = {}
    for key, cost in costs.items():
        if not _is_edge(key, count):
            raise ValueError(
                f"costs must have keys (i, j) with 0 <= i < j < {count}, the number of "
                f"marginals; got {key!r}"
            )
        i, j = key
        table = lift(check_tensor(f"costs[{key}]", cost, "(*batch, K_i, K_j)", 2))
        if table.shape[-2:] != (sizes[i], sizes[j]):
            raise ValueError(
                f"costs[{key}] must have shape (*batch, {sizes[i]}, {sizes[j]}), as the "
                f"marginals have; got {tuple(table.shape)}"
            )
        tables[key] = table
    return tables or {(0, 1): weights[0].new_zeros(sizes[0], sizes[1])}


def _is_edge(key: Any, count: int) -> bool:
    return (
        isinstance(key, tuple)
        and len(key) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in key)
        and 0 <= key[0] < key[1] < count
    )


def _check_epsilon(epsilon: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(epsilon, Tensor):
        check_positive("epsilon", epsilon)
        return torch.tensor(float(epsilon), dtype=torch.float64, device=device)
    check_tensor("epsilon", epsilon, "(*batch)", 0)
    if epsilon.device != device:
        raise ValueError(f"epsilon must be on the marginals' device {device}; got {epsilon.device}")
    # Whether it is positive is not read here, which would synchronise; the result shows it.
    return torch.where(epsilon > 0, epsilon, math.nan)


def _common_batch(
    tables: Mapping[Scope, Tensor], weights: Sequence[Tensor], epsilon: Tensor
) -> torch.Size:
    shapes = {f"costs[{scope}]": t.shape[: t.ndim - len(scope)] for scope, t in tables.items()}
    shapes |= {f"marginals[{p}]": weight.shape[:-1] for p, weight in enumerate(weights)}
    shapes["epsilon"] = epsilon.shape
    if len(set(shapes.values())) == 1:
        return epsilon.shape
    try:
        batch: torch.Size = torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        described = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"costs, marginals and epsilon must have batch dimensions that broadcast; "
            f"got {described}"
        ) from None
    return batch


def _normalise(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return marginals of sum 1, and which of their atoms are absent.

    A marginal without any mass is out: it becomes one atom, which (its costs being blanked)
    costs nothing and adds no entropy. A negative mass becomes NaN.
    """
    normalised, absent = list(weights), list(weights)
    for indices in _alike(weights):
        weight = _stack([weights[i] for i in indices])
        zero = weight == 0
        # Without gradient where it is not positive: 0 or NaN.
        weight = torch.where(weight > 0, weight, weight.detach().sqrt())
        total = weight.sum(-1, keepdim=True)
        out = (total == 0).to(weight.dtype)
        # One atom for those without mass.
        nu = (weight + functional.pad(out, (0, weight.shape[-1] - 1))) / (total + out)
        for i, one, its_zero in zip(indices, nu.unbind(0), zero.unbind(0), strict=True):
            normalised[i], absent[i] = one, its_zero
    return normalised, absent


def along(vector: Tensor, variable: int, scope: Scope) -> Tensor:
    """Shape `(B, K)` of one variable to broadcast against a table over `scope`."""
    shape = [vector.shape[-1] if v == variable else 1 for v in scope]
    return vector.reshape(len(vector), *shape)


def _centre(
    costs: Mapping[Scope, Tensor], marginals: Sequence[Tensor], absent: Sequence[Tensor]
) -> tuple[dict[Scope, Tensor], list[Tensor], Tensor]:
    """Split each cost into a part of mean 0 given any one variable and parts of one variable.

    What depends on one variable alone moves into its potential and does not change the plan, so a
    modality gap of any size costs no digits. The weights of the means are constants: any split is
    exact. The variance of the first part comes third: centred costs of different edges are
    uncorrelated, so their variances add. Before, the cost of absent atoms is set to 0: whatever
    stands there cannot reach the result.
    """
    offsets: dict[int, Tensor] = {}
    centred = dict(costs)
    variance = torch.zeros_like(marginals[0][:, 0])
    scopes, tables = list(costs), list(costs.values())
    for indices in _alike(tables):
        group = [scopes[n] for n in indices]
        cost = _stack([tables[n] for n in indices])
        axes = range(len(group[0]))
        masks = [_stack([absent[scope[axis]] for scope in group]) for axis in axes]
        masks = [_spread(mask, axis, len(axes)) for axis, mask in enumerate(masks)]
        cost = cost.masked_fill(reduce(torch.logical_or, masks), 0.0)
        weights = [_stack([marginals[scope[axis]] for scope in group]).detach() for axis in axes]
        means = [_mean_given(cost, weights, axis) for axis in axes]
        mean = (means[0] * weights[0]).sum(-1, keepdim=True)
        share = mean * ((len(means) - 1) / len(means))
        for axis, given in enumerate(means):
            part = given - share
            cost = cost - _spread(part, axis, len(axes))
            for scope, one in zip(group, part.unbind(0), strict=True):
                p = scope[axis]
                offsets[p] = offsets[p] + one if p in offsets else one
        square = _mean_given(cost.detach().square(), weights, 0)
        variance = variance + (square * weights[0]).sum((0, -1))
        centred.update(zip(group, cost.unbind(0), strict=True))
    for p, nu in enumerate(marginals):
        if p not in offsets:
            offsets[p] = torch.zeros_like(nu)
    return centred, [offsets[p] for p in range(len(marginals))], variance


def _spread(x: Tensor, axis: int, count: int) -> Tensor:
    """Shape `(E, B, K)` of one axis to broadcast against tables `(E, B, K_1, ..., K_count)`."""
    size = x.shape[-1]
    return x.reshape(*x.shape[:2], *[size if other == axis else 1 for other in range(count)])


def _mean_given(cost: Tensor, weights: Sequence[Tensor], axis: int) -> Tensor:
    """Return the weighted means of tables `(E, B, K, ...)` over all axes but one."""
    batch = cost.shape[:2]
    cost = cost.flatten(0, 1).movedim(1 + axis, 1)
    for weight in reversed([w for other, w in enumerate(weights) if other != axis]):
        shape = cost.shape[:-1]
        cost = torch.bmm(cost.flatten(1, -2), weight.flatten(0, 1).unsqueeze(-1)).view(shape)
    return cost.view(*batch, cost.shape[-1])


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group tensors to work on together: small ones of equal shape, others alone."""
    groups: dict[object, list[int]] = {}
    for n, tensor in enumerate(tensors):
        small = tensor.numel() <= _SMALL_ENTRIES
        groups.setdefault(tensor.shape if small else n, []).append(n)
    return list(groups.values())


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
