"""Three views at once, or pair by pair
=====================================

Contrastive learning of more than two views usually adds a loss for every pair of them.
`MatchingGapLoss` :cite:p:`piran:24` contrasts whole tuples: it compares the cost of the known
matching of all views with that of the best one. This page trains three views of real digits by
either loss, with everything else equal, and measures which finds partners better.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import torch
from pytorch_metric_learning.losses import NTXentLoss
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize

from multialign import MatchingGapLoss

# %%
# Three views
# -----------
# The views of a digit are the left half of its pixels, the right half, and sixteen sums, of its
# rows and of its columns. Half of the digits is for training, the other half is a gallery to
# search.

pixels = torch.as_tensor(load_digits().images, dtype=torch.float32) / 8 - 1
sums = torch.cat([pixels.sum(1), pixels.sum(2)], 1) / 8
views = [pixels[:, :, :4].flatten(1), pixels[:, :, 4:].flatten(1), sums]
Loss = Callable[[list[Tensor]], Tensor]
TRAIN, TEST, BATCH, STEPS = 900, 800, 48, 100

# %%
# Two losses
# ----------
# The rows have norm 1, so that a squared distance is 2 - 2 cos, and the temperature of InfoNCE is
# half of epsilon. The gap is divided by epsilon, which gives it the scale of InfoNCE. The peer is
# the NT-Xent loss of pytorch-metric-learning, averaged over all pairs of views.


def matching_gap(temperature: float) -> Loss:
    """Return the matching gap at this temperature, in units of epsilon."""
    epsilon = 2 * temperature
    gap = MatchingGapLoss(epsilon=epsilon, tolerance=1e-3)
    return lambda features: gap(features) / epsilon


def pairwise(temperature: float) -> Loss:
    """Return the mean InfoNCE of all pairs of views, in both directions."""
    loss = NTXentLoss(temperature=temperature)
    # Were both one tensor, no row would count as a partner.
    rows, partners = torch.arange(BATCH), torch.arange(BATCH)

    def total(features: list[Tensor]) -> Tensor:
        pairs = permutations(features, 2)
        return sum(loss(x, rows, ref_emb=y, ref_labels=partners) for x, y in pairs) / 6

    return total


def train(loss: Loss, seed: int) -> list[Tensor]:
    """Return the features of the test samples after training."""
    torch.manual_seed(seed)
    order = torch.randperm(len(pixels))
    towers = nn.ModuleList(
        nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 16)) for x in views
    )
    optimizer = torch.optim.Adam(towers.parameters(), lr=3e-3)

    def features(rows: Tensor) -> list[Tensor]:
        return [normalize(tower(x[rows]), dim=1) for tower, x in zip(towers, views, strict=True)]

    for _ in range(STEPS):
        rows = order[torch.randperm(TRAIN)[:BATCH]]
        optimizer.zero_grad()
        loss(features(rows)).backward()
        optimizer.step()
    with torch.no_grad():
        return features(order[TRAIN : TRAIN + TEST])


def recalls(features: list[Tensor]) -> tuple[float, float]:
    """Return recall at 1 in per cent: from one view to another, and from two to the third."""
    partners = torch.arange(TEST)
    one, two = [], []
    for i in range(3):
        target, (a, b) = features[i], [features[j] for j in range(3) if j != i]
        for query, found in ((a, one), (b, one), (a + b, two)):
            found.append(((query @ target.mT).argmax(1) == partners).float().mean())
    return 100 * float(torch.stack(one).mean()), 100 * float(torch.stack(two).mean())


# %%
# Five seeds
# ----------
# A seed sets the split, the towers and the batches, the same for both losses: their differences are
# paired. Each loss is trained at three temperatures.

SEEDS, TEMPERATURES = range(5), (0.05, 0.1, 0.2)
LOSSES = {"pairwise InfoNCE": pairwise, "matching gap": matching_gap}
results = np.array(
    [
        [[recalls(train(make(t), seed)) for seed in SEEDS] for t in TEMPERATURES]
        for make in LOSSES.values()
    ]
)  # (loss, temperature, seed, measure)

HALF = stats.t.ppf(0.975, len(SEEDS) - 1) / len(SEEDS) ** 0.5  # of a 95 % interval
MEASURES = ("one view finds another", "two views find the third")
print(
    f"{'recall at 1, %':26}{'tau':>6}" + "".join(f"{name:>20}" for name in (*LOSSES, "difference"))
)
for m, measure in enumerate(MEASURES):
    for t, temperature in enumerate(TEMPERATURES):
        values = results[:, t, :, m]
        difference = values[1] - values[0]
        cells = [f"{v.mean():.1f}" for v in values]
        cells.append(f"{difference.mean():+.1f} ± {HALF * difference.std(ddof=1):.1f}")
        print(f"{measure:26}{temperature:6.2f}" + "".join(f"{cell:>20}" for cell in cells))

# %%
# What to see
# -----------
# Where one view looks for another, the two losses are equally good at low temperatures, and the gap
# finds about one partner more in a hundred at 0.2. Where two views look together for the third, as
# tuples of rows do in the loss, it finds two or three more in a hundred at 0.1 and 0.2; at 0.05 the
# interval of five seeds holds 0. All are small encoders after a hundred steps, and all recalls
# are low: half a digit does not determine the other half.
#
# A step with the gap takes several times as long as one with InfoNCE, since it solves a transport
# problem between the views. Its negatives grow with the tuples of a batch, and its time with them.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for m, (axis, measure) in enumerate(zip(axes, MEASURES, strict=True)):
    for row, (name, colour) in enumerate(zip(LOSSES, ("#0072B2", "#E69F00"), strict=True)):
        places = np.arange(len(TEMPERATURES)) + 0.1 * (2 * row - 1)
        values = results[row, :, :, m]
        axis.plot(np.repeat(places, len(SEEDS)), values.ravel(), ".", color=colour, alpha=0.4)
        axis.errorbar(
            places,
            values.mean(1),
            HALF * values.std(1, ddof=1),
            fmt="o",
            color=colour,
            capsize=3,
            label=name,
        )
    axis.set(title=measure, xlabel="temperature", xticks=range(3), xticklabels=TEMPERATURES)
axes[0].set(ylabel="recall at 1 (%)")
axes[0].legend()
plt.show()
