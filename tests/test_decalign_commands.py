"""The reference model's tables, figures and feature extraction, from the command line."""

import csv
import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.signal import resample_poly
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from examples.benchmarking import figures, tables
from examples.benchmarking.cli import main
from examples.benchmarking.commands import MODULES, STRATEGIES
from examples.benchmarking.extract import read_vision, read_wave
from examples.decalign.data import MOSI, make_sample, read_dataset

CONFIGS = Path(__file__).parents[1] / "examples" / "decalign" / "configs"

pytestmark = [
    pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def small(name, *options):
    return [
        f"--config={CONFIGS / name}.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--data.batch_size=24",
        "--model.network.sizes.width=8",
        "--model.network.sizes.heads=2",
        "--model.network.sizes.layers=1",
        "--model.network.sizes.length=2",
        "--model.network.losses.prototypes.em_iterations=2",
        "--model.network.losses.prototypes.covariance_type=diag",
        "--workers=1",
        *options,
    ]


@pytest.fixture
def mosi(tmp_path, monkeypatch):
    path = tmp_path / "mosi.pkl"
    make_sample("mosi", path, sizes=(48, 12, 30), steps=4, features=4)
    sizes = {**tables.read_published(), "sizes": {"mosi": [48, 12, 30]}}
    monkeypatch.setattr(tables, "read_published", lambda: sizes)
    return [f"--data.path={path}", "--data.text=features", "--model.text=null"]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


# --- tables and figures ------------------------------------------------------------------------


def test_table_and_figures(mosi, tmp_path, capsys):
    output = tmp_path / "runs"
    run = ["table", *small("mosi", *mosi), f"--output={output}", "--seeds", "1", "2"]
    main(run)
    printed = capsys.readouterr().out
    assert printed.strip() == (output / "table.txt").read_text().strip()
    for row in ("DecAlign (paper)", "MFM (paper)", "decalign", "mult", "misa", "ridge, audio"):
        assert row in printed
    assert "ridge: alpha" in printed
    [line] = [line for line in printed.splitlines() if line.startswith("CGGM (paper)")]
    assert line.split()[2:] == ["0.787", "0.792", "82.73", "82.89", "43.47"]

    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == [
        *("decalign", "mult", "misa"),
        *("ridge", "SVR", "random forest", "ridge, text", "ridge, audio", "ridge, vision"),
    ]
    scores = [
        json.loads((output / "misa" / f"seed_{seed}" / "metrics.json").read_text())["mae"]
        for seed in (1, 2)
    ]
    assert scores[0] != scores[1]
    assert metrics["misa"]["mae"]["seeds"] == scores
    assert metrics["misa"]["mae"]["mean"] == pytest.approx(np.mean(scores))
    assert metrics["misa"]["mae"]["std"] == pytest.approx(np.std(scores, ddof=1))
    assert len(metrics["ridge"]["mae"]["seeds"]) == 1

    # A second time, nothing is trained: the checkpoints stay as they are.
    checkpoint = output / "misa" / "seed_2" / "checkpoints" / "last.ckpt"
    before = checkpoint.stat().st_mtime_ns
    main(run)
    assert checkpoint.stat().st_mtime_ns == before
    assert capsys.readouterr().out == printed

    main(["figures", str(output)])
    printed = capsys.readouterr().out
    for name in ("figure_1.png", "figure_3.png"):
        assert is_png(output / name)
    assert "figure_5.png: there are no runs of `sensitivity`" in printed

    main(["table1", str(output)])
    table = capsys.readouterr().out.splitlines()
    [line] = [line for line in table if line.startswith("AOBERT")]
    known = "AOBERT (paper) 0.780 83.03 83.02 0.588 83.90 83.64 71.04 70.89 0.430 78.55"
    assert line.split() == known.split()
    [line] = [line for line in table if line.startswith("ReconBoost")]
    assert line.split()[-2:] == ["0.413", "80.41"]
    [line] = [line for line in table if line.startswith("misa")]
    assert line.split()[1:4] == f"{np.mean(scores):.3f} +- {np.std(scores, ddof=1):.3f}".split()


def test_ablation_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN_PAIRS", 10)
    output = tmp_path / "runs"
    options = ["--data.batch_size=128", "--trainer.limit_train_batches=2"]
    main(["ablate", *small("digits", *options), f"--output={output}", "--seeds", "1"])
    printed = capsys.readouterr().out
    found = json.loads((output / "ablation.json").read_text())
    assert list(found) == list(MODULES | STRATEGIES)
    for name in found:
        assert name in printed
        # The switches arrive: the runs differ.
    assert len({json.dumps(scores) for scores in found.values()}) > 5
    switches = {
        name: yaml.safe_load((output / name / "seed_1" / "config.yaml").read_text())["model"][
            "network"
        ]["init_args"]["switches"]
        for name in found
    }
    off = {name: {key for key, on in values.items() if not on} for name, values in switches.items()}
    assert off["decalign"] == {"ct"}
    assert off["none"] == {"mfd", "hete", "homo", "ct"}
    assert off["with_ct"] == set()
    assert off["no_proto_ot"] == {"proto_ot"}

    main(["figures", str(output)])
    assert "figure_1.png: there are no paper's rows" in capsys.readouterr().out
    for name in ("figure_3.png", "figure_4.png", "figure_4_gap.png"):
        assert is_png(output / name)


def test_ablation_beside_the_papers(mosi, tmp_path, capsys):
    main(
        [
            *("ablate", *small("mosi", *mosi), f"--output={tmp_path / 'runs'}"),
            *("--seeds", "1", "2", "--halves", "strategies"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("no_sem")]
    assert line.split()[-1] == "84.73"
    # Without CT stands where Eq. 13 does.
    [line] = [line for line in lines if line.startswith("decalign")]
    assert line.split()[-1] == "84.36"
    assert "[" in line


def test_sensitivity(tmp_path, capsys):
    output = tmp_path / "runs"
    options = ["--data.batch_size=128", "--trainer.limit_train_batches=2"]
    grid = ["--alphas", "0.01", "0.5", "--betas", "0.05"]
    main(["sensitivity", *small("digits", *options), f"--output={output}", "--seeds", "1", *grid])
    found = json.loads((output / "sensitivity.json").read_text())
    assert np.shape(found["values"]) == (2, 1, 1)
    assert found["values"][0] != found["values"][1]
    assert is_png(output / "figure_5.png")
    assert "alpha \\ beta" in capsys.readouterr().out


def test_paper_rows_stand_beside_data_of_the_same_sizes_only(tmp_path, capsys):
    path = tmp_path / "mosi.pkl"
    make_sample("mosi", path, sizes=(48, 12, 30), steps=2, features=2)
    options = [f"--data.path={path}", "--data.text=features", "--model.text=null"]
    output = tmp_path / "runs"
    main(
        ["table", *small("mosi", *options), f"--output={output}", "--seeds=1", "--models=decalign"]
    )
    assert "(paper)" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no data set of Table 1"):
        main(["table1", str(output)])


def test_figures_need_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the output of `table` or `ablate`"):
        main(["figures", str(tmp_path)])


def test_intervals_are_student_t():
    values, reference = [0.97, 0.98, 0.975], [0.96, 0.96, 0.96]
    # mean 1.5, standard error 0.5 / sqrt(3), quantile 4.303
    assert tables.difference("accuracy", values, reference) == "+1.50 [+0.26, +2.74] *"
    assert tables.difference("accuracy", [0.96, 0.97, 0.95], reference).endswith("]  ")
    # In its own unit.
    assert tables.difference("mae", values, reference) == "+0.015 [+0.003, +0.027] *"
    summary = tables.summarise({"full": {"accuracy": values}})
    assert summary["full"]["accuracy"]["std"] == pytest.approx(0.005)
    assert tables.spread("accuracy", values) == "97.50 +- 0.50"
    assert tables.spread("mae", [0.735]) == "0.735"


def test_published_tables_are_the_papers():
    paper = tables.read_published()
    assert [len(paper[name]["rows"]) for name in ("mosi", "mosei", "iemocap", "sims")] == [14] * 4
    for name in ("mosi", "mosei", "iemocap", "sims"):
        rows = paper[name]["rows"]
        assert list(rows)[-1] == "DecAlign"
        # The paper calls its own the best in every column.
        for place, metric in enumerate(paper[name]["columns"]):
            best = (min if metric == "mae" else max)(row[place] for row in rows.values())
            assert rows["DecAlign"][place] == best
    # Table 2's full model is Table 5's and Table 6's.
    for name in ("mosi", "mosei"):
        mae, *_, f1 = paper[name]["rows"]["DecAlign"]
        assert paper["table_2"][name]["decalign"] == [mae, f1]


def test_gap_measures():
    x = np.random.default_rng(0).normal(size=(400, 6))
    assert figures.centre_gap(x, x) == 0
    assert figures.pair_ratio(x, x) == 0
    shifted = x + 10.0
    assert figures.centre_gap(x, shifted) == pytest.approx(10.0, rel=0.1)
    assert figures.pair_ratio(x, np.flip(x, 0)) == pytest.approx(1.0, rel=0.05)


def test_f1_of_each_category():
    found = figures.category_f1(np.array([0, 0, 1, 3]), np.array([0, 1, 1, 3]), 4)
    np.testing.assert_allclose(found, [2 / 3, 2 / 3, 0, 1])


# --- extraction --------------------------------------------------------------------------------


def write_wave(path, sound, rate, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 2**15).astype("<i2").tobytes())


@pytest.fixture
def encoders(tmp_path, transformers_with_models):
    """Save a tiny BERT with its tokenizer and a tiny wav2vec 2.0."""
    text, sound = tmp_path / "bert", tmp_path / "wav2vec"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    text.mkdir()
    (text / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(text).save_pretrained(text)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=16,
        )
    ).save_pretrained(text)
    Wav2Vec2FeatureExtractor().save_pretrained(sound)
    Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            conv_dim=(8, 8),
            conv_stride=(20, 16),
            conv_kernel=(20, 16),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(sound)
    return str(text), str(sound)


@pytest.mark.parametrize("utterance", [False, True])
def test_extract(utterance, encoders, tmp_path, capsys):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(6):
        sound = 0.1 * generator.normal(size=1600 * (1 + number))
        write_wave(tmp_path / f"{number}.wav", sound, 16000)
        frames = ["frame, confidence, AU01_r, AU45_c"]
        frames += [f"{n}, 0.9, {0.5 * n}, 1.0" for n in range(1 + number)]
        (tmp_path / f"{number}.csv").write_text("\n".join(frames))
        text = "good film" if number % 2 else "bad"
        split = ("train", "train", "train", "valid", "test", "test")[number]
        rows.append([f"u{number}", split, number % 2, text, f"{number}.wav", f"{number}.csv"])
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "split", "label", "text", "audio", "vision"), *rows])
    output = tmp_path / "data.safetensors"
    text, sound = encoders
    main(
        [
            *("extract", str(tmp_path / "table.csv"), str(output)),
            *(f"--text={text}", f"--audio={sound}", "--device=cpu"),
            *("--steps=4", "--batch-size=2", *(["--utterance"] if utterance else [])),
        ]
    )
    assert str(output) in capsys.readouterr().out

    table = read_dataset(output)["train"]
    assert table["id"] == ["u0", "u1", "u2"]
    steps = 1 if utterance else 4
    assert [tuple(table[m].shape) for m in ("text", "audio", "vision")] == [
        (3, steps, 8),
        (3, steps, 8),
        (3, steps, 2),
    ]
    assert table["classification_labels"].tolist() == [0, 1, 0]
    if utterance:
        assert table["vision"][2, 0].tolist() == [0.5, 1.0]
    else:
        assert table["text_bert"][1].tolist() == [[2, 5, 7, 3], [1, 1, 1, 1], [0, 0, 0, 0]]
        assert table["text_bert"][0].tolist() == [[2, 6, 3, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
        assert (table["text"][0, 3] == 0).all()
        assert table["vision_lengths"].tolist() == [1, 2, 3]
        assert table["vision"][2].tolist() == [[0, 1], [0.5, 1], [1, 1], [0, 0]]
        # Six frames in four parts: 0 1 | 2 3 | 4 | 5.
        test = read_dataset(output)["test"]["vision"]
        assert test[1, :, 0].tolist() == [0.25, 1.25, 2.0, 2.5]
        # What is written is what the encoder says.
        model = BertModel.from_pretrained(text).eval()
        expected = model(torch.tensor([[2, 5, 7, 3]])).last_hidden_state
        torch.testing.assert_close(table["text"][1:2], expected.detach())
    data = MOSI(str(output), labels="classes")
    assert data.modalities == {"text": 8, "audio": 8, "vision": 2}


def test_extract_names_what_is_missing(tmp_path):
    (tmp_path / "table.csv").write_text("id,split,label\na,train,1\n")
    with pytest.raises(ValueError, match=r"missing: \['text', 'audio', 'vision'\]"):
        main(["extract", str(tmp_path / "table.csv"), str(tmp_path / "out.safetensors")])


def test_read_wave(tmp_path):
    time = np.arange(8000) / 8000
    sound = 0.5 * np.sin(2 * np.pi * 100 * time)
    stereo = np.stack([sound, 0 * sound], 1)
    write_wave(tmp_path / "a.wav", stereo, 8000, channels=2)
    np.testing.assert_allclose(read_wave(tmp_path / "a.wav", 8000), sound / 2, atol=1e-4)
    found = read_wave(tmp_path / "a.wav", 16000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, resample_poly(sound / 2, 2, 1), atol=1e-3)


def test_read_vision(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3.0))
    assert read_vision(tmp_path / "a.npy").tolist() == [[0, 1, 2]]
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_vision(tmp_path / "b.npy")
    (tmp_path / "c.csv").write_text("name,x,y\nf,1,2\ng,3,4\n")
    assert read_vision(tmp_path / "c.csv").tolist() == [[1, 2], [3, 4]]
    (tmp_path / "d.csv").write_text("name,x\n")
    with pytest.raises(ValueError, match="has no frames"):
        read_vision(tmp_path / "d.csv")
