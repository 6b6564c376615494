"""The reference model: its parts, its data, and its commands from end to end."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score

from examples.decalign import encoders, figures, table
from examples.decalign.__main__ import main
from examples.decalign.baseline import logistic_scores
from examples.decalign.cli import DecAlignCLI
from examples.decalign.data import VIEWS, Batch, DigitsData, split_rows
from examples.decalign.model import DecAlign, Network
from examples.decalign.objective import Losses, Objective
from examples.decalign.switches import Switches
from examples.decalign.task import DecAlignTask

CONFIGS = Path(__file__).parents[1] / "examples" / "decalign" / "configs"
DIGITS = str(CONFIGS / "digits.yaml")
SMALL = Network(width=8, length=4, heads=2, layers=1)
# Ten components, and covariances that 24 samples carry.
LOSSES = Losses(
    decoupling={"form": "squared"},
    prototypes={"covariance_type": "diag", "num_prototypes": 3, "cost_reduction": "mean"},
)
SHAPES = {"text": (5, 6), "audio": (1, 3), "video": (9, 4), "touch": (2, 7)}
TERMS = {"task", "loss", "dec", "transport", "prototype", "hete", "sem", "mmd", "homo"}


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    # Single precision on the CPU, as for those who run the example.
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def make_batch(names=("text", "audio", "video"), count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(count, *SHAPES[name], generator=generator) for name in names}
    return Batch(features, {}, torch.randint(3, (count,), generator=generator))


def make_model(batch, *, network=SMALL, switches=None):
    modalities = {name: x.shape[-1] for name, x in batch.features.items()}
    return DecAlign(modalities, 3, network, switches)


def loss_terms(batch, *, switches=None, network=SMALL, losses=LOSSES):
    model = make_model(batch, network=network, switches=switches)
    terms = Objective(3, losses, switches)(model(batch.features, batch.masks), batch.targets)
    return model, terms


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [tuple(SHAPES)[:2], tuple(SHAPES)[:3], tuple(SHAPES)])
@pytest.mark.parametrize("context", ["self", "cross"])
def test_shapes(names, context):
    batch = make_batch(names)
    model = make_model(batch, network=Network(width=8, heads=2, layers=2, context=context))
    output = model(batch.features)
    assert output.logits.shape == (24, 3)
    for steps, pooled in [
        (output.unique_steps, output.unique),
        (output.common_steps, output.common),
    ]:
        assert [x.shape for x in steps] == [(24, 8, 8)] * len(names)
        assert [x.shape for x in pooled] == [(24, 8)] * len(names)
    assert [x.shape for x in output.latents] == [(24, 8)] * len(names)
    assert all(there.all() for there in output.present)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match=r"modalities must name at least two; got \['text'\]"):
        DecAlign({"text": 4}, 3)


def test_options_by_modality_must_name_the_modalities():
    with pytest.raises(ValueError, match=r"attention_dropout must name \['a', 'b'\]; got \['a'\]"):
        DecAlign({"a": 4, "b": 4}, 3, Network(attention_dropout={"a": 0.1}))


@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
def test_time_axis_keeps_its_mean(length):
    # Parts of equal size: whatever T_s is, the average over time does not change.
    conv = encoders.TemporalConv(3, 5, 4, kernel_size=3)
    x, mask = torch.randn(2, length, 3), torch.ones(2, length, dtype=torch.bool)
    steps, valid = conv(x, mask)
    assert steps.shape == (2, 4, 5)
    assert valid.all()
    torch.testing.assert_close(steps.mean(1), conv.conv(x.mT).mT.mean(1))


def test_padding_has_no_effect():
    torch.manual_seed(0)
    conv = encoders.TemporalConv(3, 5, 4, kernel_size=3)
    x = torch.randn(2, 8, 3)
    mask = torch.arange(8) < torch.tensor([[8], [4]])
    clean, valid = conv(x, mask)
    dirty, _ = conv(torch.where(mask.unsqueeze(-1), x, torch.nan), mask)
    torch.testing.assert_close(clean, dirty)
    assert valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert (clean[1, 2:] == 0).all()


def test_distribution_encoder_samples_in_training_only():
    batch = make_batch()
    model = make_model(batch, network=Network(width=8, heads=2, layers=1, **no_dropout()))
    first, second = (model(batch.features).latents[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(batch.features).latents[0] for _ in range(2))
    assert torch.equal(first, second)

    point = encoders.DistributionEncoder(8, stochastic=False)(torch.randn(4, 8))
    assert point.log_variance is None
    assert torch.equal(point.sample(), point.mean)


def test_distribution_has_the_variance_it_names():
    mean, log_variance = torch.full((50_000, 1), 2.0), torch.full((50_000, 1), -1.0)
    sample = encoders.Distribution(mean, log_variance).sample()
    assert abs(sample.mean() - 2.0) < 0.01
    assert abs(sample.var() - np.exp(-1)) < 0.01


def no_dropout():
    return {
        f"{place}_dropout": 0.0
        for place in ("input", "attention", "relu", "embedding", "residual", "output")
    }


BRANCHES = [
    *(f"convs.{name}" for name in ("text", "audio", "video")),
    *(f"unique_encoders.{name}" for name in ("text", "audio", "video")),
    *(f"transformers.{name}" for name in ("text", "audio", "video")),
    "common_encoder",
    "distribution_encoder",
    "head",
]


@pytest.mark.parametrize("context", ["self", "cross"])
def test_every_branch_learns_and_counts(context):
    batch = make_batch()
    network = Network(width=8, length=4, heads=2, layers=1, context=context, **no_dropout())
    model, terms = loss_terms(batch, network=network)
    terms["loss"].backward()
    # A bias before a softmax over keys, which cannot matter, is the only exception.
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert "in_proj_bias" in name or parameter.grad.abs().sum() > 0, name

    model.eval()
    before = model(batch.features).logits
    for branch in BRANCHES:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.get_submodule(branch).parameters():
                parameter.mul_(0.5)
        assert not torch.allclose(model(batch.features).logits, before, atol=1e-4), branch
        model.load_state_dict(kept)


def test_cross_context_reads_other_modalities():
    batch = make_batch()
    other = {**batch.features, "video": torch.randn_like(batch.features["video"])}
    for context, changes in [("self", False), ("cross", True)]:
        network = Network(width=8, length=4, heads=2, layers=1, context=context)
        model = make_model(batch, network=network).eval()
        refined = []
        hook = model.transformers["text"].register_forward_hook(
            lambda module, args, output, kept=refined: kept.append(output)
        )
        model(batch.features)
        model(other)
        hook.remove()
        assert torch.equal(*refined) != changes


# --- missing modalities ------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["self", "cross"])
def test_missing_modality_leaks_nothing(context):
    batch = make_batch()
    network = Network(width=8, length=4, heads=2, layers=1, context=context)
    missing = torch.arange(24) % 3 == 0
    masks = {"text": ~missing.unsqueeze(1).expand(24, 5)}
    results = []
    for value in (0.0, torch.nan, torch.inf):
        text = batch.features["text"].masked_fill(missing[:, None, None], value)
        changed = Batch({**batch.features, "text": text}, masks, batch.targets)
        torch.manual_seed(0)
        model, terms = loss_terms(changed, network=network)
        terms["loss"].backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        results.append([terms["loss"].detach(), *gradients])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_modality_missing_everywhere_and_sample_without_any():
    batch = make_batch()
    masks = {name: torch.ones(24, x.shape[1]) > 0 for name, x in batch.features.items()}
    masks["text"] = torch.zeros(24, 5, dtype=torch.bool)
    for name in ("audio", "video"):
        masks[name][0] = False
    for context in ("self", "cross"):
        network = Network(width=8, length=4, heads=2, layers=1, context=context)
        model, terms = loss_terms(batch._replace(masks=masks), network=network)
        terms["loss"].backward()
        assert all(torch.isfinite(term) for term in terms.values())
        for parameter in model.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        output = model(batch.features, masks)
        assert not output.present[0].any()
        assert (output.unique[0] == 0).all()


# --- objective and switches --------------------------------------------------------------------


def test_objective_is_the_weighted_sum():
    losses = Losses(**{**asdict(LOSSES), "alpha": 0.3, "beta": 0.7})
    _, terms = loss_terms(make_batch(), losses=losses)
    assert set(terms) == TERMS
    total = terms["task"] + terms["dec"] + 0.3 * terms["hete"] + 0.7 * terms["homo"]
    torch.testing.assert_close(terms["loss"], total)
    torch.testing.assert_close(terms["hete"], terms["transport"] + terms["prototype"])
    torch.testing.assert_close(terms["homo"], terms["sem"] + terms["mmd"])


@pytest.mark.parametrize(
    ("switch", "terms", "called", "parts"),
    [
        ("mfd", {"dec"}, "CosineDecouplingLoss.forward", ["common_encoder"]),
        ("hete", {"transport", "prototype", "hete"}, "PrototypeAlignmentLoss.solve", []),
        (
            "homo",
            {"sem", "mmd", "homo"},
            "GaussianMomentLoss.forward MMDLoss.forward",
            ["distribution_encoder"],
        ),
        ("sem", {"sem"}, "GaussianMomentLoss.forward", []),
        ("mmd", {"mmd"}, "MMDLoss.forward", ["distribution_encoder"]),
    ],
)
def test_switch_removes_the_computation(switch, terms, called, parts, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    for name in called.split():
        owner, method = name.split(".")
        monkeypatch.setattr(f"multialign.{owner}.{method}", refuse)
    model, left = loss_terms(make_batch(), switches=Switches(**{switch: False}))
    assert set(left) == TERMS - terms
    for part in parts:
        assert getattr(model, part) is None
    with pytest.raises(AssertionError, match="computed"):
        loss_terms(make_batch())


def test_without_decoupling_both_branches_read_the_same_features():
    batch = make_batch()
    output = make_model(batch, switches=Switches(mfd=False))(batch.features)
    assert all(a is b for a, b in zip(output.unique_steps, output.common_steps, strict=True))


def test_proto_ot_leaves_the_second_term():
    torch.manual_seed(0)
    _, terms = loss_terms(make_batch(), switches=Switches(proto_ot=False))
    torch.testing.assert_close(terms["hete"], terms["prototype"])


def parse_losses(*files):
    args = [f"--config={CONFIGS / file}" for file in files]
    options = DecAlignCLI([*args, "--trainer.logger=false"], run=False).config["model"]
    return Losses(**options["losses"].as_dict()), Network(**options["network"].as_dict())


def test_configurations():
    losses, network = parse_losses("paper.yaml")
    assert (losses, network) == (Losses(), Network())
    losses, network = parse_losses("digits.yaml", "released.yaml")
    assert network.pde == "mlp"
    assert network.layers == 2
    assert losses.prototypes["objective"] == "regularized"
    losses, _ = parse_losses("digits.yaml", "paper.yaml")
    assert losses == Losses()


@pytest.mark.parametrize("file", ["paper.yaml", "released.yaml", "digits.yaml"])
def test_configuration_trains(file):
    losses, network = parse_losses(file)
    batch = make_batch(count=40)
    batch = batch._replace(targets=batch.targets.remainder(3))
    model, terms = loss_terms(
        batch, network=network, losses=Losses(**{**asdict(losses), "alpha": 0.05})
    )
    terms["loss"].backward()
    for parameter in model.parameters():
        assert torch.isfinite(parameter.grad).all()


# --- data --------------------------------------------------------------------------------------


def test_views_are_the_images():
    images = load_digits().images.astype(np.float32)
    upper, lower, coarse = (VIEWS[name](images) for name in ("upper", "lower", "coarse"))
    assert upper.shape[1:] == (4, 8)
    assert lower.shape[1:] == (8, 4)
    assert coarse.shape[1:] == (1, 16)
    joined = np.concatenate([upper, lower.transpose(0, 2, 1)], 1)
    np.testing.assert_array_equal(joined, images)
    np.testing.assert_allclose(coarse[7, 0, 1], images[7, :2, 2:4].mean())


def test_splits_are_stratified_disjoint_and_fixed():
    targets = load_digits().target
    rows = split_rows(targets, 0.1)
    assert {name: len(chosen) for name, chosen in rows.items()} == {
        "train": 1212,
        "validation": 135,
        "test": 450,
    }
    assert len(np.unique(np.concatenate(list(rows.values())))) == len(targets)
    shares = np.bincount(targets[rows["test"]]) / np.bincount(targets)
    assert np.abs(shares - 0.25).max() < 0.01
    np.random.seed(123)  # noqa: NPY002
    np.testing.assert_array_equal(split_rows(targets, 0.3)["test"], rows["test"])


def test_standardised_by_the_training_split_alone(monkeypatch):
    data = DigitsData()
    data.setup()
    for name, x in data.splits["train"].samples.features.items():
        assert x.shape[-1] == data.modalities[name]
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1:]), atol=1e-5, rtol=0)
        spread = x.std(0, correction=0)
        assert ((spread - 1).abs().lt(1e-4) | (spread == 0)).all()
        assert torch.isfinite(data.splits["test"].samples.features[name]).all()

    # Other test images change nothing that training sees.
    digits = load_digits()
    digits.images[split_rows(digits.target, 0.1)["test"]] *= -3
    monkeypatch.setattr("examples.decalign.data.load_digits", lambda: digits)
    other = DigitsData()
    other.setup()
    for name, x in data.splits["train"].samples.features.items():
        assert torch.equal(other.splits["train"].samples.features[name], x)


def test_loaders_give_whole_batches():
    data = DigitsData(batch_size=100)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch.targets) for batch in batches] == [100] * 12
    assert batches[0].features["lower"].shape == (100, 8, 4)
    [test] = data.test_dataloader()
    assert torch.equal(test.targets, data.splits["test"].samples.targets)
    assert data.splits["test"][3].targets.shape == (1,)


def test_no_view_suffices_alone():
    scores = {name: values["accuracy"] for name, values in logistic_scores(DigitsData()).items()}
    assert scores["logistic"] > 0.95
    assert max(scores[f"logistic_{view}"] for view in VIEWS) < 0.93


# --- training and commands ---------------------------------------------------------------------


def test_metrics_agree_with_scikit_learn():
    task = DecAlignTask({"a": 2, "b": 2}, 4, SMALL)
    logits, targets = torch.randn(60, 4), torch.randint(4, (60,))
    for part in (slice(40), slice(40, 60)):
        task.test_metrics.update(logits[part], targets[part])
    scores = task.test_metrics.compute()
    predictions = logits.argmax(-1)
    assert scores["test/accuracy"] == pytest.approx(accuracy_score(targets, predictions))
    assert scores["test/weighted_f1"] == pytest.approx(
        f1_score(targets, predictions, average="weighted")
    )


def quick(folder):
    return [
        f"--config={DIGITS}",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={folder}",
        "--model.network.layers=1",
        "--model.losses.prototypes.em_iterations=2",
    ]


# Evaluating a checkpoint logs to a folder of its own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("schedule", ["onecycle", "plateau", "constant"])
def test_fit_and_test_commands(schedule, tmp_path, capsys):
    run = [
        *quick(tmp_path),
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--model.schedule={schedule}",
    ]
    main(["fit", *run])
    [checkpoint] = tmp_path.glob("fit/version_0/checkpoints/*.ckpt")
    logged = (tmp_path / "fit/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"{stage}/{term}" for stage in ("train", "val") for term in TERMS} <= set(logged)
    assert {"val/accuracy", "val/weighted_f1"} <= set(logged)

    main(["test", *run, f"--ckpt_path={checkpoint}"])
    assert "test/weighted_f1" in capsys.readouterr().out

    task = DecAlignTask.load_from_checkpoint(checkpoint)
    assert task.network.context == yaml.safe_load(Path(DIGITS).read_text())["model"]["network"].get(
        "context", "self"
    )


def test_table_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN_PAIRS", 10)
    output = tmp_path / "runs"
    main(
        [
            "table",
            *quick(tmp_path),
            f"--output={output}",
            "--seeds=1",
            "--workers=1",
        ]
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == [
        "full",
        "no_mfd",
        "no_hete",
        "no_homo",
        "logistic",
        *(f"logistic_{view}" for view in VIEWS),
    ]
    for model in metrics.values():
        assert list(model) == ["accuracy", "weighted_f1"]
        for score in model.values():
            assert list(score) == ["mean", "std", "seeds"]
            assert len(score["seeds"]) == 1
            assert 0 <= score["mean"] <= 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in metrics)
    for name in ("confusion_matrix.png", "modality_gap.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    task = DecAlignTask.load_from_checkpoint(output / "full.ckpt", map_location="cpu")
    data = DigitsData()
    data.setup()
    [batch] = data.test_dataloader()
    predictions = task.eval()(batch).logits.argmax(-1)
    accuracy = (predictions == batch.targets).float().mean().item()
    assert accuracy == pytest.approx(metrics["full"]["accuracy"]["mean"])


def test_intervals_are_student_t():
    metrics = {"accuracy": [0.97, 0.98, 0.975]}
    reference = {"accuracy": [0.96, 0.96, 0.96]}
    # mean 1.5, standard error 0.5 / sqrt(3), quantile 4.303
    assert table._difference(metrics, reference) == "+1.50 [+0.26, +2.74] *"
    assert table._difference({"accuracy": [0.96, 0.97, 0.95]}, reference).endswith("]  ")
    summary = table._summary({"full": {"accuracy": [0.97, 0.98, 0.975]}})
    assert summary["full"]["accuracy"]["std"] == pytest.approx(0.005)


def test_gap_measures():
    x = np.random.default_rng(0).normal(size=(400, 6))
    assert figures.centre_gap(x, x) == 0
    assert figures.pair_ratio(x, x) == 0
    shifted = x + 10.0
    assert figures.centre_gap(x, shifted) == pytest.approx(10.0, rel=0.1)
    assert figures.pair_ratio(x, np.flip(x, 0)) == pytest.approx(1.0, rel=0.05)
