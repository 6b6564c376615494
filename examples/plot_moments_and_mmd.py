"""What moments see, and what only MMD sees
========================================

`GaussianMomentLoss` compares mean, covariance and skewness. `MMDLoss` compares whole distributions.
Four clouds show the difference: the first two differ from a normal cloud in one of these moments,
the last two in none of them.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from multialign import GaussianMomentLoss, MMDLoss

# %%
# Five clouds
# -----------
# All clouds have covariance I exactly, and all but "moved" have mean 0. The ring and the four
# groups are symmetric, so their skewness is 0 too: the moment loss cannot distinguish them from the
# normal cloud.

N = 600
torch.manual_seed(0)


def whitened(x: Tensor) -> Tensor:
    """Return x, transformed to mean 0 and covariance I."""
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    return x @ vectors @ (vectors / values.sqrt()).mT


def symmetric(x: Tensor) -> Tensor:
    """Return the cloud of x and -x, whose skewness is 0."""
    return whitened(torch.cat([x, -x]))


half = torch.randn(N // 2, 2)
angle = 2 * math.pi * torch.rand(N // 2, 1)
corners = torch.randint(2, (N // 2, 2)) * 2.0 - 1
clouds = {
    "normal": symmetric(half),
    "moved": symmetric(torch.randn(N // 2, 2)) + torch.tensor([0.7, 0.0]),
    "skewed": whitened(-torch.log(torch.rand(N, 2))),
    "ring": symmetric(torch.cat([angle.cos(), angle.sin()], 1) + 0.08 * half),
    "four groups": symmetric(corners + 0.2 * half),
}

# %%
# Both losses against the normal cloud
# ------------------------------------

moments, mmd = GaussianMomentLoss(), MMDLoss(bandwidth=0.5)
normal = clouds["normal"]
values = {
    name: (moments([normal, x]).item(), mmd([normal, x]).item()) for name, x in clouds.items()
}
for name, (first, second) in values.items():
    print(f"{name:12} moments {first:9.2e}   MMD² {second:9.2e}")

# %%
# What they move
# --------------
# A loss that is not sensitive to a difference cannot remove it. A normal cloud follows the gradient
# of each loss, with the four groups as its target.


def follow(loss: nn.Module, start: Tensor, target: Tensor, rate: float) -> Tensor:
    """Return the points of `start` after gradient descent on the loss."""
    x = start.clone().requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(loss([x, target]), x)
        x = (x - rate * len(x) * gradient).detach().requires_grad_()
    return x.detach()


target = clouds["four groups"]
ends = {
    "moments": follow(moments, normal, target, rate=0.1),
    "MMD": follow(mmd, normal, target, rate=0.3),
}

# %%
# Moments of the normal cloud and of the four groups agree, so no point moves. MMD moves most of the
# points to the groups. It costs more: moments are linear in the number of samples, MMD is
# quadratic, and its bandwidth has to be chosen (:doc:`/gallery/plot_bandwidth`).

figure, axes = plt.subplots(2, 5, figsize=(8.6, 4.4), height_ratios=(1, 1.35))
for axis, (name, x) in zip(axes[0], clouds.items(), strict=True):
    axis.scatter(*x.mT, s=1.5, c="#0072B2" if name != "normal" else "0.35", lw=0)
    axis.set(title=name, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")

grid = axes[1, 0].get_gridspec()
for axis in axes[1]:
    axis.remove()
bars = figure.add_subplot(grid[1, :2])
names = [name for name in clouds if name != "normal"]
for offset, column, colour, label in ((-0.2, 0, "#E69F00", "moments"), (0.2, 1, "#0072B2", "MMD²")):
    heights = [max(values[name][column], 1e-6) for name in names]
    bars.bar([k + offset for k in range(4)], heights, width=0.38, color=colour, label=label)
bars.set(yscale="log", ylim=(1e-6, 3e3), title="loss against the normal cloud")
bars.set_xticks(range(4), [name.replace(" ", "\n") for name in names])
bars.legend(loc="upper right", ncols=2)
for columns, (name, end) in zip((slice(2, 3), slice(3, 4)), ends.items(), strict=True):
    axis = figure.add_subplot(grid[1, columns])
    axis.scatter(*end.mT, s=1.5, c="#E69F00" if name == "moments" else "#0072B2", lw=0)
    axis.set(title=f"normal cloud\nafter {name}", xlim=(-3, 3), ylim=(-3, 3))
    axis.set(xticks=[], yticks=[], aspect="equal")
axis = figure.add_subplot(grid[1, 4])
axis.scatter(*target.mT, s=1.5, c="0.35", lw=0)
axis.set(title="its\ntarget", xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
plt.show()
