import pytest
import torch
from torch.autograd import gradcheck

from multialign.ops import (
    backend,
    choose_backend,
    gaussian_form,
    log,
    log_matmul_reduce,
    log_matvec,
    logsumexp,
)
from tests import reference


def test_log_of_zero_has_no_gradient():
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    y = log(x)
    y[1].backward()
    assert y[0] == -torch.inf
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("dims", [1, [0, 2], [-1], []])
def test_logsumexp_equals_torch(dims):
    x = torch.randn(3, 4, 5, requires_grad=True)
    expected = x if dims == [] else x.logsumexp(dims)
    torch.testing.assert_close(logsumexp(x, dims), expected)
    assert gradcheck(lambda x: logsumexp(x, dims), (x,))


def test_logsumexp_of_an_empty_sum_has_no_gradient():
    x = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    y = logsumexp(x, 1)
    torch.testing.assert_close(y, torch.tensor([-torch.inf, 0.0]))
    y.exp().sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert logsumexp(torch.tensor([torch.nan, -torch.inf]), 0).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0, 5000.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 2), (31, 40, 18)])
def test_sums_of_products_are_right_at_any_range(sizes, spread, dtype):
    i, j, k = sizes
    shapes = [(2, i, j), (2, j, k), (2, i, k)]
    a, b, weight = ((spread * torch.randn(shape)).to(dtype) for shape in shapes)
    if j > 1:
        a[0, 0], a[1, :, 1], b[1, 1], weight[0, 1] = (-torch.inf,) * 4
        # A single term, far below the maxima of its row and its column.
        a[0, 2, :2], b[0, :2, 1] = torch.tensor([[0, -spread], [-2 * spread, 0]], dtype=dtype)
        weight[0, 2], weight[0, 2, 1] = -torch.inf, 0
    terms = a.double()[:, :, :, None] + b.double()[:, None] + weight.double()[:, :, None]
    relative = 3e-6 if dtype == torch.float32 else 1e-11
    tolerance = {"rtol": relative, "atol": relative}
    torch.testing.assert_close(
        log_matmul_reduce(a, b, weight, "torch"),
        logsumexp(terms, (2, 3)).to(dtype),
        **tolerance,
    )
    sums = logsumexp(a.double() + b.double()[:, None, :, 0], 2).to(dtype)
    torch.testing.assert_close(log_matvec(a, b[..., 0], "torch"), sums, **tolerance)


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (3, 7, 2), (31, 129, 5), (600, 520, 3)])
@pytest.mark.parametrize("sigmas", [[1.3], [0.5, 2.0]])
def test_gaussian_form(n, m, dim, sigmas):
    x, y, p, q = torch.randn(1, n, dim), torch.randn(1, m, dim), torch.rand(1, n), torch.rand(1, m)
    precisions = 0.5 / torch.tensor([sigmas]).square()
    form = gaussian_form(x, y, p, q, precisions)
    expected = p[0].numpy() @ reference.kernel(x[0].numpy(), y[0].numpy(), sigmas) @ q[0].numpy()
    torch.testing.assert_close(form.item(), expected, rtol=1e-10, atol=0)
    own = p[0].numpy() @ reference.kernel(x[0].numpy(), x[0].numpy(), sigmas) @ p[0].numpy()
    torch.testing.assert_close(
        gaussian_form(x, x, p, p, precisions).item(), own, rtol=1e-10, atol=0
    )


def test_choosing_a_backend(monkeypatch):
    x = torch.ones(2, device="cpu")
    assert choose_backend("torch", x) == "torch"
    for core, chosen in ((True, "native"), (False, "torch")):
        monkeypatch.setattr(backend, "_HAS_CORE", core)
        assert choose_backend("auto", x) == chosen
    with pytest.raises(RuntimeError, match="the compiled core, which was not built here"):
        choose_backend("native", x)
    with pytest.raises(RuntimeError, match="needs CPU tensors; got one on meta"):
        choose_backend("native", x.to("meta"))
    with pytest.raises(ValueError, match="one of 'auto', 'torch', 'native', 'triton'; got 1"):
        choose_backend(1, x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_VERSION", None)
    with pytest.raises(RuntimeError, match="triton 3.6 or newer, which is not installed here"):
        choose_backend("triton", x)
    monkeypatch.setattr(backend, "_VERSION", "3.5.1")
    with pytest.raises(RuntimeError, match="triton 3.6 or newer, but 3.5.1 is installed"):
        choose_backend("triton", x)
    for version in ("3.6.0", "3.10.0+git1", ""):
        monkeypatch.setattr(backend, "_VERSION", version)
        with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
            choose_backend("triton", x)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor .* got one on cpu"):
        choose_backend("triton", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", x) == "triton"
    assert choose_backend("auto", x) == "torch"
    with pytest.raises(RuntimeError, match="needs float16, .* got torch.int64"):
        choose_backend("triton", x.long())
