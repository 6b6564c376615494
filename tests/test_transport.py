import itertools
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from multialign import (
    ConvergenceWarning,
    TransportSolution,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
)
from multialign.transport import elimination, message_sweeps
from tests import reference
from tests.forms import FORMS, force_hessian, solve_in

GRAPHS = {
    "complete": lambda m: list(itertools.combinations(range(m), 2)),
    "chain": lambda m: [(i, i + 1) for i in range(m - 1)],
    "star": lambda m: [(0, j) for j in range(1, m)],
    "cycle": lambda m: sorted({(min(i, (i + 1) % m), max(i, (i + 1) % m)) for i in range(m)}),
    "disconnected": lambda m: [(0, 1)],
}
SIZES = [(1, 1), (40, 3), (7, 7), (5, 1, 6), (12, 9, 20), (4, 5, 3, 6), (3, 2, 4, 3, 2)]


def problem(sizes, graph="complete", batch=(), offset=0.5):
    points = [torch.randn(*batch, n, 3) + offset * m for m, n in enumerate(sizes)]
    costs = {
        (i, j): (points[i].unsqueeze(-2) - points[j].unsqueeze(-3)).square().sum(-1)
        for i, j in GRAPHS[graph](len(sizes))
    }
    return costs, [torch.rand(*batch, n) + 0.1 for n in sizes]


def dense(costs, marginals):
    arrays = {edge: cost.detach().numpy() for edge, cost in costs.items()}
    cost = reference.dense_cost(arrays, [len(m) for m in marginals])
    return cost, [m.detach().numpy() / m.detach().sum().item() for m in marginals]


def solve(costs, marginals, epsilon, *, form="auto", **options):
    return solve_in(form, costs, marginals, epsilon, **{"tolerance": 1e-12, **options})


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_dense_oracle(sizes, graph, method):
    costs, marginals = problem(sizes, graph)
    epsilon = 0.3 * sum(cost.mean().item() for cost in costs.values())
    solution = solve(costs, marginals, epsilon, method=method)
    cost, nus = dense(costs, marginals)
    plan = reference.transport_plan(cost, nus, epsilon)
    assert solution.converged
    torch.testing.assert_close(
        solution.value.item(), reference.transport_value(plan, cost, epsilon), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(
        solution.transport_cost.item(), (plan * cost).sum(), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(solution.plan().numpy(), plan, rtol=1e-8, atol=1e-11)
    for i, j in itertools.permutations(range(len(sizes)), 2):
        table = plan.sum(tuple(p for p in range(len(sizes)) if p not in (i, j)))
        table = table if i < j else table.T
        torch.testing.assert_close(
            solution.pairwise_marginal(i, j).numpy(), table, rtol=1e-8, atol=1e-11
        )
    for i, nu in enumerate(nus):
        torch.testing.assert_close(solution.marginal(i).numpy(), nu, rtol=0, atol=1e-11)
    exponent = -cost / epsilon
    for p, f in enumerate(solution.potentials):
        exponent = (
            exponent + f.numpy().reshape([-1 if q == p else 1 for q in range(len(sizes))]) / epsilon
        )
    torch.testing.assert_close(np.exp(exponent), plan, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("sizes", [(4, 5), (3, 4, 5), (3, 2, 3, 4)])
def test_full_tensor_equals_pairs(sizes, method):
    costs, marginals = problem(sizes)
    full = sum(
        cost.reshape([cost.shape[(i, j).index(p)] if p in (i, j) else 1 for p in range(len(sizes))])
        for (i, j), cost in costs.items()
    )
    pairs, tensor = (solve(c, marginals, 2.0, method=method) for c in (costs, full))
    for name in ("value", "transport_cost", "potentials"):
        torch.testing.assert_close(
            getattr(pairs, name), getattr(tensor, name), rtol=1e-8, atol=1e-9
        )


def test_two_marginals_match_pot():
    costs, (a, b) = problem((30, 40))
    a, b = a / a.sum(), b / b.sum()
    epsilon = 0.1 * costs[(0, 1)].mean().item()
    theirs = ot.sinkhorn(
        a.numpy(),
        b.numpy(),
        costs[(0, 1)].numpy(),
        epsilon,
        method="sinkhorn_log",
        stopThr=1e-13,
        numItermax=100_000,
    )
    torch.testing.assert_close(
        solve(costs, [a, b], epsilon).plan().numpy(), theirs, rtol=1e-7, atol=1e-11
    )


@pytest.mark.parametrize("sizes", [(6, 7), (4, 5, 3), (3, 3, 3, 3)])
def test_small_epsilon_approaches_the_linear_program(sizes):
    costs, marginals = problem(sizes)
    cost, nus = dense(costs, marginals)
    exact = reference.exact_transport(cost, nus)
    epsilon = 1e-4 * cost.mean()
    solution = solve(costs, marginals, epsilon, tolerance=1e-9)
    assert solution.converged
    # The optimal plan of the program has at most sum K - M + 1 atoms: its entropy bounds the gap.
    bound = epsilon * np.log(np.prod(sizes))
    assert exact - 1e-9 <= solution.transport_cost.item() <= exact + bound
    assert exact - bound <= solution.value.item() <= exact + 1e-9


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["plain", "outliers", "duplicates", "offset"])
@pytest.mark.parametrize("sizes", [(7, 8), (7, 8, 9), (5, 4, 6, 5)])
def test_newton_converges_however_small_epsilon_is(sizes, kind, relative):
    for seed in range(3):
        costs, marginals, deviation = hostile(sizes, kind, seed)
        solution = multi_marginal_sinkhorn(costs, marginals, relative * deviation, tolerance=1e-6)
        assert solution.converged
        assert solution.iterations < 100


def hostile(sizes, kind, seed):
    torch.manual_seed(seed)
    points = [torch.randn(n, 3) + 0.5 * m for m, n in enumerate(sizes)]
    marginals = [torch.rand(n) + 0.1 for n in sizes]
    for m, x in enumerate(points):
        if kind == "outliers":
            x[0] += 30
        elif kind == "duplicates":
            x[2:4] = x[:2].clone()
        elif kind == "offset":
            x += 100 * m
        elif kind == "zero weights":
            marginals[m][1:4] = 0
    costs = {
        (i, j): (points[i].unsqueeze(-2) - points[j].unsqueeze(-3)).square().sum(-1)
        for i, j in GRAPHS["complete"](len(sizes))
    }
    centred = [c - c.mean(0) - c.mean(1, keepdim=True) + c.mean() for c in costs.values()]
    return costs, marginals, sum(c.var().item() for c in centred) ** 0.5


def dense_marginals(costs, marginals, solution, epsilon):
    """The plan of these potentials on the dense tensor: its marginals, its cost and its entropy."""
    cost, nus = dense(costs, marginals)
    exponent = -cost
    for p, f in enumerate(solution.potentials):
        exponent = exponent + f.double().numpy().reshape(
            [-1 if q == p else 1 for q in range(len(nus))]
        )
    plan = np.exp(exponent / epsilon)
    error = sum(
        np.abs(plan.sum(tuple(q for q in range(len(nus)) if q != p)) - nu).sum()
        for p, nu in enumerate(nus)
    )
    return error, reference.transport_value(plan, cost, epsilon)


# With marginals as they should be, a plan of this form is the optimal one: that is the certificate.
@pytest.mark.parametrize("relative", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["plain", "outliers", "duplicates", "offset", "zero weights"])
@pytest.mark.parametrize("sizes", [(40, 35, 45), (60, 50)])
def test_a_dense_plan_certifies_the_solution(sizes, kind, relative):
    costs, marginals, deviation = hostile(sizes, kind, seed=0)
    epsilon = relative * deviation
    solution = solve(costs, marginals, epsilon, tolerance=1e-9, form="pairwise")
    assert solution.converged
    error, value = dense_marginals(costs, marginals, solution, epsilon)
    # Of potentials in cost units: 1e-9 of epsilon with the largest offset, at the smallest epsilon.
    rounding = np.spacing(max(f[f.isfinite()].abs().max().item() for f in solution.potentials))
    assert error < 1e-8 + 10 * rounding / epsilon
    torch.testing.assert_close(solution.value.item(), value, rtol=1e-8, atol=1e-8 * deviation)


@pytest.mark.parametrize("kind", ["plain", "outliers", "duplicates", "offset"])
def test_a_hundred_random_problems_converge_at_a_small_epsilon(kind):
    for seed in range(25):
        costs, marginals, deviation = hostile((7, 8, 9), kind, seed)
        epsilon = 1e-3 * deviation
        solution = solve(costs, marginals, epsilon, tolerance=1e-10)
        assert solution.converged
        error, value = dense_marginals(costs, marginals, solution, epsilon)
        # What the rounding of cost and potentials does to the exponent.
        rounding = 1e-15 * max(c.abs().max().item() for c in costs.values()) / epsilon
        assert error < 1e-8 + rounding
        torch.testing.assert_close(solution.value.item(), value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("relative", [1.0, 1e-1, 1e-2])
@pytest.mark.parametrize("kind", ["plain", "outliers", "offset", "zero weights"])
def test_float32_tables_end_as_exact_as_was_asked(kind, relative):
    costs, marginals, deviation = hostile((50, 45, 55), kind, seed=0)
    epsilon = relative * deviation
    exact = solve(costs, marginals, epsilon, tolerance=1e-10)
    single = multi_marginal_sinkhorn(
        {e: c.float() for e, c in costs.items()},
        [m.float() for m in marginals],
        epsilon,
        tolerance=1e-3,
    )
    assert single.converged
    scale = deviation + exact.value.abs().item()
    torch.testing.assert_close(single.value.double(), exact.value, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_reduced_precision_of_products_changes_nothing(precision):
    costs, marginals, deviation = hostile((40, 45, 35), "plain", seed=0)
    costs = {e: c.float() for e, c in costs.items()}
    marginals = [m.float() for m in marginals]
    options = {"epsilon": 0.5 * deviation, "tolerance": 1e-3}
    expected = multi_marginal_sinkhorn(costs, marginals, **options).value
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = multi_marginal_sinkhorn(costs, marginals, **options).value
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sweeps_are_those_of_one_variable_after_another():
    for graph in ["complete", "chain", "star", "cycle", "tree", "chord"]:
        sizes = (3, 4, 2, 5, 3)
        edges = {
            "tree": [(0, 1), (0, 2), (1, 3), (1, 4)],
            "chord": [(0, 1), (0, 4), (1, 2), (1, 3), (2, 3), (3, 4)],
        }.get(graph) or GRAPHS[graph](len(sizes))
        unaries = [torch.randn(2, n) for n in sizes]
        unaries[1][0, 2] = -torch.inf
        tables = {(i, j): 2 * torch.randn(2, sizes[i], sizes[j]) for i, j in edges}
        wanted = [torch.log_softmax(torch.randn(2, n), -1) for n in sizes]
        wanted[1][0] = torch.log_softmax(torch.tensor([0.1, -0.3, -torch.inf, 0.2]), -1)
        swept = message_sweeps.sweep(unaries, tables, wanted)
        # The last one visited has the marginal wanted; the dual has not fallen.
        found = elimination.beliefs(swept, tables, "all")
        errors = [(found.marginals[p] - wanted[p].exp()).abs().max() for p in range(len(sizes))]
        assert min(errors) < 1e-12
        torch.testing.assert_close(found.log_total, torch.zeros(2), rtol=0, atol=1e-12)

        def dual(blocks, tables=tables, wanted=wanted):
            inner = sum(
                torch.where(w == -torch.inf, 0, x * w.exp()).sum(-1) for x, w in zip(blocks, wanted)
            )
            return inner - elimination.log_marginal(blocks, tables)

        assert (dual(swept) >= dual(unaries) - 1e-12).all()
        for _ in range(200):
            swept = message_sweeps.sweep(swept, tables, wanted)
        found = elimination.beliefs(swept, tables, "edges")
        for p in range(len(sizes)):
            torch.testing.assert_close(found.marginals[p], wanted[p].exp(), rtol=0, atol=1e-7)


def test_the_factors_of_a_sweep_are_large_at_the_same_places(monkeypatch):
    """So that few entries of their product lie far below the maxima of a row and a column."""
    costs, marginals = problem((40, 50, 60))
    epsilon = 0.01 * sum(cost.var() for cost in costs.values()).sqrt().item()
    potentials = solve(costs, marginals, epsilon, tolerance=1e-3).potentials
    depths = []

    def measure(a, b, weight, backend):
        terms = a[0].unsqueeze(2) + b[0]
        tops = a[0].amax(1, keepdim=True) + b[0].amax(0)
        depths.append(tops - terms.logsumexp(1))
        return (terms + weight[0].unsqueeze(1)).logsumexp((1, 2)).unsqueeze(0)

    monkeypatch.setattr(message_sweeps, "log_matmul_reduce", measure)
    message_sweeps.sweep(
        [x.unsqueeze(0) / epsilon for x in potentials],
        {edge: cost.unsqueeze(0) / -epsilon for edge, cost in costs.items()},
        [(m / m.sum()).log().unsqueeze(0) for m in marginals],
    )
    (depth,) = depths
    # With the whole potential in one factor it is nearly half.
    assert (depth > 60).double().mean() < 0.25


def test_a_tree_of_many_marginals():
    sizes = (60,) * 20
    points = [torch.randn(n, 2) + 0.1 * m for m, n in enumerate(sizes)]
    costs = {
        ((j - 1) // 2, j): (points[(j - 1) // 2][:, None] - points[j]).square().sum(-1)
        for j in range(1, 20)
    }
    costs[(0, 1)].requires_grad_()
    solution = multi_marginal_sinkhorn(costs, [torch.ones(n) for n in sizes], 0.5)
    assert solution.converged
    torch.testing.assert_close(solution.marginal(13), torch.full((60,), 1 / 60), rtol=0, atol=1e-6)
    solution.value.backward(retain_graph=True)
    torch.testing.assert_close(costs[(0, 1)].grad, solution.pairwise_marginal(0, 1).detach())
    costs[(0, 1)].grad = None
    solution.transport_cost.backward()
    step = torch.zeros_like(costs[(0, 1)]).index_put(
        (torch.tensor(3), torch.tensor(4)), torch.tensor(1e-5)
    )
    moved = [
        multi_marginal_sinkhorn(
            costs | {(0, 1): costs[(0, 1)].detach() + sign * step},
            [torch.ones(n) for n in sizes],
            0.5,
            tolerance=1e-11,
        ).transport_cost.detach()
        for sign in (1, -1)
    ]
    torch.testing.assert_close(
        costs[(0, 1)].grad[3, 4], (moved[0] - moved[1]) / 2e-5, rtol=1e-3, atol=1e-6
    )


def test_memory_of_a_complete_graph_stays_below_its_tensor():
    """One evaluation of M = 4, K = 48 may not hold a table of K^4, nor of K^3 for every value."""
    sizes = (48,) * 4
    costs, marginals = problem(sizes)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // 8)
            return result

    unaries = [m.log()[None] for m in marginals]
    tables = {edge: -cost[None] for edge, cost in costs.items()}
    with Watch():
        found = elimination.beliefs(unaries, tables, "all")
    assert largest <= elimination._CHUNK_ENTRIES < 48**4 / 4
    cost = sum(c.reshape([48 if p in e else 1 for p in range(4)]) for e, c in costs.items())
    exponent = -cost
    for p, m in enumerate(marginals):
        exponent = exponent + m.log().reshape([-1 if q == p else 1 for q in range(4)])
    torch.testing.assert_close(found.log_total[0], exponent.flatten().logsumexp(0))
    table = exponent.sub(found.log_total[0]).exp().sum((1, 2))
    torch.testing.assert_close(found.table(0, 3)[0], table, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
def test_small_problems_and_large_tables_by_kernels():
    """In Triton's interpreter: one launch for small problems, the products of large ones."""
    pytest.importorskip("triton", "3.6", reason="triton is not installed, or older than 3.6")
    for sizes, dtype in [
        ((4, 5, 3), torch.float64),
        ((4, 5), torch.float32),
        ((36, 33, 34), torch.float32),
    ]:
        costs, marginals = problem(sizes)
        costs = {e: c.to(dtype).requires_grad_() for e, c in costs.items()}
        marginals = [m.to(dtype) for m in marginals]
        results = []
        for backend in ("torch", "triton"):
            solution = multi_marginal_sinkhorn(costs, marginals, 1.0, backend=backend)
            assert solution.converged
            gradients = torch.autograd.grad(solution.transport_cost, list(costs.values()))
            results.append((solution.value, solution.transport_cost, gradients))
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def differentiable(name, costs, marginals, epsilon, edges, form="auto"):
    solution = solve(dict(zip(edges, costs)), marginals, epsilon, form=form)
    if name == "marginals":
        pairs = itertools.combinations(range(len(marginals)), 2)
        return *(solution.marginal(p) for p in range(len(marginals))), *(
            solution.pairwise_marginal(*p) for p in pairs
        )
    if name == "plan":
        return solution.plan()
    result = getattr(solution, name)
    return tuple(result) if isinstance(result, list) else result


def gradients_are_right(sizes, graph, name, form="auto"):
    """By gradcheck, in costs, marginals and epsilon."""
    costs, marginals = problem(sizes, graph)
    edges = list(costs)
    inputs = [cost.requires_grad_() for cost in costs.values()]
    inputs += [marginal.requires_grad_() for marginal in marginals]
    inputs.append(torch.tensor(1.5, requires_grad=True))

    def outputs(*tensors):
        count = len(edges)
        return differentiable(
            name, tensors[:count], list(tensors[count:-1]), tensors[-1], edges, form
        )

    return gradcheck(outputs, inputs, atol=1e-6, fast_mode=len(sizes) > 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sizes", [(7, 5), (5, 1, 6), (4, 5, 3, 6), (3, 2, 4, 3, 2)])
def test_each_form_matches_the_dense_oracle(sizes, graph, form, monkeypatch):
    force_hessian(monkeypatch, form)
    costs, marginals = problem(sizes, graph)
    marginals[0][0] = 0 if sizes[0] > 1 else 1
    epsilon = 0.1 * sum(cost.mean().item() for cost in costs.values())
    kept = [costs | {}, [m.clone() for m in marginals]]
    if sizes[0] > 1:
        kept[0] = {(i, j): c[1:] if i == 0 else c for (i, j), c in costs.items()}
        kept[1][0] = marginals[0][1:]
    cost, nus = dense(*kept)
    plan = reference.transport_plan(cost, nus, epsilon)
    for method in ("newton", "sinkhorn"):
        solution = solve(
            costs, marginals, epsilon, method=method, tolerance=1e-11, form=FORMS[form]
        )
        assert solution.converged
        torch.testing.assert_close(
            solution.value.item(), reference.transport_value(plan, cost, epsilon), rtol=1e-9, atol=0
        )
        for i, j in itertools.combinations(range(len(sizes)), 2):
            table = plan.sum(tuple(p for p in range(len(sizes)) if p not in (i, j)))
            found = solution.pairwise_marginal(i, j)[int(i == 0 and sizes[0] > 1) :]
            torch.testing.assert_close(found.numpy(), table, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize("name", ["value", "transport_cost", "potentials", "marginals"])
@pytest.mark.parametrize(
    ("sizes", "graph"),
    [
        ((3, 4), "complete"),
        ((2, 3, 2), "complete"),
        ((2, 3, 2), "chain"),
        ((2, 2, 3, 2), "cycle"),
        ((2, 2, 2, 2), "complete"),
        ((2, 2, 2, 2, 2), "star"),
    ],
)
def test_gradients_of_each_form(sizes, graph, name, form, monkeypatch):
    force_hessian(monkeypatch, form)
    assert gradients_are_right(sizes, graph, name, FORMS[form])


def test_gradient_at_an_absent_atom_is_zero_in_each_form(monkeypatch):
    gradients = []
    for form in FORMS:
        force_hessian(monkeypatch, form)
        torch.manual_seed(1)
        costs, marginals = problem((4, 5, 6))
        marginals[1][2] = 0
        leaves = [c.requires_grad_() for c in costs.values()]
        solution = solve(costs, marginals, 1.0, form=FORMS[form])
        total = solution.transport_cost + solution.value + solution.marginal(0)[0]
        gradients.append(torch.autograd.grad(total, leaves))
        assert (gradients[-1][0][:, 2] == 0).all()
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["value", "transport_cost", "potentials", "marginals"])
@pytest.mark.parametrize(
    ("sizes", "graph"),
    [((3, 4), "complete"), ((1, 3), "complete")]
    + [((2, 3, 2), graph) for graph in ("complete", "chain", "star", "disconnected")]
    + [((2, 2, 3, 2), graph) for graph in ("complete", "chain", "cycle")]
    + [((2, 2, 2, 2, 2), graph) for graph in ("complete", "star", "cycle")],
)
def test_gradients(sizes, graph, name):
    assert gradients_are_right(sizes, graph, name)


@pytest.mark.parametrize("name", ["value", "transport_cost", "potentials", "plan"])
def test_gradients_of_a_full_tensor_and_a_batch(name):
    cost = torch.rand(2, 3, 2, 3, requires_grad=True)
    marginals = [torch.rand(2, n, requires_grad=True) for n in (3, 2, 3)]
    epsilon = torch.tensor([0.3, 0.8], requires_grad=True)

    def outputs(cost, a, b, c, epsilon):
        solution = solve(cost, [a, b, c], epsilon)
        result = solution.plan() if name == "plan" else getattr(solution, name)
        return tuple(result) if isinstance(result, list) else result

    assert gradcheck(outputs, (cost, *marginals, epsilon), atol=1e-6)


def test_gradient_of_the_value_is_the_plan():
    costs, marginals = problem((4, 5, 6))
    for cost in costs.values():
        cost.requires_grad_()
    solution = solve(costs, marginals, 1.0)
    solution.value.backward()
    for (i, j), cost in costs.items():
        torch.testing.assert_close(cost.grad, solution.pairwise_marginal(i, j).detach())


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_zero_mass_is_absence(method):
    costs, marginals = problem((4, 5, 6))
    keep = [[0, 1, 3], [0, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    fewer = {(i, j): c[keep[i]][:, keep[j]] for (i, j), c in costs.items()}
    masked = []
    for marginal, rows in zip(marginals, keep):
        masked.append(torch.zeros_like(marginal).index_copy(0, torch.tensor(rows), marginal[rows]))
    costs[(0, 1)][2] = torch.nan
    costs[(0, 2)][2] = torch.inf
    costs = {edge: cost.requires_grad_() for edge, cost in costs.items()}
    fewer = {edge: cost.requires_grad_() for edge, cost in fewer.items()}
    masked = [marginal.requires_grad_() for marginal in masked]
    full = solve(costs, masked, 1.0, method=method)
    small = solve(fewer, [m.detach()[rows] for m, rows in zip(masked, keep)], 1.0, method=method)
    torch.testing.assert_close(full.value, small.value)
    torch.testing.assert_close(full.transport_cost, small.transport_cost)
    assert full.potentials[0][2] == -torch.inf
    torch.testing.assert_close(full.potentials[1][keep[1]], small.potentials[1])
    assert (full.plan()[2] == 0).all()
    (full.value + full.transport_cost).backward()
    (small.value + small.transport_cost).backward()
    for (i, j), cost in costs.items():
        assert (cost.grad[2 if i == 0 else 1] == 0).all()
        torch.testing.assert_close(cost.grad[keep[i]][:, keep[j]], fewer[(i, j)].grad)
    assert all(marginal.grad.isfinite().all() for marginal in masked)


def test_a_marginal_without_mass_is_out():
    costs, marginals = problem((4, 5, 6))
    marginals[1] = torch.zeros(5)
    solution = solve(costs, marginals, 1.0)
    expected = solve({(0, 1): costs[(0, 2)]}, [marginals[0], marginals[2]], 1.0)
    torch.testing.assert_close(solution.value, expected.value)
    torch.testing.assert_close(solution.transport_cost, expected.transport_cost)


def test_batch_equals_loop_and_stops_individually():
    costs, marginals = problem((5, 6, 4), batch=(2, 3))
    epsilon = torch.tensor([[1.0, 0.1, 5.0], [0.02, 2.0, 0.5]])
    batched = multi_marginal_sinkhorn(costs, marginals, epsilon)
    assert batched.value.shape == batched.iterations.shape == batched.converged.shape == (2, 3)
    assert batched.iterations.unique().numel() > 1
    for index in itertools.product(range(2), range(3)):
        one = multi_marginal_sinkhorn(
            {edge: cost[index] for edge, cost in costs.items()},
            [marginal[index] for marginal in marginals],
            epsilon[index],
        )
        assert one.iterations == batched.iterations[index]
        torch.testing.assert_close(batched.value[index], one.value)
        torch.testing.assert_close(batched.plan()[index], one.plan())


def test_batch_dimensions_broadcast():
    costs, marginals = problem((3, 4))
    solution = solve(costs, marginals, torch.tensor([0.5, 1.0, 2.0]))
    assert solution.value.shape == (3,)
    assert solution.plan().shape == (3, 3, 4)
    torch.testing.assert_close(solution.value[1], solve(costs, marginals, 1.0).value)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(sorted(GRAPHS)),
    st.floats(-2, 1),
    st.integers(0, 10**6),
)
def test_marginals_hold_and_bounds(sizes, graph, log_epsilon, seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    costs, marginals = problem(sizes, graph)
    epsilon = 10.0**log_epsilon
    solution = solve(costs, marginals, epsilon, tolerance=1e-9)
    assert solution.converged
    plan = solution.plan()
    for p, marginal in enumerate(marginals):
        found = plan.sum([q for q in range(len(sizes)) if q != p])
        torch.testing.assert_close(found, marginal / marginal.sum(), rtol=0, atol=1e-8)
    entropy = (plan * plan.clamp_min(1e-300).log()).sum()
    torch.testing.assert_close(
        solution.value, solution.transport_cost + epsilon * entropy, rtol=1e-7, atol=1e-7
    )
    # Permuting modalities permutes the solution.
    order = torch.randperm(len(sizes)).tolist()
    place = {p: q for q, p in enumerate(order)}
    permuted = {}
    for (i, j), cost in costs.items():
        a, b = place[i], place[j]
        permuted[(min(a, b), max(a, b))] = cost if a < b else cost.mT
    other = solve(permuted, [marginals[p] for p in order], epsilon, tolerance=1e-9)
    torch.testing.assert_close(other.value, solution.value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_input(offset):
    costs, marginals = problem((6, 7, 8), offset=offset)
    exact = multi_marginal_sinkhorn(costs, marginals, 1.0)
    single = multi_marginal_sinkhorn(
        {e: c.float() for e, c in costs.items()}, [m.float() for m in marginals], 1.0
    )
    assert single.value.dtype == single.plan().dtype == single.potentials[0].dtype == torch.float32
    torch.testing.assert_close(single.value.double(), exact.value, rtol=1e-4, atol=1e-4)
    half = multi_marginal_sinkhorn(
        {e: c.half() for e, c in costs.items() if c.max() < 6e4}, [m.half() for m in marginals], 1.0
    )
    assert half.value.dtype == torch.float32


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_unfinished_warns_once_and_says_so(method):
    costs, marginals = problem((8, 8, 8), batch=(3,))
    with pytest.warns(ConvergenceWarning, match="3 of 3 transport problems") as caught:
        solution = multi_marginal_sinkhorn(costs, marginals, 1e-3, max_iterations=2, method=method)
    assert len(caught) == 1
    assert not solution.converged.any()
    assert (solution.iterations == 2).all()
    assert solution.value.isfinite().all()
    found = solution.plan().sum((2, 3)) - marginals[0] / marginals[0].sum(-1, keepdim=True)
    assert (found.abs().sum(-1) <= solution.error + 1e-12).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])  # infinity forbids a pair
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_non_finite_input_gives_a_non_finite_result(value, method):
    costs, marginals = problem((4, 5, 6), batch=(2,))
    costs[(0, 1)][0, 1, 1] = value
    solution = multi_marginal_sinkhorn(costs, marginals, 1.0, method=method)
    assert not solution.value[0].isfinite()
    assert not solution.converged[0]
    assert solution.converged[1]
    assert solution.value[1].isfinite()


@pytest.mark.parametrize("bad", [-1.0, 0.0, torch.nan])
def test_an_epsilon_tensor_that_is_not_positive_shows(bad):
    costs, marginals = problem((3, 4))
    assert multi_marginal_sinkhorn(costs, marginals, torch.tensor(bad)).value.isnan()


def test_grad_mode_is_left_alone():
    costs, marginals = problem((3, 4))
    costs[(0, 1)].requires_grad_()
    with torch.no_grad():
        assert not multi_marginal_sinkhorn(costs, marginals, 1.0).value.requires_grad
        assert not torch.is_grad_enabled()
    solution = multi_marginal_sinkhorn(costs, marginals, 1.0)
    with torch.no_grad():
        assert not solution.transport_cost.requires_grad
        assert not solution.potentials[0].requires_grad
    # What was read without gradient does not keep a later reading from having one.
    assert solution.transport_cost.requires_grad
    assert solution.potentials[0].requires_grad
    with torch.inference_mode():
        assert len(multi_marginal_sinkhorn(costs, marginals, 1.0).potentials) == 2
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_memory_does_not_grow_with_iterations():
    """Nothing of the iterations is kept: the graph behind the value has the same size."""

    def graph_size(solution):
        seen, stack = set(), [solution.value.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    costs, marginals = problem((5, 6, 7))
    costs[(0, 1)].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sizes = {
            graph_size(
                multi_marginal_sinkhorn(costs, marginals, 0.01, method="sinkhorn", max_iterations=n)
            )
            for n in (1, 10, 200)
        }
    assert len(sizes) == 1


def test_a_long_chain_needs_no_large_table():
    sizes = (30,) * 12
    costs, marginals = problem(sizes, "chain")
    solution = multi_marginal_sinkhorn(costs, marginals, 5.0)
    assert solution.converged
    torch.testing.assert_close(
        solution.marginal(7), marginals[7] / marginals[7].sum(), rtol=0, atol=1e-6
    )
    with pytest.raises(
        MemoryError, match="3959544003.0 GiB in float64, more than the bound of 2 GiB; use fewer"
    ):
        solution.plan()


def test_refuses_before_it_allocates():
    marginals = [torch.ones(300)] * 4
    with pytest.raises(MemoryError, match="8100000000 entries, 60.3 GiB.*between pairs"):
        multi_marginal_sinkhorn(torch.zeros(()).expand(300, 300, 300, 300), marginals, 1.0)


def test_elimination_equals_the_joint_table():
    costs, marginals = problem((3, 4, 2, 5), "cycle")
    small = solve(costs, marginals, 1.0)
    eliminated = solve(costs, marginals, 1.0, form="pairwise")
    torch.testing.assert_close(eliminated.value, small.value)
    torch.testing.assert_close(eliminated.pairwise_marginal(1, 3), small.pairwise_marginal(1, 3))


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    costs, marginals = problem((3, 4, 5))
    cases = [
        (
            ValueError,
            r"keys \(i, j\) with 0 <= i < j < 3.* got \(1, 0\)",
            {(1, 0): costs[(0, 1)]},
            marginals,
            {},
        ),
        (ValueError, r"keys \(i, j\) .* got 'a'", {"a": costs[(0, 1)]}, marginals, {}),
        (
            ValueError,
            r"costs\[\(0, 2\)\] must have shape \(\*batch, 3, 5\).* got \(3, 4\)",
            {(0, 2): costs[(0, 1)]},
            marginals,
            {},
        ),
        (
            ValueError,
            r"costs must end in the sizes of the marginals, \(3, 4, 5\); got \(3, 4, 6\)",
            torch.ones(3, 4, 6),
            marginals,
            {},
        ),
        (TypeError, "costs must be a mapping .* got list", [1.0], marginals, {}),
        (
            ValueError,
            "marginals must be a sequence of at least 2 tensors .* got 1",
            costs,
            marginals[:1],
            {},
        ),
        (
            TypeError,
            r"marginals\[0\] must be a tensor \(\*batch, K\); got list",
            costs,
            [[1.0], *marginals[1:]],
            {},
        ),
        (TypeError, "must share one dtype", costs, [marginals[0].float(), *marginals[1:]], {}),
        (
            ValueError,
            "batch dimensions that broadcast",
            costs,
            [m.expand(k, -1) for k, m in zip((2, 3, 2), marginals)],
            {},
        ),
        (
            ValueError,
            "epsilon must be a finite number > 0; got 0",
            costs,
            marginals,
            {"epsilon": 0},
        ),
        (
            ValueError,
            "tolerance must be a finite number >= 0; got -1",
            costs,
            marginals,
            {"tolerance": -1},
        ),
        (
            ValueError,
            "max_iterations must be an integer >= 1; got 0",
            costs,
            marginals,
            {"max_iterations": 0},
        ),
        (
            ValueError,
            "method must be one of 'sinkhorn', 'newton', 'auto'; got 'lbfgs'",
            costs,
            marginals,
            {"method": "lbfgs"},
        ),
        (
            ValueError,
            "backend must be one of 'auto', 'torch', 'native', 'triton'; got 'keops'",
            costs,
            marginals,
            {"backend": "keops"},
        ),
        (
            RuntimeError,
            'backend="triton" needs ',
            costs,
            marginals,
            {"backend": "triton"},
        ),
    ]
    for error, message, given_costs, given_marginals, options in cases:
        with pytest.raises(error, match=message):
            multi_marginal_sinkhorn(given_costs, given_marginals, **{"epsilon": 1.0, **options})
    solution = multi_marginal_sinkhorn(costs, marginals, 1.0)
    assert isinstance(solution, TransportSolution)
    with pytest.raises(ValueError, match=r"i must be an integer in 0..2; got 3"):
        solution.marginal(3)
    with pytest.raises(ValueError, match="i and j must differ; got 1 and 1"):
        solution.pairwise_marginal(1, 1)


@pytest.mark.parametrize("graph", ["complete", "chain"])
def test_apply_is_the_product_with_the_plan_of_two_variables(graph):
    costs, marginals = problem((4, 5, 3), graph, batch=(2,))
    solution = solve(costs, marginals, 0.5)
    plan = solution.plan()
    for i, j in itertools.permutations(range(3), 2):
        values = torch.randn(2, plan.shape[1 + j], 2)
        (other,) = {0, 1, 2} - {i, j}
        table = plan.sum(1 + other)
        table = table if i < j else table.mT
        torch.testing.assert_close(solution.apply(i, j, values), table @ values)


def test_apply_gives_barycentric_images_as_pot_does():
    x, y = torch.randn(7, 2), torch.randn(6, 2)
    cost = (x[:, None] - y).square().sum(-1)
    solution = solve({(0, 1): cost}, [torch.ones(7), torch.ones(6)], 0.5)
    images = solution.apply(0, 1, y) / solution.marginal(0).unsqueeze(-1)
    peer = ot.da.SinkhornTransport(reg_e=0.5, tol=1e-12, max_iter=10_000)
    peer.fit(Xs=x.numpy(), Xt=y.numpy())
    expected = torch.from_numpy(peer.transform(Xs=x.numpy()))
    torch.testing.assert_close(images, expected, rtol=1e-6, atol=1e-8)


def test_apply_has_gradients_and_errors():
    cost = torch.rand(3, 4, requires_grad=True)
    values = torch.randn(4, 2, requires_grad=True)

    def applied(cost, values):
        return solve({(0, 1): cost}, [torch.ones(3), torch.ones(4)], 0.5).apply(0, 1, values)

    assert gradcheck(applied, (cost, values), fast_mode=True)
    solution = solve({(0, 1): cost}, [torch.ones(3), torch.ones(4)], 0.5)
    for wrong in (torch.randn(3, 2), torch.randn(4), [1.0]):
        with pytest.raises(ValueError, match="values must have shape"):
            solution.apply(0, 1, wrong)


def test_a_cost_of_ones_own():
    """Also where it is not symmetric."""
    x, y = torch.randn(6, 2), torch.randn(5, 2)

    def distance(a, b):
        return (a.unsqueeze(-2) - b.unsqueeze(-3)).abs().sum(-1)

    options = {"epsilon": 0.5, "tolerance": 1e-10}
    found = multi_marginal_sinkhorn_loss([x, y], cost=distance, **options)
    terms = [
        solve({(0, 1): distance(*pair)}, [torch.ones(len(p)) for p in pair], 0.5).value
        for pair in ((x, y), (x, x), (y, y))
    ]
    torch.testing.assert_close(found, terms[0] - (terms[1] + terms[2]) / 2)

    def skewed(a, b):
        return distance(a, b) + a.sum(-1).unsqueeze(-1).relu() + (a @ b.mT).relu() * a[..., :1]

    found = multi_marginal_sinkhorn_loss([x, y], cost=skewed, **options)
    terms = [
        solve({(0, 1): skewed(*pair)}, [torch.ones(len(p)) for p in pair], 0.5).value
        for pair in ((x, y), (x, x), (y, y))
    ]
    torch.testing.assert_close(found, terms[0] - (terms[1] + terms[2]) / 2)
    with pytest.raises(ValueError, match="cost must return a tensor of shape"):
        multi_marginal_sinkhorn_loss([x, y], cost=lambda a, b: a)
    with pytest.raises(ValueError, match="cost must be one of 'sqeuclidean'"):
        multi_marginal_sinkhorn_loss([x, y], cost="euclidean")
