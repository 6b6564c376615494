"""Sums and rows over the ranks of a process group, with gradients.

One convention holds throughout: the loss is the same on all ranks, and what a rank computes as its
gradient is that of the sum of the ranks' losses, so that DDP's mean over ranks is the gradient of
the loss. It follows from one rule: the backward pass of a collective sums gradients over ranks.
Whether something is then computed once, in parts, or over again on every rank makes no difference.

No rank's samples decide which collectives it takes part in, in either direction: a rank that waits
for another would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gather", "ProcessGroup", "Ranks", "broadcast", "gatherer"]

# torch.distributed has no such class where it was built without support for it.
ProcessGroup: TypeAlias = "dist.ProcessGroup"

Gather = Callable[
    [Sequence[Tensor], Sequence[Tensor | None]], tuple[list[Tensor], list[Tensor | None]]
]


def gatherer(group: ProcessGroup | None) -> Gather | None:
    """Return what turns a rank's samples and weights into those of all ranks; None without a group.

    For losses that need all samples in one place; memory and time grow with the ranks.
    """
    if group is None:
        return None
    _check_group(group)

    def gather(
        features: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        def collect(packed: Tensor) -> list[Tensor]:
            return list(_AllGather.apply(_joining(packed), group))

        counts = _gather_counts([x.shape[-2] for x in features], features[0], group)
        rows, masses = _gather_samples(features, weights, counts, collect)
        return rows, list(masses)

    return gather


def broadcast(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the tensor of the group's first rank, for what is drawn at random."""
    if group is not None:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor


class Ranks:
    """The ranks that share a loss while samples stay where they are: a group's, or this one alone.

    Without a group every method hands back what it is given.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None:
            _check_group(group)
        self.group = group
        self._totals: list[Tensor] = []

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor summed over the ranks, in one collective for all of them."""
        if self.group is None or not tensors:
            return list(tensors)
        packed = _joining(torch.cat([x.flatten() for x in tensors]))
        summed = _AllReduce.apply(packed, self.group).split([x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(summed, tensors, strict=True)]

    def note(
        self, features: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Note the weight that this rank's samples have in total, before it is normalised away."""
        if self.group is not None:
            self._totals = [
                x.new_full(x.shape[:-2], x.shape[-2]) if weight is None else weight.sum(-1)
                for x, weight in zip(features, weights, strict=True)
            ]
        return list(features), list(weights)

    def normalise(self, masses: Sequence[Tensor], present: Tensor) -> tuple[list[Tensor], Tensor]:
        """Turn masses `(*batch, N_m)` of sum 1 on each rank into masses of sum 1 over all.

        `present` `(M, *batch)` says afterwards whether any rank has the modality.
        """
        if self.group is None:
            return list(masses), present
        local = torch.stack(self._totals)
        (totals,) = self.sum([local])
        some = totals != 0  # true for NaN, which must reach the result
        shares = local / torch.where(some, totals, 1.0)
        pooled = [mass * share.unsqueeze(-1) for mass, share in zip(masses, shares, strict=True)]
        return pooled, some.to(present.dtype)

    def first_rows(self, rows: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """Return the rows `(*batch, 1, D)` of the first rank where each modality is present.

        They are constants. `present` `(M, *batch)` is this rank's own.
        """
        if self.group is None:
            return list(rows)
        packed = torch.cat([torch.stack(list(rows)), present[..., None, None]], -1)
        gathered = _all_gather(packed.detach(), self.group)
        first = (gathered[..., -1:] != 0).int().argmax(0, keepdim=True)
        chosen = gathered[..., :-1].gather(0, first.expand(1, *packed[..., :-1].shape))
        return list(chosen[0])

    def draw(
        self,
        features: Sequence[Tensor],
        masses: Sequence[Tensor],
        weighted: bool,
        counts: Sequence[int],
        choose: Callable[[list[Tensor], list[Tensor], bool], list[Tensor]],
    ) -> list[Tensor]:
        """Return the indices `(*batch, K_m)` that `choose` draws among the samples of all ranks.

        The first rank alone holds them all, and draws. An index counts from this rank's first
        sample; one below 0, or above the last, is another rank's.
        """
        if self.group is None:
            return choose(list(features), list(masses), weighted)
        group, rank = self.group, dist.get_rank(self.group)
        sizes = [x.shape[-2] for x in features]
        table = _gather_counts([*sizes, int(weighted)], features[0], group)
        rows, weights = _gather_samples(
            [x.detach() for x in features],
            [mass.detach() for mass in masses],
            [row[:-1] for row in table],
            lambda packed: _gather_on_first(packed, group),
        )
        batch = features[0].shape[:-2]
        shapes = [torch.Size((*batch, count)) for count in counts]
        if rank == 0:
            drawn = torch.cat(
                [i.flatten() for i in choose(rows, weights, any(row[-1] for row in table))]
            )
        else:
            length = sum(shape.numel() for shape in shapes)
            drawn = torch.empty(length, dtype=torch.long, device=features[0].device)
        parts = broadcast(drawn, group).split([shape.numel() for shape in shapes])
        return [
            part.view(shape) - sum(row[m] for row in table[:rank])
            for m, (part, shape) in enumerate(zip(parts, shapes, strict=True))
        ]


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
