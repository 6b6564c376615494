"""The reference model's data: files read safely, checked, cleaned, masked, scaled and dealt."""

import io
import os
import pickle
import pickletools
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from examples.decalign.__main__ import main
from examples.decalign.baseline import linear_scores
from examples.decalign.data import (
    CHSIMS,
    IEMOCAP,
    MOSEI,
    MOSI,
    VIEWS,
    Batch,
    DigitsData,
    GlobalOrder,
    RefusedPickleError,
    Samples,
    Scaling,
    SchemaError,
    convert,
    make_sample,
    read_dataset,
)
from examples.decalign.data.digits import split_rows
from examples.decalign.data.reader import read_pickle
from examples.decalign.data.sentiment import DataWarning

FILES = {"mosi": MOSI, "mosei": MOSEI, "sims": CHSIMS, "iemocap": IEMOCAP}


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.fixture
def write(tmp_path):
    """Return a function that makes a sample file, changed by another function."""

    def make(name="mosi", change=None, **options):
        path = tmp_path / f"{name}.pkl"
        make_sample(name, path, **{"steps": 6, "features": 4, "sizes": (12, 6, 5), **options})
        if change is not None:
            content = pickle.loads(path.read_bytes())
            change(content)
            path.write_bytes(pickle.dumps(content))
        return str(path)

    return make


# --- reading -----------------------------------------------------------------------------------


class Attack:
    """What a hostile file would hold: a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        ((os.system, "touch {}"), "(posix|nt).system"),
        ((os.mkdir, "{}"), "(posix|nt).mkdir"),
        ((eval, "__import__('os').mkdir('{}')"), "builtins.eval"),
        ((getattr, os, "mkdir"), "builtins.getattr"),
        ((np.load, "{}"), r"numpy.*load"),
        ((np.ndarray, (1,), object, b"12345678"), "NoneType|numpy"),
        ((torch.load, "{}"), "torch.serialization.load"),
    ],
)
def test_reader_refuses_calls_by_name(attack, name, protocol, tmp_path):
    witness = tmp_path / "witness"
    function, *arguments = attack
    arguments = [a.format(witness) if isinstance(a, str) else a for a in arguments]
    path = tmp_path / "data.pkl"
    try:
        path.write_bytes(pickle.dumps({"train": Attack(function, *arguments)}, protocol))
    except (pickle.PicklingError, TypeError):
        pytest.skip("no such pickle")
    with pytest.raises((RefusedPickleError, TypeError), match=name):
        read_pickle(path)
    assert not witness.exists()


def test_reader_refuses_a_dotted_name_inside_numpy(tmp_path):
    # find_class of the base class would walk numpy.testing down to what it imports.
    content = io.BytesIO()
    name = b"testing._private.utils.os.system"
    content.write(b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name)
    content.write(b"\x93\x8c\x04true\x85R.")
    path = tmp_path / "data.pkl"
    path.write_bytes(content.getvalue())
    with pytest.raises(RefusedPickleError, match=r"refused to load numpy\.testing"):
        read_pickle(path)


def test_reader_refuses_objects_made_of_bytes(tmp_path):
    """An array of objects whose content is bytes would be an array of invented pointers."""
    good = pickle.dumps(np.array([None, None], dtype=object), 4)
    ops = list(pickletools.genops(good))
    # The list of elements, from EMPTY_LIST to APPENDS, becomes sixteen bytes.
    start = max(position for op, _, position in ops if op.name == "EMPTY_LIST")
    [end] = [position for op, _, position in ops if op.name == "APPENDS"]
    bad = good[:start] + b"C\x10" + b"\x41" * 16 + good[end + 1 :]
    path = tmp_path / "data.pkl"
    # Without its frame's length, which has changed.
    path.write_bytes(bad[:2] + bad[11:])
    with pytest.raises(RefusedPickleError, match="objects from bytes"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([Attack(os.getcwd)], dtype=object), "refused to load"),
        (np.array([[1], {}], dtype=object), "array of list"),
        (np.zeros(2, dtype=[("a", "f4")]), "dtype 'V4'"),
        (np.array(["2026-01-01"], dtype="M8[D]"), "dtype 'M8'"),
        (torch.zeros(2), "refused to load torch"),
    ],
)
def test_reader_refuses_other_arrays(value, message, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({"train": value}))
    with pytest.raises(RefusedPickleError, match=message):
        read_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reader_reads_what_it_should(protocol, tmp_path):
    content = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "text": np.array(["a", "bcd"]),
        "objects": np.array(["a", 1, None], dtype=object),
        "empty": np.zeros((0, 2)),
        "scalar": np.float64(2.5),
        "plain": [1, 2.0, "three", None, True, (4, b"five"), {6, 7}, bytearray(b"8"), 9j],
        "ordered": OrderedDict(a=1),
    }
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    found, reference = read_pickle(path), pickle.loads(path.read_bytes())
    assert found.keys() == content.keys()
    for key, value in reference.items():
        if isinstance(value, np.ndarray):
            assert isinstance(found[key], np.ndarray)
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


def test_cut_off_files_are_no_data(tmp_path, write):
    path = write()
    content = Path(path).read_bytes()
    for length in (0, 10, len(content) // 2):
        (tmp_path / "cut.pkl").write_bytes(content[:length])
        with pytest.raises(pickle.UnpicklingError):
            read_pickle(tmp_path / "cut.pkl")
    with pytest.raises(FileNotFoundError, match="path must be a data set's file"):
        read_dataset(tmp_path / "nowhere.pkl")


# --- checking ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("valid"), r"split 'valid' is missing; the file has \['train', 'test'\]"),
        (lambda d: d["test"].pop("audio"), r"test\['audio'\] is missing; the split has"),
        (lambda d: d["train"].pop("regression_labels"), r"train\['regression_labels'\] is missing"),
        (
            lambda d: d["train"].update(vision=d["train"]["vision"][:, 0]),
            r"train\['vision'\] has shape \(12, 4\); expected \(N, T, d\) with N = 12",
        ),
        (
            lambda d: d["train"].update(audio=d["train"]["audio"][:-1]),
            r"train\['audio'\] has shape \(11, 6, 4\); expected \(N, T, d\) with N = 12",
        ),
        (
            lambda d: d["test"].update(text=d["test"]["text"][..., :2]),
            r"'text' has other features in other splits: {'train': 4, 'valid': 4, 'test': 2}",
        ),
        (
            lambda d: d["train"].update(text=["words"] * 12),
            r"train\['text'\] must hold numbers; got <U5",
        ),
        (
            lambda d: d["valid"].update(regression_labels=np.full(6, 4.0)),
            r"valid\['regression_labels'\] must lie in \[-3, 3\]; got 4.0 to 4.0",
        ),
        (
            lambda d: d["valid"].update(regression_labels=np.full(6, np.nan)),
            r"valid\['regression_labels'\] must lie in \[-3, 3\]; got nan",
        ),
        (
            lambda d: d["train"].update(audio_lengths=[7] * 12),
            r"'audio_lengths' must lie in \[0, 6\], the steps of 'audio'; got 7 to 7",
        ),
        (
            lambda d: d["train"].update(vision_lengths=[3] * 11),
            r"train\['vision_lengths'\] has 11 entries; expected 12",
        ),
        (lambda d: d["train"].update(id=["a"]), r"train\['id'\] has 1 entries; expected 12"),
    ],
)
def test_schema_names_what_is_wrong(change, message, write):
    with pytest.raises(SchemaError, match=message):
        MOSI(write(change=change)).load()


def test_schema_of_classes_and_tokens(write):
    path = write("iemocap", lambda d: d["test"].update(classification_labels=np.full(5, 6)))
    with pytest.raises(SchemaError, match=r"whole numbers from 0 to 5 for happy, .*; got \[6"):
        IEMOCAP(path).load()
    path = write(change=lambda d: d["test"].update(text_bert=d["test"]["text_bert"][:, :2]))
    with pytest.raises(
        SchemaError, match=r"test\['text_bert'\] has shape \(5, 2, 6\); .*\(N, 3, T"
    ):
        MOSI(path, text="tokens").load()
    Path(path).write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(SchemaError, match="expected a mapping of splits; got list"):
        MOSI(path).load()


# --- cleaning, masks, scaling ------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_features_are_clean_masked_and_standardised(name, write):
    data = FILES[name](write(name, sizes=(40, 6, 5)))
    with pytest.warns(DataWarning, match=r"train audio 2 of \d+; valid audio 2 of \d+; test audio"):
        splits = data.splits
    assert list(splits) == ["train", "valid", "test"]
    assert list(data.modalities) == ["text", "audio", "vision"]
    batch = splits["train"].all()
    for modality, x in batch.features.items():
        assert x.shape[-1] == data.modalities[modality]
        assert torch.isfinite(x).all()
        mask = batch.masks.get(modality, torch.ones(x.shape[:2]) > 0)
        # Two entries of audio are read as 0, which is the mean of the others.
        torch.testing.assert_close(x[mask].mean(0), torch.zeros(x.shape[-1]), atol=1e-5, rtol=0)
        assert (x[mask].std(0, correction=0) - 1).abs().max() < 0.03
    assert torch.isfinite(splits["test"].all().features["audio"]).all()


def test_the_test_split_scales_nothing(write):
    def louder(content):
        content["test"]["vision"] *= 100
        content["valid"]["vision"] *= 100

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        one = MOSI(write()).splits
        two = MOSI(write(change=louder)).splits
    for split in ("train", "test"):
        same = torch.equal(*(x[split].all().features["vision"] for x in (one, two)))
        assert same == (split == "train")


@pytest.mark.filterwarnings("ignore::examples.decalign.data.sentiment.DataWarning")
def test_lengths_come_from_the_file_the_attention_mask_or_the_padding(write):
    unaligned = CHSIMS(write("sims")).splits["train"]
    content = read_pickle(write("sims"))["train"]
    for name in ("audio", "vision"):
        lengths = unaligned.samples.masks[name].sum(1)
        assert lengths.tolist() == content[f"{name}_lengths"]

    content = read_pickle(write())["train"]
    mask = torch.from_numpy(content["text_bert"][:, 1]) > 0
    assert not mask.all()
    for modality, found in MOSI(write()).splits["train"].samples.masks.items():
        assert torch.equal(found, mask), modality

    def bare(changed):
        for table in changed.values():
            del table["text_bert"]
            table["vision"][2] = 0

    found = MOSI(write(change=bare)).splits["train"].samples.masks
    assert torch.equal(found["text"], mask)
    assert not found["vision"][2].any()


@pytest.mark.filterwarnings("ignore::examples.decalign.data.sentiment.DataWarning")
def test_tokens_stay_what_they_are(write):
    data = MOSI(write(), text="tokens")
    assert data.modalities == {"text": 0, "audio": 4, "vision": 4}
    batch = data.splits["train"].all()
    tokens = read_pickle(write())["train"]["text_bert"]
    assert batch.features["text"].dtype == torch.int64
    np.testing.assert_array_equal(batch.features["text"].numpy(), tokens)
    assert torch.equal(batch.masks["text"], batch.features["text"][:, 1] > 0)


def test_scaling_in_pieces_is_scaling(monkeypatch):
    x = torch.randn(50, 3, 4) * 5 + 1e4
    mask = torch.rand(50, 3) > 0.3
    x[7, mask[7].nonzero()[0, 0], 1] = torch.inf
    x[..., 3] = 2.0
    whole, parts = Scaling.measure(x, mask), Scaling.measure(x, mask, chunk=7)
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.deviation, parts.deviation)
    valid = x[mask][:, 0].double()
    assert whole.mean[0] == pytest.approx(valid.mean().item(), rel=1e-6)
    assert whole.deviation[0] == pytest.approx(valid.std(correction=0).item(), rel=1e-4)
    assert torch.isfinite(whole.mean).all()
    assert (whole.apply(x)[..., 3] == 0).all()


@pytest.mark.filterwarnings("ignore::examples.decalign.data.sentiment.DataWarning")
@pytest.mark.parametrize("name", FILES)
def test_converted_file_gives_the_same_data(name, write, tmp_path, capsys):
    path, converted = write(name), str(tmp_path / "data.safetensors")
    main(["convert", path, converted])
    assert converted in capsys.readouterr().out
    before, after = FILES[name](path).splits, FILES[name](converted).splits
    for split in before:
        one, two = before[split].all(), after[split].all()
        assert torch.equal(one.targets, two.targets)
        assert before[split].ids == after[split].ids
        assert one.masks.keys() == two.masks.keys()
        for modality in one.features:
            assert torch.equal(one.features[modality], two.features[modality])
    assert read_dataset(converted)["train"]["raw_text"] == ["words"] * 12


def test_convert_refuses_other_endings(write, tmp_path):
    with pytest.raises(ValueError, match=r"destination must end in .safetensors; got .*\.npz"):
        convert(write(), tmp_path / "data.npz")


def test_make_sample_command(tmp_path):
    path = tmp_path / "made" / "sims.pkl"
    main(["make_sample", "sims", str(path), "--sizes", "4", "3", "2"])
    content = read_dataset(path)
    assert content["train"]["text"].shape == (4, 39, 768)
    assert content["valid"]["audio"].shape == (3, 400, 33)
    assert content["test"]["vision"].shape == (2, 55, 709)


# --- missing modalities ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::examples.decalign.data.sentiment.DataWarning")
def test_missing_modalities_are_masked(write):
    path = write(sizes=(40, 6, 5))
    missing = {"train": {"text": 0.5, "audio": 0.25}, "test": {"vision": 1.0}}
    one, two = (MOSI(path, missing=missing).splits for _ in range(2))
    masks = one["train"].samples.masks
    assert (~masks["text"].any(1)).sum() == 20
    assert (~masks["audio"].any(1)).sum() == 10
    assert masks["vision"].any(1).all()
    assert not one["test"].samples.masks["vision"].any()
    assert torch.equal(masks["text"], two["train"].samples.masks["text"])
    digits = DigitsData(missing={"test": {"upper": 1.0}}).splits
    assert not digits["test"].samples.masks["upper"].any()
    with pytest.raises(
        ValueError, match=r"missing must name modalities of \['text', .*; got 'smell"
    ):
        MOSI(path, missing={"train": {"smell": 1.0}}).train_dataloader()
    with pytest.raises(ValueError, match=r"missing must name splits of .*; got 'dev'"):
        MOSI(path, missing={"dev": {}}).train_dataloader()


# --- order -------------------------------------------------------------------------------------


def test_ranks_together_see_the_batches_of_one_process():
    alone = GlobalOrder(50, 12, shuffle=True, seed=3, rank=0, ranks=1)
    both = [GlobalOrder(50, 6, shuffle=True, seed=3, rank=rank, ranks=2) for rank in (0, 1)]
    for epoch in range(2):
        for order in (alone, *both):
            order.set_epoch(epoch)
        rows = [torch.tensor(list(order)) for order in (alone, *both)]
        assert [len(order) for order in (alone, *both)] == [48, 24, 24]
        batches = torch.cat([part.view(4, 6) for part in rows[1:]], 1)
        assert torch.equal(rows[0].view(4, 12), batches)
        assert len(rows[0].unique()) == 48
    assert not torch.equal(rows[0], torch.arange(48))
    other = GlobalOrder(50, 12, shuffle=True, seed=4, rank=0, ranks=1)
    other.set_epoch(1)
    assert list(other) != list(alone)


def test_order_without_shuffling_leaves_nothing_out():
    parts = [GlobalOrder(11, 4, shuffle=False, seed=0, rank=r, ranks=3) for r in range(3)]
    assert [row for part in parts for row in part] == list(range(11))


# --- digits ------------------------------------------------------------------------------------


def test_views_are_the_images():
    images = load_digits().images.astype(np.float32)
    views = {name: view(images) for name, view in VIEWS.items()}
    assert {name: view.shape[1:] for name, view in views.items()} == {
        "upper": (4, 8),
        "lower": (8, 4),
        "coarse": (1, 16),
        "left": (4, 8),
        "right": (8, 4),
        "profile": (2, 8),
    }
    joined = np.concatenate([views["upper"], views["lower"].transpose(0, 2, 1)], 1)
    np.testing.assert_array_equal(joined, images)
    joined = np.concatenate([views["left"].transpose(0, 2, 1), views["right"]], 2)
    np.testing.assert_array_equal(joined, images)
    np.testing.assert_allclose(views["coarse"][7, 0, 1], images[7, :2, 2:4].mean())
    np.testing.assert_array_equal(views["profile"][5, 1], images[5].sum(0))
    with pytest.raises(ValueError, match=r"views must be among .*; got \['middle'\]"):
        DigitsData(views=("upper", "middle"))


def test_splits_are_stratified_disjoint_and_fixed():
    targets = load_digits().target
    rows = split_rows(targets, 0.1)
    assert {name: len(chosen) for name, chosen in rows.items()} == {
        "train": 1212,
        "valid": 135,
        "test": 450,
    }
    assert len(np.unique(np.concatenate(list(rows.values())))) == len(targets)
    shares = np.bincount(targets[rows["test"]]) / np.bincount(targets)
    assert np.abs(shares - 0.25).max() < 0.01
    np.random.seed(123)  # noqa: NPY002
    np.testing.assert_array_equal(split_rows(targets, 0.3)["test"], rows["test"])


def test_digits_are_standardised_by_the_training_split_alone(monkeypatch):
    data = DigitsData()
    train = data.splits["train"].all()
    for name, x in train.features.items():
        assert x.shape[-1] == data.modalities[name]
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1:]), atol=1e-5, rtol=0)
        spread = x.std(0, correction=0)
        assert ((spread - 1).abs().lt(1e-4) | (spread == 0)).all()
        assert torch.isfinite(data.splits["test"].all().features[name]).all()

    # Other test images change nothing that training sees.
    digits = load_digits()
    digits.images[split_rows(digits.target, 0.1)["test"]] *= -3
    monkeypatch.setattr("examples.decalign.data.digits.load_digits", lambda: digits)
    for name, x in DigitsData().splits["train"].all().features.items():
        assert torch.equal(train.features[name], x)


def test_loaders_give_whole_batches():
    data = DigitsData(batch_size=100, eval_batch_size=300)
    batches = list(data.train_dataloader())
    assert [len(batch.targets) for batch in batches] == [100] * 12
    assert batches[0].features["lower"].shape == (100, 8, 4)
    batches = list(data.test_dataloader())
    assert [len(batch.targets) for batch in batches] == [300, 150]
    joined = torch.cat([batch.targets for batch in batches])
    assert torch.equal(joined, data.splits["test"].samples.targets)
    assert data.splits["test"][3].targets.shape == (1,)


def test_loading_draws_no_global_random_numbers():
    data = DigitsData()
    state = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_view_suffices_alone():
    scores = {name: values["accuracy"] for name, values in linear_scores(DigitsData()).items()}
    assert scores["linear"] > 0.95
    assert max(scores[f"linear_{view}"] for view in ("upper", "lower", "coarse")) < 0.93


@pytest.mark.filterwarnings("ignore::examples.decalign.data.sentiment.DataWarning")
def test_linear_regression_of_scores(write):
    scores = linear_scores(MOSI(write(sizes=(40, 6, 30))))
    assert list(scores) == ["linear", "linear_text", "linear_audio", "linear_vision"]
    assert scores["linear"]["corr"] > 0.8
    assert scores["linear"]["mae"] < 1


def test_samples_need_no_scaling_and_no_ids():
    samples = Samples(Batch({"a": torch.tensor([[[1.0]], [[torch.nan]]])}, {}, torch.zeros(2)))
    assert samples.all().features["a"].flatten().tolist() == [1.0, 0.0]
    assert samples.ids == ["0", "1"]
