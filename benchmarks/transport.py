"""Transport against OTT-JAX, POT, geomloss and plain sweeps: time, memory and growth.

``python -m benchmarks.transport`` takes some minutes. Every call goes from points to potentials.
All providers solve the same problem to the same marginal error (L1, summed over the marginals).
multialign and POT run on one thread; JAX uses all cores.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import geomloss
import jax
import ot
import torch
from jax import numpy as jnp
from ott.experimental.mmsinkhorn import MMSinkhorn
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from multialign import (
    ConvergenceWarning,
    TransportSolution,
    multi_marginal_sinkhorn,
    squared_euclidean_cost,
)
from multialign.ops import _native

OTT = f"OTT-JAX {importlib.metadata.version('ott-jax')} MMSinkhorn (jit)"
POT = f"POT {importlib.metadata.version('POT')} sinkhorn_log"
GEOMLOSS = f"geomloss {importlib.metadata.version('geomloss')} (tensorized)"
# OTT's default epsilon, relative to the standard deviation of the cost tensor.
RELATIVE_EPSILON = 0.05
# Number of problems of each size.
SEEDS = 8

Call = Callable[[], Any]


def clouds(size: int, count: int, dtype: torch.dtype, dim: int = 16, seed: int = 0) -> list[Tensor]:
    """Return Gaussian clouds; the means of successive clouds differ by 0.5 in every feature."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, size, dim, generator=generator, dtype=torch.float64)
    return [(draw() + 0.5 * m).to(dtype) for m in range(count)]


def edges(graph: str, count: int) -> list[tuple[int, int]]:
    """Return the pairs of a graph."""
    if graph == "complete":
        return list(combinations(range(count), 2))
    if graph == "tree":
        return [((j - 1) // 2, j) for j in range(1, count)]
    chain = [(i, i + 1) for i in range(count - 1)]
    return [*chain, (0, count - 1)] if graph == "cycle" else chain


def costs(points: list[Tensor], graph: str = "complete") -> dict[tuple[int, int], Tensor]:
    """Return the squared distances along the edges of a graph."""
    return {
        (i, j): squared_euclidean_cost(points[i], points[j]) for i, j in edges(graph, len(points))
    }


def deviation(points: list[Tensor]) -> float:
    """Return the standard deviation of the cost tensor, without building it.

    Costs of pairs that share a variable are correlated through their means over the other variable.
    """
    total = 0.0
    means = [torch.zeros(len(x), dtype=torch.float64) for x in points]
    for (i, j), cost in costs([x.double() for x in points]).items():
        rows, columns = cost.mean(1), cost.mean(0)
        total += (cost - rows[:, None] - columns + cost.mean()).square().mean().item()
        means[i] += rows
        means[j] += columns
    return math.sqrt(total + sum(mean.var(correction=0).item() for mean in means))


def solve(
    points: list[Tensor],
    epsilon: float,
    tolerance: float,
    graph: str = "complete",
    method: str = "auto",
    max_iterations: int = 2000,
) -> TransportSolution:
    """Solve with multialign."""
    uniform = [x.new_full((len(x),), 1 / len(x)) for x in points]
    return multi_marginal_sinkhorn(
        costs(points, graph),
        uniform,
        epsilon,
        tolerance=tolerance,
        method=method,
        max_iterations=max_iterations,
    )


def ott_solver(points: list[Tensor], epsilon: float, tolerance: float) -> Call:
    """Return a call of OTT's compiled solver."""
    arrays = [jnp.asarray(x.numpy()) for x in points]
    solver = MMSinkhorn(threshold=tolerance, max_iterations=2000)
    compiled = jax.jit(lambda x: solver(x, epsilon=epsilon))
    return lambda: jax.block_until_ready(compiled(arrays))


def prepare_ours(size: int, count: int, graph: str, double: bool, tolerance: float) -> Call:
    """Return a call of multialign, after a small one that loads all code."""
    dtype = torch.float64 if double else torch.float32
    small, points = clouds(40, count, dtype), clouds(size, count, dtype)
    solve(small, RELATIVE_EPSILON * deviation(small), 1e-3, graph)
    return partial(solve, points, RELATIVE_EPSILON * deviation(points), tolerance, graph)


def prepare_ott(size: int, count: int, double: bool, tolerance: float) -> Call:
    """Return a call of OTT's solver, compiled for this size."""
    jax.config.update("jax_enable_x64", double)
    points = clouds(size, count, torch.float64 if double else torch.float32)
    call = ott_solver(points, RELATIVE_EPSILON * deviation(points), tolerance)
    call()
    return call


def against_ott() -> list[Row]:
    """Measure three marginals in a complete graph at OTT's default epsilon.

    OTT's number of iterations varies widely between problems (40 to 2000 here), so each size is
    measured on several problems.
    """
    rows = []
    for double, sizes in ((False, (7, 16, 32, 64, 128, 256)), (True, (7, 16, 32, 64))):
        jax.config.update("jax_enable_x64", double)
        dtype, tolerance = (torch.float64, 1e-6) if double else (torch.float32, 1e-3)
        for size in sizes:
            times: dict[str, list[float]] = {"multialign": [], OTT: []}
            errors: dict[str, list[float]] = {name: [] for name in times}
            for seed in range(SEEDS):
                points = clouds(size, 3, dtype, seed=seed)
                epsilon = RELATIVE_EPSILON * deviation(points)
                exact = solve([x.double() for x in points], epsilon, 1e-10).value.item()
                peer = ott_solver(points, epsilon, tolerance)
                ours = partial(solve, points, epsilon, tolerance)
                measured = harness.alternate(
                    {"multialign": ours, OTT: peer}, repetitions=9 if size <= 64 else 2
                )
                output = peer()
                values = {"multialign": ours().value.item(), OTT: float(output.ent_reg_cost)}
                for name, value in values.items():
                    times[name].append(min(measured[name]))
                    errors[name].append(abs(value / exact - 1))
                if not bool(output.converged):
                    # The flag is that of the last check, which may precede the last iteration.
                    print(f"OTT at K = {size}: {int(output.n_iters)} iterations")
            ratios = [b / a for a, b in zip(times["multialign"], times[OTT], strict=True)]
            print(
                f"K = {size}, {dtype}: OTT takes {sum(times[OTT]) / sum(times['multialign']):.3g} "
                f"times as long over all problems ({min(ratios):.2g} to {max(ratios):.2g})"
            )
            peaks = {
                "multialign": partial(prepare_ours, size, 3, "complete", double, tolerance),
                OTT: partial(prepare_ott, size, 3, double, tolerance),
            }
            rows += [
                Row(
                    case=f"three marginals, complete graph, {str(dtype)[6:]} to {tolerance:g}",
                    size=f"K = {size}",
                    provider=name,
                    **harness.quantiles(times[name]),
                    peak_mib=harness.peak_mib(peaks[name]) if size >= 64 else math.nan,
                    error=max(errors[name]),
                )
                for name in times
            ]
    return rows


def core_calls() -> list[Row]:
    """Measure what a public call costs beyond the compiled core, and batches of problems."""
    rows = []
    spent = [0.0]
    core = _native.transport
    run = core._run

    def timed(*args: Any) -> int:
        start = time.perf_counter()
        status = run(*args)
        spent[0] += 1e3 * (time.perf_counter() - start)
        return status

    def forward(points: list[Tensor], epsilon: float, gradient: bool) -> None:
        tables = [cost.requires_grad_(gradient) for cost in costs(points).values()]
        uniform = [x.new_full((len(x),), 1 / len(x)) for x in points]
        spent[0], start = 0.0, time.perf_counter()
        given = dict(zip(edges("complete", 3), tables, strict=True))
        value = multi_marginal_sinkhorn(given, uniform, epsilon, tolerance=1e-6).value
        if gradient:
            torch.autograd.grad(value, tables)
        beyond.append(1e3 * (time.perf_counter() - start) - spent[0])
        alone.append(spent[0])

    core._run = timed
    for gradient in (False, True):
        for size in (7, 16, 32, 64):
            beyond: list[float] = []
            alone: list[float] = []
            points = clouds(size, 3, torch.float64)
            epsilon = RELATIVE_EPSILON * deviation(points)
            for _ in range(200):
                forward(points, epsilon, gradient)
            case = "one call of three marginals, float64 to 1e-6, value"
            rows += [
                Row(
                    case=case + (" and gradient" if gradient else ""),
                    size=f"K = {size}",
                    provider=provider,
                    **harness.quantiles(sorted(times)[:100]),
                    peak_mib=math.nan,
                    error=math.nan,
                )
                for provider, times in (("the core alone", alone), ("all else", beyond))
            ]
    core._run = run
    for count in (32, 4096):
        for size in (7, 16):
            points = [
                torch.stack([clouds(size, 3, torch.float32, seed=seed)[m] for seed in range(count)])
                for m in range(3)
            ]
            epsilon = RELATIVE_EPSILON * deviation(clouds(size, 3, torch.float32))
            uniform = [x.new_full(x.shape[:2], 1 / size) for x in points]
            call = partial(multi_marginal_sinkhorn, costs(points), uniform, epsilon, tolerance=1e-3)
            times = harness.alternate({"multialign": call}, repetitions=7)["multialign"]
            print(f"B = {count}, K = {size}: {1e3 * count / min(times):,.0f} problems a second")
            rows.append(
                Row(
                    case="a batch of three marginals, float32 to 1e-3, one thread",
                    size=f"B = {count}, K = {size}",
                    provider="multialign",
                    **harness.quantiles(times),
                    peak_mib=math.nan,
                    error=math.nan,
                )
            )
    return rows


def large_problems() -> list[Row]:
    """Measure problems whose dense tensor does not fit in memory, or would take too long."""
    cases = [
        ("complete", 3, 512),
        ("complete", 3, 1024),
        ("complete", 3, 2048),
        ("complete", 4, 64),
        ("complete", 4, 128),
        ("cycle", 4, 256),
        ("chain", 10, 500),
        ("tree", 20, 250),
        ("tree", 20, 500),
    ]
    rows = []
    for graph, count, size in cases:
        points = clouds(size, count, torch.float32)
        ours = partial(solve, points, RELATIVE_EPSILON * deviation(points), 1e-3, graph)
        times = harness.alternate({"multialign": ours}, repetitions=1)["multialign"]
        solution = ours()
        assert solution.converged
        rows.append(
            Row(
                case="float32 to 1e-3",
                size=f"{graph}, M = {count}, K = {size}",
                provider=f"multialign, {int(solution.iterations)} steps",
                **harness.quantiles(times),
                peak_mib=harness.peak_mib(prepare_ours, size, count, graph, False, 1e-3),
                error=math.nan,
            )
        )
    return rows


def small_epsilon() -> list[Row]:
    """Measure Newton steps against plain sweeps at a small epsilon.

    The number of sweeps varies widely between problems, so each size is measured on several.
    """
    rows = []
    for size in (7, 16, 64):
        times: dict[str, list[float]] = {"newton": [], "sinkhorn": []}
        solutions: dict[str, list[TransportSolution]] = {name: [] for name in times}
        errors: dict[str, list[float]] = {name: [] for name in times}
        for seed in range(SEEDS):
            points = clouds(size, 3, torch.float64, seed=seed)
            epsilon = 0.005 * sum(cost.mean().item() for cost in costs(points).values())
            exact = solve(points, epsilon, 1e-10).value.item()
            for name, limit, repetitions in (("newton", 2000, 3), ("sinkhorn", 20_000, 1)):
                call = partial(solve, points, epsilon, 1e-6, method=name, max_iterations=limit)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    measured = harness.alternate({name: call}, repetitions=repetitions)[name]
                    solutions[name].append(call())
                times[name].append(statistics.median(measured))
                errors[name].append(abs(solutions[name][-1].value.item() / exact - 1))
        ratios = [b / a for a, b in zip(times["newton"], times["sinkhorn"], strict=True)]
        print(
            f"K = {size}: sweeps take {statistics.median(ratios):.0f} times as long "
            f"({min(ratios):.1f} to {max(ratios):.0f})"
        )
        for name, group in solutions.items():
            steps = [int(solution.iterations) for solution in group]
            converged = sum(bool(solution.converged) for solution in group)
            rows.append(
                Row(
                    case=f"three marginals, epsilon = 0.005 of the mean cost, float64 to 1e-6, "
                    f"{SEEDS} problems",
                    size=f"K = {size}",
                    provider=f"{name}, {min(steps)} to {max(steps)} steps, "
                    f"{converged} of {SEEDS} converged",
                    **harness.quantiles(times[name]),
                    peak_mib=math.nan,
                    error=max(errors[name]),
                )
            )
    return rows


def marginal_error(points: list[Tensor], f: Tensor, g: Tensor, epsilon: float) -> float:
    """Return the L1 error of exp((f + g - C) / epsilon) with uniform marginals."""
    x, y = (p.double() for p in points)
    exponent = f.double()[:, None] + g.double() - squared_euclidean_cost(x, y)
    plan = (exponent / epsilon).exp() / (len(x) * len(y))
    return sum((plan.sum(d) - 1 / plan.shape[1 - d]).abs().sum().item() for d in (0, 1))


def two_marginals() -> list[Row]:
    """Measure two marginals against POT and geomloss, each at the error that the peer reaches."""
    size, rows = 1000, []
    points = clouds(size, 2, torch.float64)
    epsilon = RELATIVE_EPSILON * costs(points)[(0, 1)].std().item()
    exact = solve(points, epsilon, 1e-10).value.item()
    uniform = torch.full((size,), 1 / size, dtype=torch.float64)

    def pot() -> tuple[Tensor, float]:
        cost = squared_euclidean_cost(*points)
        plan, log = ot.sinkhorn(
            uniform, uniform, cost, epsilon, method="sinkhorn_log", stopThr=1e-7,
            numItermax=10_000, log=True,
        )  # fmt: skip
        return plan, log

    # geomloss's cost is |x - y|^2 / 2, and its epsilon is blur^2.
    divergence = geomloss.SamplesLoss(
        "sinkhorn", blur=math.sqrt(epsilon / 2), scaling=0.9, debias=False, potentials=True,
        backend="tensorized",
    )  # fmt: skip

    plan, _ = pot()
    pot_error = sum((plan.sum(d) - uniform).abs().sum().item() for d in (0, 1))
    f, g = (2 * x.squeeze() for x in divergence(*points))
    geomloss_error = marginal_error(points, f, g, epsilon)
    for name, call, error in (
        (POT, pot, pot_error),
        (GEOMLOSS, lambda: divergence(*points), geomloss_error),
    ):
        ours = partial(solve, points, epsilon, error)
        times = harness.alternate({"multialign": ours, name: call}, repetitions=3)
        rows += [
            Row(
                case=f"two marginals, float64 to {error:.1e}, the error of {name.split()[0]}",
                size=f"K = {size}",
                provider=provider,
                **harness.quantiles(times[provider]),
                peak_mib=math.nan,
                error=abs(ours().value.item() / exact - 1)
                if provider == "multialign"
                else math.nan,
            )
            for provider in times
        ]
    return rows


def main() -> None:
    """Measure, print the rows and write them."""
    torch.set_num_threads(1)
    rows = []
    for part in (against_ott, core_calls, large_problems, small_epsilon, two_marginals):
        for row in part():
            harness.show(row)
            rows.append(row)
    harness.write("transport", rows)


if __name__ == "__main__":
    main()
