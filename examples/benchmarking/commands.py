"""The commands on several trainings and on files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from examples.benchmarking import figures as drawing
from examples.benchmarking.baselines import baseline_scores
from examples.benchmarking.model import MODELS
from examples.benchmarking.runs import Run, default_workers, make_runs, parse_data, train_all
from examples.benchmarking.storage import write_atomically
from examples.benchmarking.tables import (
    TITLES,
    comparable_metric,
    describe,
    difference,
    published,
    read_description,
    read_published,
    render,
    spread,
    summarise,
    table_1,
)
from examples.decalign.data import ModalityData, Target, reader, sample

__all__ = [
    "MODULES",
    "STRATEGIES",
    "ablate",
    "convert",
    "figures",
    "make_sample",
    "sensitivity",
    "table",
    "table1",
]

CONFIGS = Path(__file__).parents[1] / "decalign" / "configs"
SWITCH = "--model.network.switches."
CT = f"{SWITCH}ct=true"


def _off(*switches: str) -> list[str]:
    return [f"{SWITCH}{name}=false" for name in switches]


# The rows of Table 2: arguments, and the parts that are on.
MODULES: dict[str, tuple[list[str], str]] = {
    "decalign": ([], "MFD Hete Homo"),
    "no_homo": (_off("homo"), "MFD Hete -"),
    "no_hete": (_off("hete"), "MFD - Homo"),
    "only_mfd": (_off("hete", "homo"), "MFD - -"),
    "none": (_off("mfd", "hete", "homo"), "- - -"),
    "no_mfd": (_off("mfd"), "- Hete Homo"),
}
"""The left half of Table 2, and a row without decoupling alone, which the table lacks."""

STRATEGIES: dict[str, tuple[list[str], str]] = {
    "with_ct": ([CT], "Proto-OT CT Sem MMD"),
    "no_mmd": ([CT, *_off("mmd")], "Proto-OT CT Sem -"),
    "no_sem": ([CT, *_off("sem")], "Proto-OT CT - MMD"),
    "decalign": ([], "Proto-OT - Sem MMD"),
    "no_proto_ot": ([CT, *_off("proto_ot")], "- CT Sem MMD"),
}
"""The right half, in which CT is on. Its row without CT is Eq. 13, the left half's full model."""

HALVES = {"modules": MODULES, "strategies": STRATEGIES}
# The paper's name of a row of Table 2, where it differs.
PAPER_ROWS = {"strategies": {"with_ct": "decalign", "decalign": "no_ct"}}
PAIRED = (
    "In brackets the 95 % interval (Student's t) of the mean difference, seed by seed; * where it "
    "excludes 0.\nAll have the same test samples: the intervals show the effect of the seed, not "
    "that of other\nsamples."
)
# The two of the paper's columns that Figure 1 plots against each other.
BUBBLES = {
    "mosi": ("acc2", "f1"),
    "mosei": ("acc2", "f1"),
    "iemocap": ("accuracy", "weighted_f1"),
    "sims": ("acc3", "f1"),
}
# What figures call the rows of Table 2.
NAMES = {
    "decalign": "DecAlign",
    "no_homo": "without homogeneous alignment",
    "no_hete": "without heterogeneous alignment",
    "only_mfd": "decoupling alone",
    "none": "no part",
    "no_mfd": "without decoupling",
    "mult": "MulT",
    "misa": "MISA",
}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The data, output folder, seeds and arguments of a command."""

    data: ModalityData
    output: Path
    seeds: list[int]
    workers: int
    shared: list[str]

    def train(self, variants: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[float]]]:
        """Train each variant over the seeds; return its scores by metric."""
        describe(self.data, self.output)
        runs = make_runs(dict(variants), self.seeds, self.output, self.shared)
        return {
            name: {m: [run.scores[m] for run in group] for m in group[0].scores if m != "loss"}
            for name, group in train_all(runs, self.workers).items()
        }

    def write(self, name: str, text: str) -> None:
        """Print a table, and write it to the folder."""
        write_atomically(self.output / f"{name}.txt", text)
        print(text)

    def note(self) -> str:
        """Say what the numbers are."""
        seeds = ", ".join(map(str, self.seeds))
        return (
            f"Test split of {len(self.data.splits['test'])} samples, mean +- deviation over seeds "
            f"{seeds}; per cent except MAE and Corr."
        )


def table(args: Sequence[str]) -> None:
    """Train the models over several seeds; print them beside baselines and the paper's rows."""
    parser = _parser(
        "table", "Tables 1, 5, 6, 7: the paper's rows, baselines, and models trained here."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options, job = _parse(parser, args)
    scores = job.train({name: _arguments(name, job.shared) for name in options.models})
    baselines = baseline_scores(job.data)
    metrics = [name for name in TITLES if name in next(iter(baselines.values()))[0]]
    name, _ = read_description(job.output)
    rows = [
        [f"{model} (paper)"] + [spread(m, [known[m]]) if m in known else "" for m in metrics]
        for model, values in published(name).items()
        for known in [{comparable_metric(name, m): value for m, value in values.items()}]
    ]
    reference = scores.get("decalign")
    head = ["test split", *(TITLES[m] for m in metrics)]
    if reference:
        head.append(f"{TITLES[metrics[0]]} - decalign")
    for model, values in scores.items():
        rows.append([model] + [spread(m, values[m]) for m in metrics])
        if reference and model != "decalign":
            rows[-1].append(difference(metrics[0], values[metrics[0]], reference[metrics[0]]))
    rows += [[m] + [spread(k, [s[k]]) for k in metrics] for m, (s, _) in baselines.items()]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    chosen = "; ".join(
        f"{model}: {', '.join(f'{option} {value}' for option, value in best.items())}"
        for model, (_, best) in baselines.items()
    )
    notes = [job.note(), PAIRED]
    notes.append(
        f"Baselines of scikit-learn, by five-fold cross-validation in training:\n{chosen}."
    )
    if name in ("mosi", "mosei"):
        notes.append(
            "The paper does not say how it counts Acc-2 and F1; its code leaves out label 0."
        )
    everything = {
        **scores,
        **{m: {k: [v] for k, v in s.items()} for m, (s, _) in baselines.items()},
    }
    write_atomically(
        job.output / "metrics.json", json.dumps(summarise(everything), indent=2) + "\n"
    )
    job.write("table", render(head, rows, "\n".join(notes)))


def ablate(args: Sequence[str]) -> None:
    """Train the rows of Table 2 over several seeds; print paired differences."""
    parser = _parser("ablate", "Table 2: what each part contributes.")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES))
    options, job = _parse(parser, args)
    variants = {
        name: arguments for half in options.halves for name, (arguments, _) in HALVES[half].items()
    }
    scores = job.train(variants)
    write_atomically(job.output / "ablation.json", json.dumps(summarise(scores), indent=2) + "\n")
    metrics = ["accuracy" if job.data.target.kind == "class" else "mae", _f1(job.data)]
    paper = read_published()["table_2"].get(read_description(job.output)[0], {})
    texts = []
    for half in options.halves:
        reference = next(iter(HALVES[half]))
        rows = []
        for name, (_, parts) in HALVES[half].items():
            row = [name, parts]
            known = paper.get(PAPER_ROWS.get(half, {}).get(name, name))
            for place, metric in enumerate(metrics):
                values, base = scores[name][metric], scores[reference][metric]
                row.append(spread(metric, values))
                row.append("" if name == reference else difference(metric, values, base))
                if paper:
                    row.append("" if known is None else str(known[place]))
            rows.append(row)
        head = [half, "parts"]
        for metric in metrics:
            head += [TITLES[metric], f"- {reference}"] + (["paper"] if paper else [])
        texts.append(render(head, rows))
    job.write("ablation", "".join(texts) + f"{job.note()}\n{PAIRED}\n")


def sensitivity(args: Sequence[str]) -> None:
    """Train over a grid of alpha and beta; draw F1 as a heat map."""
    parser = _parser("sensitivity", "Figure 5: how F1 depends on alpha and beta.")
    values = [0.005, 0.01, 0.05, 0.1, 0.5]
    parser.add_argument("--alphas", nargs="+", type=float, default=values)
    parser.add_argument("--betas", nargs="+", type=float, default=values)
    options, job = _parse(parser, args)
    alphas, betas = options.alphas, options.betas
    losses = "--model.network.losses."
    variants = {
        f"alpha_{alpha}_beta_{beta}": [f"{losses}alpha={alpha}", f"{losses}beta={beta}"]
        for alpha, beta in product(alphas, betas)
    }
    scores = job.train(variants)
    metric = _f1(job.data)
    grid = [[scores[f"alpha_{alpha}_beta_{beta}"][metric] for beta in betas] for alpha in alphas]
    result = {
        "metric": TITLES[metric],
        "alphas": alphas,
        "betas": betas,
        "seeds": job.seeds,
        "values": grid,
    }
    write_atomically(job.output / "sensitivity.json", json.dumps(result, indent=2) + "\n")
    head = ["alpha \\ beta", *map(str, betas)]
    rows = [
        [str(alpha), *(spread(metric, cell) for cell in row)]
        for alpha, row in zip(alphas, grid, strict=True)
    ]
    job.write("sensitivity", render(head, rows, f"{TITLES[metric]}. {job.note()}"))
    drawing.sensitivity(result, job.output / "figure_5.png")
    print(job.output / "figure_5.png")


def figures(args: Sequence[str]) -> None:
    """Draw the paper's figures from the runs in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign figures",
        description="Draw the figures that a folder has runs for: Figure 1 (Acc-2 against F1, with "
        "the paper's rows), 3 (confusion matrices), 4 (bars of each category and the modality gap "
        "under ablation), 5 (sensitivity).",
    )
    parser.add_argument("folder", type=Path, help="the output of table, ablate or sensitivity")
    parser.add_argument("--pair", nargs=2, help="the two modalities of the gap's maps")
    options = parser.parse_args(args)
    folder = options.folder
    name, target = read_description(folder)
    groups = {
        path.name: [
            Run(name=path.name, seed=int(seed.name.removeprefix("seed_")), folder=seed)
            for seed in sorted(path.glob("seed_*"))
        ]
        for path in sorted(folder.iterdir())
    }
    runs = {key: done for key, group in groups.items() if (done := [r for r in group if r.done])}
    heat = folder / "sensitivity.json"
    drawn = [
        ("figure_1.png", "paper's rows for this data set", _bubbles(name, runs, folder)),
        ("figure_3.png", "runs of `table`", _confusion(target, runs, folder)),
        ("figure_4.png", "runs of `ablate`", _bars(target, runs, folder)),
        ("figure_4_gap.png", "runs of `ablate`", _gap(runs, folder, options.pair)),
        ("figure_5.png", "runs of `sensitivity`", heat.is_file()),
    ]
    if heat.is_file():
        drawing.sensitivity(json.loads(heat.read_text()), folder / "figure_5.png")
    for file, source, done in drawn:
        print(f"{folder / file}" if done else f"{file}: there are no {source}")


def table1(args: Sequence[str]) -> None:
    """Print Table 1 from the output of `table` on its data sets."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign table1",
        description="Table 1: the paper's rows, and ours for data sets that `table` was run on.",
    )
    parser.add_argument("folders", nargs="*", type=Path, help="outputs of `table`")
    print(table_1(parser.parse_args(args).folders))


def convert(args: Sequence[str]) -> None:
    """Write a pickle as a safetensors file."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign convert",
        description="Write a pickle of splits, or DialogueRNN's tuple, once as a safetensors file, "
        "which contains no code and is mapped into memory when it is read.",
    )
    parser.add_argument("source", type=Path, help="the pickle")
    parser.add_argument("destination", type=Path, help="a file that ends in .safetensors")
    options = parser.parse_args(args)
    reader.convert(options.source, options.destination)
    print(f"Written: {options.destination}")


def make_sample(args: Sequence[str]) -> None:
    """Write a small file in the format of a data set."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decalign make_sample",
        description="Write a small pickle of random numbers in the format of a data set.",
    )
    parser.add_argument("name", choices=sample.FORMATS)
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument(
        "--sizes", nargs=3, type=int, default=[64, 32, 32], help="samples of each split"
    )
    parser.add_argument("--steps", type=int, help="maximum for each modality")
    parser.add_argument("--features", type=int, help="maximum for each modality")
    parser.add_argument("--vocabulary", type=int, default=100, help="token ids lie below it")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    options = vars(parser.parse_args(args))
    sample.make_sample(options.pop("name"), options.pop("path"), **options)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.decalign {name}",
        description=description,
        epilog="Other arguments, such as --config FILE, are passed to every training, as to `fit`. "
        "Models that are trained already are not trained again.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="one training for each"
    )
    parser.add_argument(
        "--output", type=Path, help="the folder; the configuration's default_root_dir by default"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="trainings at the same time"
    )
    return parser


def _parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, _Job]:
    options, shared = parser.parse_known_args(args)
    cli = parse_data(shared)
    return options, _Job(
        data=cli.datamodule,
        output=options.output or cli.folder,
        seeds=options.seeds,
        workers=options.workers,
        shared=shared,
    )


def _arguments(name: str, shared: Sequence[str]) -> list[str]:
    """Return the arguments that choose a model, after those of all models."""
    if name == "decalign":
        return []
    own = CONFIGS / f"{name}.yaml"
    return [f"--model.network={MODELS[name]}", *([f"--config={own}"] if own.is_file() else [])]


def _f1(data: ModalityData) -> str:
    """Return the F1 that is comparable with the paper's, or the nearest to it."""
    if data.target.kind == "class":
        return "weighted_f1"
    if not data.target.signed:
        return f"acc{len(data.target.categories)}"
    return "f1" if data.published == "sims" else "f1_nonzero"


def _bubbles(name: str | None, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    if name is None:
        return False
    x, y = BUBBLES[name]
    paper = {model: (row[x], row[y], row.get("mae")) for model, row in published(name).items()}
    ours: dict[str, tuple[float, float, float | None]] = {}
    for model in MODELS:
        for group in [runs[model]] if model in runs else []:
            keys = [comparable_metric(name, metric) for metric in (x, y, "mae")]
            means = [np.mean([run.scores.get(key, np.nan) for run in group]) for key in keys]
            mae = None if np.isnan(means[2]) else float(means[2])
            ours[f"{NAMES.get(model, model)}, here"] = (float(means[0]), float(means[1]), mae)
    drawing.bubbles(paper, ours, (TITLES[x], TITLES[y]), name, folder / "figure_1.png")
    return True


def _confusion(target: Target, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    matrices = {
        NAMES.get(model, model): _categories(target, runs[model])
        for model in MODELS
        if model in runs
    }
    if matrices:
        drawing.confusion_matrices(matrices, target.categories, folder / "figure_3.png")
    return bool(matrices)


def _bars(target: Target, runs: Mapping[str, list[Run]], folder: Path) -> bool:
    count = len(target.categories)
    scores = {
        NAMES[name]: [drawing.category_f1(*_categories(target, [run]), count) for run in runs[name]]
        for name in MODULES
        if name in runs
    }
    if len(scores) > 1:
        drawing.category_bars(scores, target.categories, folder / "figure_4.png")
    return len(scores) > 1


def _gap(runs: Mapping[str, list[Run]], folder: Path, pair: Sequence[str] | None) -> bool:
    stages = {
        "decoupling alone": "only_mfd",
        "homogeneous alignment": "no_hete",
        "heterogeneous alignment": "no_homo",
        "DecAlign (both)": "decalign",
    }
    available = {stage: runs[name][0] for stage, name in stages.items() if name in runs}
    if len(available) < 2:
        return False
    rows = {
        f"{kind} features": {stage: run.features(kind) for stage, run in available.items()}
        for kind in ("unique", "common")
    }
    drawing.modality_gap(rows, folder / "figure_4_gap.png", pair)
    return True


def _categories(target: Target, group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions of all runs, as indices of categories."""
    labels, predicted = (
        np.concatenate(x) for x in zip(*(r.predictions for r in group), strict=True)
    )
    if target.kind == "class":
        return labels.astype(int), predicted.astype(int)
    found = (target.category(torch.from_numpy(x)).numpy() for x in (labels, predicted))
    return next(found), next(found)
