import math

import pytest
import torch
from torch.autograd import gradcheck

from multialign import CosineDecouplingLoss, cosine_decoupling_loss
from tests import reference

FORMS = ("squared", "absolute", "signed")


def make(shapes, **options):
    return [torch.randn(shape, **options) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shapes", [[(1, 3)], [(5, 3), (2, 4)], [(40, 7), (3, 2, 5), (8, 1)] + 2 * [(4, 6)]]
)
def test_matches_oracle(form, shapes):
    unique, common = make(shapes), make(shapes)
    weights = [torch.rand(shape[0]) for shape in shapes]
    for given in (None, weights):
        loss = cosine_decoupling_loss(unique, common, given, form=form)
        expected = reference.cosine_decoupling(
            [u.numpy() for u in unique], [v.numpy() for v in common], form, given
        )
        torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-12)


def test_reductions_agree():
    shapes = [(6, 3), (6, 4)]
    unique, common, weights = make(shapes), make(shapes), [None, torch.rand(6)]
    each = cosine_decoupling_loss(unique, common, weights, reduction="none")
    total = cosine_decoupling_loss(unique, common, weights, reduction="sum")
    assert each.shape == (6,)
    torch.testing.assert_close(each.sum(), total)
    plain = cosine_decoupling_loss(unique, common, reduction="none")
    torch.testing.assert_close(plain.mean(), cosine_decoupling_loss(unique, common))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(form, reduction):
    unique, common = (
        make([(4, 3), (4, 5)], requires_grad=True),
        make([(4, 3), (4, 5)], requires_grad=True),
    )
    weights = [torch.rand(4, requires_grad=True), None]

    def loss(u1, u2, v1, v2, w):
        return cosine_decoupling_loss([u1, u2], [v1, v2], [w, None], form=form, reduction=reduction)

    assert gradcheck(loss, (*unique, *common, weights[0]))


def test_zero_vector_has_cosine_and_gradient_zero():
    u = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    v = torch.tensor([[1.0, 2.0], [1.0, 1.0]], requires_grad=True)
    loss = cosine_decoupling_loss([u], [v], reduction="none")
    loss.sum().backward()
    assert loss[0] == 0
    assert (u.grad[0] == 0).all()
    assert (v.grad[0] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scale_does_not_matter_in_float32(scale):
    u, v = torch.randn(4, 3).float(), torch.randn(4, 3).float()
    scaled = cosine_decoupling_loss([u * scale], [v])
    torch.testing.assert_close(scaled, cosine_decoupling_loss([u], [v]))


def test_orthogonal_is_the_minimum_and_signed_is_not():
    u, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cosine_decoupling_loss([u], [v]) == 0
    assert cosine_decoupling_loss([u], [-u], form="signed") == -1


def test_nan_reaches_the_loss():
    u = torch.tensor([[math.nan, 1.0]])
    assert cosine_decoupling_loss([u], [torch.ones(1, 2)]).isnan()


def test_errors():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"form must be one of 'squared', .* got 'cubed'"):
        CosineDecouplingLoss(form="cubed")
    with pytest.raises(ValueError, match="same number of modalities; got 1 and 2"):
        cosine_decoupling_loss([x], [x, x])
    with pytest.raises(ValueError, match=r"common\[0\] must have the shape of unique\[0\]"):
        cosine_decoupling_loss([x], [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="equal N; got N = "):
        cosine_decoupling_loss([x, torch.ones(3, 3)], [x, torch.ones(3, 3)], reduction="none")
    with pytest.raises(TypeError, match=r"common\[0\] must have the dtype"):
        cosine_decoupling_loss([x], [x.float()])
    with pytest.raises(TypeError, match=r"unique\[0\] must be floating point; got torch.int64"):
        cosine_decoupling_loss([x.long()], [x])


def test_sums_are_weighted():
    shapes = [(6, 3), (6, 4)]
    unique, common, weights = make(shapes), make(shapes), [torch.rand(6), torch.rand(6)]
    expected = sum(
        w * torch.nn.functional.cosine_similarity(u, v) ** 2
        for u, v, w in zip(unique, common, weights, strict=True)
    )
    each = cosine_decoupling_loss(unique, common, weights, reduction="none")
    torch.testing.assert_close(each, expected)
    total = cosine_decoupling_loss(unique, common, weights, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


def test_errors_name_the_argument():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="^reduction must be one of"):
        cosine_decoupling_loss([x], [x], reduction="max")
    with pytest.raises(TypeError, match=r"^common\[0\] must be floating point"):
        cosine_decoupling_loss([x], [x.long()])
    with pytest.raises(ValueError, match=r"^unique\[0\] must have shape \(N, \.\.\.\); got"):
        cosine_decoupling_loss([x[0, 0]], [x])
    with pytest.raises(ValueError, match=r"^common\[0\] must have shape \(N, \.\.\.\); got"):
        cosine_decoupling_loss([x], [x[0, 0]])
    with pytest.raises(ValueError, match="unique"):
        cosine_decoupling_loss([x[:, :0]], [x[:, :0]])
