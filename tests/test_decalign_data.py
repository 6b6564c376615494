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

from examples.benchmarking.baselines import baseline_scores
from examples.benchmarking.cli import main
from examples.decalign.data import (
    CHSIMS,
    IEMOCAP,
    MOSEI,
    MOSI,
    VIEWS,
    Arrays,
    Batch,
    DataWarning,
    DigitsData,
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
            r"train audio_lengths must be whole numbers in \[0, 6\], the steps; got 7 to 7",
        ),
        (
            lambda d: d["train"].update(vision_lengths=[3] * 11),
            r"train vision_lengths has shape \(11,\); expected \(12,\)",
        ),
        (lambda d: d["train"].update(id=["a"]), r"train\['id'\] has 1 entries; expected a list"),
        (lambda d: d["train"].update(id=None), r"train\['id'\] has None; expected a list of 12"),
        (
            lambda d: d["train"].update(audio_lengths=np.full((12, 1), 3)),
            r"train audio_lengths has shape \(12, 1\); expected \(12,\)",
        ),
        (
            lambda d: d["train"].update(audio_lengths=3),
            r"train audio_lengths has shape \(\); expected \(12,\)",
        ),
        (
            lambda d: d["train"].update(text_bert=np.ones((12, 6), np.int64)),
            r"train\['text_bert'\] has shape \(12, 6\); expected \(N, 3, T\) with N = 12",
        ),
        (
            lambda d: d["train"].update(vision=[np.ones((1 + n % 2, 2 + n)) for n in range(12)]),
            r"train\['vision'\] must be a list of arrays \(T, d\) of one d",
        ),
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


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
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


def test_a_mask_of_the_text_that_drops_other_steps_is_not_taken(write):
    """A left-padded file: the attention mask begins where the text does, audio is everywhere."""

    def change(content):
        for table in content.values():
            table["text"] = np.flip(table["text"], 1)
            table["text_bert"] = np.flip(table["text_bert"], 2)
            table["audio"] = np.where(np.isfinite(table["audio"]), table["audio"], 1)
            table["text_bert"][:, 1, :3] = 0
            table["vision"][:, :4] = 0

    with pytest.warns(DataWarning) as caught:
        masks = MOSI(write(change=change)).splits["train"].samples.masks
    found = [str(warning.message) for warning in caught]
    assert any("train audio: the text's attention mask would drop" in text for text in found)
    content = read_pickle(write(change=change))["train"]
    nonzero = torch.from_numpy(content["audio"] != 0).any(-1)
    assert (masks["audio"] | ~nonzero).all()


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
def test_ragged_lists_and_whole_numbers_are_features(write):
    def change(content):
        for table in content.values():
            count = len(table["text"])
            table["audio"] = [np.ones((2 + n % 3, 4), np.float32) for n in range(count)]
            table["vision"] = np.ones((count, 6, 4), np.int64)

    data = MOSI(write(change=change))
    assert data.modalities == {"text": 4, "audio": 4, "vision": 4}
    samples = data.splits["train"].samples
    assert samples.masks["audio"].sum(1).tolist() == [2 + n % 3 for n in range(12)]
    assert samples.features["vision"].is_floating_point()


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
def test_dialogues_are_converted_and_lists_of_examples_refused(tmp_path):
    generator = np.random.default_rng(0)
    lengths = {f"v{n}": 2 + n % 3 for n in range(12)}

    def each(make):
        return {video: [make(n) for n in range(count)] for video, count in lengths.items()}

    content = (
        {video: [f"{video}_{n}" for n in range(count)] for video, count in lengths.items()},
        each(lambda n: "M"),
        each(lambda n: n),
        each(lambda n: generator.normal(size=5)),
        each(lambda n: generator.normal(size=3)),
        each(lambda n: generator.normal(size=4)),
        each(lambda n: "words"),
        {f"v{n}" for n in range(10)},
        {"v10", "v11"},
    )
    source, destination = tmp_path / "a.pkl", tmp_path / "a.safetensors"
    source.write_bytes(pickle.dumps(content))
    convert(source, destination)
    data = IEMOCAP(str(destination))
    assert data.modalities == {"text": 5, "audio": 3, "vision": 4}
    test = data.splits["test"]
    assert test.ids == [f"v10_{n}" for n in range(3)] + [f"v11_{n}" for n in range(4)]
    assert test.samples.targets.tolist() == [0, 1, 2, 0, 1, 2, 3]
    source.write_bytes(pickle.dumps([(("words", 1, 2), 3.0, "segment")]))
    with pytest.raises(ValueError, match="a list of examples, as MISA writes"):
        convert(source, destination)


# --- your own ----------------------------------------------------------------------------------


def own(count=60, seed=0):
    """Return six modalities of other names, lengths and widths, and labels."""
    generator = np.random.default_rng(seed)
    shapes = {"eeg": (7, 3), "gaze": (1, 2), "Sprache 1": (4, 5), "a-b": (2, 1), "c": (3, 3)}
    arrays = {name: generator.normal(size=(count, *shape)) for name, shape in shapes.items()}
    arrays["table"] = generator.normal(size=(count, 6))
    arrays["labels"] = np.arange(count) % 3
    return arrays


def save(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def test_six_views_of_an_npz(tmp_path):
    arrays = own()
    data = Arrays(save(tmp_path / "a.npz", arrays))
    assert data.modalities == {"eeg": 3, "gaze": 2, "Sprache 1": 5, "a-b": 1, "c": 3, "table": 6}
    assert data.target.categories == ("0", "1", "2")
    sizes = {split: len(samples) for split, samples in data.splits.items()}
    assert sizes == {"train": 43, "valid": 5, "test": 12}
    ids = [name for samples in data.splits.values() for name in samples.ids]
    assert sorted(map(int, ids)) == list(range(60))
    test = data.splits["test"]
    rows = list(map(int, test.ids))
    np.testing.assert_allclose(test.samples.features["table"][:, 0], arrays["table"][rows], 1e-6)
    assert Arrays(data.path, modalities=["table", "eeg"]).modalities == {"table": 6, "eeg": 3}


def test_own_splits_masks_names_and_scores(tmp_path):
    arrays = own()
    arrays["split"] = np.array(["train"] * 40 + ["test"] * 20)
    arrays["id"] = np.array([f"n{n}" for n in range(60)])
    arrays["labels"] = np.linspace(2, 9, 60).reshape(60, 1, 1)  # as MulT's files
    arrays["eeg_lengths"] = np.arange(60) % 8
    arrays["c_mask"] = np.ones((60, 3))
    arrays["c_mask"][:, 1] = 0
    data = Arrays(save(tmp_path / "a.npz", arrays), labels="scores", bins=7)
    assert data.target.limits == (2, 9)
    assert data.target.categories[:2] == ("2 to 3", "3 to 4")
    assert len(data.splits["train"]) + len(data.splits["valid"]) == 40
    test = data.splits["test"]
    assert test.ids[0] == "n40"
    assert test.samples.masks["eeg"].sum(1).tolist() == [n % 8 for n in range(40, 60)]
    assert test.samples.masks["c"][0].tolist() == [True, False, True]


def test_own_tables_of_a_pickle_with_ragged_lists_and_names(tmp_path):
    tables = {
        split: {
            "a": [np.ones((1 + n % 4, 2)) for n in range(count)],
            "b": np.random.default_rng(0).normal(size=(count, 3)),
            "labels": ["cat", "dog", "cat"][:3] * (count // 3),
        }
        for split, count in {"train": 30, "valid": 6, "test": 6}.items()
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(tables))
    data = Arrays(str(path))
    assert data.target.categories == ("cat", "dog")
    assert data.splits["valid"].samples.targets.tolist() == [0, 1, 0] * 2
    assert data.splits["test"].samples.masks["a"].sum(1).tolist() == [1, 2, 3, 4, 1, 2]
    flat = {f"{s}/{k}": np.asarray(v) for s, t in tables.items() for k, v in t.items() if k != "a"}
    flat |= {f"{s}/c": flat[f"{s}/b"] for s in tables}
    again = Arrays(save(tmp_path / "a.npz", flat))
    assert torch.equal(
        again.splits["test"].samples.features["b"], data.splits["test"].samples.features["b"]
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda d: d.pop("labels"), {}, "'labels' is missing; there are"),
        (lambda d: d.update(labels=d["labels"][:-1]), {}, r"'eeg' has shape \(60, 7, 3\).*N = 59"),
        (lambda d: d.update(labels=d["labels"] - 1), {}, "'labels' must be whole numbers from 0"),
        (lambda d: d.update(labels=d["labels"] + 0.5), {}, "'labels' must be whole numbers from 0"),
        (lambda d: d.update(labels=np.full(60, np.nan)), {"labels": "scores"}, "finite scores"),
        (
            lambda d: d.update(labels=np.array(["a"] * 60)),
            {"labels": "scores"},
            "got strings|hold num",
        ),
        (lambda d: d.update(c=np.array(["x"] * 60)), {}, "'c' must hold numbers; got <U1"),
        (lambda d: d.update(c_lengths=np.full(60, 4)), {}, r"'c_lengths' must be whole .*\[0, 3\]"),
        (lambda d: d.update(c_mask=np.ones((60, 4))), {}, r"'c_mask' has shape \(60, 4\)"),
        (lambda d: d.update(split=np.array(["dev"] * 60)), {}, r"'split' must hold .*\['dev'\]"),
        (
            lambda d: None,
            {"modalities": ["eeg", "smell"]},
            "there is no modality 'smell'; the file",
        ),
        (lambda d: None, {"categories": ["a"]}, "'labels' has 3 classes; categories names 1"),
        (lambda d: [d.pop(k) for k in list(d) if k not in ("c", "labels")], {}, "at least two"),
    ],
)
def test_own_files_name_what_is_wrong(change, options, message, tmp_path):
    arrays = own()
    change(arrays)
    with pytest.raises(SchemaError, match=message) as caught:
        Arrays(save(tmp_path / "a.npz", arrays), **options).splits  # noqa: B018
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
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


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
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


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
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


class Process:
    """What a data module asks a trainer."""

    def __init__(self, rank, ranks):
        self.global_rank, self.world_size = rank, ranks


def rows(data, loader, rank=0, ranks=1, epoch=0):
    data.trainer = Process(rank, ranks)
    found = getattr(data, loader)()
    if loader == "train_dataloader":
        found.sampler.set_epoch(epoch)
    return [sorted(batch) for batch in found.batch_sampler], found


def test_ranks_together_see_the_batches_of_one_process(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    one, two = DigitsData(batch_size=100), DigitsData(batch_size=50)
    orders = []
    for epoch in range(2):
        alone, _ = rows(one, "train_dataloader", epoch=epoch)
        both = [rows(two, "train_dataloader", rank, 2, epoch)[0] for rank in (0, 1)]
        assert [sorted(a + b) for a, b in zip(*both, strict=True)] == alone
        assert len({n for batch in alone for n in batch}) == 1200
        orders.append(alone)
    monkeypatch.setenv("PL_GLOBAL_SEED", "40")
    orders.append(rows(one, "train_dataloader")[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_evaluation_leaves_nothing_out():
    data = DigitsData(eval_batch_size=100)
    parts = [list(rows(data, "test_dataloader", rank, 3)[1].sampler) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(450))


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


def test_no_view_suffices_alone():
    scores = baseline_scores(DigitsData())
    accuracy = {name: values["accuracy"] for name, (values, _) in scores.items()}
    assert accuracy["logistic"] > 0.95
    assert accuracy["SVC"] > 0.95
    assert accuracy["random forest"] > 0.95
    assert max(accuracy[f"logistic, {view}"] for view in ("upper", "lower", "coarse")) < 0.93
    assert scores["logistic"][1]["C"] in (0.01, 0.1, 1.0)


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
def test_baselines_of_scores(write):
    scores = baseline_scores(MOSI(write(sizes=(40, 6, 30))))
    assert list(scores) == [
        *("ridge", "SVR", "random forest", "ridge, text", "ridge, audio", "ridge, vision")
    ]
    assert scores["ridge"][0]["corr"] > 0.8
    assert scores["ridge"][0]["mae"] < 1


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
def test_baselines_are_chosen_without_the_test_split(write):
    """What cross-validation chooses does not change with the test labels."""
    one = baseline_scores(IEMOCAP(write("iemocap", sizes=(60, 6, 30))), single=False)

    def change(content):
        content["test"]["classification_labels"][:] = 0

    two = baseline_scores(IEMOCAP(write("iemocap", change, sizes=(60, 6, 30))), single=False)
    assert [best for _, best in one.values()] == [best for _, best in two.values()]
    assert one["SVC"][0] != two["SVC"][0]


def test_samples_need_no_scaling_and_no_ids():
    samples = Samples(Batch({"a": torch.tensor([[[1.0]], [[torch.nan]]])}, {}, torch.zeros(2)))
    assert samples.all().features["a"].flatten().tolist() == [1.0, 0.0]
    assert samples.ids == ["0", "1"]
