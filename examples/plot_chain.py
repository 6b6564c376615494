"""A chain of marginals over time
==============================

A population is seen at six times, each time other individuals: snapshots without tracks. Which part
of the first snapshot became which part of the last? Comparing the two directly can only guess by
distance. A chain of marginals goes through the snapshots between.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from multialign import MultiMarginalSinkhornLoss

# %%
# Three groups on a carousel
# --------------------------
# Three groups turn by 40° from one snapshot to the next, 200° in all. New samples are drawn at
# every time, and the numbers differ. The group is drawn as colour and is never shown to the solver.

TIMES, TURN, PER_GROUP = 6, 40.0, (14, 16, 18, 15, 17, 16)
torch.manual_seed(0)
START = (90.0, 210.0, 330.0)


def snapshot(time: int) -> tuple[Tensor, Tensor]:
    """Return the points seen at one time, and the group of each."""
    n = PER_GROUP[time]
    groups = torch.arange(3).repeat_interleave(n)
    angle = torch.deg2rad(torch.tensor(START)[groups] + TURN * time)
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    return centres + 0.1 * torch.randn(3 * n, 2), groups


points, groups = zip(*(snapshot(time) for time in range(TIMES)), strict=True)

# %%
# A chain, and its two ends
# -------------------------
# `MultiMarginalSinkhornLoss` with ``graph="chain"`` puts a cost between each snapshot and the next.
# ``solve`` returns the plan over all six, from which the table of the two ends follows: never was a
# table built that is larger than two snapshots.

chain = MultiMarginalSinkhornLoss(graph="chain", epsilon=0.02).solve(points)
ends = chain.pairwise_marginal(0, TIMES - 1)
direct = MultiMarginalSinkhornLoss(epsilon=0.02).solve([points[0], points[-1]])
guess = direct.pairwise_marginal(0, 1)


def by_group(plan: Tensor) -> Tensor:
    """Return which share of each group at the start goes to each group at the end."""
    rows = torch.nn.functional.one_hot(groups[0]).to(plan)
    columns = torch.nn.functional.one_hot(groups[-1]).to(plan)
    table = rows.mT @ plan @ columns
    return table / table.sum(1, keepdim=True)


for name, plan in (("first to last, directly", guess), ("along the chain", ends)):
    print(f"{name}: {100 * by_group(plan).diagonal().mean():.0f} % arrive in their own group")

# %%
# What to see
# -----------
# Over 200° the nearest group at the end is another one, and the direct plan takes it. Along the
# chain every step is short enough for distance to be right, and the steps compose: what the plan
# knows about both ends is what it knows about each step.
#
# As elsewhere on these pages the plan is differentiable, so that a model of the motion could be
# trained through it.

COLOURS = ("#0072B2", "#E69F00", "#009E73")
figure, axes = plt.subplots(1, 3, figsize=(8.8, 3.2), width_ratios=(1.1, 1, 1))
for time in range(TIMES):
    shade = 0.2 + 0.8 * time / (TIMES - 1)
    for group, colour in enumerate(COLOURS):
        rows = groups[time] == group
        axes[0].scatter(*points[time][rows].mT, s=9, c=colour, alpha=shade, lw=0)
    angle = math.radians(START[0] + TURN * time)
    axes[0].annotate(
        f"t = {time}", (1.45 * math.cos(angle), 1.45 * math.sin(angle)), ha="center", va="center",
        c=COLOURS[0], fontsize=8,
    )  # fmt: skip
axes[0].set(title="six snapshots", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
for axis, plan, title in (
    (axes[1], guess, "first to last, directly"),
    (axes[2], ends, "along the chain"),
):
    for row in range(0, len(points[0]), 2):
        column = plan[row].argmax()
        start, end = points[0][row], points[-1][column]
        axis.plot(*torch.stack([start, end]).mT, c=COLOURS[groups[0][row]], lw=0.7, alpha=0.6)
    for group, colour in enumerate(COLOURS):
        axis.scatter(*points[0][groups[0] == group].mT, s=9, c=colour, alpha=0.3, lw=0)
        axis.scatter(*points[-1][groups[-1] == group].mT, s=12, c=colour, lw=0)
    share = 100 * by_group(plan).diagonal().mean()
    axis.set(title=f"{title}: {share:.0f} % right", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
for axis in axes:
    axis.set(xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)
plt.show()
