r"""The bandwidth of MMD
====================

The bandwidth :math:`\sigma` of the Gaussian kernel is a length: at about that scale `MMDLoss` sees.
Too small, and every sample is alone; too large, and only the means are compared. What matters in
training is the gradient, and it is that which dies first.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from multialign import mmd_loss

# %%
# Two clouds, moved apart
# -----------------------
# Two normal clouds of spread 1 in 8 dimensions, at growing distance. Drawn is the pull on the
# second cloud: the derivative of the loss along the line between the two.

N, D = 256, 8
torch.manual_seed(0)
x, y = torch.randn(N, D), torch.randn(N, D)
distances = torch.logspace(-1, 2, 40)
CHOICES = {
    "0.5": 0.5,
    "2": 2.0,
    "8": 8.0,
    "[0.5, 2, 8, 32]": [0.5, 2.0, 8.0, 32.0],
    '"median"': "median",
}


def pull(distance: Tensor, bandwidth: float | list[float] | str) -> float:
    """Return the derivative of MMD² with respect to the distance of the two clouds."""
    shift = distance.clone().requires_grad_()
    along = torch.zeros(D)
    along[0] = 1.0
    mmd_loss([x, y + shift * along], bandwidth=bandwidth).backward()
    return shift.grad.item()


pulls = {name: [pull(d, choice) for d in distances] for name, choice in CHOICES.items()}

# %%
# A training run in small
# -----------------------
# The second cloud starts 30 away and follows Adam, which makes up for gradients that are small but
# not for gradients that are zero.


def approach(bandwidth: float | list[float] | str, steps: int = 150) -> list[float]:
    """Return the distance of the means over the steps of Adam on the second cloud."""
    cloud = y.clone()
    cloud[:, 0] += 30.0
    cloud.requires_grad_()
    optimizer = torch.optim.Adam([cloud], lr=0.5)
    path = []
    for _ in range(steps):
        path.append((cloud.mean(0) - x.mean(0)).norm().item())
        optimizer.zero_grad()
        mmd_loss([x, cloud], bandwidth=bandwidth).backward()
        optimizer.step()
    return path


paths = {name: approach(choice) for name, choice in CHOICES.items()}
for name, path in paths.items():
    print(f"bandwidth {name:16} distance after {len(path)} steps: {path[-1]:6.2f}")

# %%
# How to choose
# -------------
# A fixed bandwidth pulls only while the distance is a few times its size: at 0.5, in 8 dimensions
# where two samples of *one* cloud are 4 apart, hardly anywhere. Several bandwidths, each four times
# the last, cover all scales. "median" takes the median distance of the pooled samples, and so
# follows the clouds as they move; it is a number to the gradient. Since it is different in every
# step, values of the loss cannot be compared between steps.
#
# Near 0 the choice matters as well: the larger bandwidths compare little more than means there, and
# values below the noise of the estimate (256 samples) mean nothing.

COLOURS = ("#56B4E9", "#0072B2", "#004060", "#D55E00", "#009E73")
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4))
for (name, values), colour in zip(pulls.items(), COLOURS, strict=True):
    left.loglog(distances, torch.tensor(values).clamp_min(1e-12), c=colour, lw=1.6, label=name)
    right.plot(paths[name], c=colour, lw=1.6)
left.axvline(D**0.5 * 2**0.5, c="0.7", lw=0.8, ls=":")
left.annotate("distance within\na cloud", (4.6, 2e-7), c="0.45", fontsize=8)
left.set(ylim=(1e-7, 1), xlabel="distance of the means", ylabel="pull: derivative of MMD²")
figure.legend(title="bandwidth", loc="outside right center")
right.set(xlabel="step of Adam", ylabel="distance of the means", ylim=(0, 36))
plt.show()
