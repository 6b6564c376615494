"""Sums and rows over the ranks of a process group, with gradients.

One convention holds throughout: the loss is the same on all ranks, and what a rank computes as its
gradient is that of the sum of the ranks' losses, so that DDP's mean over ranks is the gradient of
the loss. It follows from one rule: the backward pass of a collective sums gradients over ranks.
Whether something is then computed once, in parts, or over again on every rank makes no difference.

No rank's samples decide which collectives it takes part in, in either direction: a rank that waits
for another would wait for ever.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "GatheredRows", "GroupModule", "ProcessGroup", "Ranks"]

# torch.distributed has no such class where it was built without support for it.
ProcessGroup: TypeAlias = "dist.ProcessGroup"

_Module = TypeVar("_Module", bound="GroupModule")


class GatheredRows(NamedTuple):
    """The rows of all ranks on the first rank; none on the others."""

    features: list[Tensor]
    """M tensors `(*batch, N_m, D)`, constant."""
    masses: list[Tensor]
    """M tensors `(*batch, N_m)`, constant."""
    weighted: bool
    """Whether any rank was given weights."""
    starts: list[int]
    """Where the rows of this rank begin, in each modality."""


class Ranks:
    """The ranks that share a loss: those of a process group, or this one alone.

    Without a group every method returns what it is given.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None:
            _check_group(group)
        self.group = group

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that draws what is drawn at random."""
        return self.group is None or dist.get_rank(self.group) == 0

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor summed over the ranks, in one collective for all of them."""
        if self.group is None or not tensors:
            return list(tensors)
        packed = _joining(torch.cat([x.flatten() for x in tensors]))
        return _unpack(_AllReduce.apply(packed, self.group), [x.shape for x in tensors])

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the first rank, without gradient, in one collective."""
        if self.group is None:
            return list(tensors)
        packed = torch.cat([x.flatten() for x in tensors])
        dist.broadcast(packed, src=dist.get_global_rank(self.group, 0), group=self.group)
        return _unpack(packed, [x.shape for x in tensors])

    def first_rows(self, rows: Tensor, here: Tensor) -> Tensor:
        """Return the rows `(M, *batch, 1, D)` of the first rank that has each modality.

        They are constants. `here` `(M, *batch)` says which modalities this rank has.
        """
        if self.group is None:
            return rows
        packed = torch.cat([rows, here.to(rows.dtype)[..., None, None]], -1)
        gathered = _all_gather(packed.detach(), self.group)
        first = (gathered[..., -1:] != 0).int().argmax(0, keepdim=True)
        chosen: Tensor = gathered[..., :-1].gather(0, first.expand(1, *rows.shape))
        return chosen[0]

    def gather(
        self, features: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the samples and weights of all ranks, with gradient.

        For losses that need all samples in one place; memory and time grow with the ranks.
        """
        group = self.group
        if group is None:
            return list(features), list(weights)

        def collect(packed: Tensor) -> list[Tensor]:
            return list(_AllGather.apply(_joining(packed), group))

        counts = _gather_counts([x.shape[-2] for x in features], features[0], group)
        rows, masses = _gather_samples(features, weights, counts, collect)
        return rows, list(masses)

    def gather_on_first(
        self, features: Sequence[Tensor], masses: Sequence[Tensor], weighted: bool
    ) -> GatheredRows:
        """Gather the rows of all ranks, without gradient, on the first rank alone."""
        group = self.group
        if group is None:
            return GatheredRows(list(features), list(masses), weighted, [0] * len(features))
        sizes = [x.shape[-2] for x in features]
        table = _gather_counts([*sizes, int(weighted)], features[0], group)
        rows, gathered = _gather_samples(
            [x.detach() for x in features],
            [mass.detach() for mass in masses],
            [row[:-1] for row in table],
            lambda packed: _gather_on_first(packed, group),
        )
        before = table[: dist.get_rank(group)]
        starts = [sum(row[m] for row in before) for m in range(len(sizes))]
        return GatheredRows(rows, gathered, any(row[-1] for row in table), starts)


ALONE = Ranks(None)


class GroupModule(nn.Module):
    """A Module with a `process_group`, which its copies share and which a pickle cannot hold."""

    process_group: ProcessGroup | None

    def __copy__(self: _Module) -> _Module:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self: _Module, memo: dict[int, Any]) -> _Module:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group  # stands for its own copy
        copied.__dict__.update(copy.deepcopy(super().__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the process group, which belongs to running processes."""
        state: dict[str, Any] = super().__getstate__()
        if state["process_group"] is not None:
            warnings.warn(
                f"a pickle of {type(self).__name__} holds no process_group: after loading, set it "
                "again, loss.process_group = group",
                stacklevel=2,
            )
        return {**state, "process_group": None}


def _check_group(group: object) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group needs torch.distributed to be initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed process group or None; "
            f"got {type(group).__name__}"
        )


def _gather_counts(counts: Sequence[int], like: Tensor, group: ProcessGroup) -> list[list[int]]:
    """Return the counts of every rank."""
    table: list[list[int]] = _all_gather(torch.tensor(counts, device=like.device), group).tolist()
    return table


def _gather_samples(
    features: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    counts: Sequence[Sequence[int]],
    collect: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gather M tensors `(*batch, N_m, D)` and weights `(*batch, N_m)`, in rank order.

    `counts` are the N_m of every rank, and `collect` is the one collective, for all rows with
    their weights. Where it returns nothing, this rank gets no samples.
    """
    packed = torch.cat(
        [
            torch.cat([x, (x.new_ones(x.shape[:-1]) if w is None else w).unsqueeze(-1)], -1)
            for x, w in zip(features, weights, strict=True)
        ],
        -2,
    )
    longest = max(sum(row) for row in counts)
    padding = packed.new_zeros(*packed.shape[:-2], longest - packed.shape[-2], packed.shape[-1])
    gathered = collect(torch.cat([packed, padding], -2))

    pieces: list[list[Tensor]] = [[] for _ in features]
    for part, row in zip(gathered, counts, strict=False):
        for m, piece in enumerate(part[..., : sum(row), :].split(list(row), -2)):
            pieces[m].append(piece)
    joined = [torch.cat(parts, -2) if parts else packed[..., :0, :] for parts in pieces]
    return [x[..., :-1] for x in joined], [x[..., -1] for x in joined]


def _unpack(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a flat tensor into tensors of these shapes."""
    parts = packed.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Stack the equal-sized tensors of all ranks, without gradient."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def _gather_on_first(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Return the equal-sized tensors of all ranks on the first, and nothing on the others."""
    x = x.contiguous()
    first = dist.get_rank(group) == 0
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))] if first else []
    dist.gather(x, parts if first else None, dst=dist.get_global_rank(group, 0), group=group)
    return parts


def _joining(x: Tensor) -> Tensor:
    """Return `x` with gradient, so that this rank joins the collective's backward pass.

    Samples of other ranks may need it where those of this one do not.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_()


class _AllGather(torch.autograd.Function):
    """Stack the equal-sized tensors of all ranks; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group)[dist.get_rank(ctx.group)], None


class _AllReduce(torch.autograd.Function):
    """Sum the tensors of all ranks; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None
