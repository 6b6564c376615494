"""Options and defaults of the whole suite: float64 on the CPU, one seed a test."""

import os

import pytest
import torch

try:
    from hypothesis import Phase, settings
except ImportError:  # `make test-gpu` asks for pytest and triton alone
    settings = None

# The tensors here are tiny: a second thread has nothing to do but to be waited for.
torch.set_num_threads(1)
if settings:
    settings.register_profile(
        "default",
        deadline=None,
        derandomize=True,
        max_examples=12,
        # Failing examples here are small already, and shrinking runs the slow ones hundreds of
        # times.
        phases=[Phase.explicit, Phase.generate],
    )
    settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the tests run on")
    parser.addoption("--site", help="built documentation, for test_docs.py: `make docs` passes it")


def pytest_ignore_collect(collection_path, config):
    # It tests what sphinx made, which a run of the other tests does not make anew.
    if collection_path.name == "test_docs.py" and not config.getoption("--site"):
        return True


def pytest_configure(config):
    config.addinivalue_line("markers", "transforms: of torch.compile and torch.func")
    config.addinivalue_line("markers", "long: the code of another test at another size")
    # Without a GPU the kernels are interpreted. Triton reads this when it is imported.
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    # Eager calls work from torch 2.4 on; of the versions tested, these need the newest.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        skip = pytest.mark.skip(reason="torch.compile and torch.func: tested with torch 2.13")
        for item in items:
            if item.get_closest_marker("transforms"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def defaults(request):
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(request.config.getoption("--device"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def transformers_with_models():
    """Skip where the transformers installed has no models for so old a torch."""
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} has no models for this torch")
