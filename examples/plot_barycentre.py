"""Barycentres of three clouds, by a star
======================================

A Wasserstein barycentre is the cloud with the smallest weighted sum of transport costs to several
others :cite:p:`agueh:11`. With the unknown cloud in the centre of a star, this sum is the cost of
one multi-marginal problem, and the plan of that problem gives new places for its points.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from multialign import multi_marginal_sinkhorn, squared_euclidean_cost

# %%
# Three shapes
# ------------
# The shapes are a ring, a cross and a heart, of N points each.

N = 80
t = 2 * math.pi * torch.arange(N) / N
side = torch.linspace(-1, 1, N // 2)
heart = torch.stack(
    [
        16 * t.sin() ** 3,
        13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos(),
    ],
    1,
)
shapes = torch.stack(
    [
        torch.stack([t.cos(), t.sin()], 1),
        torch.cat([torch.stack([side, side], 1), torch.stack([side, -side], 1)]),
        heart / 16,
    ]
)
shapes = shapes - shapes.mean(1, keepdim=True)

# %%
# Fifteen barycentres at once
# ---------------------------
# The weights :math:`\lambda_i` of the three shapes run over a triangle. Each choice is a separate
# problem. A leading dimension holds all fifteen, and one call solves them.

corners = 4
weights = torch.tensor(
    [(i, j, corners - i - j) for i in range(corners, -1, -1) for j in range(corners - i, -1, -1)]
) / float(corners)


def move(cloud: Tensor, epsilon: float) -> Tensor:
    """Move each point of the `(15, N, 2)` clouds to the weighted mean of its images."""
    costs = {
        (0, i + 1): weights[:, i, None, None]
        * squared_euclidean_cost(cloud, shapes[i].expand_as(cloud))
        for i in range(3)
    }
    uniform = torch.full((len(weights), N), 1 / N)
    # A rough plan is enough for an update.
    solution = multi_marginal_sinkhorn(
        costs, [uniform] * 4, epsilon, tolerance=1e-2, method="sinkhorn"
    )
    images = [N * solution.pairwise_marginal(0, i + 1) @ shapes[i] for i in range(3)]
    return torch.einsum("bi,ibnd->bnd", weights, torch.stack(images))


# %%
# Each step replaces a point by the weighted mean of its images under the plan, which is the exact
# minimiser for that plan :cite:p:`cuturi:14`. Eight steps from the same start are enough, with a
# falling :math:`\epsilon`.

torch.manual_seed(0)
cloud = 0.3 * torch.randn(N, 2).expand(len(weights), N, 2)
for step in range(8):
    cloud = move(cloud, epsilon=0.1 * 0.7**step)

# %%
# Gradient descent on ``multi_marginal_sinkhorn_loss([cloud, *shapes], graph="star")`` would give
# the same cloud, and could also train a network that generates it. If the points themselves are the
# unknowns, the fixed-point iteration is faster.
#
# The entropy term shrinks a barycentre a little. At a corner, where one shape has all the weight,
# the cloud is that shape, shrunk by an amount that vanishes with :math:`\epsilon`.

corner = cloud[0] - cloud[0].mean(0)
print(f"radius of the ring: 1, of its barycentre at the corner: {corner.norm(dim=1).mean():.3f}")

figure, axis = plt.subplots(figsize=(6.4, 5.6))
colours = torch.tensor([[0.0, 0.45, 0.70], [0.84, 0.37, 0.0], [0.0, 0.62, 0.45]])
for points, weight in zip(cloud, weights, strict=True):
    place = torch.stack([(weight[1] - weight[0]) * 5, weight[2] * 8.6])
    axis.scatter(*(points + place).mT, s=3, color=(weight @ colours).tolist(), lw=0)
axis.set(aspect="equal")
axis.axis("off")
plt.show()
