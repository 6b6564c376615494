r"""A class that only one modality has
===================================

Transport with fixed marginals has to send all mass somewhere. Where one modality has samples of a
class that the other does not have, their mass lands on samples of other classes, and displaces the
mass of these. With `marginal_relaxation` the marginals are penalised instead, by
:math:`\rho \operatorname{KL}(T_i | \nu_i)` for each: a sample that is far from all others is left
behind, at a price.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from multialign import MultiMarginalSinkhornLoss

# %%
# Two sensors
# -----------
# Both record handwritten digits, different samples each, in 16 common dimensions. The first sees
# the digits 0 to 3, a quarter each. The second never sees a 3.

digits, classes = load_digits(return_X_y=True)
features = torch.from_numpy(PCA(16, random_state=0).fit_transform(digits)).float()
features = features / features.std()
labels = torch.from_numpy(classes)


def draw(digit: int, start: int) -> Tensor:
    """Return the places of 40 samples of a digit."""
    return (labels == digit).nonzero().flatten()[start : start + 40]


first = torch.cat([draw(digit, 0) for digit in (0, 1, 2, 3)])
second = torch.cat([draw(digit, 40) for digit in (0, 1, 2)])
clouds = [features[first], features[second]]

# %%
# Where the mass goes
# -------------------
# Each row is a digit of the first sensor, each column one of the second. With fixed marginals a
# quarter of all mass, that of the 3, has to go to other digits. The smaller :math:`\rho`, the more
# of it is left behind. That has a price: samples far from their own class lose mass too.

LEVELS = (None, 100.0, 30.0, 15.0, 5.0)


def class_table(plan: Tensor) -> Tensor:
    """Return the mass between every two digits."""
    rows = torch.stack([labels[first] == digit for digit in range(4)]).to(plan)
    columns = torch.stack([labels[second] == digit for digit in range(3)]).to(plan)
    return rows @ plan @ columns.mT


tables = {}
for rho in LEVELS:
    loss = MultiMarginalSinkhornLoss(epsilon=0.5, debias=False, marginal_relaxation=rho)
    tables[rho] = class_table(loss.solve(clouds).plan())

figure, axes = plt.subplots(1, len(LEVELS), figsize=(9, 2.9), sharey=True)
for axis, (rho, table) in zip(axes, tables.items(), strict=True):
    axis.imshow(table, cmap="Blues", vmin=0, vmax=1 / 3)
    for row in range(4):
        for column in range(3):
            share = table[row, column].item()
            axis.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center",
                color="white" if share > 0.2 else "black",
            )  # fmt: skip
    axis.set(xticks=range(3), yticks=range(4), xlabel="second sensor")
    axis.set_title("fixed" if rho is None else rf"$\rho = {rho:g}$")
axes[0].set_ylabel("digit of the first sensor")
figure.suptitle("Mass between the digits, in percent")
plt.show()

# %%
# What it changes
# ---------------
# The digit of a sample is guessed from the second sensor: the digit that most of its mass goes to.
# A sample that keeps less than half of its mass is called unknown.

for rho in LEVELS:
    loss = MultiMarginalSinkhornLoss(epsilon=0.5, debias=False, marginal_relaxation=rho)
    plan = loss.solve(clouds).plan()
    columns = torch.stack([labels[second] == digit for digit in range(3)]).to(plan)
    guess = (plan @ columns.mT).argmax(-1)
    guess[plan.sum(-1) < 0.5 / len(first)] = 3  # unknown, which is right for a 3
    right = (guess == labels[first]).double()
    known, unknown = right[labels[first] < 3].mean(), right[labels[first] == 3].mean()
    name = "fixed" if rho is None else f"rho {rho:g}"
    print(f"{name:8}: digits 0 to 2 right {known:6.1%}, 3 left behind {unknown:6.1%}")

# %%
# How to choose :math:`\rho`: it is in the units of the cost. A sample is left behind where the cost
# of its way exceeds a few :math:`\rho`. A value between the costs within a class and those between
# classes tells the two apart; ``solution.marginal(i)`` shows what stays.
