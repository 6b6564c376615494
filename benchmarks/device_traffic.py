"""What a step of every loss asks of an accelerator: launches, and waits of the host.

A card computes small losses faster than the host can ask for them, so a step takes as long as its
launches (some 5 microseconds each) and its waits (some 20) do. They are counted on an emulated
device. Each case is a loss and its gradient, of three modalities of dimension 64; its name ends in
the number of samples of each. The solver has 7 atoms a marginal, and is solved alone.

Run with ``python -m benchmarks.device_traffic``, which prints a line ``name,launches,waits`` for
each case and writes ``benchmarks/results/device_traffic.csv``; ``--places`` adds the lines of
multialign that wait, and names choose cases.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import multialign
from benchmarks.harness import write
from tests.second_device import Traffic, on_device, second_device

DIM, MODALITIES = 64, 3
ATOMS = 7


@dataclass(frozen=True)
class Row:
    """One case."""

    name: str
    launches: int
    waits: int


def _decoupling(features: list[Tensor]) -> Tensor:
    return multialign.cosine_decoupling_loss(features, [x.flip(-1) for x in features])


def _hsic(features: list[Tensor]) -> Tensor:
    return multialign.hsic_loss(features, [x.flip(-1) for x in features])


def _prototypes(kind: str) -> Callable[[list[Tensor]], Tensor]:
    def loss(features: list[Tensor]) -> Tensor:
        return multialign.prototype_alignment_loss(
            features, num_prototypes=ATOMS, covariance_type=kind
        )

    return loss


CASES: dict[str, tuple[Callable[[list[Tensor]], Tensor], int]] = {
    "decoupling_64": (_decoupling, 64),
    "moments_64": (multialign.gaussian_moment_loss, 64),
    "mmd_128": (multialign.mmd_loss, 128),
    "mmd_1024": (multialign.mmd_loss, 1024),
    "mmd_energy_128": (lambda x: multialign.mmd_loss(x, kernel="energy"), 128),
    "hsic_64": (_hsic, 64),
    "prototypes_diag_256": (_prototypes("diag"), 256),
    "prototypes_full_256": (_prototypes("full"), 256),
    "sinkhorn_256": (multialign.multi_marginal_sinkhorn_loss, 256),
    "matching_64": (multialign.matching_gap_loss, 64),
}


def count(name: str) -> Traffic:
    """Return the traffic of a case."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == f"solver_{ATOMS}":
            return _count_solver(generator)
        loss, rows = CASES[name]
        features = [
            on_device(torch.randn(rows, DIM, generator=generator)).requires_grad_()
            for _ in range(MODALITIES)
        ]
        with second_device() as traffic:
            torch.autograd.grad(loss(features), features)
    return traffic


def _count_solver(generator: torch.Generator) -> Traffic:
    costs = {
        (i, j): on_device(torch.rand(ATOMS, ATOMS, generator=generator))
        for i, j in ((0, 1), (0, 2), (1, 2))
    }
    marginals = [on_device(torch.ones(ATOMS)) for _ in range(MODALITIES)]
    with second_device() as traffic:
        _ = multialign.multi_marginal_sinkhorn(costs, marginals, 0.1).value
    return traffic


def main(names: Sequence[str], *, places: bool) -> None:
    """Count, print and, without names, record."""
    rows = []
    for name in names or [*CASES, f"solver_{ATOMS}"]:
        traffic = count(name)
        rows.append(Row(name, traffic.launches, traffic.waits))
        print(f"{name},{traffic.launches},{traffic.waits}", flush=True)
        if places:
            for (cause, place), number in traffic.waiting.most_common():
                print(f"    {number:4} {cause} at {place}")
            print("    " + ", ".join(f"{n} {c}" for n, c in traffic.operations.most_common(14)))
    if not names:
        write("device_traffic", rows, once=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; none: all, which are written down")
    parser.add_argument("--places", action="store_true", help="print what waits, and where")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.names, places=arguments.places)
