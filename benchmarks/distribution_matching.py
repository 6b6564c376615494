"""MMD against geomloss, moments against torch.cov: time, memory and growth.

``python -m benchmarks.distribution_matching`` takes some minutes on one core.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from functools import partial

import geomloss
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from multialign import gaussian_moment_loss, mmd_loss

GEOMLOSS = f"geomloss {importlib.metadata.version('geomloss')} (tensorized)"
SIGMA = 8.0


def clouds(n: int, dim: int = 64) -> list[Tensor]:
    """Return two float32 clouds whose means differ by 0.1 in every feature."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator) for _ in range(2))
    return [x.requires_grad_(), (y + 0.1).requires_grad_()]


def mmd_step(loss: Callable[[list[Tensor]], Tensor], x: list[Tensor]) -> Tensor:
    """Run forward and backward; return the loss."""
    value = loss(x)
    torch.autograd.grad(value, x)
    return value.detach()


def multialign_mmd(x: list[Tensor]) -> Tensor:
    """Return the squared MMD by multialign."""
    return mmd_loss(x, bandwidth=SIGMA)


def geomloss_mmd(x: list[Tensor]) -> Tensor:
    """Return the squared MMD by geomloss, whose loss is half of it."""
    loss: Tensor = 2 * geomloss.SamplesLoss("gaussian", blur=SIGMA, backend="tensorized")(*x)
    return loss


def prepare_step(loss: Callable[[list[Tensor]], Tensor], n: int) -> Callable[[], Tensor]:
    """Return a step on clouds of n points, after one on smaller clouds that loads all code."""
    mmd_step(loss, clouds(1500))
    return partial(mmd_step, loss, clouds(n))


def mmd_rows() -> list[Row]:
    """Measure MMD, forward and backward, D = 64."""
    rows = []
    for n in (500, 1000, 2000, 5000):
        x = clouds(n)
        exact = multialign_mmd([f.detach().double() for f in x]).item()
        losses = {"multialign": multialign_mmd, GEOMLOSS: geomloss_mmd}
        times = harness.alternate(
            {name: partial(mmd_step, loss, x) for name, loss in losses.items()},
            repetitions=15 if n < 5000 else 5,
        )
        rows += [
            Row(
                case="mmd, forward and backward; error against float64",
                size=f"N = {n}, D = 64",
                provider=name,
                **harness.quantiles(times[name]),
                peak_mib=harness.peak_mib(prepare_step, loss, n),
                error=abs(loss(x).item() / exact - 1),
            )
            for name, loss in losses.items()
        ]
    for n in (20_000, 50_000):
        step = partial(mmd_step, multialign_mmd, clouds(n))
        times = harness.alternate({"multialign": step}, repetitions=1)["multialign"]
        rows.append(
            Row(
                case="mmd, forward and backward; error against float64",
                size=f"N = {n}, D = 64",
                provider="multialign",
                **harness.quantiles(times),
                peak_mib=harness.peak_mib(prepare_step, multialign_mmd, n),
                error=math.nan,
            )
        )
    return rows


def moment_rows() -> list[Row]:
    """Measure all moments of three modalities, forward, against their covariances alone."""
    n, dim = 100_000, 256
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, dim, generator=generator) for _ in range(3)]
    times = harness.alternate(
        {
            "multialign": lambda: gaussian_moment_loss(x),
            "three calls of torch.cov": lambda: [f.T.cov(correction=0) for f in x],
        }
    )
    return [
        Row(
            case="moments of three modalities, forward",
            size=f"N = {n}, D = {dim}",
            provider=name,
            **harness.quantiles(values),
            peak_mib=math.nan,
            error=math.nan,
        )
        for name, values in times.items()
    ]


def main() -> None:
    """Measure, print the rows and write them."""
    torch.set_num_threads(1)
    rows = moment_rows() + mmd_rows()
    for row in rows:
        harness.show(row)
    harness.write("distribution_matching", rows)


if __name__ == "__main__":
    main()
