"""show_versions prints what a bug report needs."""

import importlib.metadata
import platform
import subprocess
import sys

import torch

import multialign
from multialign import show_versions

NAMES = [
    "multialign",
    "python",
    "torch",
    "CUDA",
    "triton",
    "compiled core",
    "platform",
    "device",
]


def _report(capsys):
    assert show_versions() is None
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(line.split(": ", 1) for line in captured.out.splitlines())


def test_reports_every_version(capsys):
    report = _report(capsys)
    assert list(report) == NAMES
    assert all(report.values())
    assert report["multialign"] == multialign.__version__
    assert report["python"] == platform.python_version()
    assert report["torch"] == torch.__version__
    assert report["platform"] == platform.platform()


def test_reports_missing_parts(capsys, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    report = _report(capsys)
    assert report["triton"] == "not installed"
    assert report["CUDA"] == "not in this build of torch"
    assert report["device"].startswith(f"cpu ({platform.machine()}")


def test_reports_every_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    report = _report(capsys)
    assert report["CUDA"] == "13.0"
    assert report["device"] == "GPU 0, GPU 1"


def test_finds_triton_without_importing_it():
    code = (
        "import importlib.metadata as m, sys\n"
        "find = m.version\n"
        "m.version = lambda name: '9.9' if name == 'triton' else find(name)\n"
        "sys.modules['triton'] = None\n"
        "import multialign\n"
        "multialign.show_versions()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "triton: 9.9\n" in result.stdout
