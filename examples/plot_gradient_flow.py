"""Gradient flow of the Sinkhorn divergence
========================================

Points that follow the gradient of a loss show what the loss minimises. Here a cloud flows towards
another under the Sinkhorn divergence, under the same loss without its second term, and under MMD.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from multialign import mmd_loss, multi_marginal_sinkhorn_loss

# %%
# From a disc to two moons
# ------------------------

N = 120
torch.manual_seed(0)
radius, angle = 0.35 * torch.rand(N, 1).sqrt(), 2 * math.pi * torch.rand(N, 1)
start = torch.cat([radius * angle.cos() - 1.2, radius * angle.sin() + 1.2], 1)
arc = math.pi * torch.linspace(0, 1, N // 2)
moons = torch.cat(
    [
        torch.stack([arc.cos(), arc.sin()], 1),
        torch.stack([1 - arc.cos(), 0.5 - arc.sin()], 1),
    ]
)
target = moons + 0.05 * torch.randn(N, 2)

# %%
# The flow
# --------
# Each step moves every point along N times its gradient, so the speed does not depend on N. For the
# cost :math:`|x-y|^2` of two clouds, a single step with a rate of 1/2 would take the points to
# their images.

EPSILON = 0.3
LOSSES = {
    "Sinkhorn divergence": lambda x: multi_marginal_sinkhorn_loss(
        [x, target], epsilon=EPSILON, tolerance=1e-3
    ),
    "without its second term": lambda x: multi_marginal_sinkhorn_loss(
        [x, target], epsilon=EPSILON, tolerance=1e-3, debias=False
    ),
    "MMD, bandwidth 0.3": lambda x: mmd_loss([x, target], bandwidth=0.3),
}
SHOWN = (0, 5, 15, 60)


def flow(loss: Callable[[Tensor], Tensor], rate: float = 0.05) -> dict[int, Tensor]:
    """Return the cloud after each step in `SHOWN`."""
    x, frames = start.clone().requires_grad_(), {}
    for step in range(max(SHOWN) + 1):
        if step in SHOWN:
            frames[step] = x.detach()
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x - rate * N * gradient).detach().requires_grad_()
    return frames


flows = {name: flow(loss) for name, loss in LOSSES.items()}

# %%
# What to see
# -----------
# The divergence moves the whole cloud, since its gradient at a point leads to the image of that
# point under transport, at any distance. It is 0 only at the target itself.
#
# Without the second term the minimiser is not the target but a shrunken version of it: each point
# moves to the mean of the points that the blurred plan couples it with. A smaller :math:`\epsilon`
# shrinks less and takes more iterations. The second term removes the bias, and costs two more
# problems, of each cloud with itself.
#
# MMD at a bandwidth of 0.3 attracts only points within about that distance of the target. On the
# rest of the cloud only the repulsion of its own points acts, and it scatters.


def spread(x: Tensor) -> Tensor:
    """Return the mean distance from the centre."""
    return (x - x.mean(0)).norm(dim=1).mean()


for name, frames in flows.items():
    ratio = spread(frames[SHOWN[-1]]) / spread(target)
    print(f"{name:24} spread at the end: {ratio:.2f} of the target's")

figure, axes = plt.subplots(3, 4, figsize=(8.8, 5.6), sharex=True, sharey=True)
for row, ((name, frames), colour) in enumerate(
    zip(flows.items(), ("#0072B2", "#E69F00", "#009E73"), strict=True)
):
    for axis, (step, x) in zip(axes[row], frames.items(), strict=True):
        axis.scatter(*target.mT, s=5, c="0.8", lw=0)
        axis.scatter(*x.mT, s=6, c=colour, lw=0)
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
        if row == 0:
            axis.set_title(f"step {step}")
    axes[row, 0].set_ylabel(name)
plt.show()
