r"""A plan between three marginals
==============================

A plan between two distributions is a table of the mass that goes from each atom to each other one.
Between three distributions it is a cube, which gives the mass of *triples* of atoms. This page
solves such a problem, draws the plan, and shows the effect of :math:`\epsilon`.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from multialign import multi_marginal_sinkhorn, squared_euclidean_cost

# %%
# Three histograms on a line
# --------------------------
# The marginals are one bump, two bumps, and a flat one, on 60 atoms each. The cost of a triple is
# the sum of the squared distances of its three pairs.

K = 60
grid = torch.linspace(0, 1, K, dtype=torch.float64)


def bumps(*places: float, width: float) -> Tensor:
    """Return a histogram with a bump at each place."""
    mass = sum(torch.exp(-((grid - place) ** 2) / (2 * width**2)) for place in places)
    return mass / mass.sum()


marginals = [
    bumps(0.5, width=0.09),
    bumps(0.25, 0.8, width=0.06),
    ((grid > 0.1) & (grid < 0.9)).double(),
]
marginals[2] = marginals[2] / marginals[2].sum()
table = squared_euclidean_cost(grid[:, None], grid[:, None])
costs = {(0, 1): table, (0, 2): table, (1, 2): table}

# %%
# Solve
# -----
# `multi_marginal_sinkhorn` returns a `TransportSolution`. ``pairwise_marginal`` returns the table
# of two marginals, and only ``plan()`` builds the cube, of 216,000 entries here.

LEVELS = (0.1, 0.01, 0.001)
solutions = {epsilon: multi_marginal_sinkhorn(costs, marginals, epsilon) for epsilon in LEVELS}
for epsilon, solution in solutions.items():
    print(
        f"epsilon {epsilon:5}: value {solution.value:7.4f}, transport cost "
        f"{solution.transport_cost:.4f}, error {solution.error:.0e}"
    )

# %%
# Draw the plan
# -------------
# On a line, the optimal triples are those of equal rank: the left end of one distribution goes with
# the left ends of the others. At a small :math:`\epsilon` the mass lies on the curve of these
# triples; at a large one the plan is close to independence, and its transport cost is that of
# random triples.
#
# The curve jumps where the second histogram has a gap: neighbours in the bump of the first
# histogram are coupled with different bumps there.

figure = plt.figure(figsize=(8.8, 5.4))
upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.1))
axes = upper.subplots(1, 3, sharey=True)
for axis, mass, name in zip(axes, marginals, ("first", "second", "third"), strict=True):
    axis.fill_between(grid, mass, step="mid", color="#0072B2", alpha=0.35, lw=0)
    axis.set(title=f"{name} marginal", yticks=[], xticks=(0, 1))
    axis.spines["left"].set_visible(False)

grids = lower.add_gridspec(1, 4, width_ratios=(1, 1, 1, 1.7))
panels = [lower.add_subplot(grids[k]) for k in range(3)]
for panel, (epsilon, solution) in zip(panels, solutions.items(), strict=True):
    pairs = solution.pairwise_marginal(0, 1)
    panel.imshow(pairs.mT, origin="lower", extent=(0, 1, 0, 1), cmap="Blues", vmax=pairs.max())
    panel.set(title=f"ε = {epsilon}", xlabel="first", xticks=(0, 1), yticks=(0, 1))
panels[0].set_ylabel("second")

plan = solutions[0.001].plan()
first, second, third = (plan > plan.max() / 50).nonzero().mT
space = lower.add_subplot(grids[3], projection="3d")
colours = plan[first, second, third]
space.scatter(grid[first], grid[second], grid[third], c=colours, cmap="viridis", s=4, lw=0)
space.set(title="all three, ε = 0.001", xlabel="first", ylabel="second", zlabel="third")
space.set(xlim=(0, 1), ylim=(0, 1), zlim=(0, 1), xticks=(0, 1), yticks=(0, 1), zticks=(0, 1))
space.set_box_aspect(None, zoom=0.9)
plt.show()

# %%
# The value has a gradient
# ------------------------
# All results of a solution are differentiable, by the implicit function theorem. The gradient of
# the value with respect to a marginal is its potential, up to a constant: the price of one more
# unit of mass at each atom.

second_marginal = marginals[1].clone().requires_grad_()
solution = multi_marginal_sinkhorn(costs, [marginals[0], second_marginal, marginals[2]], 0.01)
solution.value.backward()
price, potential = second_marginal.grad, solution.potentials[1].detach()
mass = marginals[1] / marginals[1].sum()
price, potential = price - price @ mass, potential - potential @ mass
print(f"largest difference of gradient and potential: {(price - potential).abs().max():.1e}")

figure, axis = plt.subplots(figsize=(5, 2.4))
axis.plot(grid, price, c="#0072B2", lw=2, label="gradient of the value")
axis.plot(grid, potential, "--", c="#E69F00", lw=1.5, label="potential")
axis.set(xlabel="atom of the second marginal", ylabel="price of mass")
axis.legend()
plt.show()
