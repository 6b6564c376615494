"""What prototype alignment does, and how to choose K, epsilon and the covariances
================================================================================

:class:`~multialign.PrototypeAlignmentLoss` summarises each modality by a Gaussian mixture, moves
mass between the components of the mixtures by optimal transport, and pulls samples toward the
counterparts of the components that they belong to. This page draws each of these steps for two
views of handwritten digits in two dimensions, and then shows the effect of three options.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from multialign import (
    GaussianMixture,
    PrototypeAlignmentLoss,
    bures_wasserstein_cost,
    fit_gaussian_mixture,
    multi_marginal_sinkhorn,
)

torch.manual_seed(0)
DIGITS = (2, 4, 6, 8)
NAMES = ("even columns", "odd columns")

# %%
# Two views
# ---------
# One view is the even columns of each image, the other the odd ones. Each is projected to its own
# first two principal components and scaled to unit variance. Row n of both is the same image. The
# labels are used to colour the points only.


def make_views() -> tuple[list[Tensor], np.ndarray]:
    """Return two views `(N, 2)` and the labels."""
    digits = load_digits()
    keep = np.isin(digits.target, DIGITS)
    views = []
    for first in (0, 1):
        columns = digits.images[keep][:, :, first::2].reshape(keep.sum(), -1)
        plane = PCA(2, whiten=True).fit_transform(columns)
        views.append(torch.as_tensor(plane, dtype=torch.float32))
    return views, digits.target[keep]


views, labels = make_views()

# %%
# Mixtures
# --------
# A mixture of four Gaussians is fitted to each view (Eq. 2-4 of the paper). As both views have
# equally many samples, the loss takes them as paired and starts component k of both views from the
# same images, so that components of equal index correspond. ``solve`` returns all parts of the
# loss.

loss = PrototypeAlignmentLoss(
    4,
    epsilon=0.1,
    covariance_type="full",
    em_iterations=30,
    generator=torch.Generator().manual_seed(0),
)
with torch.no_grad():
    parts = loss.solve(views)
print(
    f"transport term {parts.transport_loss:.2f}, sample-to-prototype term "
    f"{parts.prototype_loss:.2f}, sum {parts.loss:.2f}"
)


def draw_points(axes: Axes, points: Tensor) -> None:
    """Draw the samples, coloured by digit."""
    for colour, digit in enumerate(DIGITS):
        axes.scatter(*points[labels == digit].T, s=3, c=f"C{colour}", alpha=0.35, lw=0)
    axes.set(xticks=[], yticks=[], aspect="equal")


def draw_mixture(axes: Axes, mixture: GaussianMixture, numbers: Sequence[int]) -> None:
    """Draw each component as its ellipse of two standard deviations, with its number."""
    for k, (mean, covariance) in enumerate(zip(mixture.means, mixture.covariances, strict=True)):
        values, vectors = torch.linalg.eigh(covariance)
        width, height = (4 * values.sqrt()).tolist()
        angle = float(torch.atan2(vectors[1, 0], vectors[0, 0]).rad2deg())
        axes.add_patch(Ellipse(tuple(mean), width, height, angle=angle, fill=False, ec="0.2"))
        axes.annotate(
            str(numbers[k]),
            tuple(mean),
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.2", "fc": "white", "ec": "0.2"},
        )


figure, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axes, points, mixture, name in zip(panels, views, parts.mixtures, NAMES, strict=True):
    draw_points(axes, points)
    draw_mixture(axes, mixture, range(4))
    axes.set_title(f"{name} of the digits {', '.join(map(str, DIGITS))}")

# %%
# The plan
# --------
# The cost between two components is that of Eq. 6, the squared 2-Wasserstein distance of two
# Gaussians. The plan gives the mass that goes from component k to component l; its marginals are
# the component weights. The right panel draws the plan as lines in the plane of both views; the
# width of a line is its mass. The first term of the loss is the total cost of these lines: it pulls
# the ends of each together.

plan = parts.solution.plan()
a, b = parts.mixtures
cost = bures_wasserstein_cost(a.means, a.covariances, b.means, b.covariances)

figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for axes, table, title in zip(panels, (cost, plan), ("cost", "plan"), strict=False):
    axes.imshow(table, cmap="Greys", vmin=0, vmax=1.4 * float(table.max()))
    for (k, m), value in np.ndenumerate(table.numpy()):
        axes.annotate(f"{value:.2f}", (m, k), ha="center", va="center")
    axes.set(xlabel=NAMES[1], ylabel=NAMES[0], xticks=range(4), yticks=range(4), title=title)
panels[2].set_title("the plan on the plane")
for k, m in np.ndindex(4, 4):
    ends = torch.stack([a.means[k], b.means[m]])
    panels[2].plot(*ends.T, c="0.4", lw=25 * float(plan[k, m]), solid_capstyle="round", zorder=0)
for mixture, colour in ((a, "C0"), (b, "C3")):
    for k, mean in enumerate(mixture.means):
        panels[2].annotate(
            str(k),
            tuple(mean),
            ha="center",
            va="center",
            c=colour,
            bbox={"boxstyle": "circle,pad=0.2", "fc": "white", "ec": colour},
        )
panels[2].scatter(*torch.cat([a.means, b.means]).T, s=0)
panels[2].margins(0.15)
panels[2].set(xticks=[], yticks=[], aspect="equal", xlabel=f"blue {NAMES[0]}, red {NAMES[1]}")

# %%
# By index, or by the plan
# ------------------------
# The second term of the loss pulls each sample of one view toward the counterpart of the component
# it belongs to, and ``matching`` defines this counterpart. ``"index"`` takes the component of equal
# index, which is right here, since the views are paired. Without pairs, indices are arbitrary:
# below, the components of the second view are permuted, as independent fits would number them.
# ``"plan"`` takes the barycentric image of a component, the mean of its targets under the plan, and
# finds the counterparts again. It uses distances only: it can match only components that are close,
# and if a component is split between two, its image is a point between them.

order = torch.tensor([2, 0, 3, 1])
shuffled = GaussianMixture(
    weights=b.weights[order],
    means=b.means[order],
    covariances=b.covariances[order],
    covariance_type="full",
)
table = bures_wasserstein_cost(a.means, a.covariances, shuffled.means, shuffled.covariances)
solution = multi_marginal_sinkhorn({(0, 1): table}, [a.weights, shuffled.weights], 0.1)
plan = solution.pairwise_marginal(0, 1)
images = plan @ shuffled.means / plan.sum(1, keepdim=True)

figure, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axes, targets, title in zip(
    panels, (shuffled.means, images), ('matching="index"', 'matching="plan"'), strict=True
):
    draw_points(axes, views[1])
    draw_mixture(axes, shuffled, range(4))
    for k in range(4):
        start, end = a.means[k], targets[k]
        axes.annotate("", tuple(end), tuple(start), arrowprops={"arrowstyle": "->", "lw": 1.5})
        axes.annotate(
            str(k),
            tuple(start),
            c="C0",
            weight="bold",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.2", "fc": "white", "ec": "C0"},
        )
    axes.set_title(f"{title}: counterparts of blue")

# %%
# What the gradient does
# ----------------------
# To see the effect of the gradient, the samples themselves are trained here. The two views start
# apart, as the features of two encoders would. Prototypes of equal index meet, and samples gather
# around them. The loss does not keep different prototypes apart, since alignment alone is minimal
# where all features are equal; that takes the loss of a task or a decoder.

moving = [view + shift for view, shift in zip(views, (-1.5, 1.5), strict=True)]
moving = [view.requires_grad_() for view in moving]
frames = {0: [view.detach().clone() for view in moving]}
optimizer = torch.optim.Adam(moving, lr=0.1)
loss = PrototypeAlignmentLoss(4, epsilon=0.1)
torch.manual_seed(0)
for step in range(1, 41):
    optimizer.zero_grad()
    loss(moving).backward()
    optimizer.step()
    frames[step] = [view.detach().clone() for view in moving]

figure, panels = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharex=True, sharey=True)
for axes, step in zip(panels, (0, 15, 40), strict=True):
    for points, marker in zip(frames[step], "o^", strict=True):
        for colour, digit in enumerate(DIGITS):
            axes.scatter(
                *points[labels == digit].T, s=4, marker=marker, c=f"C{colour}", alpha=0.35, lw=0
            )
    axes.set(xticks=[], yticks=[], aspect="equal", title=f"step {step}")
panels[0].set_xlabel(f"circles {NAMES[0]}, triangles {NAMES[1]}")

# %%
# How many prototypes?
# --------------------
# Use as many prototypes as there are groups that should correspond, if that number is known. If
# not, fit mixtures to one half of the data, and take the K at which the log-likelihood of the other
# half stops rising. The figure shows this for all four types of covariance, on the first eight
# principal components of all ten digits, with many samples and with few.

images, _ = load_digits(return_X_y=True)
planes = torch.as_tensor(PCA(8).fit_transform(images), dtype=torch.float64)
planes = planes[torch.randperm(len(planes))]
test = planes[900:]
TYPES = ("spherical", "diag", "tied", "full")
COUNTS = (1, 2, 4, 7, 12, 20)


def held_out(train: Tensor, k: int, covariance_type: str) -> float:
    """Return the mean log-likelihood of the test half, averaged over three fits."""
    copies = train.expand(3, *train.shape)
    mixture = fit_gaussian_mixture(
        copies,
        k,
        covariance_type=covariance_type,
        iterations=30,
        tolerance=0.0,
        regularization=1e-3,
    )
    return float(mixture.log_prob(test.expand(3, *test.shape)).mean())


figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for axes, size in zip(panels, (900, 100), strict=True):
    for covariance_type in TYPES:
        curve = [held_out(planes[:size], k, covariance_type) for k in COUNTS]
        axes.plot(COUNTS, curve, marker="o", ms=3, label=covariance_type)
    axes.set(xscale="log", xlabel="K", title=f"fitted to {size} samples", ylim=(-31, -26))
    axes.set_xticks(COUNTS, [str(k) for k in COUNTS], minor=False)
    axes.minorticks_off()
panels[0].set_ylabel("log-likelihood, held out")
panels[0].legend(title="covariance_type")

# %%
# Which covariances?
# ------------------
# A full covariance has D (D + 1) / 2 numbers for each component, a diagonal one D, a spherical one
# a single number, and "tied" shares one full matrix among all components. With many samples, "full"
# is best and needs the fewest components; with few samples, it overfits first. A training step has
# few samples: a batch of 32 in 64 dimensions has four or five samples for each of seven components.
# Use "diag" there (or "spherical"), and ``momentum``, which keeps a running mixture over batches.
# Use full covariances for few dimensions and large batches; each cost between two of them also
# takes a matrix square root.
#
# Which epsilon?
# --------------
# Epsilon has the units of the costs. As it grows, the plan changes from a matching (each component
# is sent to one other) to independence (each is sent to all, which aligns nothing). The figure
# measures this by the perplexity of the rows of the plan, the effective number of components that a
# component is sent to. It is 1 for a matching, if the weights allow one.

epsilons = np.geomspace(1e-3, 1e2, 26)
perplexity, values = [], []
for epsilon in epsilons:
    solution = multi_marginal_sinkhorn({(0, 1): cost}, [a.weights, b.weights], float(epsilon))
    rows = solution.pairwise_marginal(0, 1)
    rows = rows / rows.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(rows, rows).sum(1)
    perplexity.append(float((a.weights * entropy).sum().exp()))
    values.append(float(solution.transport_cost))

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.semilogx(epsilons / float(cost.mean()), perplexity, c="C0")
axes.set(xlabel="epsilon / mean cost", ylim=(0.9, 4.1))
axes.set_ylabel("components sent to", color="C0")
right = axes.twinx()
right.semilogx(epsilons / float(cost.mean()), values, c="C3")
right.set_ylabel("transport term", color="C3")
axes.axvspan(0.01, 0.1, color="0.93", zorder=-1)

# %%
# Up to a tenth of the mean cost (shaded) the plan is close to the unregularised one; above, it
# blurs. A smaller epsilon only makes the plan jump as the costs change. As costs are summed over
# features, they grow with D, and the same epsilon has a different effect for every D;
# ``cost_reduction="mean"`` divides them by D. The paper's 0.1, on sums over 64 features of unit
# variance, is far to the left in this figure.

if __name__ == "__main__":
    plt.show()
