"""Gradient flow of the Sinkhorn divergence
========================================

Points that follow the gradient of a loss show what the loss wants. Here a cloud flows to another
under the Sinkhorn divergence, under the same loss without its second term, and under MMD.
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
# Each step moves every point along N times its gradient, so that the speed does not depend on N.
# For the cost :math:`|x-y|^2` of two clouds a rate of 1/2 would take the points to their images at
# once.

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
    """Return the cloud after each of the steps that are shown."""
    x, seen = start.clone().requires_grad_(), {}
    for step in range(max(SHOWN) + 1):
        if step in SHOWN:
            seen[step] = x.detach()
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x - rate * N * gradient).detach().requires_grad_()
    return seen


flows = {name: flow(loss) for name, loss in LOSSES.items()}

# %%
# What to see
# -----------
# The divergence takes all of the cloud along, since its gradient at a point is the way to where
# transport wants that point, however far. Near the end it is 0 only at the target itself.
#
# Without the second term the minimiser is not the target but a shrunken version of it: each point
# is content with the mean of what the blurred plan couples it with. A smaller :math:`\epsilon`
# shrinks less and takes more iterations; the second term takes the bias away at the price of the
# two problems of each cloud with itself.
#
# MMD at a bandwidth of 0.3 pulls only at what is about as near as that. The rest of the cloud feels
# its own points alone, which repel each other, and scatters.


def spread(x: Tensor) -> Tensor:
    """Return the mean distance from the centre."""
    return (x - x.mean(0)).norm(dim=1).mean()


for name, seen in flows.items():
    ratio = spread(seen[SHOWN[-1]]) / spread(target)
    print(f"{name:24} spread at the end: {ratio:.2f} of the target's")

figure, axes = plt.subplots(3, 4, figsize=(8.8, 5.6), sharex=True, sharey=True)
for row, ((name, seen), colour) in enumerate(
    zip(flows.items(), ("#0072B2", "#E69F00", "#009E73"), strict=True)
):
    for axis, (step, x) in zip(axes[row], seen.items(), strict=True):
        axis.scatter(*target.mT, s=5, c="0.8", lw=0)
        axis.scatter(*x.mT, s=6, c=colour, lw=0)
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
        if row == 0:
            axis.set_title(f"step {step}")
    axes[row, 0].set_ylabel(name)
plt.show()
