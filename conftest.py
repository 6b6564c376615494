"""Where pytest looks for doctests, and the seed that each of them starts from."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# What imports triton at its top, and so can be collected only where that is installed.
NEEDS_TRITON = ("multialign/ops/_triton", "tests/cross_compile.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Pass over what cannot be imported here, in this folder or where multialign is installed."""
    missing = not find_spec("triton") and collection_path.as_posix().endswith(NEEDS_TRITON)
    return missing or None  # None leaves it to pytest


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, so that a test does not depend on those before it."""
    torch.manual_seed(0)
