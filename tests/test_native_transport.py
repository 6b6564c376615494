"""Whole transport problems in the compiled core, against torch."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from multialign import ConvergenceWarning, multi_marginal_sinkhorn
from multialign.ops._native import native_function
from multialign.transport import direct
from tests.forms import solve_in
from tests.test_transport import GRAPHS

pytestmark = pytest.mark.skipif(
    native_function("transport") is None, reason="the core was not built"
)

SHAPES = [((5, 5), 2), ((1, 4), 2), ((3, 4, 5), 3), ((9, 8, 17), 3), ((2, 3, 4, 3), 4)]
SHAPES += [((2, 3, 2, 3, 2), 5)]


def problem(sizes, edges, batch=(), dtype=torch.float64, zeros=False):
    points = [torch.randn(*batch, size, 3, dtype=dtype) for size in sizes]
    costs = {(i, j): torch.cdist(points[i], points[j]).square() for i, j in edges}
    marginals = [torch.rand(*batch, size, dtype=dtype) + 0.1 for size in sizes]
    if zeros:
        for marginal in marginals:
            marginal[..., ::3] = 0.0
    return costs, marginals


def solve(costs, marginals, epsilon, backend, **options):
    solution = multi_marginal_sinkhorn(costs, marginals, epsilon, backend=backend, **options)
    return solution


def same(a, b, rtol=1e-8, atol=1e-9):
    """The same solution, up to the tolerance of both."""
    assert a.converged.all()
    assert b.converged.all()
    count = len(a.potentials)
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(a.value, b.value, **close)
    torch.testing.assert_close(a.transport_cost, b.transport_cost, **close)
    for i in range(count):
        torch.testing.assert_close(a.marginal(i), b.marginal(i), **close)
        for j in range(count):
            if i != j:
                torch.testing.assert_close(
                    a.pairwise_marginal(i, j), b.pairwise_marginal(i, j), **close
                )
    torch.testing.assert_close(a.plan(), b.plan(), **close)


@pytest.mark.parametrize("relative", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("graph", sorted(GRAPHS))
@pytest.mark.parametrize(("sizes", "count"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_equals_torch(sizes, count, graph, relative, zeros):
    costs, marginals = problem(sizes, GRAPHS[graph](count), (2,), zeros=zeros)
    epsilon = relative * torch.stack([c.std((-2, -1), correction=0) for c in costs.values()]).amax(
        0
    )
    epsilon = epsilon + 1e-3
    ours = solve(costs, marginals, epsilon, "native", tolerance=1e-12)
    assert isinstance(ours, direct._DirectSolution)
    same(ours, solve(costs, marginals, epsilon, "torch", tolerance=1e-12))


@pytest.mark.parametrize("sizes", [(6, 5), (4, 6, 5), (3, 2, 3, 2)])
def test_sweeps_equal_newton(sizes):
    costs, marginals = problem(sizes, GRAPHS["complete"](len(sizes)))
    found = [
        solve(costs, marginals, 0.5, "native", method=method, tolerance=1e-12)
        for method in ("sinkhorn", "newton")
    ]
    same(*found)
    assert found[0].iterations > found[1].iterations


@pytest.mark.parametrize("sizes", [(4, 3), (3, 4, 3), (9, 9, 9)])
@pytest.mark.parametrize("rho", [0.3, 30.0, [0.5, None]])
@pytest.mark.parametrize("method", ["auto", "sinkhorn"])
def test_relaxed_marginals(sizes, rho, method):
    costs, marginals = problem(sizes, GRAPHS["complete"](len(sizes)), (2,))
    if isinstance(rho, list):
        rho = [*rho, *[None] * (len(sizes) - 2)]
        marginals = [nu / nu.sum(-1, keepdim=True) for nu in marginals]
    options = {"marginal_relaxation": rho, "tolerance": 1e-11, "method": method}
    found = [solve(costs, marginals, 0.4, backend, **options) for backend in ("native", "torch")]
    same(*found, atol=1e-7)


def test_full_tensor():
    costs = torch.rand(2, 3, 4, 5, requires_grad=True)
    marginals = [torch.rand(2, size) + 0.1 for size in (3, 4, 5)]
    found = [
        solve(costs, marginals, 0.2, backend, tolerance=1e-12) for backend in ("native", "torch")
    ]
    same(*found)
    gradients = [torch.autograd.grad(x.value.sum(), costs)[0] for x in found]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("sizes", "count"), SHAPES[:5])
@pytest.mark.parametrize("graph", ["complete", "chain"])
def test_gradients(sizes, count, graph):
    costs, marginals = problem(sizes[:count], GRAPHS[graph](count), zeros=len(sizes) == 2)
    inputs = [x.requires_grad_() for x in (*costs.values(), *marginals)]
    inputs.append(torch.tensor(0.8, requires_grad=True))

    def results(*x):
        tables = dict(zip(costs, x, strict=False))
        found = solve(tables, x[len(costs) : -1], x[-1], "native", tolerance=1e-13)
        weighted = found.pairwise_marginal(0, count - 1).cos().sum()
        return found.value, found.transport_cost, weighted, found.marginal(1).square().sum()

    present = [x for x in inputs if not (x == 0).any()]
    if len(present) == len(inputs):
        assert gradcheck(results, inputs, atol=1e-6)
        assert gradgradcheck(lambda *x: results(*x)[0], inputs, atol=1e-5)
    ours = torch.autograd.grad(sum(results(*inputs)), inputs)

    def other(*x):
        tables = dict(zip(costs, x, strict=False))
        found = solve(tables, x[len(costs) : -1], x[-1], "torch", tolerance=1e-13)
        weighted = found.pairwise_marginal(0, count - 1).cos().sum()
        return found.value + found.transport_cost + weighted + found.marginal(1).square().sum()

    expected = torch.autograd.grad(other(*inputs), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-8)


def test_first_derivatives_alone_raise_in_second_ones():
    costs, marginals = problem((3, 4), [(0, 1)])
    cost = costs[(0, 1)].requires_grad_()
    solution = solve(costs, marginals, 1.0, "native")
    (gradient,) = torch.autograd.grad(solution.transport_cost, cost, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    costs, marginals = problem((5, 6, 7), GRAPHS["complete"](3), (3,), torch.float32)
    costs = {edge: cost.to(dtype).requires_grad_() for edge, cost in costs.items()}
    marginals = [nu.to(dtype) for nu in marginals]
    found = solve(costs, marginals, 0.5, "native")
    assert found.value.dtype == torch.float32
    wide = {edge: cost.detach().double() for edge, cost in costs.items()}
    exact = solve(wide, [nu.double() for nu in marginals], 0.5, "torch", tolerance=1e-12)
    torch.testing.assert_close(found.value.double(), exact.value, rtol=1e-4, atol=1e-4)
    gradient = torch.autograd.grad(found.transport_cost.sum(), list(costs.values()))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradient)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("place", ["cost", "marginal", "epsilon"])
def test_what_is_not_finite_stays_in_its_problem(place, bad):
    costs, marginals = problem((5, 6, 7), GRAPHS["complete"](3), (3,))
    epsilon = torch.full((3,), 0.5)
    target = {"cost": costs[(0, 2)], "marginal": marginals[1], "epsilon": epsilon}[place]
    target[(1,) + (2,) * (target.ndim - 1)] = bad
    for table in costs.values():
        table.requires_grad_()
    found = solve(costs, marginals, epsilon, "native")
    assert found.value.isnan().tolist() == [False, True, False]
    assert found.converged.tolist() == [True, False, True]
    for result in (found.value, found.transport_cost):
        for g in torch.autograd.grad(result[[0, 2]].sum(), list(costs.values()), retain_graph=True):
            assert g[[0, 2]].isfinite().all()


def test_extreme_costs_are_left_to_torch():
    costs, marginals = problem((4, 4, 4), GRAPHS["complete"](3))
    costs[(0, 1)][0, 1] = math.inf
    costs[(1, 2)][2, 1] = 1e14
    solution = solve(costs, marginals, 0.5, "native")
    assert not isinstance(solution, direct._DirectSolution)
    same(solution, solve(costs, marginals, 0.5, "torch"), atol=1e-5)


def test_what_the_core_does_not_solve_torch_takes():
    costs, marginals = problem((5, 5, 5), GRAPHS["complete"](3))
    with pytest.warns(ConvergenceWarning):
        found = solve(costs, marginals, 1e-3, "native", max_iterations=2, tolerance=1e-14)
    assert found.iterations == 2
    assert not found.converged


def test_the_way_back_of_what_the_core_leaves(monkeypatch):
    costs, marginals = problem((4, 3, 4), GRAPHS["complete"](3))
    inputs = [cost.requires_grad_() for cost in costs.values()]
    expected = torch.autograd.grad(solve(costs, marginals, 0.5, "native").transport_cost, inputs)
    found = solve(costs, marginals, 0.5, "native").transport_cost
    monkeypatch.setattr(direct, "whole_gradients", lambda *_: None)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [3, 40])
def test_the_same_bits_on_any_number_of_threads(count):
    costs, marginals = problem((24, 24, 24), GRAPHS["complete"](3), (count,))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(solve(costs, marginals, 0.2, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.value, found[0].value)
        assert torch.equal(other.plan(), found[0].plan())


def test_broadcast_and_strided_arguments():
    costs, marginals = problem((4, 5, 6), GRAPHS["complete"](3), (2, 3))
    costs[(0, 1)] = costs[(0, 1)][0, 0].mT.contiguous().mT.requires_grad_()
    marginals[2] = marginals[2][:, :1]
    epsilon = torch.tensor([0.4, 0.5, 0.6], requires_grad=True)
    found = [solve(costs, marginals, epsilon, b, tolerance=1e-12) for b in ("native", "torch")]
    assert found[0].value.shape == (2, 3)
    same(*found)
    inputs = [costs[(0, 1)], epsilon]
    grads = [torch.autograd.grad(x.value.sum() + x.transport_cost.sum(), inputs) for x in found]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)


@pytest.mark.transforms
def test_compile_and_vmap():
    costs, marginals = problem((5, 6, 7), GRAPHS["complete"](3), (3,))
    edges = list(costs)

    def value(*tables):
        masses = [nu[0] for nu in marginals]
        return solve(dict(zip(edges, tables, strict=True)), masses, 0.5, "native").value

    one = [cost[0] for cost in costs.values()]
    torch.testing.assert_close(
        torch.compile(value, fullgraph=True, backend="aot_eager")(*one), value(*one)
    )
    many = torch.func.vmap(value)(*costs.values())
    expected = torch.stack([value(*[c[n] for c in costs.values()]) for n in range(3)])
    torch.testing.assert_close(many, expected, rtol=1e-6, atol=1e-7)


def test_results_are_detached_and_moved_as_those_of_any_solution():
    costs, marginals = problem((4, 5), [(0, 1)])
    costs[(0, 1)].requires_grad_()
    solution = solve(costs, marginals, 0.5, "native")
    assert solution.value.requires_grad
    for other in (solution.detach(), solution.to(torch.float32)):
        torch.testing.assert_close(other.plan().double(), solution.plan(), rtol=1e-5, atol=1e-6)
    assert not solution.detach().transport_cost.requires_grad
    assert solution.to(torch.float32).value.dtype == torch.float32


def test_reads_only_what_is_asked_for_with_gradient():
    """A solution that was read without gradient can still be read with one."""
    costs, marginals = problem((4, 5, 3), GRAPHS["complete"](3))
    costs[(0, 1)].requires_grad_()
    solution = solve(costs, marginals, 0.5, "native")
    with torch.inference_mode():
        assert not solution.transport_cost.requires_grad
        assert not solution.potentials[0].requires_grad
    assert solution.transport_cost.requires_grad
    assert solution.potentials[0].requires_grad


def test_many_threads_of_python_at_once():
    """The core holds no state between calls, and lets other threads run."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [problem((6, 7, 8), GRAPHS["complete"](3)) for _ in range(8)]
    expected = [solve(*one, 0.3, "native").value for one in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: solve(*one, 0.3, "native").value, problems * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, itertools.cycle(expected)))


def test_named_forms_do_not_take_the_core():
    costs, marginals = problem((4, 4, 4), GRAPHS["complete"](3))
    found = solve_in("triangle", costs, marginals, 0.5)
    same(found, solve(costs, marginals, 0.5, "native"), atol=1e-6)
