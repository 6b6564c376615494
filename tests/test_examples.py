"""The gallery pages, at a size that tests can afford."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from examples import plot_unpaired_transfer as transfer

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1)
LOSSES = [
    "GaussianMomentLoss",
    "MMDLoss",
    "MultiMarginalSinkhornLoss",
    "PrototypeAlignmentLoss",
]
ROWS = [transfer.NONE, *LOSSES, transfer.CEILING]


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.fixture(scope="module")
def outcomes():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return transfer.run(
                SEEDS, source_steps=150, steps=15, angles=(20, 60), further_angles=(10,)
            )
    finally:
        torch.set_default_dtype(dtype)


def test_halves_are_disjoint_and_cover_the_data():
    labels = load_digits().target
    first, second = transfer.deal(0, labels), transfer.deal(1, labels)
    for half in (first, second):
        assert np.array_equal(np.sort(np.concatenate(half)), np.arange(len(labels)))
    assert np.array_equal(first.test, second.test)
    assert not np.array_equal(np.sort(first.source), np.sort(second.source))


def test_task_holds_what_it_says():
    digits = load_digits()
    half = transfer.deal(1, digits.target)
    task = transfer.make_task(20, SEEDS)
    assert task.source.shape[0] == task.target.shape[0] == len(SEEDS)
    assert torch.equal(task.source_labels[1], torch.as_tensor(digits.target[half.source]))
    assert torch.equal(task.target_labels[1], torch.as_tensor(digits.target[half.target]))
    # Standardised by training samples of the same view.
    for view in (task.source, task.target):
        assert torch.allclose(view.mean(1), torch.zeros(()), atol=1e-5)
    upright = transfer.make_task(0, SEEDS)
    assert torch.equal(upright.source, task.source)
    assert not torch.allclose(upright.target, task.target)


def test_batches_are_unpaired_and_pass_over_the_data():
    count = 3 * transfer.BATCH
    ours, theirs = (
        torch.stack(list(transfer.batches(count, 3, [base, base + 1]))) for base in (400, 500)
    )
    assert ours.shape == (3, 2, transfer.BATCH)
    for r in range(2):
        assert torch.equal(ours[:, r].flatten().sort().values, torch.arange(count))
    assert not torch.equal(ours, theirs)
    assert not torch.equal(ours[:, 0], ours[:, 1])


def test_target_labels_reach_the_ceiling_alone():
    task = transfer.make_task(20, SEEDS)
    unlabelled = task._replace(target_labels=torch.full_like(task.target_labels, -1))
    encoder, classifier = transfer.train_source(unlabelled, SEEDS, 5)
    for align in transfer.make_losses().values():
        student = transfer.train_target(unlabelled, encoder, classifier, align, SEEDS, 1)
        assert not torch.equal(student.out.weight, encoder.out.weight)
    with pytest.raises(IndexError):
        transfer.train_target(unlabelled, encoder, classifier, None, SEEDS, 1)


def test_outcomes(outcomes):
    assert list(outcomes) == [10, 20, 60]
    assert list(outcomes[10].accuracy) == [transfer.NONE, "MMDLoss", transfer.CEILING]
    for outcome in outcomes.values():
        assert list(outcome.discrepancy) == list(outcome.accuracy)
        for accuracy in outcome.accuracy.values():
            assert accuracy.shape == (len(SEEDS),)
            assert np.all((accuracy >= 0) & (accuracy <= 100))
        for name, accuracy in outcome.accuracy.items():
            assert np.all(outcome.renamed[name] >= accuracy - 1e-9)
        assert all(np.isfinite(value) for value in outcome.discrepancy.values())
        assert all(np.isfinite(value).all() for value in outcome.features.values())
    for angle in (20, 60):
        accuracy = outcomes[angle].accuracy
        assert list(accuracy) == ROWS
        # Wide margins: these hold from the first steps on.
        assert accuracy[transfer.CEILING].min() > accuracy[transfer.NONE].max() + 5
        discrepancy = outcomes[angle].discrepancy
        assert discrepancy["MMDLoss"] < discrepancy[transfer.NONE]
    assert outcomes[20].accuracy[transfer.NONE].min() > 50
    assert outcomes[60].accuracy[transfer.NONE].max() < 40


def test_interval_is_that_of_scipy():
    values = np.array([71.0, 74.5, 69.25, 80.0, 77.5])
    mean, half = transfer.mean_interval(values)
    expected = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert np.allclose((mean - half, mean + half), expected)


def test_gain_is_paired():
    shared = np.array([60.0, 70.0, 80.0])
    accuracy = {transfer.NONE: shared, "a": shared + 2.0}
    mean, half = transfer.gain(transfer.Outcome(accuracy, {}, {}, {}), "a")
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(0.0, abs=1e-9)


def test_renaming_finds_exchanged_classes():
    labels = torch.arange(10).repeat(2, 3)
    predicted = torch.stack([labels[0], (labels[1] + 1) % 10])
    assert np.allclose(transfer.accuracies(predicted, labels), [100, 0])
    assert np.allclose(transfer.renamed_accuracies(predicted, labels), [100, 100])


def test_table(outcomes):
    sections = [text.splitlines() for text in transfer.table(outcomes, (20, 60)).split("\n\n")]
    for angle, (header, *lines) in zip((20, 60), sections, strict=True):
        assert header.startswith(f"view B turned by {angle}°")
        assert [line[:26].strip() for line in lines] == ROWS
        outcome = outcomes[angle]
        for name, line in zip(ROWS, lines):
            mean, half = transfer.mean_interval(outcome.accuracy[name])
            assert line[26:].startswith(f"{mean:5.1f} ± {half:4.1f}")
            assert line.count("±") == (2 if name == transfer.NONE else 3)
            if name != transfer.NONE:
                mean, half = transfer.gain(outcome, name)
                assert f"{mean:+.1f} ± {half:4.1f}" in line
                assert ("*" in line) == (abs(mean) > half)


def test_figure(outcomes, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SHOWN", 40)
    plt.switch_backend("agg")
    figure = transfer.draw(outcomes, (20, 60))
    figure.savefig(tmp_path / "figure.png", dpi=50)
    assert len(figure.axes) == 7
    plt.close(figure)


def test_every_script_has_its_place_in_the_gallery():
    scripts = {path.name for path in (ROOT / "examples").glob("plot_*.py")}
    configuration = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    (gallery,) = (
        ast.literal_eval(node.value)
        for node in configuration.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GALLERY"
    )
    assert scripts <= set(gallery)
    for name in scripts:
        text = (ROOT / "examples" / name).read_text(encoding="utf-8")
        title, line, *_ = ast.get_docstring(ast.parse(text)).splitlines()
        assert line == "=" * len(line)
        assert len(line) >= len(title)
        assert "plt.show()" in text
