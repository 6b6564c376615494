"""The tables of benchmarks.small_epsilon, as reStructuredText."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
Problems = Mapping[tuple[str, ...], Mapping[str, Row]]
"""The rows of each problem by provider."""

# The number of problems in benchmarks.small_epsilon.grid(), of which a run may be a part.
GRID = 3648
METHODS = ("auto", "newton", "sinkhorn")
PROBLEM = ("graph", "marginals", "size", "weights", "points", "level")
KINDS = {
    "epsilon / std": ("level",),
    "graph": ("graph", "marginals"),
    "weights": ("weights",),
    "points": ("points",),
}


def write_small_epsilon(source: Path, target: Path) -> None:
    """Write the tables of a recorded run, or a note that there is none."""
    if not source.exists():
        target.write_text("No run is recorded: `make bench` records one.\n")
        return
    with source.open() as file:
        rows = list(csv.DictReader(file))
    problems: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        problems[tuple(row[name] for name in PROBLEM)][row["provider"]] = row
    lines = [summary(problems), "", comparison(problems), ""]
    lines += ["**The methods, by kind of problem**", "", *kinds(rows)]
    pairs = [row for row in rows if row["graph"] == "pair"]
    lines += ["**Two marginals, by epsilon / std**", "", *levels(pairs)]
    # Those that OTT's multi-marginal solver is given.
    small = {key for key, found in problems.items() if any("MMSinkhorn" in name for name in found)}
    dense = [row for row in rows if tuple(row[name] for name in PROBLEM) in small]
    if dense:
        lines += ["**Complete graphs of at most 2^16 entries, by epsilon / std**", ""]
        lines += levels(dense)
    first = rows[0]
    lines += [
        f"Recorded on {first['machine']}; torch {first['torch']}, Python {first['python']}, "
        f"commit {first['commit']}.",
        "",
    ]
    target.write_text("\n".join(lines))


def solved(row: Row) -> bool:
    """Return whether a provider solved a problem."""
    return row["converged"] == "1"


def summary(problems: Problems) -> str:
    """Say what share "auto" solves of what any provider solves."""
    solvable = [found for found in problems.values() if any(map(solved, found.values()))]
    ours = sum(solved(found["auto"]) for found in solvable)
    return (
        f"{len(problems):,} of the {GRID:,} problems of the grid are recorded; at least one "
        f"provider solves {len(solvable):,}. "
        f'Of these, "auto" solves {ours:,} ({100 * ours / len(solvable):.2f} %).'
    )


def comparison(problems: Problems) -> str:
    """Say how the time of "auto" compares with that of the faster of its parts."""
    ratios = []
    for found in problems.values():
        parts = [found[name] for name in METHODS[1:] if solved(found[name])]
        if solved(found["auto"]) and parts:
            best = min(float(row["milliseconds"]) for row in parts)
            ratios.append(float(found["auto"]["milliseconds"]) / best)
    ratios.sort()
    late = ratios[int(0.95 * len(ratios))]
    return (
        'Its time, divided by that of the faster of "newton" and "sinkhorn" on the same problem, '
        f"is {statistics.median(ratios):.2f} in the median, {late:.2f} at the 95 % quantile "
        f"and {ratios[-1]:.2f} at most; it is above 2 on "
        f"{sum(ratio > 2 for ratio in ratios):,} of {len(ratios):,} problems."
    )


def cell(rows: Sequence[Row]) -> str:
    """Return how many of some problems are solved, with median iterations and time."""
    if not rows:
        return ""
    steps = statistics.median(int(row["iterations"]) for row in rows)
    time = statistics.median(float(row["milliseconds"]) for row in rows)
    return f"{sum(map(solved, rows))} of {len(rows)}; {steps:.0f}; {time:.3g} ms"


def kinds(rows: Sequence[Row]) -> list[str]:
    """Return a table with a row for each kind of problem and a column for each method."""
    table = [["Problems", *METHODS]]
    for title, names in KINDS.items():
        found = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
        if names == ("level",):
            found.sort(key=lambda values: -float(values[0]))
        for values in found:
            own = [row for row in rows if tuple(row[name] for name in names) == values]
            label = f"{title} {values[0]}" + "".join(f", M = {value}" for value in values[1:])
            table.append(
                [label, *(cell([row for row in own if row["provider"] == m]) for m in METHODS)]
            )
    return list_table(table)


def levels(rows: Sequence[Row]) -> list[str]:
    """Return a table with a row for each provider and a column for each level of epsilon."""
    found = sorted({row["level"] for row in rows}, key=float, reverse=True)
    table = [["Provider", *(f"{float(level):g}" for level in found)]]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        table.append([provider, *(cell([r for r in own if r["level"] == x]) for x in found)])
    return list_table(table)


def list_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its head."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for cells in table:
        lines += [f"   {'*' if i == 0 else ' '} - {text}" for i, text in enumerate(cells)]
    return [*lines, ""]
