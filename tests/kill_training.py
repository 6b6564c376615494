"""Kill a training of the reference model at random moments, and look at what it left.

``python -m tests.kill_training 20`` kills it 20 times. After each there is either no checkpoint yet
or one that loads and goes on; every other file of the run's folder but the logs is whole or absent;
and the run that is left alone at last ends within noise of one that was never killed.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
EPOCHS = 40


def command(folder):
    """Return a training of some seconds, whose epochs are one batch and two checkpoints."""
    return [
        *(sys.executable, "-m", "examples.decalign", "fit"),
        f"--config={ROOT / 'examples/decalign/configs/digits.yaml'}",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.limit_train_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.network.sizes.width=8",
        "--model.network.sizes.heads=2",
        "--model.network.sizes.layers=1",
        "--model.network.losses.prototypes.momentum=0.9",
    ]


def run(folder, checkpoints=None, delay=0.0):
    """Train; kill the process `delay` seconds after it has written so many checkpoints, if told to.

    Returns whether it was killed before it ended by itself.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # With no checkpoint to wait for, from when its folder has been claimed.
    mark = folder / ("checkpoints/last.ckpt" if checkpoints else "environment.json")
    seen, written = _time(mark), 0
    process = subprocess.Popen(
        command(folder),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if checkpoints is None:
        _, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        return False
    while process.poll() is None and written < max(checkpoints, 1):
        time.sleep(0.002)
        if _time(mark) != seen:
            seen, written = _time(mark), written + 1
    time.sleep(delay)
    process.kill()  # SIGKILL, where there is one: nothing is run after it
    _, err = process.communicate()
    assert process.returncode <= 0, err[-4000:]
    return process.returncode != 0


def _time(path):
    return path.stat().st_mtime_ns if path.exists() else None


def look(folder):
    """Read every file that a run has left; return the epochs that its checkpoint has seen."""
    # Here, so that collecting this file needs nothing of the example's.
    import yaml

    epochs = 0
    for path in folder.rglob("*"):
        if path.name.endswith(".part") or path.is_dir() or "logs" in path.parts:
            continue  # what it was writing; the next writes over it, or beside the log
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
    # One for each file that is ever written, however often it was killed.
    assert len(list(folder.rglob("*.part"))) <= 8
    return epochs


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed" / "0"
        run(whole)
        assert look(whole) == EPOCHS
        kills, found, finished = 0, [], 0
        while kills < options.count:
            # Before the first checkpoint of this process, or a part of an epoch after a later one.
            checkpoints = draw.randrange(6)
            delay = draw.uniform(0, 0.3 if checkpoints else 6.0)
            if not run(killed, checkpoints, delay):
                compare(whole, killed)
                finished += 1
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
            f"{sum(e > 0 for _, e in found)} with one that loads; {finished + 1} killed runs "
            "went on and ended within noise of one that was not killed"
        )


def compare(whole, killed):
    """Compare what two runs of the same options and seed have left."""
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed))
    assert one.keys() == two.keys()
    # A chance guess is 0.1 right, and seeds differ by about 0.03.
    assert one["accuracy"] > 0.5, one
    assert abs(one["accuracy"] - two["accuracy"]) < 0.12, (one, two)
    lines = [(folder / "predictions.csv").read_text().splitlines() for folder in (whole, killed)]
    assert [line.split(",")[:2] for line in lines[0]] == [line.split(",")[:2] for line in lines[1]]
    one, two = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (whole, killed)
    )
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert one["global_step"] == two["global_step"] == EPOCHS


if __name__ == "__main__":
    main()
