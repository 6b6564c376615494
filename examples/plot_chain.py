"""A chain of marginals over time
==============================

A population is observed at six times, with different individuals each time: snapshots without
tracks. Which part of the first snapshot became which part of the last? A direct comparison of the
two can only use their distance. A chain of marginals also uses the snapshots between them.
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
# Three groups turn by 40° from one snapshot to the next, 200° in all. Each snapshot has new
# samples, and their numbers differ. The figure shows the group as colour; the solver does not see
# it.

TIMES, TURN, PER_GROUP = 6, 40.0, (14, 16, 18, 15, 17, 16)
torch.manual_seed(0)
START = (90.0, 210.0, 330.0)


def snapshot(time: int) -> tuple[Tensor, Tensor]:
    """Return the points observed at one time, and the group of each."""
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
# ``solve`` returns the plan over all six, whose marginal of the two ends is a table. No table over
# more than two snapshots is built.

chain = MultiMarginalSinkhornLoss(graph="chain", epsilon=0.02).solve(points)
ends = chain.pairwise_marginal(0, TIMES - 1)
direct = MultiMarginalSinkhornLoss(epsilon=0.02).solve([points[0], points[-1]])
direct_ends = direct.pairwise_marginal(0, 1)


def by_group(plan: Tensor) -> Tensor:
    """Return the share of each group at the start that goes to each group at the end."""
    rows = torch.nn.functional.one_hot(groups[0]).to(plan)
    columns = torch.nn.functional.one_hot(groups[-1]).to(plan)
    table = rows.mT @ plan @ columns
    return table / table.sum(1, keepdim=True)


for name, plan in (("first to last, directly", direct_ends), ("along the chain", ends)):
    print(f"{name}: {100 * by_group(plan).diagonal().mean():.0f} % arrive in their own group")

# %%
# What to see
# -----------
# After 200° the nearest group at the end is another one, and the direct plan couples each group
# with the wrong one. Along the chain every step is short enough that the nearest group is the right
# one, and the plan composes the steps.
#
# The plan is differentiable, so it could be used to train a model of the motion.

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
    (axes[1], direct_ends, "first to last, directly"),
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
