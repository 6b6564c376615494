"""Give hostile problems to every loss for a while, and say what was tried and found.

Problem n is the same in every run, so that a run can go on where another one stopped:

    python -m tests.fuzz --examples 100000 --seconds 3600 --record runs/fuzz.json

Each problem is one recipe with one law of one loss; all are gone through in turn.
"""

import argparse
import json
import random
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from tests.hostile import CHECKS, JOBS, LOSSES, applies, run
from tests.hostile_problems import draw_recipe
from tests.hostile_transport import draw_problem, solve

# Longer than this is a hang.
_SECONDS_EACH = 60
# The transport solver by itself has so many of the problems, to one for each law of each loss.
_SOLVER_SHARE = 40
SOLVER = ("solution", "solver")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000, help="problems in all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--start", type=int, default=0, help="first problem, if none is recorded")
    parser.add_argument("--record", type=Path, default=Path("runs/fuzz.json"))
    losses, checks = [*LOSSES, SOLVER[1]], [*CHECKS, SOLVER[0]]
    parser.add_argument("--losses", nargs="*", default=losses, choices=losses)
    parser.add_argument("--checks", nargs="*", default=checks, choices=checks)
    args = parser.parse_args()

    torch.set_num_threads(1)
    record = {"next": args.start, "tried": {}, "unfinished": {}, "found": []}
    if args.record.exists():
        record = json.loads(args.record.read_text())
    tried, unfinished = Counter(record["tried"]), Counter(record["unfinished"])
    jobs = [*JOBS, *[SOLVER] * _SOLVER_SHARE]
    jobs = [job for job in jobs if job[0] in args.checks and job[1] in args.losses]
    random.Random(0).shuffle(jobs)
    signal.signal(signal.SIGALRM, _hang)
    began, slowest = time.monotonic(), (0.0, 0)
    first = number = record["next"]
    while number < args.examples and time.monotonic() - began < args.seconds:
        check, loss = jobs[number % len(jobs)]
        if loss == SOLVER[1]:
            problem = draw_problem(number)
            recipe = problem.recipe
        else:
            recipe = applies(loss, draw_recipe(random.Random(number)))
        started = time.monotonic()
        signal.alarm(_SECONDS_EACH)
        try:
            if loss == SOLVER[1]:
                solution = solve(problem)
                swept = recipe["method"] == "sinkhorn"
                unfinished["solver"] += not swept and not bool(solution.converged.all())
            else:
                unfinished[loss] += run(check, loss, recipe) > 0
        except Exception as error:  # whatever it is, it is a finding
            found = {
                "number": number,
                "check": check,
                "loss": loss,
                "error": f"{type(error).__name__}: {error}".strip()[:500],
                "where": traceback.format_exc().strip().splitlines()[-4:-1],
                "recipe": repr(recipe),
            }
            record["found"].append(found)
            print(f"#{number} {loss}: {check}: {found['error']}\n  {found['recipe']}", flush=True)
        finally:
            signal.alarm(0)
        slowest = max(slowest, (time.monotonic() - started, number))
        tried[f"{loss}: {check}"] += 1
        number += 1
        if number % 500 == 0:
            print(f"{number} tried, {len(record['found'])} found", flush=True)
            _save(args.record, record, number, tried, unfinished)
    _save(args.record, record, number, tried, unfinished)
    print(f"\n{'':20}" + "".join(f"{check[:9]:>10}" for check in args.checks))
    for loss in args.losses:
        row = [tried.get(f"{loss}: {check}", 0) for check in args.checks]
        print(f"{loss:20}" + "".join(f"{count or '':>10}" for count in row))
    for loss, count in unfinished.items():
        if count:
            print(f"{loss}: {count} problems were left unfinished, with a ConvergenceWarning")
    print(
        f"{number - first} problems in this run, {sum(tried.values())} in all, "
        f"{len(record['found'])} findings; the slowest was #{slowest[1]} with {slowest[0]:.1f} s"
    )


def _hang(*unused: object) -> None:
    raise TimeoutError(f"no result within {_SECONDS_EACH} s")


def _save(path: Path, record: dict, number: int, tried: Counter, unfinished: Counter) -> None:
    record.update(next=number, tried=dict(tried), unfinished=dict(unfinished))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
