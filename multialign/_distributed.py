"""Rows of all ranks of a process group, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gather", "ProcessGroup", "broadcast", "gatherer"]

# torch.distributed has no such class where it was built without support for it.
ProcessGroup: TypeAlias = "dist.ProcessGroup"

Gather = Callable[
    [Sequence[Tensor], Sequence[Tensor | None]], tuple[list[Tensor], list[Tensor | None]]
]


def gatherer(group: ProcessGroup | None) -> Gather | None:
    """Return what turns a rank's samples and weights into those of all ranks; None without a group.

    The loss of the gathered samples is the same on all ranks. Its gradient on one rank is that of
    the sum of the ranks' losses, so that DDP's mean over ranks is the gradient of the loss.
    """
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group needs torch.distributed to be initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed process group or None; "
            f"got {type(group).__name__}"
        )

    def gather(
        features: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        return _gather_samples(features, weights, group)

    return gather


def broadcast(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the tensor of the group's first rank, for what is drawn at random."""
    if group is not None:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor


def _gather_samples(
    features: Sequence[Tensor], weights: Sequence[Tensor | None], group: ProcessGroup
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gather M tensors `(*batch, N_m, D)` and weights `(*batch, N_m)`, in rank order.

    One collective for the counts, which may differ, and one for all rows with their weights.
    """
    counts = [x.shape[-2] for x in features]
    table = torch.tensor(counts, device=features[0].device)
    tables = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tables, table, group=group)
    all_counts = torch.stack(tables).tolist()

    packed = torch.cat(
        [
            torch.cat([x, (x.new_ones(x.shape[:-1]) if w is None else w).unsqueeze(-1)], -1)
            for x, w in zip(features, weights, strict=True)
        ],
        -2,
    )
    longest = max(sum(row) for row in all_counts)
    padding = packed.new_zeros(*packed.shape[:-2], longest - packed.shape[-2], packed.shape[-1])
    gathered = _AllGather.apply(torch.cat([packed, padding], -2), group)

    pieces: list[list[Tensor]] = [[] for _ in features]
    for rank, row in enumerate(all_counts):
        for m, part in enumerate(gathered[rank][..., : sum(row), :].split(row, -2)):
            pieces[m].append(part)
    joined = [torch.cat(parts, -2) for parts in pieces]
    return [x[..., :-1] for x in joined], [x[..., -1] for x in joined]


class _AllGather(torch.autograd.Function):
    """Stack the equal-sized tensors of all ranks; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
