"""Where pytest looks for doctests, and the seed that each of them starts from."""

from importlib.util import find_spec

import pytest
import torch

# Its kernels can be imported, and so collected, only where triton is installed.
collect_ignore = [] if find_spec("triton") else ["multialign/ops/_triton"]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, so that a test does not depend on those before it."""
    torch.manual_seed(0)
