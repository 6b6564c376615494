"""Independence: HSIC and CKA."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from multialign import HSICLoss, hsic_loss
from tests import reference


def sides(count, dims=(3, 2), batch=()):
    u = torch.randn(*batch, count, dims[0])
    return u, u[..., : dims[1]].square() + 0.3 * torch.randn(*batch, count, dims[1])


@pytest.mark.parametrize("count", [5, 40, 300])  # 300: streamed
@pytest.mark.parametrize("bandwidth", [1.3, "median", (0.7, "median"), [2, 0.5]])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_oracle(count, bandwidth, estimator, normalize):
    pairs = [sides(count), sides(count + 2, (1, 4))]
    widths = bandwidth if isinstance(bandwidth, (tuple, list)) else (bandwidth, bandwidth)
    weights = [torch.rand(count), None]
    masks = [torch.arange(count) != 2, None]
    for given in (None, weights if estimator == "biased" else masks):
        expected = 0.0
        for m, pair in enumerate(pairs):
            weight = None if given is None or given[m] is None else given[m].numpy()
            kept = slice(None) if estimator == "biased" or weight is None else weight
            kernels = []
            for x, width in zip(pair, widths):
                x = x.numpy()[kept]
                sigma = reference.median_distance([x]) if width == "median" else width
                kernels.append(reference.kernel(x, x, [sigma]))
            if estimator == "unbiased":
                expected += reference.unbiased_hsic(*kernels, normalize)
            else:
                expected += reference.hsic(*kernels, weight, normalize)
        loss = hsic_loss(
            *zip(*pairs), given, bandwidth=bandwidth, estimator=estimator, normalize=normalize
        )
        torch.testing.assert_close(loss.item(), float(expected), rtol=1e-9, atol=1e-12)


def test_with_equal_weights_it_is_the_trace():
    u, v = sides(12)
    k, h = (reference.kernel(x.numpy(), x.numpy(), [1.0]) for x in (u, v))
    centre = np.eye(12) - 1 / 12
    expected = np.trace(k @ centre @ h @ centre) / 12**2
    torch.testing.assert_close(hsic_loss([u], [v], bandwidth=1.0).item(), expected)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_gradients(estimator, normalize, streamed, monkeypatch):
    if streamed:
        monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
        monkeypatch.setattr("multialign.ops.kernel_sums._BLOCK", 3)
    u, v = (x.requires_grad_() for x in sides(7, batch=(2,)))
    weight = torch.rand(2, 7, requires_grad=True)
    options = {"bandwidth": (1.0, 2.0), "estimator": estimator, "normalize": normalize}

    def loss(u, v, w):
        return hsic_loss([u], [v], None if estimator == "unbiased" else [w], **options)

    assert gradcheck(loss, (u, v, weight))
    if not streamed:
        assert gradgradcheck(loss, (u, v, weight))


@pytest.mark.parametrize("by", [0, 1])
def test_second_derivatives_of_streamed_matrices_are_refused(by, monkeypatch):
    monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
    pair = [x.requires_grad_() for x in sides(6)]
    (grad,) = torch.autograd.grad(hsic_loss(*([x] for x in pair)), pair[0], create_graph=True)
    with pytest.raises(RuntimeError, match="streamed and has first derivatives only"):
        torch.autograd.grad(grad.sum(), pair[by])


@pytest.mark.transforms
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_streamed_matrices_under_func_and_compile(estimator, monkeypatch):
    monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
    u, v = sides(7, batch=(3,))

    def loss(u, v):
        return hsic_loss([u], [v], estimator=estimator, normalize=True)

    expected = torch.stack([loss(u[b], v[b]) for b in range(3)])
    torch.testing.assert_close(torch.func.vmap(loss)(u, v), expected)
    leaf = u[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, v[0]), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(u, v)[0], grad)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (by_compiled,) = torch.autograd.grad(compiled(leaf, v[0]), leaf)
    torch.testing.assert_close(by_compiled, grad)


def test_the_unbiased_estimate_of_independent_features_has_mean_0():
    values = torch.stack(
        [
            hsic_loss([torch.randn(12, 2)], [torch.randn(12, 3)], estimator="unbiased")
            for _ in range(2000)
        ]
    )
    # The biased one has a mean of about 1/12 of the variances of the kernels.
    assert values.mean().abs() < 4 * values.std() / 2000**0.5 < 2e-3
    assert hsic_loss([torch.randn(12, 2)], [torch.randn(12, 3)]) > 0


def test_every_pair_of_independent_coordinates_is_0():
    """On a product grid the weights factorise exactly."""
    x, y = torch.meshgrid(torch.randn(5), torch.randn(6), indexing="ij")
    p, q = torch.rand(5), torch.rand(6)
    pair = [x.reshape(-1, 1)], [y.reshape(-1, 1)]
    loss = hsic_loss(*pair, [torch.outer(p, q).flatten()])
    torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-16)


def test_a_right_angle_is_not_independence():
    angle = torch.rand(200) * 2 * torch.pi
    zero = torch.zeros(200)
    u, v = torch.stack([angle.cos(), zero], 1), torch.stack([zero, angle.sin()], 1)
    assert hsic_loss([u], [v], normalize=True) > 0.03
    assert hsic_loss([u], [v[torch.randperm(200)]], normalize=True) < 0.02


def test_alignment_is_1_with_itself_and_of_a_rotation():
    u = torch.randn(30, 4)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    torch.testing.assert_close(hsic_loss([u], [3 * u @ turn], normalize=True), torch.ones(()))


def test_alignment_of_wide_kernels_is_that_of_linear_ones():
    """CKA of Kornblith et al. (2019) with a linear kernel is the limit, and no digits are lost."""
    u, v = sides(25, (3, 3))
    x, y = u - u.mean(0), v - v.mean(0)
    linear = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    for dtype in (torch.float32, torch.float64):
        found = hsic_loss([u.to(dtype)], [v.to(dtype)], bandwidth=1e4, normalize=True)
        torch.testing.assert_close(found.double(), linear, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [9, 300])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_alignment_with_a_constant_side_is_0_with_zero_gradient(count, estimator):
    u, v = torch.randn(count, 3, requires_grad=True), torch.full((count, 2), 0.1)
    v.requires_grad_()
    loss = hsic_loss([u], [v], estimator=estimator, normalize=True)
    grads = torch.autograd.grad(loss, (u, v))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def test_fewer_than_four_samples_are_out_of_the_unbiased_estimate():
    u, v = sides(6)
    few = torch.arange(6) < 3
    loss = hsic_loss([u, u], [v, v], [few, None], estimator="unbiased")
    torch.testing.assert_close(loss, hsic_loss([u], [v], estimator="unbiased"))


def test_minimising_it_removes_what_a_probe_could_read():
    torch.manual_seed(1)
    v = torch.randn(128, 1)
    u = torch.cat([v.square() - 1 + 0.1 * torch.randn(128, 1), torch.randn(128, 1)], 1)
    weight = torch.tensor([[0.7, 0.7]], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        direction = torch.nn.functional.normalize(weight)
        hsic_loss([u @ direction.T], [v]).backward()
        optimizer.step()
    assert weight[0, 1].abs() > 5 * weight[0, 0].abs()


def test_errors():
    x = torch.ones(5, 2)
    with pytest.raises(ValueError, match='"unbiased" needs at least 4 .* unique\\[0\\] has N = 3'):
        hsic_loss([x[:3]], [x[:3]], estimator="unbiased")
    with pytest.raises(TypeError, match="weights\\[0\\] must be boolean with .* got torch.float64"):
        hsic_loss([x], [x], [torch.ones(5)], estimator="unbiased")
    with pytest.raises(ValueError, match="the same number of modalities; got 1 and 2"):
        hsic_loss([x], [x, x])
    with pytest.raises(ValueError, match=r"common\[0\] must have shape \(5, 'D'\).*got \(4, 2\)"):
        hsic_loss([x], [x[:4]])
    with pytest.raises(
        ValueError, match=r"unique\[1\] must have the batch dimensions of unique\[0"
    ):
        hsic_loss([x, x[None]], [x, x[None]])
    with pytest.raises(ValueError, match="at least one feature; got D = 2 and 0"):
        hsic_loss([x], [x[:, :0]])
    with pytest.raises(TypeError, match="must share one dtype"):
        hsic_loss([x], [x.float()])
    with pytest.raises(ValueError, match="a pair of these, .* got 3 values"):
        HSICLoss(bandwidth=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"bandwidth\[1\] must be a finite number > 0; got 0"):
        HSICLoss(bandwidth=(1.0, 0.0))
    with pytest.raises(ValueError, match="must be one of 'median'; got 'mean'"):
        HSICLoss(bandwidth="mean")
    with pytest.raises(TypeError, match="normalize must be True or False; got 1"):
        HSICLoss(normalize=1)
