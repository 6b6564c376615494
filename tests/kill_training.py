"""Kill a training of the reference model at random moments, and look at what it left.

``python -m tests.kill_training 20`` kills it 20 times. After each time there is either no checkpoint
yet or one that loads and goes on; every other file of the run's folder is whole or absent; and the
run that is left alone at last ends with the bits of one that was never killed.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from examples.decalign import task  # noqa: F401 (it names the classes that its checkpoints hold)

ROOT = Path(__file__).parents[1]
EPOCHS = 12


def command(folder):
    """Return a training of some seconds, most of whose time goes into its checkpoints."""
    return [
        *(sys.executable, "-m", "examples.decalign", "fit"),
        f"--config={ROOT / 'examples/decalign/configs/digits.yaml'}",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.limit_train_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.network.width=8",
        "--model.network.heads=2",
        "--model.network.layers=1",
        "--model.losses.prototypes.momentum=0.9",
    ]


def run(folder, after=None):
    """Train; with `after`, kill the process so many seconds after it has begun to train."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "environment.json"  # written just before
    seen = mark.stat().st_mtime_ns if mark.exists() else None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(folder),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if after is None:
        _, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        return False
    while process.poll() is None and not (
        mark.exists() and mark.stat().st_mtime_ns != seen
    ):
        time.sleep(0.01)
    time.sleep(after)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err[-4000:]
    return process.returncode != 0


def look(folder):
    """Read every file that a run has left; return the epochs that its checkpoint has seen."""
    epochs = 0
    for path in folder.rglob("*"):
        if path.name.endswith(".part") or path.is_dir():
            continue  # what it was writing; the next writes over it
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            assert all(x.isfinite().all() for x in content["state_dict"].values()), path
            if path.name == "last.ckpt":
                epochs = content["epoch"] + 1
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            assert len({len(row) for row in rows}) == 1, path
        elif path.suffix == ".npz":
            with np.load(path) as file:
                assert all(np.isfinite(file[name]).all() for name in file.files), path
        else:
            {".json": json.loads, ".yaml": yaml.safe_load}[path.suffix](path.read_text())
    parts = list(folder.rglob("*.part"))
    assert len(parts) <= len(set(parts)) <= 8, parts
    return epochs


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed" / "0"
        started = time.monotonic()
        run(whole)
        assert look(whole) == EPOCHS
        span = time.monotonic() - started
        kills, found, finished = 0, [], 0
        while kills < options.count:
            # Moments from the first of the training on; an epoch is some hundredths of a span.
            if not run(killed, draw.uniform(0, span / 2)):
                finished += 1
                compare(whole, killed)
                killed = killed.with_name(str(finished))
                continue
            kills += 1
            epochs = look(killed)
            assert epochs >= (found[-1][1] if found and found[-1][0] == finished else 0)
            found.append((finished, epochs))
            print(f"killed {kills}: run {finished}, checkpoint of epoch {epochs}", flush=True)
        run(killed)
        look(killed)
        compare(whole, killed)
        print(
            f"{kills} kills: {sum(e == 0 for _, e in found)} before the first checkpoint, "
            f"{sum(e > 0 for _, e in found)} with one that loads; {finished + 1} killed runs went on "
            "and ended with the bits of one that was not killed"
        )


def compare(whole, killed):
    """Compare what two runs of the same options and seed have left."""
    for file in ("log.csv", "metrics.json", "predictions.csv"):
        assert (whole / file).read_text() == (killed / file).read_text(), file
    one, two = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, killed)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


if __name__ == "__main__":
    main()
