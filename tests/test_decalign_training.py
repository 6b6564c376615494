"""The reference model trained from the command line: every data set, resumed, on two processes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from examples.benchmarking.cli import TrainingCLI, console, main
from examples.benchmarking.text import Text, TextEncoder
from examples.benchmarking.training import Training
from examples.decalign.data import MOSI, make_sample
from examples.decalign.model import DecAlign

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "decalign" / "configs"

pytestmark = [
    # The samples' infinities, which are meant.
    pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning"),
    # Lightning on splits of one batch.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Return the path of a small file in each data set's format."""
    folder = tmp_path_factory.mktemp("samples")
    for name in ("mosi", "mosei", "sims", "iemocap"):
        make_sample(name, folder / f"{name}.pkl", sizes=(48, 12, 11), steps=6, features=5)
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory, transformers_with_models):
    """Return the folder of a tiny random BERT."""
    folder = str(tmp_path_factory.mktemp("bert"))
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=100,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=60,
        )
        BertModel(config).float().save_pretrained(folder)
    return folder


def small(folder, *options, epochs=1):
    return [
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_epochs={epochs}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--data.batch_size=24",
        "--model.network.sizes.width=8",
        "--model.network.sizes.heads=2",
        "--model.network.sizes.layers=1",
        "--model.network.sizes.length=4",
        "--model.network.losses.prototypes.em_iterations=2",
        "--model.network.losses.prototypes.covariance_type=diag",
        *options,
    ]


def config_of(name):
    return f"--config={CONFIGS / name}.yaml"


def read_log(folder, version=0):
    """Return a row for each epoch: its training terms and validation metrics."""
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    rows = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found = {key: value for key, value in row.items() if value != ""}
            rows.setdefault(row["epoch"], {}).update(found)
    return [row for row in rows.values() if "train/loss" in row]


def state_of(folder):
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


# --- every data set ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mosi", "mosei", "sims", "iemocap"])
def test_fit_leaves_everything(name, samples, bert, tmp_path):
    text = [] if name == "iemocap" else [f"--model.text.name={bert}"]
    run = [config_of(name), f"--data.path={samples[name]}", *small(tmp_path, *text)]
    main(["fit", *run])

    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["data"]["init_args"]["path"] == samples[name]
    network = config["model"]["network"]["init_args"]
    assert network["sizes"]["attention_dropout"] is not None
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["seed"] == 1
    assert torch.__version__.startswith(environment["torch"])  # which may lack the +cu130
    assert environment["data"].startswith("sha256:")

    [row] = read_log(tmp_path)
    terms = ["task", "loss", "dec", "transport", "prototype", "hete", "sem", "mmd", "homo"]
    assert {f"train/{term}" for term in terms} <= row.keys()
    assert all(np.isfinite(float(value)) for value in row.values())
    expected = {"mosi": "acc7", "mosei": "acc7", "sims": "acc3", "iemocap": "weighted_f1"}[name]
    assert f"val/{expected}" in row

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    with (tmp_path / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [row["id"] for row in predictions] == [f"sample$_${n}" for n in range(11)]
    labels, said = (
        np.array([float(row[k]) for row in predictions]) for k in ("label", "prediction")
    )
    if name == "iemocap":
        assert metrics["accuracy"] == pytest.approx((labels == said).mean(), abs=1e-6)
    else:
        assert metrics["mae"] == pytest.approx(np.abs(labels - said).mean(), abs=1e-5)
    with np.load(tmp_path / "features.npz") as features:
        assert sorted(features.files) == sorted(
            f"{kind}/{m}" for kind in ("unique", "common") for m in ("text", "audio", "vision")
        )
        assert features["unique/audio"].shape == (11, 8)

    # `test` and `predict` evaluate the folder's checkpoint, into folders of their own.
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    main(["test", *run])
    main(["predict", *run])
    # A checkpoint can be named, and evaluated elsewhere on other data.
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    elsewhere = tmp_path / "elsewhere"
    missing = json.dumps({"test": {"vision": 1.0}})
    main(
        [
            *("test", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={checkpoint}"),
            *(f"--trainer.default_root_dir={elsewhere}", f"--data.missing={missing}"),
        ]
    )
    found = tmp_path / "evaluations"
    assert json.loads((found / "1" / "metrics.json").read_text()) == metrics
    same = (found / "2" / "predictions.csv").read_text()
    assert same == (tmp_path / "predictions.csv").read_text()
    other = json.loads((elsewhere / "evaluations" / "1" / "metrics.json").read_text())
    assert other != metrics
    assert {path: path.read_bytes() for path in before} == before


def test_the_saved_configuration_repeats_the_run(samples, tmp_path):
    run = [config_of("iemocap"), f"--data.path={samples['iemocap']}"]
    main(["fit", *run, *small(tmp_path / "one")])
    saved = f"--config={tmp_path / 'one' / 'config.yaml'}"
    main(["fit", saved, f"--trainer.default_root_dir={tmp_path / 'two'}"])
    for file in ("metrics.json", "predictions.csv"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_a_folder_belongs_to_one_configuration(samples, tmp_path):
    run = [config_of("iemocap"), f"--data.path={samples['iemocap']}", *small(tmp_path)]
    main(["fit", *run])
    with pytest.raises(
        FileExistsError, match=r"other options \(model\..*alpha: 0.05 there, 0.5 here"
    ):
        main(["fit", *run, "--model.network.losses.alpha=0.5"])
    with pytest.raises(FileNotFoundError, match="ckpt_path must name a checkpoint"):
        main(["test", *run, f"--trainer.default_root_dir={tmp_path / 'elsewhere'}"])


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_a_finished_run_is_trained_longer(schedule, samples, tmp_path):
    run = [config_of("iemocap"), f"--data.path={samples['iemocap']}"]
    options = [f"--model.schedule={schedule}"]
    main(["fit", *run, *small(tmp_path, *options)])
    main(["fit", *run, *small(tmp_path, *options, epochs=3)])
    assert [row["epoch"] for row in read_log(tmp_path, version=1)] == ["1", "2"]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_best_epoch_can_be_chosen(samples, tmp_path):
    run = [config_of("iemocap"), f"--data.path={samples['iemocap']}"]
    # So high a rate spoils what the first epoch has learnt.
    options = ["--select=best", "--model.learning_rate=0.3", "--model.schedule=constant"]
    main(["fit", *run, *small(tmp_path, *options, epochs=3)])
    losses = [float(row["val/loss"]) for row in read_log(tmp_path)]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == int(np.argmin(losses))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("network", ["DecAlign", "MulT", "MISA"])
def test_precisions(network, precision, samples, tmp_path):
    run = [config_of("sims"), f"--data.path={samples['sims']}", *small(tmp_path)]
    run += [f"--trainer.precision={precision}", "--data.text=features", "--model.text=null"]
    ct = ["--model.network.switches.ct=true"] if network == "DecAlign" else []
    main(["fit", *run, *ct, *([] if ct else [f"--model.network={network}"])])
    [row] = read_log(tmp_path)
    assert all(np.isfinite(float(value)) for value in row.values())


def test_six_modalities_by_configuration_alone(tmp_path):
    run = [config_of("digits"), config_of("digits_six"), *small(tmp_path)]
    main(["fit", *run, "--data.batch_size=128", "--trainer.limit_train_batches=2"])
    with np.load(tmp_path / "features.npz") as features:
        assert len([name for name in features.files if name.startswith("unique/")]) == 6
    shapes = {
        name: x.shape for name, x in state_of(tmp_path).items() if name.endswith("conv.weight")
    }
    assert [shape[1] for shape in shapes.values()] == [8, 4, 16, 8, 4, 8]


def test_modalities_missing_in_training_and_test(samples, tmp_path):
    missing = {"train": {"text": 0.5}, "test": {"text": 1.0, "audio": 0.5}}
    run = [config_of("iemocap"), f"--data.path={samples['iemocap']}", *small(tmp_path)]
    main(["fit", *run, f"--data.missing={json.dumps(missing)}"])
    [row] = read_log(tmp_path)
    assert all(np.isfinite(float(value)) for value in row.values())
    with np.load(tmp_path / "features.npz") as features:
        assert (features["common/text"] == 0).all()
        gone = (features["common/audio"] == 0).all(1)
        assert gone.sum() == round(0.5 * 11)


def test_it_learns(samples, tmp_path):
    run = [config_of("mosi"), f"--data.path={samples['mosi']}", "--data.text=features"]
    options = ["--model.text=null", "--model.learning_rate=0.01", "--model.schedule=onecycle"]
    main(["fit", *run, *small(tmp_path, *options, epochs=12)])
    assert json.loads((tmp_path / "metrics.json").read_text())["corr"] > 0.8
    losses = [float(row["train/task"]) for row in read_log(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


# --- text --------------------------------------------------------------------------------------


def test_text_encoder_is_the_saved_model(bert):
    encoder = TextEncoder(Text(name=bert)).eval()
    reference = BertModel.from_pretrained(bert).eval()
    ids = torch.randint(100, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [0]])
    segments = torch.zeros_like(ids)
    segments[0, 4:] = 1
    states, valid = encoder(torch.stack([ids, mask.long(), segments], 1))
    assert encoder.width == 8
    assert torch.equal(valid, mask)
    expected = reference(ids, mask.long(), segments).last_hidden_state
    torch.testing.assert_close(states[:2], expected[:2])
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_text_encoder_is_trained_unless_frozen(frozen, bert, samples, tmp_path):
    text = Text(name=bert, frozen=frozen, learning_rate=1e-3)
    data = MOSI(samples["mosi"], text="tokens")
    task = Training(data.modalities, data.target, DecAlign, text=text, schedule="constant")
    before = {name: p.clone() for name, p in task.text_encoder.named_parameters()}
    groups = task.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == ([5e-5] if frozen else [5e-5, 1e-3])
    [batch] = [data.splits["train"].all()]
    task.train()
    assert task.text_encoder.transformer.training != frozen
    loss = task.network.objective(task(batch), batch.targets)["task"]
    loss.backward()
    for name, parameter in task.text_encoder.named_parameters():
        if frozen:
            assert parameter.grad is None
        else:
            # Of a key's bias, which no softmax feels, the gradient is only rounding.
            assert parameter.grad is not None, name
    assert before.keys() == dict(task.text_encoder.named_parameters()).keys()


def test_tokens_need_an_encoder(samples):
    data = MOSI(samples["mosi"], text="tokens")
    with pytest.raises(ValueError, match="text must name the encoder of one modality of token ids"):
        Training(data.modalities, data.target)


# --- resumed -----------------------------------------------------------------------------------


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("schedule", ["plateau", "onecycle"])
def test_an_interrupted_run_goes_on(schedule, samples, tmp_path, monkeypatch):
    options = [
        f"--model.schedule={schedule}",
        "--model.learning_rate=0.02",
        # The mixture of earlier batches is part of the state.
        "--model.network.losses.prototypes.momentum=0.9",
        *(
            f"--model.network.sizes.{place}_dropout=0.0"
            for place in ("input", "attention", "relu", "embedding", "residual", "output")
        ),
        "--model.network.architecture.pde=mlp",
    ]

    def fit(folder):
        run = [config_of("iemocap"), f"--data.path={samples['iemocap']}"]
        main(["fit", *run, *small(folder, *options, epochs=6)])

    fit(tmp_path / "whole")

    steps = []
    original = Training.training_step

    def interrupted(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 8:  # in the fourth epoch of two batches
            raise InterruptionError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Training, "training_step", interrupted)
    with pytest.raises(InterruptionError):
        fit(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "metrics.json").exists()
    # As in a new process.
    torch.manual_seed(1234)
    fit(tmp_path / "resumed")
    assert len(steps) == 8 + 6
    assert [row["epoch"] for row in read_log(tmp_path / "resumed", 1)] == ["3", "4", "5"]

    # Only the start of the components is random here, which the running mixtures replace: samples,
    # weights, mixtures and schedule go on as they were.
    one, two = (state_of(tmp_path / run) for run in ("whole", "resumed"))
    assert one.keys() == two.keys()
    assert any("running" in name for name in one)
    whole, resumed = (
        [float(row["val/loss"]) for row in rows]
        for rows in (read_log(tmp_path / "whole")[3:], read_log(tmp_path / "resumed", 1))
    )
    assert resumed == pytest.approx(whole, rel=0.02)


# --- two processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sims", pytest.param("digits", marks=pytest.mark.long)])
def test_two_processes_train_as_one(name, samples, tmp_path):
    """DDP on two gloo ranks against one process with batches twice as large."""
    # What draws numbers of its own on every process is off. The prototypes start from rows of the
    # batch, whose order differs.
    options = [
        "--trainer.precision=64-true",
        "--model.network.architecture.pde=mlp",
        "--model.network.switches.hete=false",
        *(
            f"--model.network.sizes.{place}_dropout=0.0"
            for place in ("input", "attention", "relu", "embedding", "residual", "output")
        ),
        "--model.learning_rate=0.01",
        "--model.schedule=constant",
    ]
    if name == "sims":
        options += [f"--data.path={samples['sims']}", "--data.text=features", "--model.text=null"]
    else:
        options.append("--trainer.limit_train_batches=3")
    run = ["fit", config_of(name)]
    main([*run, *small(tmp_path / "one", *options, epochs=2)])

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        *("-m", "examples.decalign", *run),
        *small(tmp_path / "two", *options, epochs=2),
        *("--data.batch_size=12", "--trainer.devices=2", "--trainer.strategy=ddp"),
    ]
    for _ in range(3):
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        # A thread of gloo may abort a process at its end, and torchrun then stops the other.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-4000:]

    one, two = (state_of(tmp_path / folder) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        # The gradient of a key's bias, which no softmax feels, is rounding, and Adam steps by it.
        if not key.endswith("in_proj_bias"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=1e-8, msg=key)
    metrics = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=2e-6)
    files = [(tmp_path / f / "predictions.csv").read_text().splitlines() for f in ("one", "two")]
    assert [line.split(",")[0] for line in files[0]] == [line.split(",")[0] for line in files[1]]


# --- the command line --------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for command in (
        *("fit", "validate", "test", "predict", "table", "ablate", "sensitivity", "figures"),
        *("table1", "convert", "make_sample", "extract"),
    ):
        assert f"\n  {command} " in printed


def test_an_error_is_one_line(samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)
    run = ["fit", config_of("iemocap"), f"--trainer.default_root_dir={tmp_path}"]
    for args, text in [
        ([*run, "--data.path=nowhere.pkl"], "path must be a data set's file; got nowhere.pkl"),
        (["fitt"], "the command must be one of fit, validate"),
    ]:
        with pytest.raises(SystemExit) as caught:
            console(args)
        message = str(caught.value)
        assert text in message
        assert message.startswith("error: ")
        assert "\n" not in message
        assert "Traceback" not in capsys.readouterr().err
        with pytest.raises(SystemExit):
            console([*args, "--debug"])
        assert "Traceback" in capsys.readouterr().err


def test_every_option_has_a_text(capsys):
    with pytest.raises(SystemExit):
        TrainingCLI(["fit", "--model.network.help=DecAlign"])
    printed = capsys.readouterr().out
    assert "Weight of the heterogeneous alignment." in printed
    assert "The rate for raw features" in printed
    with pytest.raises(SystemExit):
        TrainingCLI(["fit", "--data.help=Arrays"])
    assert "The number of categories that a score is cut into" in capsys.readouterr().out
