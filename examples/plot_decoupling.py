"""Cosine decoupling, with factors known
=====================================

Two modalities of the same sample share some information, and each has information of its own.
`CosineDecouplingLoss` keeps the two representations apart by their angle. On this page the factors
of the data are known, so it can measure what each representation holds with and without the loss,
and what the angle does not show.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from multialign import CosineDecouplingLoss, mmd_loss

# %%
# Data with known factors
# -----------------------
# The data have a shared factor s and a private factor for each modality, all two-dimensional and
# independent. Each modality observes a random linear mixture of both, with a little noise.

SHARED, PRIVATE, SEEN, WIDTH = 2, 2, 12, 4
generator = torch.Generator().manual_seed(0)
mixing = [torch.randn(SHARED + PRIVATE, SEEN, generator=generator) for _ in range(2)]


def sample(n: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return n draws of the shared factor, the first private factor, and both modalities."""
    shared = torch.randn(n, SHARED, generator=generator)
    private = [torch.randn(n, PRIVATE, generator=generator) for _ in range(2)]
    seen = [
        torch.cat([shared, own], 1) @ mix + 0.05 * torch.randn(n, SEEN, generator=generator)
        for own, mix in zip(private, mixing, strict=True)
    ]
    return shared, private[0], seen


train, test = sample(2000), sample(1000)

# %%
# A model with two branches
# -------------------------
# Each modality has a unique and a common feature, from which a decoder reconstructs it. A loss
# draws the common features of a pair together. `extra` is the term under study.


class Branches(nn.Module):
    """A unique and a common feature of one modality, and a decoder from both."""

    def __init__(self) -> None:
        super().__init__()
        self.unique = nn.Linear(SEEN, WIDTH)
        self.common = nn.Linear(SEEN, WIDTH)
        self.decoder = nn.Linear(2 * WIDTH, SEEN)


def fit(extra: Callable[..., Tensor], steps: int = 500) -> list[Branches]:
    """Train with reconstruction, agreement of the common features, and `extra(unique, common)`."""
    torch.manual_seed(1)
    branches = [Branches(), Branches()]
    optimizer = torch.optim.Adam([p for b in branches for p in b.parameters()], lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(2000, (128,))
        x = [seen[rows] for seen in train[2]]
        unique = [b.unique(v) for b, v in zip(branches, x, strict=True)]
        common = [b.common(v) for b, v in zip(branches, x, strict=True)]
        restored = [
            b.decoder(torch.cat([u, c], 1))
            for b, u, c in zip(branches, unique, common, strict=True)
        ]
        loss = sum((r - v).square().mean() for r, v in zip(restored, x, strict=True))
        loss = loss + (common[0] - common[1]).square().mean() / common[0].var().detach()
        loss = loss + extra(unique, common)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return branches


# %%
# The terms
# ---------
# The default of `CosineDecouplingLoss` is the squared cosine, whose minimum is orthogonality.
# ``form="signed"`` is the published equation, whose minimum is an angle of 180°.
#
# The last term requires what no angle can express: that unique and common features are independent.
# `mmd_loss` compares the pairs (unique, common) with pairs whose partners have been exchanged. It
# is 0 only if the two features are independent.

squared = CosineDecouplingLoss()
signed = CosineDecouplingLoss(form="signed")


def standard(x: Tensor) -> Tensor:
    """Return x in units of its spread, feature by feature."""
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def dependence(unique: list[Tensor], common: list[Tensor]) -> Tensor:
    """Return the MMD between the pairs and independent pairs, summed over modalities."""
    total = torch.zeros(())
    for u, c in zip(unique, common, strict=True):
        u, c = standard(u), standard(c)
        pairs, exchanged = torch.cat([u, c], 1), torch.cat([u, c[torch.randperm(len(c))]], 1)
        total = total + mmd_loss([pairs, exchanged], bandwidth=[1.0, 2.0, 4.0])
    return total


TERMS = {
    "nothing": lambda unique, common: torch.zeros(()),
    "signed": signed,
    "squared": squared,
    "squared + MMD": lambda unique, common: (
        squared(unique, common) + 20 * dependence(unique, common)
    ),
}

# %%
# What the features hold
# ----------------------
# The measure is the share of a factor's variance that a linear map predicts from a feature, on
# samples that were not used in training. The ideal for the shared and the private factor is 0 and 1
# for the unique feature, and 1 and 0 for the common one.


def readable(feature: Tensor, factor: Tensor) -> float:
    """Return the R^2 of a linear map from feature to factor, fitted on one half of the samples."""
    inputs = torch.cat([feature, torch.ones(len(feature), 1)], 1)
    half = len(inputs) // 2
    weights = torch.linalg.lstsq(inputs[:half], factor[:half]).solution
    rest = (factor[half:] - inputs[half:] @ weights).square().sum()
    return float(1 - rest / (factor[half:] - factor[half:].mean(0)).square().sum())


cosines, shares = {}, {}
for name, extra in TERMS.items():
    first = fit(extra)[0]
    with torch.no_grad():
        unique, common = first.unique(test[2][0]), first.common(test[2][0])
    cosines[name] = cosine_similarity(unique, common)
    shares[name] = [readable(f, factor) for f in (unique, common) for factor in test[:2]]

print(f"{'term':16}{'mean cos²':>10}{'shared | unique':>18}{'private | unique':>18}")
for name, share in shares.items():
    mean = cosines[name].square().mean()
    print(f"{name:16}{mean:10.3f}{share[0]:18.2f}{share[1]:18.2f}")

# %%
# Orthogonal is not independent
# -----------------------------
# The left panel shows the angle between the two features of each sample. Without a term the angles
# vary; "signed" turns nearly all of them to 180°, where one feature is a multiple of the
# other; "squared" makes the features orthogonal.
#
# The right panel shows what a linear map predicts from the unique feature. It predicts all of the
# shared factor, also from orthogonal features: four dimensions have room for a copy at a right
# angle. Removing the copy takes a loss on independence. With the MMD between pairs and exchanged
# pairs, about half of the shared factor is gone, and all of the private one remains.
#
# The cosine term keeps two branches from collapsing onto one direction, which matters to a model
# that adds or compares them. A small cosine does not prove that the branches hold different
# information.

COLOURS = ("0.6", "#E69F00", "#0072B2", "#009E73")
figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4), width_ratios=(1.2, 1))
for (name, values), colour in zip(cosines.items(), COLOURS, strict=True):
    angles = torch.rad2deg(torch.acos(values.clamp(-1, 1)))
    left.hist(
        angles.numpy(), bins=60, range=(0, 180), histtype="step", color=colour, lw=1.8, label=name
    )
left.set(xlabel="angle between unique and common feature (degrees)", ylabel="samples")
left.set(xticks=range(0, 181, 45), ylim=(0, 500))
left.legend(title="term", loc="upper left")
for row, (share, colour) in enumerate(zip(shares.values(), COLOURS, strict=True)):
    right.barh([row, row + 5], share[:2], color=colour, height=0.8)
right.set(xlim=(0, 1.05), xlabel="share that can be read from the unique feature")
right.set_yticks([1.5, 6.5], ["the shared\nfactor\n(ideal: 0)", "the private\nfactor\n(ideal: 1)"])
right.invert_yaxis()
right.tick_params(axis="y", length=0)
plt.show()
