"""Every loss on tensors of a device that is not the CPU, against its values on the CPU.

With ``--device cuda`` that is a card; otherwise it is the emulated device. Tensors are put there
one by one, without a default device, which would hide a missing ``device=``.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch

from multialign import ConvergenceWarning, multi_marginal_sinkhorn
from multialign.ops import backend, choose_backend
from tests.losses import FUNCTIONS
from tests.second_device import on_device, second_device, to_host

# What never waits for the device.
FREE_OF_WAITS = [
    "decoupling",
    "moments",
    "moments mean",
    "moments covariance",
    "moments skewness",
    "mmd",
    "mmd bandwidths",
    "mmd median",
    "mmd unbiased",
    "mmd energy",
]

# The interpreter computes with NumPy, which warns of what the kernels mean to do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = (6, 6, 6)


@pytest.fixture(autouse=True)
def no_default_device(defaults):
    torch.set_default_device(None)


@pytest.fixture
def is_card(request):
    return request.config.getoption("--device") == "cuda"


def place(x, is_card):
    """Return a copy on the device."""
    return x.detach().to("cuda") if is_card else on_device(x)


def fetch(x):
    return to_host(x).cpu()


def emulated(is_card):
    """Return the context of the emulated device, whose traffic is counted, or of the card."""
    return nullcontext() if is_card else second_device()


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [6.0, 6.0]]).repeat(3, 1)
    features = [torch.randn(n, 2, generator=generator) + centres[:n] for n in SIZES]
    weights = [torch.rand(n, generator=generator) + 0.5 for n in SIZES]
    weights[0][3] = 0.0
    return [x.to(dtype) for x in features], [w.to(dtype) for w in weights]


def gradients(loss, features, weights):
    features = [x.requires_grad_() for x in features]
    value = loss(features, weights)
    return [value, *torch.autograd.grad(value, features)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_losses_on_a_device_are_those_of_the_cpu(name, dtype, weighted, is_card):
    loss = FUNCTIONS[name]
    features, weights = inputs(dtype)
    weights = weights if weighted else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = gradients(loss, [x.clone() for x in features], weights)
        there = [place(x, is_card) for x in features]
        masses = weights and [place(w, is_card) for w in weights]
        with emulated(is_card):
            found = gradients(loss, there, masses)
    assert all(x.device == there[0].device for x in found)
    tolerance = {torch.float32: 2e-3, torch.float64: 1e-5}[dtype]
    scale = max(x.abs().max().item() for x in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(fetch(one), other.detach(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", FREE_OF_WAITS)
def test_losses_free_of_waits(name, is_card):
    features, weights = inputs(torch.float32)
    there = [place(x, is_card) for x in features]
    masses = [place(w, is_card) for w in weights]
    with emulated(is_card) as traffic:
        if is_card:
            torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(FUNCTIONS[name], there, masses)
        finally:
            if is_card:
                torch.cuda.set_sync_debug_mode("default")
    assert is_card or not traffic.waiting


def problem(is_card):
    generator = torch.Generator().manual_seed(0)
    costs = {edge: torch.rand(4, 4, generator=generator) for edge in ((0, 1), (0, 2), (1, 2))}
    marginals = [torch.rand(4, generator=generator) + 0.1 for _ in range(3)]
    return {e: place(c, is_card) for e, c in costs.items()}, [place(m, is_card) for m in marginals]


def test_the_solver_warns_when_converged_is_read(is_card):
    costs, marginals = problem(is_card)
    options = {"max_iterations": 1, "tolerance": 1e-12, "method": "sinkhorn"}
    with emulated(is_card):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            solution = multi_marginal_sinkhorn(costs, marginals, 0.01, **options)
        with pytest.warns(ConvergenceWarning, match="1 of 1 transport problems"):
            assert not solution.converged
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            assert not solution.converged


def test_a_tolerance_of_0_reads_nothing(is_card):
    costs, marginals = problem(is_card)
    exact = multi_marginal_sinkhorn(
        {edge: fetch(cost) for edge, cost in costs.items()}, [fetch(m) for m in marginals], 0.5
    )
    with emulated(is_card) as traffic, warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        solution = multi_marginal_sinkhorn(costs, marginals, 0.5, tolerance=0, max_iterations=60)
    assert is_card or not traffic.waiting
    assert fetch(solution.iterations) == 60
    torch.testing.assert_close(fetch(solution.value), exact.value, rtol=0, atol=1e-5)


def test_the_emulated_device_counts():
    x = on_device(torch.ones(3, dtype=torch.float32))
    with second_device() as traffic:
        (x + 1).sum().item()
        x.new_tensor([1.0])
    assert (traffic.launches, traffic.waits) == (2, 2)
    with second_device(), pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    with second_device(float64=False), pytest.raises(TypeError, match="no float64"):
        x.double()


def test_names_are_of_the_registry():
    assert [name for name in FUNCTIONS if name in FREE_OF_WAITS] == FREE_OF_WAITS


def test_torch_takes_over_where_no_kernel_can_be_built(monkeypatch, is_card):
    def refuse(*arguments):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("multialign.ops._triton.log_matvec", refuse)
    backend._builds.cache_clear()
    x = place(torch.ones(2), is_card)
    with emulated(is_card):
        with pytest.warns(UserWarning, match="no C compiler"):
            assert choose_backend("auto", x) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose_backend("auto", x) == "torch"
    backend._builds.cache_clear()
