"""Every Python block of the README and of the quickstart runs as printed."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.rst"


def _markdown_blocks(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _rst_blocks(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


README_BLOCKS = _markdown_blocks(README)
QUICKSTART_BLOCKS = _rst_blocks(QUICKSTART)


def test_blocks_are_found():
    assert len(README_BLOCKS) == README.read_text(encoding="utf-8").count("```python") >= 1
    text = QUICKSTART.read_text(encoding="utf-8")
    assert len(QUICKSTART_BLOCKS) == text.count("code-block:: python") >= 1


@pytest.mark.parametrize(
    "block",
    [
        *(pytest.param(b, id=f"README-{i}") for i, b in enumerate(README_BLOCKS)),
        *(pytest.param(b, id=f"quickstart-{i}") for i, b in enumerate(QUICKSTART_BLOCKS)),
    ],
)
def test_block_runs(block):
    torch.manual_seed(0)
    exec(compile(block, "<block>", "exec"), {})


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
    assert README_BLOCKS[0].strip() == QUICKSTART_BLOCKS[0].strip()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))
def test_link_leads_somewhere(path):
    assert (ROOT / path).exists()
