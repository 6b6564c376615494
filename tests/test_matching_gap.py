"""The matching gap of M views of the same samples."""

import math
from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, normalize

from multialign import MatchingGapLoss, matching_gap_loss, squared_euclidean_cost
from tests import reference

GRAPHS = {
    "complete": lambda m: list(combinations(range(m), 2)),
    "chain": lambda m: [(i, i + 1) for i in range(m - 1)],
    "star": lambda m: [(0, j) for j in range(1, m)],
    "cycle": lambda m: [*[(i, i + 1) for i in range(m - 1)], *([(0, m - 1)] if m > 2 else [])],
}
EXACT = {"tolerance": 1e-12}


def views(count, modalities=3, dim=4, noise=0.5, batch=()):
    base = torch.randn(*batch, count, dim)
    return [base + noise * torch.randn(*batch, count, dim) for _ in range(modalities)]


@pytest.mark.parametrize("graph", [*GRAPHS, "pairs"])
@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_oracle(graph, modalities, weighted):
    count = 4 if modalities == 4 else 6
    features = views(count, modalities)
    edges = [(0, 1)] if graph == "pairs" else GRAPHS[graph](modalities)
    weights = [torch.rand(count) + 0.1 for _ in features] if weighted else None
    if weighted:
        weights[1] = None
    options = {"graph": edges if graph == "pairs" else graph, "epsilon": 4.0, **EXACT}
    expected = reference.matching_gap([x.numpy() for x in features], edges, 4.0, weights)
    loss = matching_gap_loss(features, weights, **options)
    torch.testing.assert_close(loss.item(), float(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", ["complete", "chain"])
def test_gradients(graph):
    features = [x.requires_grad_() for x in views(5, batch=(2,))]
    weight = (torch.rand(2, 5) + 0.2).requires_grad_()

    def loss(x, y, z, w):
        return matching_gap_loss([x, y, z], [w, None, None], epsilon=2.0, graph=graph, **EXACT)

    assert gradcheck(loss, (*features, weight))
    assert gradgradcheck(loss, (*features, weight))


def test_gradients_are_those_of_both_terms():
    """Of the matched costs, and of the optimum: the latter's are the plan."""
    x, y = (x.requires_grad_() for x in views(7, 2))
    loss = matching_gap_loss([x, y], epsilon=1.0, **EXACT)
    cost = squared_euclidean_cost(x, y).detach().numpy()
    p = torch.ones(7) / 7
    plan = torch.from_numpy(reference.transport_plan(cost, [p.numpy()] * 2, 1.0))
    excess = torch.diag(p) - plan
    expected = 2 * (excess.sum(1, keepdim=True) * x - excess @ y)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected.detach())


def test_it_is_never_negative():
    """However well the views are matched, and however early the solver stops."""
    for noise in (0.0, 1e-3, 0.3, 3.0):
        for epsilon in (1e-3, 0.1, 10.0, None):
            for options in ({}, {"tolerance": 1e-2}):
                features = [x.float() for x in views(20, noise=noise)]
                loss = matching_gap_loss(features, epsilon=epsilon, **options)
                assert loss >= -1e-6 * sum(x.var().item() for x in features)


def test_a_wrong_matching_costs_its_excess_at_small_epsilon():
    x = 10 * torch.randn(6, 2)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    loss = matching_gap_loss([x, x[order]], epsilon=1e-2)
    torch.testing.assert_close(loss, (x - x[order]).square().sum(-1).mean(), rtol=1e-3, atol=1e-2)


def test_a_row_absent_in_one_view_is_out_in_all():
    features = views(8)
    kept = torch.tensor([0, 2, 3, 5, 6])
    rows = torch.arange(8)
    weights = [None, rows != 1, (rows != 4) & (rows != 7)]
    junk = [x.clone() for x in features]
    junk[0][1], junk[1][4], junk[2][7] = torch.nan, torch.inf, 1e30
    leaves = [x.requires_grad_() for x in junk]
    loss = matching_gap_loss(leaves, weights, epsilon=1.0)
    expected = matching_gap_loss([x[kept] for x in features], epsilon=1.0)
    torch.testing.assert_close(loss, expected)
    for grad in torch.autograd.grad(loss, leaves):
        assert (grad[[1, 4, 7]] == 0).all()


def test_the_weight_of_a_row_is_the_product_over_views():
    features, w = views(6), torch.rand(3, 6) + 0.1
    product = w.prod(0)
    torch.testing.assert_close(
        matching_gap_loss(features, list(w)), matching_gap_loss(features, [None, product, None])
    )
    # In float32 each is within range, and their product is not.
    small = [x.float() for x in (2.0**-60 * w)]
    found = matching_gap_loss([x.float() for x in features], small, epsilon=1.0)
    expected = matching_gap_loss(features, list(w), epsilon=1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_default_epsilon_is_that_of_the_divergence():
    features = views(9)
    costs = torch.cat(
        [squared_euclidean_cost(features[i], features[j]).flatten() for i, j in ((0, 1), (1, 2))]
    )
    epsilon = 0.05 * costs.std(correction=0).item()
    torch.testing.assert_close(
        matching_gap_loss(features, graph="chain"),
        matching_gap_loss(features, graph="chain", epsilon=epsilon),
    )


def test_a_cost_of_ones_own():
    features = [normalize(x, dim=-1) for x in views(8)]
    cosine = matching_gap_loss(features, epsilon=0.5, cost=lambda x, y: 2 - 2 * x @ y.mT)
    torch.testing.assert_close(cosine, matching_gap_loss(features, epsilon=0.5))


# Beside InfoNCE


def info_nce(x, y, temperature):
    """Cross-entropy of the cosines of x with each row of y."""
    return cross_entropy(x @ y.mT / temperature, torch.arange(len(x)))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_two_views_have_a_gap_of_at_most_info_nce(temperature):
    """InfoNCE is the gap where the plan has one marginal to meet, so that its optimum is lower."""
    for noise in (0.1, 0.5, 2.0):
        x, y = (normalize(x, dim=-1) for x in views(16, 2, noise=noise))
        epsilon = 2 * temperature
        gap = matching_gap_loss([x, y], epsilon=epsilon, **EXACT) / epsilon
        cost = squared_euclidean_cost(x, y)
        one_marginal = -epsilon * (torch.logsumexp(-cost / epsilon, 1).mean() + math.log(16))
        relaxed = cost.diagonal().mean() - epsilon * math.log(16) - one_marginal
        torch.testing.assert_close(relaxed / epsilon, info_nce(x, y, temperature))
        assert gap <= info_nce(x, y, temperature) + 1e-12
        assert gap <= info_nce(y, x, temperature) + 1e-12


def test_of_symmetric_scores_the_gap_becomes_info_nce_as_the_temperature_falls():
    """The potentials then cannot make use of the second marginal, to first order."""
    x, y = (normalize(x, dim=-1) for x in views(12, 2, dim=2, noise=1.0))

    def ratio(x, y, temperature):
        epsilon = 2 * temperature
        gap = matching_gap_loss([x, y], epsilon=epsilon, **EXACT) / epsilon
        return (gap / info_nce(x, y, temperature)).item()

    assert ratio(x, x, 1.0) < 0.9999 < ratio(x, x, 0.002) <= 1 + 1e-9
    assert ratio(x, y, 0.05) < 0.97


def test_training_by_it_matches_the_views():
    torch.manual_seed(0)
    base = torch.randn(48, 6)
    inputs = [base @ torch.randn(6, 10) for _ in range(3)]
    maps = [torch.nn.Linear(10, 6) for _ in inputs]
    optimizer = torch.optim.Adam([p for m in maps for p in m.parameters()], lr=0.02)
    loss = MatchingGapLoss(epsilon=0.4)

    def features():
        return [normalize(m(x), dim=-1) for m, x in zip(maps, inputs)]

    def matched():
        x, y, _ = features()
        return (squared_euclidean_cost(x, y).argmin(1) == torch.arange(48)).double().mean()

    before = matched()
    for _ in range(60):
        optimizer.zero_grad()
        loss(features()).backward()
        optimizer.step()
    assert before < 0.3
    assert matched() > 0.9


def test_errors():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"features\[1\] must have N = 4 as features\[0\].* N = 3"):
        matching_gap_loss([x, x[:3]])
    with pytest.raises(ValueError, match="graph must be one of"):
        MatchingGapLoss(graph="tree")
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0; got 0"):
        MatchingGapLoss(epsilon=0)
    with pytest.raises(ValueError, match="cost must be one of 'sqeuclidean'"):
        MatchingGapLoss(cost="cosine")
