"""Arguments of the solver, checked and made into a problem: in float64, masked and centred."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from multialign._validation import check_alike, check_positive, check_tensor, lift
from multialign.transport.absorption import absorb, is_extreme
from multialign.transport.elimination import Scope, check_table
from multialign.transport.problem import Problem

__all__ = ["Arguments", "check_arguments", "make_problem", "prepare"]

# Tables up to this size are centred several at once, in fewer operations.
_SMALL_ENTRIES = 2**14


class Arguments(NamedTuple):
    """The arguments of `multi_marginal_sinkhorn`, checked; dtypes and shapes are as given."""

    costs: dict[Scope, Tensor]
    """Tables `(*batch, K_i, K_j)`, or one over all variables."""
    marginals: list[Tensor]
    """M tensors `(*batch, K_p)`."""
    epsilon: Tensor
    """`(*batch)`, float64."""
    batch: torch.Size
    """To which the batch dimensions of all broadcast."""
    rho: list[float | None]
    """The weight of the penalty on each marginal, None for a hard constraint."""

    def tensors(self) -> list[Tensor]:
        """Return costs, marginals and epsilon."""
        return [*self.costs.values(), *self.marginals, self.epsilon]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """Return the same arguments with a function of each tensor."""
        return self._replace(
            costs={scope: function(cost) for scope, cost in self.costs.items()},
            marginals=[function(marginal) for marginal in self.marginals],
            epsilon=function(self.epsilon),
        )


def check_arguments(
    costs: Mapping[tuple[int, int], Tensor] | Tensor,
    marginals: Sequence[Tensor],
    epsilon: float | Tensor,
    relaxation: float | Sequence[float | None] | None = None,
) -> Arguments:
    """Check the arguments of `multi_marginal_sinkhorn`; `relaxation` is `marginal_relaxation`."""
    weights = _check_marginals(marginals)
    tables = _check_costs(costs, weights)
    tensors, first = [*tables.values(), *weights], weights[0]
    if any(x.dtype != first.dtype or x.device != first.device for x in tensors):
        named = isinstance(costs, Mapping)
        labels = [f"costs[{scope}]" if named else "costs" for scope in tables]
        labels += [f"marginals[{p}]" for p in range(len(weights))]
        check_alike("costs and marginals", tensors, labels)
    epsilon = _check_epsilon(epsilon, weights[0].device)
    batch = _common_batch(tables, weights, epsilon)
    for scope in tables:
        if len(scope) > 2:
            check_table(batch.numel() * math.prod(weights[p].shape[-1] for p in scope))
    return Arguments(tables, weights, epsilon, batch, _check_relaxation(relaxation, len(weights)))


def make_problem(
    costs: Mapping[tuple[int, int], Tensor] | Tensor,
    marginals: Sequence[Tensor],
    epsilon: float | Tensor,
    dtype: torch.dtype | None = None,
    relaxation: float | Sequence[float | None] | None = None,
) -> Problem:
    """Check the arguments of `multi_marginal_sinkhorn` and put them in order."""
    return prepare(check_arguments(costs, marginals, epsilon, relaxation), dtype)


def prepare(
    arguments: Arguments, dtype: torch.dtype | None = None, *, reads: bool = True
) -> Problem:
    """Put arguments in order; `dtype` is that of the results, None: that of the marginals.

    Without `reads` no value is read, and no cost may be infinite.
    """
    tables, weights, epsilon, batch, rho = arguments

    def flat(x: Tensor, dims: int) -> Tensor:
        shape = x.shape[x.ndim - dims :]
        if x.ndim - dims != len(batch) or x.shape[: len(batch)] != batch:
            x = x.expand((*batch, *shape))
        return x.double().reshape((batch.numel(), *shape))

    relaxed = tuple(p for p, one in enumerate(rho) if one is not None)
    given = [flat(weight, 1) for weight in weights]
    normalised, absent = _normalise(given)
    flat_costs = {scope: flat(table, len(scope)) for scope, table in tables.items()}
    groups = _mask_absent(flat_costs, absent)
    # Whether it is positive is not read here, which would synchronise; the result shows it.
    flat_epsilon = flat(torch.where(epsilon > 0, epsilon, math.nan), 0)
    if len(relaxed) == len(rho):
        groups = _cap(groups, flat_epsilon + sum(rho[p] or 0.0 for p in relaxed))
    forbidden: Mapping[Scope, Tensor] = {}
    extreme = reads and is_extreme([group.costs for group in groups], flat_epsilon)
    if extreme and not relaxed:
        tables = _by_scope(groups)
        centred, offsets, deviation, forbidden = absorb(tables, normalised, flat_epsilon)
    else:
        if extreme:
            forbidden = {scope: cost == math.inf for scope, cost in _by_scope(groups).items()}
            groups = [
                _Group(group.scopes, group.costs.masked_fill(group.costs == math.inf, 0.0))
                for group in groups
            ]
        centred, offsets, deviation = _centre(groups, normalised)
    if relaxed:
        # A potential that is penalised is what it is: nothing may move into it.
        centred = _by_scope(groups)
        offsets = [torch.zeros_like(nu) for nu in normalised]
        normalised = _with_masses(normalised, given)
    return Problem(
        costs=centred,
        offsets=offsets,
        marginals=normalised,
        epsilon=flat_epsilon,
        deviation=deviation,
        batch=batch,
        dtype=weights[0].dtype if dtype is None else dtype,
        relaxed=relaxed,
        rho=flat_epsilon.new_tensor([rho[p] for p in relaxed]).expand(len(flat_epsilon), -1)
        if relaxed
        else None,
        forbidden=forbidden,
    )


def _check_relaxation(relaxation: Any, count: int) -> list[float | None]:
    """Return rho for each marginal, None for a hard constraint."""
    if relaxation is None:
        return [None] * count
    name = "marginal_relaxation"
    if not isinstance(relaxation, Sequence) or isinstance(relaxation, str):
        return [check_positive(name, relaxation)] * count
    if len(relaxation) != count:
        raise ValueError(
            f"{name} must be None, a number > 0, or {count} of these, one for each marginal; "
            f"got {relaxation!r}"
        )
    return [
        None if one is None else check_positive(f"{name}[{i}]", one)
        for i, one in enumerate(relaxation)
    ]


def _with_masses(normalised: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return marginals with the masses given; one without any takes the largest of the others.

    Where none has any, it is 1.
    """
    totals = torch.stack([weight.sum(-1, keepdim=True) for weight in given])
    largest = totals.amax(0)
    totals = torch.where(totals == 0, torch.where(largest == 0, 1.0, largest), totals)
    return [nu * total for nu, total in zip(normalised, totals, strict=True)]


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
        number = check_positive("epsilon", epsilon)
        return torch.full((), number, dtype=torch.float64, device=device)  # no copy to wait for
    check_tensor("epsilon", epsilon, "(*batch)", 0)
    if epsilon.device != device:
        raise ValueError(f"epsilon must be on the marginals' device {device}; got {epsilon.device}")
    return epsilon.double()


def _common_batch(
    tables: Mapping[Scope, Tensor], weights: Sequence[Tensor], epsilon: Tensor
) -> torch.Size:
    batches = [t.shape[: t.ndim - len(scope)] for scope, t in tables.items()]
    batches += [weight.shape[:-1] for weight in weights]
    if all(batch == epsilon.shape for batch in batches):
        return epsilon.shape
    names = [f"costs[{scope}]" for scope in tables] + [
        f"marginals[{p}]" for p in range(len(weights))
    ]
    shapes = dict(zip([*names, "epsilon"], [*batches, epsilon.shape], strict=True))
    # torch.broadcast_shapes would import sympy, which takes a second.
    axes = zip_longest(*[reversed(shape) for shape in shapes.values()], fillvalue=1)
    sizes = [[size for size in axis if size != 1] or [1] for axis in axes]
    if any(size != axis[0] for axis in sizes for size in axis):
        described = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"costs, marginals and epsilon must have batch dimensions that broadcast; "
            f"got {described}"
        )
    return torch.Size([axis[0] for axis in reversed(sizes)])


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


class _Group(NamedTuple):
    """Cost tables of one shape, to work on together."""

    scopes: list[Scope]
    costs: Tensor
    """`(E, B, K_1, ...)`."""


def _mask_absent(costs: Mapping[Scope, Tensor], absent: Sequence[Tensor]) -> list[_Group]:
    """Set the costs of absent atoms to 0, whatever stands there."""
    scopes, tables = list(costs), list(costs.values())
    groups = []
    for indices in _alike(tables):
        group = [scopes[n] for n in indices]
        axes = range(len(group[0]))
        masks = [_stack([absent[scope[axis]] for scope in group]) for axis in axes]
        masks = [_spread(mask, axis, len(axes)) for axis, mask in enumerate(masks)]
        cost = _stack([tables[n] for n in indices])
        groups.append(_Group(group, cost.masked_fill(reduce(torch.logical_or, masks), 0.0)))
    return groups


def _by_scope(groups: Sequence[_Group]) -> dict[Scope, Tensor]:
    """Return the tables `(B, K_1, ...)` by their variables."""
    return {
        scope: cost
        for group in groups
        for scope, cost in zip(group.scopes, group.costs.unbind(0), strict=True)
    }


def _cap(groups: Sequence[_Group], weight: Tensor) -> list[_Group]:
    """Lower costs that no plan pays, infinite ones too, where all marginals are penalised.

    With w = epsilon + sum_p rho_p, the `weight`, the optimal plan is at most

        exp((sum_p rho_p log nu_p - C) / w),

    since f_p = rho_p log(nu_p / T_p) and T <= T_p. At a cost of 500 w this is about 1e-217, so that
    an atom all of whose pairs are forbidden has a finite potential.
    """
    cap = 500 * weight.detach()
    for _, cost in groups:
        # What other tables may give back.
        cap = cap - cost.detach().flatten(2).amin(-1).clamp_max(0.0).sum(0)
    return [
        _Group(scopes, cost.minimum(cap.reshape(-1, *[1] * (cost.ndim - 2))))
        for scopes, cost in groups
    ]


def _centre(
    groups: Sequence[_Group], marginals: Sequence[Tensor]
) -> tuple[dict[Scope, Tensor], list[Tensor], Tensor]:
    """Split each cost into a part of mean 0 given any one variable and parts of one variable.

    A part that depends on one variable alone moves into its potential and does not change the plan,
    so a modality gap of any size costs no digits. The weights of the means are constants: any split
    is exact. The third result is the standard deviation of the first part: centred costs of
    different edges are uncorrelated, so their variances add.
    """
    offsets: dict[int, Tensor] = {}
    centred: dict[Scope, Tensor] = {}
    variance = torch.zeros_like(marginals[0][:, 0])
    for group, cost in groups:
        axes = range(len(group[0]))
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
    return centred, [offsets[p] for p in range(len(marginals))], variance.sqrt()


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
