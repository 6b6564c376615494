"""Attention and dropout of the reference model against torch's."""

import pytest
import torch
from torch.autograd import gradcheck

from examples.decalign import attention
from examples.decalign.attention import Attention, attend
from examples.decalign.dropout import Dropout, draw_bits, keep_factors


@pytest.mark.parametrize("entries", [1, 2**16])
def test_attention_is_that_of_torch(entries, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_ENTRIES", entries)
    ours = Attention(16, 4).double()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    queries = torch.randn(3, 5, 16).double().requires_grad_()
    keys = torch.randn(3, 7, 16).double().requires_grad_()
    blocked = torch.arange(7) >= torch.tensor([[3], [7], [1]])
    expected, _ = theirs(queries, keys, keys, key_padding_mask=blocked)
    result = ours(queries, keys, blocked)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, [queries, keys, *ours.parameters()], weights),
        torch.autograd.grad(expected, [queries, keys, *theirs.parameters()], weights),
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_attend_has_the_derivative_of_its_formula(drop):
    inputs = [torch.randn(6, 2, size).double().requires_grad_() for size in (5, 7, 7)]
    bias = torch.randn(6, 1, 7).double()

    def seeded(query, key, value):
        torch.manual_seed(0)
        return attend(query, key, value, bias, drop)

    torch.manual_seed(0)
    factors = keep_factors(draw_bits((6, 5, 7)), drop, torch.float64) if drop else 1.0
    query, key, value = inputs
    weights = (query.mT @ key / 2**0.5 + bias).softmax(-1) * factors
    torch.testing.assert_close(seeded(*inputs), value @ weights.mT)
    assert gradcheck(seeded, inputs)


def test_attention_takes_half_precision_under_autocast():
    layer = Attention(16, 4, 0.1)
    x = torch.randn(3, 5, 16, requires_grad=True)
    blocked = torch.zeros(3, 5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, x, blocked).float().square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    layer = Dropout(p)
    x = torch.ones(1001, 999, requires_grad=True)
    y = layer(x)
    count = x.numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs((y == 0).double().mean() - p) < 4 * deviation + 2**-16
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-4, atol=0)
    # Entries that share a draw do not share their fate.
    both = (y.flatten()[:-1:2] == 0) & (y.flatten()[1::2] == 0)
    assert abs(both.double().mean() - p**2) < 4 * (p**2 / len(both)) ** 0.5 + 2**-15
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y)
    assert layer.eval()(x) is x


def test_dropout_of_everything_and_of_nothing():
    x = torch.randn(3, 5)
    assert Dropout(0.0)(x) is x
    assert (Dropout(1.0)(x) == 0).all()
    assert Dropout(0.5)(torch.ones(0, 3)).shape == (0, 3)
