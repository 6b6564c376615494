"""The Triton kernels against plain torch in float64, interpreted where there is no GPU.

``make test-gpu`` runs the same tests on a GPU. Without one, each kernel is also compiled for two
GPUs, and its registers, spills and shared memory are checked.
"""

import csv
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from multialign import multi_marginal_sinkhorn
from multialign.ops.kernel_sums import _stream

pytest.importorskip("triton", "3.6", reason="triton is not installed, or older than 3.6")
from multialign.ops import _triton
from multialign.ops._triton import small
from multialign.transport import message_sweeps, solver
from multialign.transport.forms import choose
from multialign.transport.options import SolverOptions
from multialign.transport.prepare import make_problem

ROOT = Path(__file__).parents[1]
# The interpreter computes with numpy, which warns of log 0 and of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [(1, 1, 1, 1), (2, 3, 7, 1), (1, 7, 31, 3), (1, 129, 5, 31)]
LARGE_SIZES = [(3, 129, 257, 65), (1, 1000, 1023, 1025), (1, 4096, 4096, 4096)]
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def pytest_generate_tests(metafunc):
    """Add large problems on a GPU; the interpreter would take hours for them."""
    if "table" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") != "cpu"
        metafunc.parametrize("table", SIZES + LARGE_SIZES * on_gpu, ids=str)


def tolerance(dtype):
    """Return the relative error of results in `dtype`'s working precision."""
    return 1e-12 if dtype == torch.float64 else 3e-6


def assert_near(actual, expected, dtype, scale=1.0):
    """Compare in float64, with an error relative to 1 + |expected|; -inf must be equal."""
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    actual = actual.double()
    assert torch.equal(actual == -INF, expected == -INF)
    there = expected != -INF
    error = (actual - expected)[there].abs() / (1 + expected[there].abs())
    assert error.numel() == 0 or error.max() <= scale * tolerance(dtype)


def tables(sizes, dtype, spread):
    batch, rows, inner, columns = sizes
    a, b = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
    a, b = (spread * a).to(dtype), (spread * b).to(dtype)
    if inner > 2:
        # A row without mass, a column without mass, and single entries.
        a[0, 0], b[0, :, -1] = -INF, -INF
        a[:, -1, 1], b[:, 2, 0] = -INF, -INF
    return a, b


def log_matmul(a, b):
    """Return the product by its definition, in float64 and one row of a at a time."""
    a, b = a.double(), b.double()
    rows = [torch.logsumexp(a[:, i, :, None] + b, 1) for i in range(a.shape[1])]
    return torch.stack(rows, 1)


def squares(x, y):
    return (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_matmul(table, dtype):
    a, b = tables(table, dtype, 3.0)
    assert_near(_triton.log_matmul(a, b), log_matmul(a, b), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [30.0, 5000.0])
def test_log_matmul_of_any_range(dtype, spread):
    a, b = tables((1, 33, 40, 17), dtype, spread)
    a[0, 3], b[0, :, 4] = torch.linspace(-spread, 0, 40), torch.linspace(0, -spread, 40)
    a[0, 5] = -INF
    a[0, 5, 7], b[0, 7, 4] = 0, -2 * spread  # a single term, far below the maxima
    assert_near(_triton.log_matmul(a, b), log_matmul(a, b), dtype)


def test_offsets_that_cancel_cost_no_digits():
    a, b = torch.randn(1, 20, 30).float(), torch.randn(1, 30, 10).float()
    expected = log_matmul(a + 4096, b - 4096)
    assert_near(_triton.log_matmul(a + 4096, b - 4096), expected, torch.float32)


def test_log_matmul_of_disjoint_supports():
    a, b = torch.zeros(1, 3, 4).float(), torch.zeros(1, 4, 2).float()
    a[..., :2], b[:, 2:] = -INF, -INF
    assert torch.equal(_triton.log_matmul(a, b), torch.full((1, 3, 2), -INF).float())


@pytest.mark.parametrize("value", [torch.nan, INF])
def test_non_finite_entries_come_out_as_such(value):
    a, b, w = (torch.zeros(1, 4, 4).float() for _ in range(3))
    a[0, 1, 2] = value
    out = _triton.log_matmul(a, b)
    assert not out[0, 1].isfinite().any()
    assert out[0, [0, 2, 3]].isfinite().all()
    for found in (_triton.log_matmul_reduce(a, b, w), _triton.log_matvec(a, b[:, 0])):
        assert torch.equal(found.isfinite(), torch.tensor([[True, False, True, True]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_matmul_reduce(table, dtype):
    a, b = tables(table, dtype, 3.0)
    w = (3 * torch.randn(table[0], table[1], table[3])).to(dtype)
    if w.shape[-1] > 2:
        w[..., 1] = -INF
    expected = torch.logsumexp(w.double() + log_matmul(a, b), 2)
    assert_near(_triton.log_matmul_reduce(a, b, w), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [30.0, 5000.0])
def test_log_matmul_reduce_of_any_range(dtype, spread):
    a, b = tables((1, 20, 18, 37), dtype, spread)
    a[0, 3], b[0, :, 4] = torch.linspace(-spread, 0, 18), torch.linspace(0, -spread, 18)
    w = (spread * torch.randn(1, 20, 37)).to(dtype)
    w[0, 3], w[0, 3, 4] = -INF, 0  # a sum of one entry, too far below to be trusted
    expected = torch.logsumexp(w.double() + log_matmul(a, b), 2)
    assert_near(_triton.log_matmul_reduce(a, b, w), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_matvec(table, dtype):
    a, b = tables(table, dtype, 3.0)
    g = b[:, :, 0]
    assert_near(
        _triton.log_matvec(a, g), torch.logsumexp(a.double() + g.double().unsqueeze(1), 2), dtype
    )


@pytest.mark.parametrize("epsilon", [1.0, 1e-3])
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (5, 33), (129, 18)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_matvec_of_points(sizes, depth, epsilon, dtype):
    x, y = (torch.randn(2, n, depth).to(dtype) + 10 for n in sizes)
    g = torch.randn(2, sizes[1]).to(dtype)
    g[1, 0] = -INF
    # Near -1000 at the small epsilon, where float32 has steps of 6e-5.
    scale = epsilon * torch.tensor([1.0, 2.0], dtype=dtype)
    terms = g.double().unsqueeze(1) - squares(x, y) / scale.double()[:, None, None]
    assert_near(_triton.log_matvec_points(x, y, g, scale), torch.logsumexp(terms, 2), dtype)


def test_layout_does_not_matter():
    a, b = torch.randn(2, 9, 7).float(), torch.randn(2, 7, 5).float()
    w, g = torch.randn(2, 9, 5).float(), torch.randn(2, 7).float()
    x, y = torch.randn(2, 9, 3).float(), torch.randn(2, 7, 3).float()
    z, h, epsilon = torch.randn(2, 5, 3).float(), torch.randn(2, 5).float(), torch.ones(2).float()

    def potentials(a, b, epsilon):
        marginals = [torch.full((2, n), 1 / n).float() for n in (9, 7, 5)]
        return _triton.solve_small([a, b], [(0, 1), (1, 2)], marginals, epsilon, 1e-3, 20)[0]

    def form(x, z, p, h, epsilon):
        return _triton.gaussian_form(x, z, p, h, epsilon[:, None], True, False)[1]

    calls = [
        (_triton.log_matmul, (a, b)),
        (_triton.log_matmul_reduce, (a, b, w)),
        (_triton.log_matvec, (a, g)),
        (_triton.log_matvec_points, (x, y, g, epsilon)),
        (potentials, (a, b, epsilon)),
        (form, (x, z, w[..., 0], h, epsilon)),
    ]
    for function, arguments in calls:
        expected = function(*arguments)
        strided = [t.mT.contiguous().mT if t.ndim > 1 else t for t in arguments]
        torch.testing.assert_close(function(*strided), expected)
        gaps = [torch.stack([t, t], -1)[..., 0] for t in arguments]
        torch.testing.assert_close(function(*gaps), expected)
        one = [t[:1].expand(2, *t.shape[1:]) for t in arguments]
        torch.testing.assert_close(function(*one), expected[:1].expand_as(expected))


def test_results_are_the_same_each_time_and_with_global_tf32():
    a, b = (x.float() for x in tables((2, 40, 50, 30), torch.float64, 20.0))
    w, g = torch.randn(2, 40, 30).float(), torch.randn(2, 40).float()
    x, y = (torch.randn(2, 40, 3).float() for _ in range(2))
    costs, epsilon = torch.rand(2, 7, 5).float(), torch.ones(2).float()
    marginals = [torch.full((2, n), 1 / n).float() for n in (7, 5)]
    before = torch.backends.cuda.matmul.allow_tf32
    results = []
    try:
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allow
            results.append(
                [
                    _triton.log_matmul(a, b),
                    _triton.log_matmul_reduce(a, b, w),
                    _triton.log_matvec(a.mT, g),
                    _triton.log_matvec_points(x, y, g, epsilon),
                    *_triton.solve_small([costs], [(0, 1)], marginals, epsilon, 1e-3, 20),
                    *_triton.gaussian_form(x, y, g, g, epsilon[:, None], True, False),
                ]
            )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_arguments_that_do_not_fit_raise():
    a, b, g = torch.ones(1, 3, 4), torch.ones(1, 5, 2), torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"b must have shape \(1, 4, 'any'\); got \(1, 5, 2\)"):
        _triton.log_matmul(a, b)
    with pytest.raises(ValueError, match=r"w must have shape \(1, 3, 2\); got \(1, 3, 3\)"):
        _triton.log_matmul_reduce(a, b[:, :4], torch.ones(1, 3, 3))
    with pytest.raises(TypeError, match=r"take float16, bfloat16, float32, float64; got .*int64"):
        _triton.log_matvec(a.long(), g)
    with pytest.raises(ValueError, match="2 to 4 marginals of 1 to 32 atoms; got"):
        _triton.solve_small([], [], [torch.ones(1, 33)] * 2, torch.ones(1), 1e-3, 10)


def test_empty_batches():
    assert _triton.log_matmul(torch.ones(0, 3, 4), torch.ones(0, 4, 2)).shape == (0, 3, 2)
    assert _triton.log_matvec(torch.ones(0, 3, 4), torch.ones(0, 4)).shape == (0, 3)


@pytest.mark.transforms
def test_operators_are_well_formed():
    """What torch.library checks: schemas, fakes, and operators under torch.compile."""
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    x, y, g = torch.randn(2, 3, 2), torch.randn(2, 4, 2), torch.randn(2, 4)
    torch.library.opcheck(_triton.log_matmul, (a, b))
    torch.library.opcheck(_triton.log_matmul_reduce, (a, b, torch.randn(2, 3, 5)))
    torch.library.opcheck(_triton.log_matvec, (a, g))
    torch.library.opcheck(_triton.log_matvec_points, (x, y, g, torch.ones(2)))
    problem = ([torch.rand(1, 2, 2)], [0, 1], [torch.full((1, 2), 0.5)] * 2, torch.ones(1))
    torch.library.opcheck(small._solve, (*problem, 1e-3, 20))


@pytest.mark.transforms
def test_compiles_without_a_break():
    inputs = [torch.randn(1, 5, 5) for _ in range(3)]
    masses, epsilon = torch.full((1, 5), 0.2), torch.ones(1)

    def sums(a, b, w):
        product = _triton.log_matmul(2 * a, b)
        potentials, _, _ = _triton.solve_small(
            [product], [(0, 1)], [masses, masses], epsilon, 1e-3, 20
        )
        found = _triton.log_matmul_reduce(product, 2 * b, w)
        found = found + _triton.log_matvec(w, found) + potentials[:, :5]
        return found + _triton.log_matvec_points(a, a, masses.log(), epsilon)

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), sums(*inputs))


@pytest.mark.transforms
def test_vmap():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(3, 5, 2)
    mapped = torch.func.vmap(_triton.log_matmul, (0, None))(a, b)
    expected = torch.stack([_triton.log_matmul(one, b) for one in a])
    torch.testing.assert_close(mapped, expected)


# -- Whole solves ---------------------------------------------------------------------------------


def problem(sizes, edges=None, batch=1, relative=0.05, dtype=torch.float32):
    """Return costs by edge, marginals and epsilon, relative to the deviation of the cost."""
    edges = list(combinations(range(len(sizes)), 2)) if edges is None else edges
    points = [torch.randn(batch, size, 2) + m for m, size in enumerate(sizes)]
    costs = {edge: squares(points[edge[0]], points[edge[1]]) for edge in edges}
    marginals = [torch.rand(batch, size) + 0.1 for size in sizes]
    marginals = [m / m.sum(-1, keepdim=True) for m in marginals]
    deviation = torch.stack([cost.var(correction=0) for cost in costs.values()]).sum().sqrt()
    epsilon = relative * deviation.clamp_min(1.0) * torch.ones(batch)
    return (
        {e: c.to(dtype) for e, c in costs.items()},
        [m.to(dtype) for m in marginals],
        epsilon.to(dtype),
    )


def joint_cost(costs, sizes):
    """Return the cost of all variables, in float64."""
    total = 0
    for scope, cost in costs.items():
        shape = [size if v in scope else 1 for v, size in enumerate(sizes)]
        total = total + cost.double().reshape(-1, *shape)
    return total


def check_solution(costs, marginals, epsilon, tolerance=1e-4, max_iterations=500):
    """Solve, and measure the plan of the potentials in float64."""
    sizes = [m.shape[-1] for m in marginals]
    potentials, iterations, error = _triton.solve_small(
        list(costs.values()), list(costs), marginals, epsilon, tolerance, max_iterations
    )
    count = len(sizes)
    plan = -joint_cost(costs, sizes) / epsilon.double().reshape(-1, *[1] * count)
    for p, (x, m) in enumerate(zip(potentials.split(sizes, -1), marginals)):
        x = torch.where(m == 0, -INF, x.double())
        plan = plan + x.reshape(-1, *[sizes[q] if q == p else 1 for q in range(count)])
    plan = plan.exp()
    measured = sum(
        (plan.sum([1 + q for q in range(count) if q != p]) - m.double()).abs().sum(-1)
        for p, m in enumerate(marginals)
    )
    rounding = 1e-4 if epsilon.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(error.double(), measured, rtol=0.1, atol=rounding)
    assert iterations.dtype == torch.int64
    return plan, iterations, error


EDGES = {
    "ones": ((1, 1), None),
    "two": ((31, 7), None),
    "three": ((3, 1, 4), None),
    "chain": ((2, 3, 2), [(0, 1), (1, 2)]),
    "four": ((2, 3, 2, 2), None),
    "cycle": ((2, 2, 2, 3), [(0, 1), (1, 2), (2, 3), (0, 3)]),
    "an edge of four": ((2, 2, 2, 2), [(0, 2)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_solve_small_finds_the_plan(name, dtype):
    costs, marginals, epsilon = problem(*EDGES[name], dtype=dtype)
    limit = 1e-4 if dtype == torch.float32 else 1e-8
    plan, iterations, error = check_solution(costs, marginals, epsilon, limit)
    assert (error <= limit).all()
    assert (iterations < 50).all()
    exact = multi_marginal_sinkhorn(
        {e: c.double() for e, c in costs.items()},
        [m.double() for m in marginals],
        epsilon.double(),
        tolerance=1e-10,
        backend="torch",
    )
    torch.testing.assert_close(plan, exact.plan(), rtol=0, atol=10 * limit)


def test_solve_small_stops_each_problem_by_itself(request):
    on_gpu = request.config.getoption("--device") != "cpu"
    costs, marginals, epsilon = problem((3, 3, 2), batch=5000 if on_gpu else 3)
    epsilon = epsilon * torch.linspace(0.5, 20.0, len(epsilon)).to(epsilon)
    _, iterations, error = check_solution(costs, marginals, epsilon)
    assert (error <= 1e-4).all()
    assert iterations[0] > iterations[-1]
    one = _triton.solve_small(
        [c[:1] for c in costs.values()], list(costs), [m[:1] for m in marginals], epsilon[:1], 1e-4,
        500,
    )  # fmt: skip
    assert one[1] == iterations[0]
    assert one[2] == error[0]


@pytest.mark.parametrize(
    "sizes", [(3, 4, 5), pytest.param((2, 3, 2, 2), marks=pytest.mark.long)], ids=str
)
def test_solve_small_takes_a_full_tensor(sizes):
    costs, marginals, epsilon = problem(sizes)
    whole = {tuple(range(len(sizes))): joint_cost(costs, sizes).float()}
    plan, _, error = check_solution(whole, marginals, epsilon)
    assert (error <= 1e-4).all()
    other, _, _ = check_solution(costs, marginals, epsilon)
    torch.testing.assert_close(plan, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [(1, 3, 2), pytest.param((2, 3, 2, 1), marks=pytest.mark.long)], ids=str
)
def test_solve_small_by_slices(sizes, monkeypatch):
    """Plans larger than one tile are summed by slices."""
    costs, marginals, epsilon = problem(sizes)
    expected, _, _ = check_solution(costs, marginals, epsilon)
    monkeypatch.setattr(small, "_TILE", 1)
    plan, _, error = check_solution(costs, marginals, epsilon)
    assert (error <= 1e-4).all()
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-4)


def test_solve_small_at_a_small_epsilon():
    costs, marginals, epsilon = problem((4, 3, 4), relative=3e-3)
    _, iterations, error = check_solution(costs, marginals, epsilon)
    assert (error <= 1e-4).all()
    assert (iterations < 200).all()


def test_atoms_without_mass_are_absent():
    costs, marginals, epsilon = problem((3, 2, 3))
    wider = {
        (0, 1): torch.cat([costs[0, 1], torch.full((1, 1, 2), torch.nan).float()], 1),
        (0, 2): torch.cat([costs[0, 2], torch.full((1, 1, 3), -INF).float()], 1),
        (1, 2): costs[1, 2],
    }
    first = torch.cat([marginals[0], torch.zeros(1, 1).float()], 1)
    potentials, _, error = _triton.solve_small(
        list(wider.values()), list(wider), [first, *marginals[1:]], epsilon, 1e-4, 100
    )
    assert error <= 1e-4
    assert potentials.isfinite().all()
    assert potentials[0, 3] == 0
    kept = potentials[:, [0, 1, 2, 4, 5, 6, 7, 8]]
    again, _, _ = _triton.solve_small(
        list(costs.values()), list(costs), marginals, epsilon, 1e-4, 100
    )
    torch.testing.assert_close(kept, again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, INF, -INF])
def test_non_finite_problems_end_at_once(value):
    costs, marginals, epsilon = problem((2, 3), batch=4)
    costs[0, 1][1, 0, 1] = value
    marginals[0][2, 1] = value
    epsilon[3] = torch.nan
    _, iterations, error = _triton.solve_small(
        list(costs.values()), list(costs), marginals, epsilon, 1e-4, 1000
    )
    assert error[0] <= 1e-4
    assert error[1:].isnan().all()
    assert (iterations[1:] <= 1).all()


def test_solve_small_always_stops():
    costs, marginals, epsilon = problem((3, 3), relative=1e-3)
    for limit in (1, 4):
        _, iterations, error = check_solution(costs, marginals, epsilon, 1e-4, limit)
        assert iterations == limit
        assert error > 1e-4
    # It gives up on a tolerance below the rounding of float32.
    _, iterations, error = check_solution(costs, marginals, epsilon * 100, 1e-12, 1000)
    assert iterations < 200
    assert error < 1e-5


def test_fits_small():
    assert _triton.fits_small([7, 7, 7], 1, torch.float32)
    assert _triton.fits_small([32, 1], 1, torch.float64)
    assert _triton.fits_small([32] * 4, 64, torch.float32)
    assert not _triton.fits_small([32] * 4, 1, torch.float32)
    assert not _triton.fits_small([33, 2], 1, torch.float32)
    assert not _triton.fits_small([2] * 5, 1, torch.float32)
    assert not _triton.fits_small([2, 2], 1, torch.float16)


# -- The solver on the kernels --------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Solve small problems as if they were large, and collect the names of the kernels called."""
    monkeypatch.setattr(choose, "_VECTOR_WORK", 0)
    monkeypatch.setattr(choose, "_TABLE_ENTRIES", 0)
    monkeypatch.setattr(choose, "_LARGE_ENTRIES", 0)
    monkeypatch.setattr(solver, "solve_small", lambda *args, **options: None)
    names = []

    def remembered(name, kernel):
        return lambda *args: names.append(name) or kernel(*args)

    for name in ("log_matmul", "log_matmul_reduce", "log_matvec"):
        monkeypatch.setattr(_triton, name, remembered(name, getattr(_triton, name)))
    return names


def dense_plan(costs, marginals, epsilon, sweeps=500):
    """Return the plan by sweeps over all its entries, in float64."""
    sizes = [m.shape[-1] for m in marginals]
    count = len(sizes)
    plan = (-joint_cost(costs, sizes) / epsilon.double().reshape(-1, *[1] * count)).exp()
    for p in sweeps * list(range(count)):
        now = plan.sum([1 + q for q in range(count) if q != p])
        ratio = torch.where(now == 0, 0, marginals[p].double() / now)
        plan = plan * ratio.reshape(-1, *[sizes[q] if q == p else 1 for q in range(count)])
    return plan


SUMS, PRODUCTS = {"log_matvec"}, {"log_matmul", "log_matmul_reduce"}
GRAPHS = {
    "two": ((5, 3), None, SUMS),
    "chain": ((2, 3, 2), [(0, 1), (1, 2)], SUMS),
    "triangle": ((5, 3, 4), None, SUMS | PRODUCTS),
    "cycle": ((2, 2, 2, 3), [(0, 1), (1, 2), (2, 3), (0, 3)], SUMS | PRODUCTS),
    "four": ((2, 3, 2, 2), None, PRODUCTS),
}


@pytest.mark.parametrize(
    ("name", "method", "dtype", "tolerance"),
    [
        pytest.param(
            *(name, *how),
            # Each kernel of these is one of the triangle's sweeps or of their own Newton steps.
            marks=[pytest.mark.long] if name in ("cycle", "four") and how[0] == "sinkhorn" else [],
        )
        for name in GRAPHS
        for how in [("sinkhorn", torch.float64, 1e-6), ("newton", torch.float32, 1e-4)]
    ],
)
def test_solutions_by_kernels(name, method, dtype, tolerance, calls):
    sizes, edges, expected = GRAPHS[name]
    costs, marginals, epsilon = problem(sizes, edges, batch=2, relative=0.5, dtype=dtype)
    marginals[0][1, 0] = 0  # an atom without mass
    results = []
    for backend in ("triton", "torch"):
        found = multi_marginal_sinkhorn(
            costs, marginals, epsilon, backend=backend, method=method, tolerance=tolerance
        )
        assert found.converged.all()
        assert set(calls) == expected
        results.append(found.plan())
    marginals = [m / m.sum(-1, keepdim=True) for m in marginals]
    results.append(dense_plan(costs, marginals, epsilon).to(dtype))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("count", "expected"), [(2, {"log_matvec"}), (3, PRODUCTS), (4, PRODUCTS)])
def test_symmetric_problems_by_kernels(count, expected, calls):
    x = torch.randn(4, 2, dtype=torch.float64)
    cost, nu = torch.cdist(x, x).square().unsqueeze(0), torch.rand(1, 4, dtype=torch.float64)
    checked = make_problem(dict.fromkeys(combinations(range(count), 2), cost), [nu] * count, 1.0)
    values = []
    for backend in ("triton", "torch"):
        options = SolverOptions(tolerance=1e-6, max_iterations=100, method="auto", backend=backend)
        found = solver.solve_problem(checked, options, symmetric=True)
        assert found.converged.all()
        assert set(calls) == expected
        values.append(found.value)
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    ("sizes", "edges", "expected"),
    [
        # Two of three marginals are set from one table, the third without a table.
        ((31, 7, 3), None, ["log_matmul", "log_matvec", "log_matvec", "log_matmul_reduce"]),
        # A tree is swept without a table.
        ((3, 1, 31), [(0, 1), (1, 2)], ["log_matvec"] * 5),
        # With one of four marginals held, the other three are swept without a table.
        ((3, 2, 2, 2), None, ["log_matmul_reduce"] * 4),
    ],
    ids=str,
)
def test_a_sweep_by_kernels(sizes, edges, expected, calls):
    costs, marginals, epsilon = problem(sizes, edges, batch=2)
    tables = {edge: -cost / epsilon[:, None, None] for edge, cost in costs.items()}
    unaries = [torch.randn_like(m) for m in marginals]
    unaries[0][0, 1], marginals[0][0, 1] = -INF, 0
    wanted = [m.log() for m in marginals]
    found = message_sweeps.sweep(unaries, tables, wanted, "triton")
    assert calls == expected
    exact = message_sweeps.sweep(
        [x.double() for x in unaries],
        {edge: table.double() for edge, table in tables.items()},
        [x.double() for x in wanted],
    )
    for one, other in zip(found, exact):
        assert_near(one, other, torch.float32)


# -- Gaussian forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 1, 1), (1, 31, 129, 3, 2), (2, 20, 7, 70, 1), (1, 70, 70, 9, 2)], ids=str
)
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gaussian_form(shape, dtype, distinct, request):
    if dtype == torch.float64 and request.config.getoption("--device") != "cpu":
        pytest.skip("triton 3.7 does not compile it in float64, where multialign does not call it")
    batch, n, m, depth, scales = shape
    x, y = torch.randn(batch, n, depth) + 50, torch.randn(batch, m, depth) + 51
    p, q, c = torch.rand(batch, n), torch.rand(batch, m), torch.rand(batch, scales) / depth
    arguments = [t.to(dtype) for t in (x, y, p, q, c)]
    exact = _stream(*[t.double() for t in arguments], True, distinct)
    found = _triton.gaussian_form(*arguments, True, distinct)
    plain = _triton.gaussian_form(*arguments, False, distinct)
    assert torch.equal(plain[0], found[0])
    assert not plain[3].any()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for one, other in zip(found, exact):
        size = other.norm().clamp_min(1e-30)
        assert (one.double() - other).norm() / size <= tolerance


def test_gaussian_form_has_1_on_its_diagonal_however_narrow():
    x, p = 1e3 * torch.randn(1, 70, 90).float(), torch.ones(1, 70).float() / 70
    value, *derivatives = _triton.gaussian_form(
        x, x, p, p, torch.full((1, 1), 0.5).float(), False, False
    )
    torch.testing.assert_close(value.item(), 1 / 70, rtol=1e-6, atol=0)
    assert not derivatives[0].any()


def test_gaussian_form_lets_nan_through():
    x = torch.randn(1, 5, 3).float()
    y, p = x.clone(), torch.ones(1, 5).float()
    y[0, 2, 1] = torch.nan
    form = _triton.gaussian_form(x, y, p, p, torch.ones(1, 1).float(), True, False)
    assert form[0].isnan().all()


# -- Without a GPU, and without triton -------------------------------------------------------------


# The smaller of the two in every run.
@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.long)])
def test_compiles_for(capability):
    """In a process that does not interpret."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.cross_compile", str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in kernels} == {
        "_gaussian_sums",
        "_log_matmul",
        "_log_matvec",
        "_repair",
        "_solve_small",
    }
    for row in kernels:
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED[capability], row
        # Few registers are spilled, but for the largest solve.
        allowed = 256 if row["case"] == "solve 32, M = 4" else 80
        assert row["stack"] <= allowed, row
        products = row["kernel"] in ("_log_matmul", "_gaussian_sums")
        assert row["tensor_cores"] == products, row


def test_benchmark_runs(tmp_path, request):
    """It runs here on tiny problems, before its first run on a card."""
    device = request.config.getoption("--device")
    environment = os.environ | {"JAX_PLATFORMS": device}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", tmp_path, "--tiny"]
    result = subprocess.run(
        [*command, "--device", device], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["case"] for row in rows}) == 8
    for row in rows:
        assert row["device"]
        assert row["milliseconds"] or row["note"].startswith(
            ("ModuleNotFoundError", "RuntimeError")
        )
    for row in rows:
        if row["provider"].startswith("multialign"):
            assert float(row["milliseconds"]) > 0, row


def test_works_where_triton_is_missing():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from multialign import MMDLoss, MultiMarginalSinkhornLoss, multi_marginal_sinkhorn\n"
        "x = [torch.randn(300, 2, requires_grad=True) for _ in range(2)]\n"
        "(MMDLoss()(x) + MultiMarginalSinkhornLoss()([f[:9] for f in x])).backward()\n"
        "assert x[0].grad.isfinite().all()\n"
        "costs, half = {(0, 1): torch.rand(2, 2)}, torch.ones(2)\n"
        "try:\n"
        "    multi_marginal_sinkhorn(costs, [half, half], 1.0, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton 3.6 or newer, which is not installed' in str(error)\n"
        "else:\n"
        "    raise AssertionError('a backend that cannot run was accepted')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
