"""Every Python block of the README and of the documentation's pages runs as printed."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.rst")
    if not {"_build", "_generated", "gallery", "generated"} & set(path.parts)
)
QUICKSTART = ROOT / "docs" / "quickstart.rst"


def _markdown_blocks(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _rst_blocks(path):
    """Return (class, code) for each block; the class says how it is run."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(
        r"^\.\. code-block:: python\n(?: {3}:class: (\w+)\n)?\n((?: {3}.*\n|\n)+)",
        text,
        re.MULTILINE,
    )
    return [(kind, textwrap.dedent(block).strip() + "\n") for kind, block in found]


README_BLOCKS = _markdown_blocks(README)
PAGE_BLOCKS = {path: _rst_blocks(path) for path in PAGES}


def test_blocks_are_found():
    assert len(README_BLOCKS) == README.read_text(encoding="utf-8").count("```python") >= 1
    for path, blocks in PAGE_BLOCKS.items():
        text = path.read_text(encoding="utf-8")
        assert len(blocks) == len(re.findall(r"code(-block)?:: python", text)), path
    assert PAGE_BLOCKS[QUICKSTART]


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        *(pytest.param("", b, id=f"README-{i}") for i, b in enumerate(README_BLOCKS)),
        *(
            pytest.param(*block, id=f"{path.stem}-{i}")
            for path, blocks in PAGE_BLOCKS.items()
            for i, block in enumerate(blocks)
        ),
    ],
)
def test_block_runs(kind, block, defaults, tmp_path, request):
    if kind == "torchrun":
        _run_on_two_ranks(block, tmp_path)
        return
    if kind == "compiled" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch.compile: tested with torch 2.13")
    torch.set_default_dtype(torch.float32)
    if kind == "compiled":  # the compiler proper takes its time; this finds all that can break
        block = block.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"')
        # What is compiled here must not be what a later test finds compiled, and the reverse.
        torch.compiler.reset()
        request.addfinalizer(torch.compiler.reset)
    exec(compile(block, "<block>", "exec"), {"__name__": "block"})


def _run_on_two_ranks(block, folder):
    """Run it as two processes, each of which must print the same loss."""
    (folder / "script.py").write_text(block, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, complaint) in zip(ranks, results):
        # A thread of gloo may abort a process that is at its end, with everything done and printed.
        aborted = complaint.strip() == "terminate called without an active exception"
        assert rank.returncode == 0 or aborted, results
    losses = [re.search(r"^rank \d: (\S+)$", out, re.MULTILINE)[1] for out, _ in results]
    assert losses[0] == losses[1]


def test_example_trains_every_encoder():
    torch.manual_seed(0)
    names = {}
    exec(compile(README_BLOCKS[0], "<block>", "exec"), names)
    assert names["loss"].isfinite()
    for encoder in names["encoders"]:
        assert encoder.weight.grad.isfinite().all()
        assert encoder.weight.grad.any()
    assert len([line for line in README_BLOCKS[0].splitlines() if line]) <= 15


def test_readme_and_quickstart_show_the_same_example():
    assert README_BLOCKS[0].strip() == PAGE_BLOCKS[QUICKSTART][0][1].strip()


@pytest.mark.parametrize(
    ("picture", "table"), [("benchmark", "distribution_matching"), ("transport", "transport")]
)
def test_benchmark_picture_is_of_the_recorded_table(picture, table):
    table = ROOT / "benchmarks" / "results" / f"{table}.csv"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    picture = (ROOT / "docs" / "_static" / f"{picture}.svg").read_text(encoding="utf-8")
    assert digest in picture, "run `python docs/pictures.py` to draw the table as it is now"


LINKS = re.findall(r"(?:\]\(|src=\")([^)#:\"]+)[)\"]", README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LINKS)
def test_link_leads_somewhere(path):
    assert (ROOT / path).exists()
