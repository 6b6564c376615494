"""The compiled core: where it is found, what happens where it is not, and its exp."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

from multialign.ops._native import library

SETS = library.instruction_sets()
needs_core = pytest.mark.skipif(not SETS, reason=f"the compiled core is {library.core_state()}")
NAMED = os.environ.get("MULTIALIGN_NATIVE_LIBRARY")
BUILT = Path(NAMED) if NAMED else library._PATH


@pytest.fixture
def state(monkeypatch):
    """Return a function that says of the core what a fresh process would say."""
    caches = (library._library, library.instruction_sets, library.instruction_set)
    caches += (library.native_function,)

    def state_with(path=None, **environment):
        for variable in ("MULTIALIGN_NATIVE", "MULTIALIGN_NATIVE_LIBRARY"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(library, "_PATH", path or BUILT)
        for function in caches:
            function.cache_clear()
        return library.core_state()

    yield state_with
    for function in caches:
        function.cache_clear()


def _has_no_core():
    return (
        library.instruction_sets() == ()
        and library.instruction_set() is None
        and library.native_function("exp") is None
    )


def test_missing_library(state, tmp_path):
    assert state(tmp_path / "core.so") == "not built"
    assert _has_no_core()


@pytest.mark.parametrize("content", [b"", b"not a library\n" * 1000], ids=["empty", "text"])
def test_broken_library(state, tmp_path, content):
    path = tmp_path / "core.so"
    path.write_bytes(content)
    assert state(path).startswith("not loaded: ")
    assert _has_no_core()


@needs_core
def test_truncated_library(state, tmp_path):
    path = tmp_path / "core.so"
    path.write_bytes(BUILT.read_bytes()[:300])
    assert state(path).startswith("not loaded: ")
    assert _has_no_core()


def test_library_of_another_project(state):
    path = next(Path(torch.__file__).parent.glob("lib/*torch_global_deps*"), None)
    if path is None:
        pytest.skip("this build of torch has no such library")
    assert state(path).startswith("not loaded: ")
    assert _has_no_core()


def test_a_named_library_that_cannot_be_loaded_raises(state, tmp_path):
    path = str(tmp_path / "missing.so")
    with pytest.raises(OSError, match=r"MULTIALIGN_NATIVE_LIBRARY=.*missing\.so cannot be loaded"):
        state(MULTIALIGN_NATIVE_LIBRARY=path)


def test_losses_run_without_the_core():
    code = """
    import torch
    from multialign import MultiMarginalSinkhornLoss, PrototypeAlignmentLoss
    from multialign.ops._native import core_state
    assert core_state() == "off (MULTIALIGN_NATIVE=0)"
    features = [torch.randn(8, 3, requires_grad=True) for _ in range(3)]
    for loss in (MultiMarginalSinkhornLoss(), PrototypeAlignmentLoss(2)):
        loss(features).backward()
        assert all(x.grad.isfinite().all() for x in features)
    try:
        PrototypeAlignmentLoss(2, backend="native")(features)
    except RuntimeError as error:
        assert "was not built here" in str(error)
    else:
        raise AssertionError
    """
    environment = {**os.environ, "MULTIALIGN_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", dedent(code)], check=True, env=environment)


@needs_core
@pytest.mark.parametrize("name", SETS)
def test_the_environment_chooses_the_instruction_set(state, name):
    assert state(MULTIALIGN_NATIVE=name) == name
    assert library.native_function("exp").__name__ == f"multialign_exp_{name}"


@needs_core
def test_the_best_instruction_set_is_the_default(state):
    assert state() == SETS[-1]


@needs_core
def test_an_unknown_instruction_set_raises(state):
    with pytest.raises(ValueError, match="MULTIALIGN_NATIVE must be 0 or one of baseline.*'sse9'"):
        state(MULTIALIGN_NATIVE="sse9")


@needs_core
def test_the_core_is_not_older_than_its_sources():
    sources = [path for kind in ("*.c", "*.h") for path in library._PATH.parent.glob(kind)]
    newest = max((path.stat().st_mtime for path in sources), default=0.0)  # none in a wheel
    assert BUILT.stat().st_mtime >= newest, "`make native` builds it again"


def _exp(x, name):
    """Return exp(x) by the core, whose writes end where the array does."""
    x = np.ascontiguousarray(x)
    out = np.full(len(x) + 8, 7.0)
    library.native_function("exp", name)(x.ctypes, out.ctypes, library.ctypes.c_int64(len(x)))
    assert (out[len(x) :] == 7).all()
    return out[: len(x)]


@needs_core
@pytest.mark.parametrize("name", SETS)
class TestExp:
    def test_is_right_to_one_ulp(self, name):
        rng = np.random.default_rng(0)
        x = np.concatenate(
            [
                np.linspace(-750, 720, 1_000_003),
                rng.standard_normal(100_000),
                np.ldexp(rng.standard_normal(100_000), rng.integers(-1074, 10, 100_000)),
                np.log(2) * (np.arange(-2150, 2050) / 2),  # ends of the reduced range
                np.nextafter(np.log(np.finfo(float).max), [-np.inf, 0]),
            ]
        )
        with np.errstate(over="ignore", under="ignore"):
            exact = np.exp(x.astype(np.longdouble))
            ulp = np.spacing(np.exp(x))
        out = _exp(x, name)
        finite = np.isfinite(ulp)
        error = np.abs(out[finite] - exact[finite]) / ulp[finite]
        assert error.max() <= 1.01
        assert (out[~finite] == np.inf).all()

    def test_limits(self, name):
        x = np.array([-np.inf, np.inf, np.nan, -np.nan, 0.0, -0.0, 5e-324, -746.0, -1e308, 1e308])
        expected = [0, np.inf, np.nan, np.nan, 1, 1, 1, 0, 0, np.inf]
        np.testing.assert_array_equal(_exp(x, name), expected)
        assert not np.signbit(_exp(x[:1], name))

    @pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33])
    def test_of_any_length(self, name, n):
        x = np.linspace(-3, 3, n)
        np.testing.assert_allclose(_exp(x, name), np.exp(x), rtol=3e-16)


@pytest.mark.skipif("sanitized" not in BUILT.parts, reason="for `make native-check`")
def test_the_sanitizer_stops_a_write_out_of_bounds():
    code = (
        "import ctypes, numpy as np\n"
        "from multialign.ops._native.library import native_function\n"
        "x, out = np.zeros(1000), np.zeros(999)\n"
        "native_function('exp')(x.ctypes, out.ctypes, ctypes.c_int64(1000))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode
    assert "heap-buffer-overflow" in result.stderr
