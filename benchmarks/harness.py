"""Timing, peak memory, and the table that every benchmark writes."""

from __future__ import annotations

import csv
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of one provider."""

    case: str
    """The computation."""
    size: str
    provider: str
    """multialign or a peer, with its version."""
    milliseconds: float
    """Median time over the repetitions."""
    low: float
    """20 % quantile of the times."""
    high: float
    """80 % quantile of the times."""
    peak_mib: float
    """Peak memory above the inputs, in a separate process; NaN where not measured."""
    error: float
    """Of the value, relative to the reference named in `case`; NaN for the reference itself."""


def alternate(
    functions: dict[str, Callable[[], object]], repetitions: int = 7
) -> dict[str, list[float]]:
    """Return times in milliseconds, alternating between the providers so that load affects all."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return the fields of a Row that describe `times`."""
    if len(times) == 1:
        return {"milliseconds": times[0], "low": times[0], "high": times[0]}
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"milliseconds": statistics.median(times), "low": cuts[1], "high": cuts[7]}


def peak_mib(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Return the peak memory of the function that `prepare(*args)` returns.

    It is measured in a fresh process, above the memory held after the preparation.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, args))


def _peak(prepare: Callable[..., Callable[[], object]], args: Sequence[Any]) -> float:
    torch.set_num_threads(1)
    work = prepare(*args)
    # Linux only: reset the peak so far, which includes the parent's.
    Path("/proc/self/clear_refs").write_text("5")
    before = _highest_mib()
    work()
    return _highest_mib() - before


def _highest_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def show(row: Row) -> None:
    """Print a row."""
    print(
        f"{row.case[:60]:60} {row.size:42} {row.provider:34} {row.milliseconds:10.2f} ms "
        f"{row.peak_mib:8.0f} MiB  error {row.error:.1e}",
        flush=True,
    )


def write(name: str, rows: Sequence[Any], folder: Path = RESULTS, *, once: bool = False) -> None:
    """Write dataclasses as rows of `folder/name.csv`, with machine, versions and commit.

    With `once` these stand in the first row only, which keeps a table of many rows small.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    environment = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *environment])
        writer.writeheader()
        for number, row in enumerate(rows):
            values = {
                key: f"{value:.5g}" if isinstance(value, float) else value
                for key, value in asdict(row).items()
            }
            writer.writerow(values if once and number else values | environment)
