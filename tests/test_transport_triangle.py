"""Three marginals of one size, solved by plain products while the exponent range holds them."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from multialign import multi_marginal_sinkhorn
from multialign.transport.forms.choose import make_form
from multialign.transport.forms.dense import Table
from multialign.transport.forms.guarded import Guarded, RangeError
from multialign.transport.forms.pairwise import Pairwise
from multialign.transport.forms.triangle import Triangle
from multialign.transport.prepare import make_problem
from tests import reference
from tests.forms import force_hessian, solve_in

EDGES = [(0, 1), (0, 2), (1, 2)]


def problem(size, batch=(), gap=0.5, dim=3):
    points = [torch.randn(*batch, size, dim) + gap * m for m in range(3)]
    costs = {
        (i, j): (points[i].unsqueeze(-2) - points[j].unsqueeze(-3)).square().sum(-1)
        for i, j in EDGES
    }
    return costs, [torch.rand(*batch, size) + 0.1 for _ in range(3)]


def deviation(costs, marginals):
    return make_problem(costs, marginals, 1.0).deviation


@pytest.fixture(params=["matrix", "conjugate gradients"])
def solver(request, monkeypatch):
    """Solve Newton's equation by a matrix, or by conjugate gradients."""
    force_hessian(monkeypatch, request.param)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_matches_the_dense_oracle(size, method, solver):
    costs, marginals = problem(size, batch=(3,))
    if size > 2:
        marginals[0][0, 0] = marginals[1][1, 2] = marginals[2][2, :2] = 0
    epsilon = 0.3 * sum(cost.mean((-1, -2)) for cost in costs.values())
    solution = solve_in("triangle", costs, marginals, epsilon, tolerance=1e-12, method=method)
    assert solution.converged.all()
    for b in range(3):
        present = [m[b] > 0 for m in marginals]
        kept = {(i, j): costs[i, j][b][present[i]][:, present[j]].numpy() for i, j in EDGES}
        nus = [m[b][at].numpy() / m[b].sum().item() for m, at in zip(marginals, present)]
        cost = reference.dense_cost(kept, [len(nu) for nu in nus])
        plan = reference.transport_plan(cost, nus, epsilon[b].item())
        value = reference.transport_value(plan, cost, epsilon[b].item())
        torch.testing.assert_close(solution.value[b].item(), value, rtol=1e-9, atol=1e-10)
        for i, j in EDGES:
            table = torch.from_numpy(plan.sum(3 - i - j))
            found = solution.pairwise_marginal(i, j)[b]
            found = found[present[i]][:, present[j]]
            torch.testing.assert_close(found, table, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["value", "transport_cost", "potentials", "marginals"])
def test_gradients(name, solver):
    costs, marginals = problem(3)
    inputs = [x.requires_grad_() for x in (*costs.values(), *marginals)]
    inputs.append(torch.tensor(1.5, requires_grad=True))

    def outputs(*tensors):
        costs = dict(zip(EDGES, tensors))
        solution = solve_in("triangle", costs, tensors[3:6], tensors[6], tolerance=1e-12)
        if name == "marginals":
            return tuple(solution.pairwise_marginal(i, j) for i, j in EDGES)
        result = getattr(solution, name)
        return tuple(result) if isinstance(result, list) else result

    assert gradcheck(outputs, inputs, atol=1e-6, fast_mode=True)


def test_all_that_is_read_of_a_plan_is_what_another_form_reads():
    costs, marginals = problem(9, batch=(2,))
    marginals[1][0, 3] = 0
    checked = make_problem(costs, marginals, 0.5 * deviation(costs, marginals))
    whole, ours = (
        form.at(checked.epsilon) for form in (Table(checked), Triangle(checked, torch.float64))
    )
    start = torch.cat(checked.marginals, -1)
    start = torch.where(start == 0, 0.0, start.log())
    for potentials in (start, start + torch.randn_like(start)):
        torch.testing.assert_close(ours.marginals(potentials), whole.marginals(potentials))
        # The first potential that is set takes log Z as well, where the plan was not divided by it.
        shifted = potentials - ours.marginals(potentials)[0].unsqueeze(-1) / 3
        for inner in (0, 1, 3):
            (swept, moved), (other, far) = [
                level.sweep(shifted, 3, inner) for level in (ours, whole)
            ]
            torch.testing.assert_close(moved, far)
            # Up to a constant, which a sweep may leave in the plan.
            difference = (swept - other).view(2, 3, -1)
            torch.testing.assert_close(difference, difference[..., :1].expand_as(difference))
        now, other = ours.evaluate(shifted), whole.evaluate(shifted)
        torch.testing.assert_close(now.log_total, other.log_total)
        torch.testing.assert_close(
            ours.tangent(shifted, now), whole.tangent(shifted, other), rtol=1e-2, atol=1e-5
        )
        right = torch.cat(checked.marginals, -1) - now.marginals
        solved = [
            e.hessian.solve(right, torch.full((2, 1), 1e-3), torch.zeros(2), 10)
            for e in (now, other)
        ]
        torch.testing.assert_close(*solved, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.5, 50.0])
def test_it_is_used_only_where_it_is_right(dtype, gap):
    """From wide to narrow exponent ranges: what it says is right, until it says nothing."""
    used = []
    for relative in (1.0, 0.1, 0.02, 1e-2, 3e-3, 1e-3, 1e-4):
        for stretch in (0.0, 5.0):
            costs, marginals = problem(24, gap=gap, dim=8)
            checked = make_problem(costs, marginals, relative * deviation(costs, marginals))
            exact = Pairwise(checked, torch.float64, "torch").at(checked.epsilon)
            potentials = torch.cat(checked.marginals, -1).log()
            potentials, _ = exact.sweep(potentials, 3)
            potentials = potentials + stretch * torch.randn_like(potentials)
            try:
                found = Triangle(checked, dtype).at(checked.epsilon).marginals(potentials)
            except RangeError:
                used.append(False)
                continue
            used.append(True)
            log_total, right = exact.marginals(potentials)
            # Exponents of hundreds are rounded as such.
            rounding = torch.finfo(dtype).eps * 500 / relative
            torch.testing.assert_close(found[0], log_total, rtol=rounding, atol=rounding)
            assert (found[1] - right).abs().sum() < rounding
    assert used[0]
    assert not used[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_range_does_not_hold_another_form_takes_over(dtype, monkeypatch):
    """By itself, on the way down in epsilon."""
    made = []
    create = Guarded.__init__

    def remember(self, *args):
        create(self, *args)
        made.append(self)

    monkeypatch.setattr(Guarded, "__init__", remember)
    costs, marginals = problem(10)
    epsilon = 1e-4 * deviation(costs, marginals).item()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    costs = {edge: cost.to(dtype) for edge, cost in costs.items()}
    marginals = [m.to(dtype) for m in marginals]
    solution = solve_in("triangle", costs, marginals, epsilon, tolerance=tolerance)
    assert solution.converged
    assert made[-1]._safe is not None
    cost = reference.dense_cost({e: c.double().numpy() for e, c in costs.items()}, [10] * 3)
    nus = [m.double().numpy() / m.double().sum().item() for m in marginals]
    bound = reference.exact_transport(cost, nus)
    assert solution.transport_cost == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("size", [7, 20])
def test_float32_is_as_exact_as_its_rounding(size):
    costs, marginals = problem(size)
    epsilon = 0.1 * deviation(costs, marginals).item()
    exact = multi_marginal_sinkhorn(costs, marginals, epsilon, tolerance=1e-12).value
    costs = {edge: cost.float() for edge, cost in costs.items()}
    marginals = [m.float() for m in marginals]
    found = solve_in("triangle", costs, marginals, epsilon, tolerance=1e-3)
    assert found.converged
    assert found.value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_non_finite_input_ends_at_once_and_shows():
    costs, marginals = problem(10)
    costs[0, 1][0, 0] = math.nan
    solution = multi_marginal_sinkhorn(costs, marginals, 1.0)
    assert solution.value.isnan()
    assert solution.iterations < 5


def test_three_costs_of_other_graphs_are_no_triangle():
    cost = torch.rand(20, 20)
    for count, edges in ((4, [(0, 1), (0, 2), (0, 3)]), (4, EDGES), (3, EDGES)):
        found = make_problem(dict.fromkeys(edges, cost), [torch.ones(20)] * count, 1.0)
        form = make_form(found, torch.float64, "torch")
        assert isinstance(form, Guarded) == (count == 3)
