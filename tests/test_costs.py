import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.autograd import gradcheck, gradgradcheck

from multialign import bures_wasserstein_cost, squared_euclidean_cost
from multialign.costs import _DIRECT_ENTRIES, pairwise_bures_cost
from multialign.ops import spectral
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


def test_both_formulas_are_reached():
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
        mixed = bures_wasserstein_cost(means_i, left, means_j, torch.diag_embed(j))
        torch.testing.assert_close(mixed, expected)


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
    # With create_graph the gradient is computed by another formula.
    first = torch.autograd.grad(cost(*inputs).square().sum(), inputs)
    with_graph = torch.autograd.grad(cost(*inputs).square().sum(), inputs, create_graph=True)
    torch.testing.assert_close(with_graph, first)


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
    """The cost is defined for symmetric matrices, so derivatives are along symmetric directions."""
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
    # Zero eigenvalues are off by rounding, and their roots by its square root.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(cost.diagonal(), torch.zeros(4, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(cost, cost.mT, rtol=1e-5, atol=1e-5)
    diagonal = covariances.diagonal(dim1=-2, dim2=-1)
    assert (bures_wasserstein_cost(means, diagonal, means, diagonal).diagonal() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
def test_few_large_eigenvalues_give_what_all_of_them_give(floor, dtype, monkeypatch):
    """In spaces of 1 + 4 to 9 + 9 of 40 dimensions, values and both gradients are right."""
    means = [torch.randn(2, count, 40, dtype=dtype) for count in (2, 3)]
    factors = [torch.randn(2, k, 40, 9) for k in (2, 3)]
    factors[0][:, 0, :, 1:] = 0
    factors[1][:, 1, :, 4:] = 0
    factors = [factor.requires_grad_() for factor in factors]

    def cost():
        i, j = ((a @ a.mT + floor * torch.eye(40)).to(dtype) for a in factors)
        value = bures_wasserstein_cost(means[0], i, means[1], j)
        weights = torch.arange(value.numel()).view_as(value)
        return value.detach(), *torch.autograd.grad((weights * value).sum(), factors)

    sizes = []
    decompose = spectral._polar

    def record(matrix, *args):
        sizes.append(matrix.shape[-1])
        return decompose(matrix, *args)

    monkeypatch.setattr(spectral, "_polar", record)
    few = cost()
    monkeypatch.setattr(spectral, "_LARGEST_SHARE", -1.0)
    whole = cost()
    assert sizes == [8, 16, 40, 40]
    # Without a floor, zero eigenvalues are off by rounding, and their roots by its square root.
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


def test_non_finite_covariance_leaves_other_gradients_alone():
    means, covariances = torch.randn(2, 3), random_covariances(2, 3)
    expected = covariances.clone().requires_grad_()
    bures_wasserstein_cost(means, expected, means, expected)[0, 0].backward()
    covariances[1, 0, 0] = torch.nan
    covariances.requires_grad_()
    bures_wasserstein_cost(means, covariances, means, covariances)[0, 0].backward()
    torch.testing.assert_close(covariances.grad, expected.grad)


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


def test_bures_of_a_batch_of_batches_is_that_of_each():
    means = torch.randn(2, 3, 4, 5)
    inputs = [random_covariances(2, 3, 4, 5), random_covariances(2, 3, 2, 5)]
    inputs = [covariances.requires_grad_() for covariances in inputs]
    cost = bures_wasserstein_cost(means, inputs[0], means[..., :2, :], inputs[1])
    weights = torch.rand(2, 3, 4, 2)
    grads = torch.autograd.grad((weights * cost).sum(), inputs)
    for a in range(2):
        for b in range(3):
            leaves = [covariances[a, b].detach().requires_grad_() for covariances in inputs]
            mean = means[a, b]
            single = bures_wasserstein_cost(mean, leaves[0], mean[:2], leaves[1])
            torch.testing.assert_close(cost[a, b], single)
            expected = torch.autograd.grad((weights[a, b] * single).sum(), leaves)
            for grad, one in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad[a, b], one)


def test_a_non_finite_correlation_reaches_its_costs_and_their_gradients():
    means, covariances = torch.randn(3, 3), random_covariances(3, 3)
    covariances[1, 1, 2] = covariances[1, 2, 1] = torch.nan  # not in the trace
    covariances.requires_grad_()
    for right in (covariances.detach(), covariances):
        cost = bures_wasserstein_cost(means, covariances, means, right)
        assert cost[1].isnan().all()
        assert cost[:, 1].isnan().all()
        assert cost[::2, ::2].isfinite().all()
    (grad,) = torch.autograd.grad(cost[0, 1], covariances)
    assert grad[:2].isnan().all()


@pytest.mark.parametrize("dim", [4, 16])
@pytest.mark.parametrize("batched", [False, True])
def test_an_eigenvalue_is_zero_up_to_its_rounding_of_dim_epsilon(dim, batched):
    """The derivative of -2 Tr sqrt(S) is -1 / sqrt(s), or 0 where s is 0 up to rounding."""
    rounding = dim * torch.finfo(torch.float64).eps
    values = torch.ones(dim)
    values[1], values[2] = 0.75 * rounding, 1.25 * rounding
    left, mean = torch.diag(values)[None], torch.zeros(1, dim)
    if batched:  # beside a problem of another scale
        left, mean = torch.stack([left, 1e8 * left]), mean.expand(2, 1, dim)
    left = left.clone().requires_grad_()
    right = torch.eye(dim).expand_as(left)
    cost = bures_wasserstein_cost(mean, left, mean, right)
    (grad,) = torch.autograd.grad(cost.sum(), left)
    expected = 1 - values.rsqrt()
    expected[1] = 1
    grad = grad[0, 0] if batched else grad[0]
    torch.testing.assert_close(grad.diagonal(), expected, rtol=1e-6, atol=1e-6)


def test_costs_keep_the_dtype():
    means, pairs = torch.randn(3, 4, 5).float(), [(0, 2), (1, 2)]
    full = random_covariances(3, 4, 5).float()
    for covariances in (full, full.diagonal(dim1=-2, dim2=-1)):
        costs = pairwise_bures_cost(means, covariances, pairs)
        assert costs.dtype == torch.float32
        cost = bures_wasserstein_cost(means[0], covariances[0], means[2], covariances[2])
        assert cost.dtype == torch.float32
        torch.testing.assert_close(cost, costs[0])


def test_costs_are_computed_where_their_arguments_are():
    means, covariances = torch.randn(4, 3), random_covariances(4, 3).requires_grad_()
    expected = bures_wasserstein_cost(means, covariances, means, covariances)
    with torch.device("meta"):
        cost = bures_wasserstein_cost(means, covariances, means, covariances)
    torch.testing.assert_close(cost, expected)


def test_a_table_of_too_many_matrices_is_refused(monkeypatch):
    means = [torch.randn(2, 3, count, 5) for count in (4, 7)]
    full = [random_covariances(2, 3, count, 5) for count in (4, 7)]
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 4 * 7 * 25)
    assert bures_wasserstein_cost(means[0], full[0], means[1], full[1]).shape == (2, 3, 4, 7)
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 4 * 7 * 25 - 1)
    with pytest.raises(MemoryError, match="; use diagonal covariances, fewer components, or proj"):
        bures_wasserstein_cost(means[0], full[0], means[1], full[1])
    diagonal = [covariances.diagonal(dim1=-2, dim2=-1) for covariances in full]
    assert bures_wasserstein_cost(means[0], diagonal[0], means[1], diagonal[1]).isfinite().all()


def test_errors_name_the_argument():
    x, full = torch.ones(2, 3), torch.eye(3).expand(2, 3, 3)
    good = {"means_i": x, "covariances_i": full, "means_j": x, "covariances_j": full}
    for name in good:
        with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
            bures_wasserstein_cost(**{**good, name: [1.0]})
        with pytest.raises(
            ValueError, match=rf"^{name} must have shape \(\*batch, K_{name[-1]}, D"
        ):
            bures_wasserstein_cost(**{**good, name: x[0]})
        with pytest.raises(TypeError, match=rf"^means and covariances must .*\b{name}\b"):
            bures_wasserstein_cost(**{**good, name: good[name].float()})
    for side in "ij":
        with pytest.raises(ValueError, match=rf"^covariances_{side} must have .*; got \(2, 2\)"):
            bures_wasserstein_cost(**{**good, f"covariances_{side}": torch.ones(2, 2)})
    for name in "xy":
        good = {"x": x, "y": x}
        with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
            squared_euclidean_cost(**{**good, name: [1.0]})
        with pytest.raises(ValueError, match=rf"^{name} must have shape \(\*batch, [NM], D\)"):
            squared_euclidean_cost(**{**good, name: x[0]})
        with pytest.raises(TypeError, match=rf"^x and y must .*\b{name}\b"):
            squared_euclidean_cost(**{**good, name: x.float()})
    with pytest.raises(ValueError, match="must agree in batch and D"):
        squared_euclidean_cost(x, x[None])


def test_distances_in_one_product_keep_the_digits_of_near_rows_far_out():
    # Enough rows for the matrix product, a large offset of each feature, distances far below 1.
    x = 1e-2 * torch.randn(300, 4) + torch.tensor([1e5, -1e5, 3e4, 0.0])
    y = x + 1e-3 * torch.randn(300, 4)
    assert x.numel() * len(y) > _DIRECT_ENTRIES
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(squared_euclidean_cost(x, y), exact, rtol=1e-6, atol=1e-12)
    equal = squared_euclidean_cost(x, x.clone())
    assert (equal.diagonal() == 0).all()
    assert (equal + torch.eye(300) > 0).all()
