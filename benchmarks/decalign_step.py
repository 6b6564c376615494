"""A training step of the reference model with its losses on against the same step without them.

``python -m benchmarks.decalign_step`` takes a minute on one core and needs what `examples/decalign`
needs. The size is that of the paper: 32 samples, 50 steps, 64 features, four transformer levels,
three modalities, seven categories.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from examples.decalign.model import DecAlign
from examples.decalign.network import Network
from examples.decalign.objective import Losses, Objective
from examples.decalign.switches import Switches
from examples.decalign.targets import SENTIMENT

BATCH, STEPS, WIDTH, LAYERS = 32, 50, 64, 4
# Raw features as in MMSA's CMU-MOSI.
MODALITIES = {"text": 768, "audio": 5, "vision": 20}

RELEASED = Losses(
    score="l1",
    decoupling={"form": "squared"},
    prototypes={
        "covariance_type": "diag",
        "em_iterations": 5,
        "objective": "regularized",
        "cost_reduction": "mean",
    },
    moments={"feature_reduction": "mean"},
)
NONE = Switches(mfd=False, hete=False, homo=False)
OBJECTIVES = {
    "losses off": (RELEASED, NONE),
    "released losses": (RELEASED, Switches()),
    "paper's losses": (Losses(), Switches()),
    "released, decoupling alone": (RELEASED, Switches(hete=False, homo=False)),
    "released, prototypes alone": (RELEASED, Switches(mfd=False, homo=False)),
    "released, moments and MMD alone": (RELEASED, Switches(mfd=False, hete=False)),
}


def make_step(name: str) -> Callable[[], Tensor]:
    """Return one step of Adam, of the full network whatever the losses."""
    torch.manual_seed(0)
    losses, switches = OBJECTIVES[name]
    network = DecAlign(MODALITIES, 1, Network(width=WIDTH, length=STEPS, layers=LAYERS))
    objective = Objective(SENTIMENT, losses, switches)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    features = {modality: torch.randn(BATCH, STEPS, dim) for modality, dim in MODALITIES.items()}
    targets = torch.rand(BATCH) * 6 - 3

    def step() -> Tensor:
        loss: Tensor = objective(network(features), targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def prepared(name: str) -> Callable[[], Tensor]:
    """Return a step after one that loads what is needed and makes the optimiser's state."""
    step = make_step(name)
    step()
    return step


def main() -> None:
    """Measure, print the ratios and write them."""
    torch.set_num_threads(1)
    times = harness.alternate({name: make_step(name) for name in OBJECTIVES}, repetitions=25)
    rows = [
        Row(
            case="DecAlign, one training step",
            size=f"B = {BATCH}, T = {STEPS}, d = {WIDTH}, {LAYERS} levels, M = 3",
            provider=name,
            **harness.quantiles(taken),
            peak_mib=harness.peak_mib(partial(prepared, name)),
            error=math.nan,
        )
        for name, taken in times.items()
    ]
    base = min(times["losses off"])
    for row in rows:
        fastest = min(times[row.provider])
        print(
            f"{row.provider:<34} median {row.milliseconds:7.1f} ms   fastest {fastest:7.1f} ms   "
            f"{fastest / base:5.2f} x   {row.peak_mib:6.1f} MiB"
        )
    harness.write("decalign_step", rows)


if __name__ == "__main__":
    main()
