"""The commands that train several models: `table`, `ablate` and `sensitivity`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from examples.decalign import figures
from examples.decalign.baseline import linear_scores
from examples.decalign.data import ModalityData
from examples.decalign.report import (
    TITLES,
    describe,
    difference,
    published,
    read_published,
    render,
    spread,
    summarise,
)
from examples.decalign.runs import Run, default_workers, make_runs, parse_data, train_all
from examples.decalign.storage import write_atomically

__all__ = ["MODELS", "MODULES", "STRATEGIES", "ablate", "sensitivity", "table"]


def _off(*switches: str) -> list[str]:
    return [f"--model.switches.{name}=false" for name in switches]


CT = "--model.switches.ct=true"

MODELS: dict[str, list[str]] = {
    "decalign": [],
    "mult": ["--model.architecture=mult"],
    "misa": ["--model.architecture=misa"],
}
"""The models of `table`."""

MODULES: dict[str, list[str]] = {
    "decalign": [],
    "no_homo": _off("homo"),
    "no_hete": _off("hete"),
    "only_mfd": _off("hete", "homo"),
    "none": _off("mfd", "hete", "homo"),
    "no_mfd": _off("mfd"),
}
"""The left half of Table 2, and a row without decoupling alone, which the table lacks."""

STRATEGIES: dict[str, list[str]] = {
    "with_ct": [CT],
    "no_mmd": [CT, *_off("mmd")],
    "no_sem": [CT, *_off("sem")],
    "decalign": [],
    "no_proto_ot": [CT, *_off("proto_ot")],
}
"""The right half, in which CT is on. Its row without CT is Eq. 13, the left half's full model."""

# The parts that each row of Table 2 has.
PARTS = {
    "decalign": "MFD Hete Homo",
    "no_homo": "MFD Hete -",
    "no_hete": "MFD - Homo",
    "only_mfd": "MFD - -",
    "none": "- - -",
    "no_mfd": "- Hete Homo",
}
STRATEGY_PARTS = {
    "with_ct": "Proto-OT CT Sem MMD",
    "no_mmd": "Proto-OT CT Sem -",
    "no_sem": "Proto-OT CT - MMD",
    "decalign": "Proto-OT - Sem MMD",
    "no_proto_ot": "- CT Sem MMD",
}
HALVES = {
    "modules": (MODULES, "decalign", PARTS),
    "strategies": (STRATEGIES, "with_ct", STRATEGY_PARTS),
}
# The paper's name of a row of Table 2, where it differs.
PAPER_ROWS = {"strategies": {"with_ct": "decalign", "decalign": "no_ct"}}

PAIRED = (
    "In brackets the 95 % interval (Student's t) of the mean difference, seed by seed; * where it "
    "excludes 0.\nAll have the same test samples: the intervals show the effect of the seed, not "
    "that of other\nsamples."
)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The data, output folder, seeds and arguments of a command."""

    data: ModalityData
    output: Path
    seeds: list[int]
    workers: int
    shared: list[str]

    def train(self, variants: Mapping[str, Sequence[str]]) -> dict[str, list[Run]]:
        describe(self.data, self.output)
        runs = make_runs(dict(variants), self.seeds, self.output, self.shared)
        return train_all(runs, self.workers)

    def write(self, name: str, text: str) -> None:
        """Print a table, and write it to the folder."""
        write_atomically(self.output / f"{name}.txt", text)
        print(text)

    def seeds_note(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return f"Test split, mean +- deviation over seeds {seeds}; per cent except MAE and Corr."


def table(args: Sequence[str] | None = None) -> None:
    """Train the models over several seeds; print their scores beside the paper's."""
    parser = _parser(
        "table", "Tables 1, 5, 6, 7: the paper's fourteen methods, and what is trained here."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options, task = _parse(parser, args)
    groups = task.train({name: MODELS[name] for name in options.models})
    scores = _collect(groups)
    linear = linear_scores(task.data)
    everything = {**scores, **{name: {m: [v] for m, v in s.items()} for name, s in linear.items()}}
    write_atomically(
        task.output / "metrics.json", json.dumps(summarise(everything), indent=2) + "\n"
    )

    metrics = [name for name in TITLES if name in linear["linear"]]
    described = json.loads((task.output / "data.json").read_text())
    rows = []
    paper = published(described["published"])
    # The paper has one Acc-2 and one F1. On MOSI and MOSEI its released code leaves out the samples
    # of label 0; MMSA's CH-SIMS counts all.
    renamed = {"acc2": "acc2_nonzero", "f1": "f1_nonzero"}
    if described["published"] == "sims":
        renamed = {}
    for name, values in paper.items():
        known = {renamed.get(metric, metric): value for metric, value in values.items()}
        rows.append(
            [f"{name} (paper)"] + [spread(m, [known[m]]) if m in known else "" for m in metrics]
        )
    rows += [
        [name] + [spread(m, values[m]) for m in metrics] for name, values in everything.items()
    ]
    notes = [
        task.seeds_note(),
        "linear: logistic or ridge regression on the same features; no seed.",
    ]
    if renamed and paper:
        notes.append(
            "The paper does not say how it counts Acc-2 and F1; its code leaves out label 0."
        )
    task.write(
        "table", render(["test split", *(TITLES[m] for m in metrics)], rows, "\n".join(notes))
    )


def ablate(args: Sequence[str] | None = None) -> None:
    """Train the rows of Table 2 over several seeds; print paired differences."""
    parser = _parser("ablate", "Table 2: what each part contributes.")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES))
    options, task = _parse(parser, args)
    variants: dict[str, Sequence[str]] = {}
    for half in options.halves:
        variants |= HALVES[half][0]
    scores = _collect(task.train(variants))
    write_atomically(task.output / "ablation.json", json.dumps(summarise(scores), indent=2) + "\n")
    metrics = ["accuracy" if task.data.target.kind == "class" else "mae", _f1(task.data)]
    described = json.loads((task.output / "data.json").read_text())
    paper = read_published()["table_2"].get(described["published"], {})
    texts = []
    for half in options.halves:
        names, reference, parts = HALVES[half]
        rows = []
        for name in names:
            row = [name, parts[name]]
            for place, metric in enumerate(metrics):
                values = scores[name][metric]
                row.append(spread(metric, values))
                compared = (
                    ""
                    if name == reference
                    else difference(metric, values, scores[reference][metric])
                )
                row.append(compared)
                if paper:
                    known = paper.get(PAPER_ROWS.get(half, {}).get(name, name))
                    row.append("" if known is None else str(known[place]))
            rows.append(row)
        head = [half, "parts"]
        for metric in metrics:
            head += [TITLES[metric], f"- {reference}"] + (["paper"] if paper else [])
        texts.append(render(head, rows))
    task.write("ablation", "".join(texts) + f"{task.seeds_note()}\n{PAIRED}\n")


def sensitivity(args: Sequence[str] | None = None) -> None:
    """Train over a grid of alpha and beta; draw F1 as a heat map."""
    parser = _parser("sensitivity", "Figure 5: how F1 depends on alpha and beta.")
    values = [0.005, 0.01, 0.05, 0.1, 0.5]
    parser.add_argument("--alphas", nargs="+", type=float, default=values)
    parser.add_argument("--betas", nargs="+", type=float, default=values)
    options, task = _parse(parser, args)
    alphas, betas = options.alphas, options.betas
    variants = {
        f"alpha_{alpha}_beta_{beta}": [
            f"--model.losses.alpha={alpha}",
            f"--model.losses.beta={beta}",
        ]
        for alpha, beta in product(alphas, betas)
    }
    scores = _collect(task.train(variants))
    metric = _f1(task.data)
    grid = [[scores[f"alpha_{alpha}_beta_{beta}"][metric] for beta in betas] for alpha in alphas]
    result = {
        "metric": metric,
        "alphas": alphas,
        "betas": betas,
        "seeds": task.seeds,
        "values": grid,
    }
    write_atomically(task.output / "sensitivity.json", json.dumps(result, indent=2) + "\n")
    head = ["alpha \\ beta", *map(str, betas)]
    rows = [
        [str(alpha), *(spread(metric, cell) for cell in row)]
        for alpha, row in zip(alphas, grid, strict=True)
    ]
    task.write("sensitivity", render(head, rows, f"{TITLES[metric]}. {task.seeds_note()}"))
    figures.sensitivity(result, task.output / "figure_5.png")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.decalign {name}",
        description=description,
        epilog="Other arguments, such as --config FILE, are passed to every training, as to `fit`. "
        "Models that are trained already are not trained again.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--output", type=Path, help="the folder; the configuration's default_root_dir by default"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="trainings at the same time"
    )
    return parser


def _parse(
    parser: argparse.ArgumentParser, args: Sequence[str] | None
) -> tuple[argparse.Namespace, _Task]:
    options, shared = parser.parse_known_args(args)
    cli = parse_data(shared)
    return options, _Task(
        data=cli.datamodule,
        output=options.output or cli.folder,
        seeds=options.seeds,
        workers=options.workers,
        shared=shared,
    )


def _f1(data: ModalityData) -> str:
    """Return the F1 that is comparable with the paper's; see `table`."""
    if data.target.kind == "class":
        return "weighted_f1"
    return "f1" if data.published == "sims" else "f1_nonzero"


def _collect(groups: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            metric: [run.scores[metric] for run in runs]
            for metric in runs[0].scores
            if metric != "loss"
        }
        for name, runs in groups.items()
    }
