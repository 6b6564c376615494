"""A training step of the reference model against plain torch, with and without its losses.

``python -m benchmarks.decalign_step`` takes two minutes on one core and needs the requirements of
`examples/decalign`. The size is that of the paper: 32 samples, 50 steps, 64 features, four
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
from examples.benchmarking.model import Sizes
from examples.decalign.data.target import SENTIMENT
from examples.decalign.model import DecAlign
from examples.decalign.objective import Decoupling, Losses, Moments, Prototypes, Switches

BATCH, STEPS, WIDTH, LAYERS = 32, 50, 64, 4
# The numbers of raw features in MMSA's CMU-MOSI.
MODALITIES = {"text": 768, "audio": 5, "vision": 20}

RELEASED = Losses(
    score="l1",
    decoupling=Decoupling(form="squared"),
    prototypes=Prototypes(
        covariance_type="diag",
        em_iterations=5,
        regularization=1e-6,
        objective="regularized",
        cost_reduction="mean",
    ),
    moments=Moments(feature_reduction="mean"),
)
NONE = Switches(mfd=False, hete=False, homo=False)
OURS = "multialign"
OBJECTIVES = {
    f"{OURS}, losses off": (RELEASED, NONE),
    f"{OURS}, released losses": (RELEASED, Switches()),
    f"{OURS}, paper's losses": (Losses(), Switches()),
}
# The released code's losses in plain torch, with the transformers of the reference model and with
# those of the released code.
PLAIN = {"plain torch, same network": "self", "plain torch, released network": "pairs"}


def make_step(name: str) -> Callable[[], Tensor]:
    """Return one step of Adam on the full network, with the losses that `name` stands for."""
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
        sizes = Sizes(width=WIDTH, length=STEPS, layers=LAYERS)
        network = DecAlign(MODALITIES, SENTIMENT, sizes, losses=losses, switches=switches)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

        def evaluate() -> Tensor:
            return network.objective(network(features), targets)["loss"]

    def step() -> Tensor:
        loss = evaluate()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def prepare_step(name: str) -> Callable[[], Tensor]:
    """Return a step, after one that loads all code and creates the optimiser's state."""
    step = make_step(name)
    step()
    # Return freed memory to the system; it would count as held before the measured step.
    ctypes.CDLL(None).malloc_trim(0)
    return step


def main() -> None:
    """Measure, print the ratios and write the rows."""
    torch.set_num_threads(1)
    names = [*OBJECTIVES, *PLAIN]
    times = harness.alternate({name: make_step(name) for name in names}, repetitions=25)
    rows = [
        Row(
            case="one training step: forward, backward, Adam",
            size=f"B = {BATCH}, T = {STEPS}, d = {WIDTH}, {LAYERS} levels, M = 3",
            provider=name,
            **harness.quantiles(times[name]),
            peak_mib=harness.peak_mib(partial(prepare_step, name)),
            error=math.nan,
        )
        for name in names
    ]
    base = times[names[0]]
    for row in rows:
        # Each ratio is of two consecutive steps, so load of the machine affects both.
        ratios = [own / off for own, off in zip(times[row.provider], base, strict=True)]
        print(
            f"{row.provider:<34} median {row.milliseconds:7.1f} ms   {row.peak_mib:6.1f} MiB   "
            f"{min(times[row.provider]) / min(base):5.2f} x the fastest step without losses, "
            f"{statistics.median(ratios):5.2f} x in the median"
        )
    harness.write("decalign_step", rows)


if __name__ == "__main__":
    main()
