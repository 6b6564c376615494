import itertools

import geomloss
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from multialign import MultiMarginalSinkhornLoss, multi_marginal_sinkhorn_loss
from tests import reference

EDGES = {
    "complete": lambda m: list(itertools.combinations(range(m), 2)),
    "chain": lambda m: [(i, i + 1) for i in range(m - 1)],
    "star": lambda m: [(0, j) for j in range(1, m)],
    "cycle": lambda m: [(0, 1)] if m == 2 else [(i, i + 1) for i in range(m - 1)] + [(0, m - 1)],
}


def clouds(sizes, dim=2):
    return [torch.randn(n, dim) + m / 2 for m, n in enumerate(sizes)]


@pytest.mark.parametrize("graph", EDGES)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (20, 7), (4, 5, 6), (6, 6, 6), (3, 4, 3, 2), (2, 3, 2, 3, 2)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_oracle(sizes, graph, weighted):
    points = clouds(sizes)
    weights = [torch.rand(n) + 0.1 for n in sizes] if weighted else [None] * len(sizes)
    epsilon = 3.0 * len(sizes)
    loss = multi_marginal_sinkhorn_loss(
        points, weights, epsilon=epsilon, graph=graph, tolerance=1e-12
    )
    arrays = [x.numpy() for x in points]
    expected = reference.sinkhorn_divergence(arrays, weights, EDGES[graph](len(sizes)), epsilon)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-10)
    pairs = EDGES[graph](len(sizes))
    listed = multi_marginal_sinkhorn_loss(
        points, weights, epsilon=epsilon, graph=[(j, i) for i, j in pairs], tolerance=1e-12
    )
    torch.testing.assert_close(listed, loss)


def test_default_epsilon_is_a_share_of_the_deviation_of_all_costs():
    points = clouds((4, 5, 6))
    costs = [torch.cdist(points[i], points[j]).square().flatten() for i, j in EDGES["complete"](3)]
    epsilon = 0.05 * torch.cat(costs).std(correction=0).item()
    torch.testing.assert_close(
        multi_marginal_sinkhorn_loss(points), multi_marginal_sinkhorn_loss(points, epsilon=epsilon)
    )
    x = points[0].clone().requires_grad_()
    (by_default,) = torch.autograd.grad(multi_marginal_sinkhorn_loss([x, *points[1:]]), x)
    (by_number,) = torch.autograd.grad(
        multi_marginal_sinkhorn_loss([x, *points[1:]], epsilon=epsilon), x
    )
    torch.testing.assert_close(by_default, by_number)


@pytest.mark.parametrize("weighted", [False, True])
def test_two_clouds_agree_with_geomloss(weighted):
    # geomloss: cost |x-y|^2 / 2 at epsilon = blur^2
    x, y = clouds((20, 30))
    a, b = (torch.rand(n) for n in (20, 30))
    if not weighted:
        a, b = torch.ones(20), torch.ones(30)
    a, b = a / a.sum(), b / b.sum()
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.999, backend="tensorized")
    ours = multi_marginal_sinkhorn_loss([x, y], [a, b], epsilon=2 * 0.5**2)
    torch.testing.assert_close(ours, 2 * theirs(a, x, b, y), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "graph"),
    [((3, 4), "complete"), ((3, 2, 3), "complete"), ((3, 3, 3), "star"), ((2, 2, 3, 2), "cycle")],
)
def test_gradients(sizes, graph, debias):
    points = [x.requires_grad_() for x in clouds(sizes)]
    weights = [torch.rand(n) + 0.1 for n in sizes]
    weights = [w.requires_grad_() for w in weights]

    def loss(*tensors):
        return multi_marginal_sinkhorn_loss(
            tensors[: len(sizes)],
            tensors[len(sizes) :],
            epsilon=1.0,
            graph=graph,
            debias=debias,
            tolerance=1e-12,
        )

    assert gradcheck(loss, (*points, *weights), atol=1e-6)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(sorted(EDGES)),
    st.floats(-1, 1),
    st.floats(-6, 0),
    st.integers(0, 10**6),
)
def test_never_negative_and_zero_at_equality(sizes, graph, log_epsilon, log_distance, seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    options = {"graph": graph, "epsilon": 10.0**log_epsilon, "tolerance": 1e-10}
    x = torch.randn(max(sizes), 2)
    equal = multi_marginal_sinkhorn_loss([x] * len(sizes), **options)
    assert abs(equal) < 1e-10
    if graph in ("complete", "cycle"):  # where every cloud has as many neighbours
        assert multi_marginal_sinkhorn_loss(clouds(sizes), **options) >= -1e-10
        near = [x + 10.0**log_distance * torch.randn_like(x) for _ in sizes]
        assert multi_marginal_sinkhorn_loss(near, **options) >= -1e-10


@pytest.mark.filterwarnings("ignore::multialign.ConvergenceWarning")
@pytest.mark.parametrize("options", [{"tolerance": 0.3}, {"max_iterations": 1, "epsilon": 1e-3}])
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_however_roughly_solved_it_is_not_negative(count, method, options):
    options = {"method": method, **options}
    x = torch.randn(8, 2)
    assert multi_marginal_sinkhorn_loss([x] * count, **options) > -1e-12
    for distance in (1e-6, 1e-4, 1e-2, 1.0):
        for _ in range(10):
            near = [x + distance * torch.randn(8, 2) for _ in range(count)]
            assert multi_marginal_sinkhorn_loss(near, **options) > -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_at_equality_value_and_gradient_are_zero(count, dtype):
    x = torch.randn(30, 4, dtype=dtype)
    equal = [x.clone().requires_grad_() for _ in range(count)]
    loss = multi_marginal_sinkhorn_loss(equal)
    assert abs(loss) < 1e-12
    for gradient in torch.autograd.grad(loss, equal):
        assert gradient.abs().max() < (1e-6 if dtype == torch.float32 else 1e-12)


def test_close_float32_clouds_are_not_negative():
    """Many close pairs in a high dimension, where single precision alone would go below 0."""
    x = 0.01 * torch.randn(200, 50, 160).float()
    y = x + 1e-4 * torch.randn(200, 50, 160).float()
    for a, b in zip(x.split(50), y.split(50)):
        solutions = multi_marginal_sinkhorn_loss([a, b])
        assert solutions >= 0


@pytest.mark.parametrize("point", [[[1.0]], [[1.0, 2.0]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_points(point, dtype):
    x = torch.tensor(point, dtype=dtype, requires_grad=True)
    loss = multi_marginal_sinkhorn_loss([x, x.detach().clone()])
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_duplicates_and_zero_diameter():
    x = torch.ones(5, 3, requires_grad=True)
    loss = multi_marginal_sinkhorn_loss([x, torch.ones(4, 3), torch.ones(5, 3)])
    loss.backward()
    torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-12)
    assert x.grad.isfinite().all()


def test_translation_and_scale():
    points = [x.float() for x in clouds((6, 7, 8))]
    loss = multi_marginal_sinkhorn_loss(points)
    moved = multi_marginal_sinkhorn_loss([x + 1024.0 for x in points])
    torch.testing.assert_close(moved, loss, rtol=1e-3, atol=0)
    for scale in (2.0**-14, 2.0**14):
        scaled = multi_marginal_sinkhorn_loss([scale * x for x in points])
        torch.testing.assert_close(scaled / scale**2, loss, rtol=1e-4, atol=0)


def test_solve_gives_the_first_term():
    points = clouds((4, 5, 6))
    module = MultiMarginalSinkhornLoss(debias=False, graph="chain")
    solution = module.solve(points)
    torch.testing.assert_close(module(points), solution.value)
    assert solution.plan().shape == (4, 5, 6)
    single = module.solve([x.float() for x in points])
    assert single.value.dtype == torch.float32


def test_absent_modality_is_out():
    points = clouds((4, 5, 6))
    weights = [None, torch.zeros(5), None]
    options = {"epsilon": 1.0, "tolerance": 1e-10}
    loss = multi_marginal_sinkhorn_loss(points, weights, **options)
    torch.testing.assert_close(loss, multi_marginal_sinkhorn_loss(points[::2], **options))
    nowhere = multi_marginal_sinkhorn_loss(points, [torch.zeros(n) for n in (4, 5, 6)])
    assert nowhere == 0


def test_errors(monkeypatch):
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="graph must be one of 'complete', .* got 'ring'"):
        MultiMarginalSinkhornLoss(graph="ring")
    with pytest.raises(ValueError, match=r"pairs of different modalities in 0..1; got \(0, 2\)"):
        multi_marginal_sinkhorn_loss([x, x], graph=[(0, 2)])
    with pytest.raises(ValueError, match="graph must hold each pair once"):
        multi_marginal_sinkhorn_loss([x, x], graph=[(0, 1), (1, 0)])
    with pytest.raises(ValueError, match="a list of pairs"):
        MultiMarginalSinkhornLoss(graph=[(0, 1, 2)])
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0; got 0"):
        MultiMarginalSinkhornLoss(epsilon=0)
    with pytest.raises(ValueError, match=r"points\[1\] must have shape \(N, 2\)"):
        multi_marginal_sinkhorn_loss([x, torch.randn(4, 3)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton"):
        multi_marginal_sinkhorn_loss([x, x], backend="triton")
