"""A training step of the reference model: against plain torch, and what its losses add to it.

``python -m benchmarks.decalign_step`` takes two minutes on one core and needs what
`examples/decalign` needs. The size is that of the paper: 32 samples, 50 steps, 64 features, four
transformer levels, three modalities, seven categories.
"""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.plain_decalign import PlainDecAlign, plain_objective
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
OURS = "multialign"
OBJECTIVES = {
    f"{OURS}, losses off": (RELEASED, NONE),
    f"{OURS}, released losses": (RELEASED, Switches()),
    f"{OURS}, paper's losses": (Losses(), Switches()),
}
# The released code's losses in plain torch: after the transformers of the reference model, and
# after those of the released code.
PLAIN = {"plain torch, same network": "self", "plain torch, released network": "pairs"}


def make_step(name: str) -> Callable[[], Tensor]:
    """Return one step of Adam, of the full network whatever the losses."""
    torch.manual_seed(0)
    features = {modality: torch.randn(BATCH, STEPS, dim) for modality, dim in MODALITIES.items()}
    targets = torch.rand(BATCH) * 6 - 3
    if name in PLAIN:
        network = PlainDecAlign(MODALITIES, WIDTH, STEPS, LAYERS, PLAIN[name])
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

        def evaluate() -> Tensor:
            return plain_objective(network(list(features.values())), targets, 7)
    else:
        losses, switches = OBJECTIVES[name]
        network = DecAlign(MODALITIES, 1, Network(width=WIDTH, length=STEPS, layers=LAYERS))
        objective = Objective(SENTIMENT, losses, switches)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

        def evaluate() -> Tensor:
            return objective(network(features), targets)["loss"]

    def step() -> Tensor:
        loss = evaluate()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def prepared(name: str) -> Callable[[], Tensor]:
    """Return a step after one that loads what is needed and makes the optimiser's state."""
    step = make_step(name)
    step()
    # What that step freed goes back: it would count as held before.
    ctypes.CDLL(None).malloc_trim(0)
    return step


def main() -> None:
    """Measure, print the ratios and write them."""
    torch.set_num_threads(1)
    names = [*OBJECTIVES, *PLAIN]
    times = harness.alternate({name: make_step(name) for name in names}, repetitions=25)
    rows = [
        Row(
            case="one training step: forward, backward, Adam",
            size=f"B = {BATCH}, T = {STEPS}, d = {WIDTH}, {LAYERS} levels, M = 3",
            provider=name,
            **harness.quantiles(times[name]),
            peak_mib=harness.peak_mib(partial(prepared, name)),
            error=math.nan,
        )
        for name in names
    ]
    base = times[names[0]]
    for row in rows:
        # Of steps that followed one another, so that a busy machine is so for both.
        ratios = [own / off for own, off in zip(times[row.provider], base, strict=True)]
        print(
            f"{row.provider:<34} median {row.milliseconds:7.1f} ms   {row.peak_mib:6.1f} MiB   "
            f"{min(times[row.provider]) / min(base):5.2f} x the fastest step without losses, "
            f"{statistics.median(ratios):5.2f} x in the median"
        )
    harness.write("decalign_step", rows)


if __name__ == "__main__":
    main()
