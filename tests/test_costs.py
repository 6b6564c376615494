import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.autograd import gradcheck, gradgradcheck

from multialign import bures_wasserstein_cost, squared_euclidean_cost
from multialign.costs import _DIRECT_ENTRIES, pairwise_bures_cost
from multialign.ops import polar
from tests import reference


def random_covariances(*shape, rank=None):
    *batch, dim = shape
    factor = torch.randn(*batch, dim, rank or dim)
    return factor @ factor.mT


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (3, 7, 2), (40, 39, 65), (300, 310, 17)])
def test_squared_euclidean_matches_scipy(n, m, dim):
    x, y = torch.randn(n, dim), torch.randn(m, dim) + 3
    torch.testing.assert_close(
        squared_euclidean_cost(x, y).numpy(),
        cdist(x.numpy(), y.numpy(), "sqeuclidean"),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("expanded", [False, True])
def test_squared_euclidean_properties(expanded, monkeypatch):
    if expanded:
        monkeypatch.setattr("multialign.costs._DIRECT_ENTRIES", 0)
    x = torch.randn(2, 6, 3, requires_grad=True)
    y = torch.randn(2, 5, 3, requires_grad=True)
    assert gradcheck(squared_euclidean_cost, (x, y))
    assert gradgradcheck(squared_euclidean_cost, (x, y))
    assert (squared_euclidean_cost(x, x) >= 0).all()
    far = squared_euclidean_cost((x + 1e4).float(), (y + 1e4).float())
    moved = squared_euclidean_cost(
        (x + 1e4).float().double() - 1e4, (y + 1e4).float().double() - 1e4
    )
    torch.testing.assert_close(far.double(), moved, rtol=1e-4, atol=1e-5)
    coincident = x.detach().clone().requires_grad_()
    squared_euclidean_cost(coincident, coincident).sum().backward()
    assert coincident.grad.isfinite().all()


def test_both_forms_are_reached():
    assert 40 * 39 * 65 < _DIRECT_ENTRIES < 300 * 310 * 17


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_bures_matches_scipy_and_pot(dim):
    means, covariances = torch.randn(7, dim), random_covariances(7, dim)
    cost = bures_wasserstein_cost(means[:3], covariances[:3], means[3:], covariances[3:])
    for k in range(3):
        for m in range(4):
            a, b = (means[k], covariances[k]), (means[3 + m], covariances[3 + m])
            args = [t.numpy() for t in (*a, *b)]
            torch.testing.assert_close(
                cost[k, m].item(), reference.bures_wasserstein(*args), rtol=1e-9, atol=1e-9
            )
            theirs = ot.gaussian.bures_wasserstein_distance(args[0], args[2], args[1], args[3])
            torch.testing.assert_close(cost[k, m].item(), float(theirs) ** 2, rtol=1e-7, atol=1e-9)


def test_diagonal_equals_full():
    means_i, means_j = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    i, j = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    expected = bures_wasserstein_cost(means_i, torch.diag_embed(i), means_j, torch.diag_embed(j))
    for left in (i, torch.diag_embed(i)):
        torch.testing.assert_close(bures_wasserstein_cost(means_i, left, means_j, j), expected)


@pytest.mark.parametrize("full", [False, True])
def test_bures_gradients(full):
    means = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    if full:
        factors = torch.randn(2, 3, 3, requires_grad=True), torch.randn(3, 3, 3, requires_grad=True)
    else:
        factors = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)

    def cost(mean_i, factor_i, mean_j, factor_j):
        if full:
            return bures_wasserstein_cost(
                mean_i, factor_i @ factor_i.mT, mean_j, factor_j @ factor_j.mT
            )
        return bures_wasserstein_cost(mean_i, factor_i**2, mean_j, factor_j**2)

    inputs = (means[0], factors[0], means[1], factors[1])
    assert gradcheck(cost, inputs)
    assert gradgradcheck(cost, inputs)


EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (EYE, EYE),
        (EYE, 2 * EYE),
        (torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)), EYE),
        (
            torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)),
            torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)),
        ),
    ],
)
def test_bures_gradients_at_repeated_eigenvalues(a, b):
    """The derivative by a symmetric direction, to which the cost is restricted."""
    mean = torch.zeros(1, 3)
    directions = [random_covariances(3) for _ in range(2)]

    def cost(s, t):
        left, right = a + s * directions[0], b + t * directions[1]
        return bures_wasserstein_cost(mean, left[None], mean, right[None])

    inputs = tuple(torch.zeros((), requires_grad=True) for _ in range(2))
    assert gradcheck(cost, inputs)
    assert gradgradcheck(cost, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0 * EYE, 0 * EYE),
        (0 * EYE, EYE),
        (
            torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)),
            torch.diag(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)),
        ),
        (torch.ones(3, 3, dtype=torch.float64), EYE),
    ],
)
def test_bures_gradients_are_finite_at_singular_covariances(a, b, dtype):
    mean = torch.zeros(1, 3, dtype=dtype)
    for left, right in ((a, b), (a.diagonal(), b.diagonal())):
        left = left[None].to(dtype).clone().requires_grad_()
        right = right[None].to(dtype).clone().requires_grad_()
        cost = bures_wasserstein_cost(mean, left, mean, right)
        expected = reference.bures_wasserstein(
            np.zeros(3),
            a.numpy() if left.ndim == 3 else np.diag(a.diagonal()),
            np.zeros(3),
            b.numpy() if left.ndim == 3 else np.diag(b.diagonal()),
        )
        torch.testing.assert_close(cost.item(), expected, rtol=1e-4, atol=1e-6)
        grads = torch.autograd.grad(cost, (left, right), create_graph=True)
        assert all(g.isfinite().all() for g in grads)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), (left, right))
        assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bures_is_symmetric_nonnegative_and_zero_at_equality(rank, dtype):
    means, covariances = (
        torch.randn(4, 5, dtype=dtype),
        random_covariances(4, 5, rank=rank).to(dtype),
    )
    cost = bures_wasserstein_cost(means, covariances, means, covariances)
    assert (cost >= 0).all()
    # Roots of eigenvalues that are 0 up to rounding bound what can be asked for.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(cost.diagonal(), torch.zeros(4, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(cost, cost.mT, rtol=1e-5, atol=1e-5)
    diagonal = covariances.diagonal(dim1=-2, dim2=-1)
    assert (bures_wasserstein_cost(means, diagonal, means, diagonal).diagonal() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
def test_few_large_eigenvalues_give_what_all_of_them_give(floor, dtype, monkeypatch):
    """A space of 3 + 4 dimensions stands for all 30, values and both gradients."""
    means = [torch.randn(2, count, 30, dtype=dtype) for count in (2, 3)]
    factors = [torch.randn(2, k, 30, r).requires_grad_() for k, r in ((2, 3), (3, 4))]

    def cost():
        i, j = ((a @ a.mT + floor * torch.eye(30)).to(dtype) for a in factors)
        value = bures_wasserstein_cost(means[0], i, means[1], j)
        weights = torch.arange(value.numel()).view_as(value)
        return value.detach(), *torch.autograd.grad((weights * value).sum(), factors)

    sizes = []
    decompose = polar._polar

    def record(matrix, *args):
        sizes.append(matrix.shape[-1])
        return decompose(matrix, *args)

    monkeypatch.setattr(polar, "_polar", record)
    few = cost()
    monkeypatch.setattr(polar, "_LARGEST_SHARE", -1.0)
    whole = cost()
    assert sizes == [7, 30]
    # Without a floor, eigenvalues that are 0 up to rounding have roots of the root of that.
    tolerance = (4 if floor == 0 else 1) * torch.finfo(dtype).eps ** 0.5
    for a, b in zip(few, whole, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_pairwise_costs_are_those_of_each_pair():
    means, pairs = torch.randn(3, 2, 4, 5), [(0, 2), (1, 2)]
    full = random_covariances(3, 2, 4, 5)
    for covariances in (full, full.diagonal(dim1=-2, dim2=-1)):
        costs = pairwise_bures_cost(means, covariances, pairs)
        for cost, (i, j) in zip(costs, pairs, strict=True):
            expected = bures_wasserstein_cost(means[i], covariances[i], means[j], covariances[j])
            torch.testing.assert_close(cost, expected)


def test_non_finite_covariance_gives_non_finite_cost():
    means, covariances = torch.randn(2, 3), random_covariances(2, 3)
    covariances[1, 0, 0] = torch.nan
    cost = bures_wasserstein_cost(means, covariances, means, covariances)
    assert cost[0, 0].isfinite()
    assert cost[1].isnan().all()


def test_errors():
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match="must agree in batch and D; got \\(2, 3\\) and \\(2, 4\\)"
    ):
        squared_euclidean_cost(x, torch.ones(2, 4))
    with pytest.raises(TypeError, match="x must be a tensor .* got list"):
        squared_euclidean_cost([1.0], x)
    with pytest.raises(TypeError, match="must share one dtype"):
        squared_euclidean_cost(x, x.float())
    with pytest.raises(
        ValueError,
        match="covariances_j must have shape \\(2, 3\\) \\(diagonals\\) or \\(2, 3, 3\\)",
    ):
        bures_wasserstein_cost(x, x, x, torch.ones(2, 2))


@pytest.mark.parametrize("entry", [(0, 0), (1, 1), (2, 2)])
def test_a_non_finite_covariance_on_either_side_spares_the_others(entry):
    means, covariances = torch.randn(3, 3), random_covariances(3, 3)
    covariances[1][entry] = torch.nan
    cost = bures_wasserstein_cost(means, covariances, means, covariances)
    assert cost[1].isnan().all()
    assert cost[:, 1].isnan().all()
    assert cost[::2, ::2].isfinite().all()


def test_bures_gradients_do_not_depend_on_the_others_of_a_batch():
    small = (1e-12 * random_covariances(1, 3)).requires_grad_()
    other, mean = 1e-12 * random_covariances(1, 3), torch.zeros(1, 3)
    (alone,) = torch.autograd.grad(bures_wasserstein_cost(mean, small, mean, other), small)
    both = torch.cat([small, random_covariances(1, 3)])
    cost = bures_wasserstein_cost(mean.expand(2, 3), both, mean, other)[0, 0]
    torch.testing.assert_close(torch.autograd.grad(cost, small)[0], alone, rtol=1e-6, atol=0)


def test_bures_gradient_leaves_out_what_is_zero_up_to_rounding():
    vector = torch.randn(5)
    left = torch.outer(vector, vector)[None].requires_grad_()
    right, mean = random_covariances(1, 5), torch.zeros(1, 5)
    (grad,) = torch.autograd.grad(bures_wasserstein_cost(mean, left, mean, right), left)
    assert grad.norm() < 100
