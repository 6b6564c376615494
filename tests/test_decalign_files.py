"""Files that are cut off, foreign or hostile: named in the error, and nothing in them is run."""

import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

from examples.benchmarking.cli import main
from examples.benchmarking.extract import read_vision, read_wave
from examples.benchmarking.runs import Run
from examples.benchmarking.storage import Checkpoints, replacing
from examples.benchmarking.text import Text, TextEncoder
from examples.decalign.data import (
    MOSI,
    RefusedPickleError,
    SchemaError,
    convert,
    make_sample,
    reader,
)
from examples.decalign.data.reader import read_dataset, read_pickle
from tests import kill_training


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.fixture
def witness(tmp_path):
    """Return a path that is made only if a file's code runs."""
    path = tmp_path / "witness"
    yield path
    assert not path.exists()


class Call:
    """What a hostile file holds."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# --- cut off and foreign -----------------------------------------------------------------------


def test_a_pickle_cut_off_anywhere_is_named(tmp_path):
    path, cut = tmp_path / "data.pkl", tmp_path / "cut.pkl"
    make_sample("mosi", path, sizes=(6, 3, 2), steps=3, features=2)
    content = path.read_bytes()
    lengths = {*range(0, 200), *range(200, len(content), len(content) // 300), len(content) - 1}
    for length in sorted(lengths):
        cut.write_bytes(content[:length])
        with pytest.raises(pickle.UnpicklingError, match=r"cut\.pkl is no whole pickle"):
            MOSI(str(cut)).load()


def test_a_damaged_pickle_gives_data_or_is_named(tmp_path):
    """Any byte may be another one: no error but ours, and no import."""
    path, bad = tmp_path / "data.pkl", tmp_path / "bad.pkl"
    make_sample("mosi", path, sizes=(6, 3, 2), steps=3, features=2)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    before = set(sys.modules)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        changed = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 4)):
            changed[place] = generator.integers(256)
        bad.write_bytes(changed)
        try:
            read_pickle(bad)
            outcomes["read"] += 1
        except pickle.UnpicklingError as error:
            assert str(bad) in str(error)  # noqa: PT017 (it may also be read)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50, outcomes
    assert set(sys.modules) == before


def foreign(kind, path):
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("id,label\n1,2\n")
    elif kind == "random":
        path.write_bytes(np.random.default_rng(1).bytes(4096))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data.txt", "text")
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, train=np.array([Call(os.getcwd)], dtype=object))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([Call(os.getcwd)], dtype=object), allow_pickle=True)
    elif kind == "checkpoint":
        torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)


KINDS = ["empty", "text", "random", "zip", "npz", "npy", "checkpoint"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["pkl", "safetensors"])
def test_a_foreign_file_is_named(kind, ending, tmp_path):
    path = tmp_path / f"data.{ending}"
    foreign(kind, path)
    expected = pickle.UnpicklingError if ending == "pkl" else ValueError
    for read in (read_dataset, lambda p: convert(p, tmp_path / "out.safetensors")):
        with pytest.raises(expected, match=rf"data\.{ending}"):
            read(path)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "data.pkl"):
        path.mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="path must be a data set's file; got .*"):
            MOSI(str(path)).load()


def test_a_pickle_of_something_else_is_named(tmp_path):
    path = tmp_path / "data.pkl"
    for content in (3, [1], {"train": 1}, {"train": {}, "valid": {}, "test": {}}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(SchemaError, match=r"data\.pkl: "):
            MOSI(str(path)).load()
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"data\.pkl must hold a dictionary of splits"):
        convert(path, tmp_path / "out.safetensors")
    # A checkpoint in the form before zip files begins with a pickle of one number.
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(SchemaError, match=r"data\.pkl: expected a mapping of splits; got int"):
        MOSI(str(path)).load()


def test_a_cut_off_or_foreign_safetensors_file_is_named(tmp_path):
    source, path, cut = (tmp_path / n for n in ("a.pkl", "a.safetensors", "cut.safetensors"))
    make_sample("mosi", source, sizes=(6, 3, 2), steps=3, features=2)
    convert(source, path)
    content = path.read_bytes()
    for length in (*range(0, 40), *range(40, len(content), len(content) // 100)):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors is no whole file"):
            read_dataset(cut)
    save_file({"weight": np.zeros(2)}, cut)
    with pytest.raises(ValueError, match=r"cut\.safetensors is no whole file"):
        read_dataset(cut)
    save_file({"train/text": np.zeros(2)}, cut, metadata={"texts": "[1]"})
    with pytest.raises(ValueError, match=r"cut\.safetensors is no whole file"):
        read_dataset(cut)


def test_features_to_extract_from_are_named(tmp_path, witness):
    path = tmp_path / "a.npy"
    for kind in KINDS:
        foreign(kind, path)
        with pytest.raises(ValueError, match=r"a\.npy is no whole array"):
            read_vision(path)
    np.save(path, np.array([Call(os.mkdir, str(witness))], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is no whole array"):
        read_vision(path)
    np.save(path, np.ones((20, 3)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.npy is no whole array"):
        read_vision(path)

    sound = tmp_path / "a.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    content = sound.read_bytes()
    for length in (0, 3, 20, 40, 44, 1001, len(content) - 1):
        sound.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.wav is no whole WAV file"):
            read_wave(sound, 16000)


# --- hostile pickles ---------------------------------------------------------------------------


def text(value):
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def stack_global(module, name):
    return text(module) + text(name) + b"\x93"


def programs(target):
    """Return pickles, written by hand, that would make a folder if they were run."""
    mkdir = stack_global("posix", "mkdir")
    call = mkdir + text(target) + b"\x85R"
    array = pickle.dumps(np.zeros(1), 4)
    return {
        "reduce": b"\x80\x04" + call + b".",
        "reduce inside a list": b"\x80\x04](" + call + b"e.",
        "reduce as a key": b"\x80\x04}(" + call + b"Nu.",
        "reduce of a reduce": b"\x80\x04"
        + stack_global("builtins", "getattr")
        + (b"(" + stack_global("builtins", "__import__") + text("os") + b"\x85R")
        + (text("mkdir") + b"tR" + text(target) + b"\x85R."),
        "global": b"cposix\nmkdir\n(V" + target.encode() + b"\ntR.",
        "inst": b"(V" + target.encode() + b"\niposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\nV" + target.encode() + b"\no.",
        "newobj": b"\x80\x04" + mkdir + text(target) + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + mkdir + text(target) + b"\x85}\x92.",
        "eval": b"\x80\x04"
        + stack_global("builtins", "eval")
        + text(f"__import__('os').mkdir('{target}')")
        + b"\x85R.",
        "Python 2": b"c__builtin__\neval\n(V__import__('os').mkdir('"
        + target.encode()
        + b"')\ntR.",
        "dotted": b"\x80\x04" + stack_global("numpy", "os.mkdir") + text(target) + b"\x85R.",
        "a module's own": b"\x80\x04"
        + stack_global("examples.decalign.data.reader", "pickle.loads")
        + (b"C" + bytes([len(b := b"\x80\x04" + call + b".")]) + b)
        + b"\x85R.",
        "persistent": b"P" + target.encode() + b"\n.",
        "binary persistent": b"\x80\x04" + text(target) + b"Q.",
        "partial": b"\x80\x04" + stack_global("functools", "partial") + mkdir + b"\x85R.",
        "after a whole array": array[:-1] + b"0" + call + b".",
        "out of band": b"\x80\x05\x97.",
    }


@pytest.mark.parametrize("name", programs(""))
def test_hostile_programs_are_refused(name, witness, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(programs(str(witness))[name])
    with pytest.raises(pickle.UnpicklingError, match=r"data\.pkl"):
        read_pickle(path)
    with pytest.raises(pickle.UnpicklingError):
        convert(path, tmp_path / "out.safetensors")


def test_extension_codes_are_refused_even_where_known(witness, tmp_path):
    """A process may have given a function a number, and used it: then pickle asks no more."""
    path = tmp_path / "data.pkl"
    for code in (b"\x82\xf1", b"\x83\xf1\x00", b"\x84\xf1\x00\x00\x00"):
        program = b"\x80\x04" + code + text(str(witness)) + b"\x85R."
        path.write_bytes(program)
        with pytest.raises(pickle.UnpicklingError, match=r"data\.pkl"):  # an unknown number
            read_pickle(path)
        copyreg.add_extension("posix", "mkdir", 0xF1)
        try:
            assert pickle.loads(b"\x80\x04" + code + b".") is os.mkdir  # which remembers it
            with pytest.raises(RefusedPickleError, match=r"refused to load posix\.mkdir"):
                read_pickle(path)
        finally:
            copyreg.remove_extension("posix", "mkdir", 0xF1)
            copyreg.clear_extension_cache()


def test_what_reads_files_cannot_be_changed_by_one(tmp_path):
    """BUILD sets attributes: of a function, what it does from then on."""
    path = tmp_path / "data.pkl"
    before = {
        name: vars(value).copy()
        for name, value in vars(reader).items()
        if callable(value) and hasattr(value, "__dict__")
    }
    state = b"N}(" + text("__defaults__") + text("evil") + b"\x85u\x86b."
    for module, name in reader._ALLOWED:
        path.write_bytes(b"\x80\x04" + stack_global(module, name) + state)
        with pytest.raises(pickle.UnpicklingError, match=r"data\.pkl"):
            read_pickle(path)
    for name, attributes in before.items():
        assert vars(getattr(reader, name)).keys() == attributes.keys(), name


def test_sizes_in_a_file_allocate_nothing(tmp_path):
    path = tmp_path / "data.pkl"
    size = b"\x8a\x06" + (2**44).to_bytes(6, "little")
    programs = {
        "bytes": stack_global("builtins", "bytes") + size + b"\x85R.",
        "bytearray": stack_global("builtins", "bytearray") + size + b"\x85R.",
        "a string": b"\x8d" + struct.pack("<Q", 2**60) + b"abc.",
        "an array": b"",
    }
    stream = pickle.dumps(np.zeros(3), 2)
    programs["an array"] = stream[2:].replace(b"K\x03\x85", size + b"\x85")
    assert len(programs["an array"]) > len(stream)
    for name, program in programs.items():
        path.write_bytes(b"\x80\x04" + program)
        with pytest.raises(pickle.UnpicklingError, match=r"data\.pkl"):
            print(name, read_pickle(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_objects_are_refused_deep_inside(protocol, witness, tmp_path):
    path = tmp_path / "data.pkl"
    attack = Call(os.mkdir, str(witness))
    inner = np.empty(2, dtype=object)
    inner[0] = [attack]
    for content in (
        {"train": {"text": inner}},
        {"train": np.array([{"a": attack}], dtype=object)},
        [np.array([np.array([attack], dtype=object), 1], dtype=object)],
        {(1, 2): {"deep": ({"er": [attack]},)}},
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(pickle.UnpicklingError, match=r"data\.pkl"):
            read_pickle(path)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::examples.decalign.data.base.DataWarning")
def test_hostile_checkpoints_are_refused(witness, tmp_path):
    data = tmp_path / "data.pkl"
    make_sample("iemocap", data, sizes=(24, 6, 5), steps=3, features=4)
    config = Path(__file__).parents[1] / "examples" / "decalign" / "configs" / "iemocap.yaml"
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    attack = {"state_dict": {"weight": Call(os.mkdir, str(witness))}}
    whole = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.zeros(30)}}, whole)
    contents = []
    for form in (True, False):
        file = io.BytesIO()
        torch.save(attack, file, _use_new_zipfile_serialization=form)
        contents.append(file.getvalue())
    contents += [whole.getvalue()[:n] for n in (0, 10, 200, len(whole.getvalue()) - 1)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.ckpt is no whole checkpoint"):
            Checkpoints().load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint of a training"):
        Checkpoints().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        Checkpoints().load_checkpoint(tmp_path / "nowhere.ckpt")

    # By the commands: to go on from, and named.
    path.write_bytes(contents[0])
    run = [f"--config={config}", f"--data.path={data}", f"--trainer.default_root_dir={tmp_path}"]
    run += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    for command in (["test", *run], ["fit", *run, "--trainer.max_epochs=1"]):
        with pytest.raises(ValueError, match=r"last\.ckpt is no whole checkpoint"):
            main(command)


def test_hostile_text_encoders_are_refused(witness, tmp_path, transformers_with_models):
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=20, intermediate_size=8, **tiny))
    model.config.save_pretrained(tmp_path)
    torch.save({"weight": Call(os.mkdir, str(witness))}, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        TextEncoder(Text(name=str(tmp_path)))


def test_saved_features_hold_no_objects(witness, tmp_path):
    np.savez(tmp_path / "features.npz", **{"unique/a": np.array([Call(os.mkdir, str(witness))])})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Run(name="a", seed=1, folder=tmp_path).features("unique")


# --- killed ------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as part:
        part.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    for _ in range(2):  # what is left is written over, and does not pile up
        with pytest.raises(KeyboardInterrupt), replacing(path) as part:  # noqa: PT012
            part.write_text("half")
            raise KeyboardInterrupt
        assert path.read_text() == "one"
        assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize(("kills", "seed"), [(1, 0), pytest.param(3, 1, marks=pytest.mark.long)])
def test_a_killed_training_goes_on(kills, seed):
    """``python -m tests.kill_training 20`` kills it more often."""
    kill_training.main([str(kills), "--seed", str(seed)])


def test_a_checkpoint_is_whole_when_its_writer_is_killed(tmp_path):
    """Killed while it writes one after another: who reads only ever sees whole ones."""
    path = tmp_path / "last.ckpt"
    code = (
        "import sys, torch\n"
        "from examples.benchmarking.storage import Checkpoints\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    content = {'state_dict': {'x': torch.full((500_000,), float(n))}}\n"
        "    Checkpoints().save_checkpoint(content, sys.argv[1])\n"
        "    print(n, flush=True)\n"
    )
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, cwd=root
    )
    for _ in range(10):
        last = int(process.stdout.readline())
        x = Checkpoints().load_checkpoint(path)["state_dict"]["x"]
        assert (x == x[0]).all()
    process.kill()
    process.communicate()
    x = Checkpoints().load_checkpoint(path)["state_dict"]["x"]
    assert x[0] >= last
    assert (x == x[0]).all()
