"""What stands in an absent row, and how samples are weighed."""

import pytest
import torch

from multialign._samples import make_samples, pad_rows

NAN = torch.nan


def test_an_absent_row_is_a_present_row_of_its_modality():
    x = [torch.randn(2, 4, 3), torch.randn(2, 5, 3) + 9]
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 1.0, 1.0]])
    x[0] = torch.where(weight.unsqueeze(-1) == 0, NAN, x[0])
    samples = make_samples(x, [weight, None])
    assert torch.equal(samples.origins[0, 0, 0], x[0][0, 2])
    assert torch.equal(samples.origins[0, 1, 0], x[0][1, 1])
    filled = samples.features[0][weight == 0]
    assert torch.equal(filled, samples.origins[0].expand_as(x[0])[weight == 0])
    assert torch.equal(samples.features[0][weight != 0], x[0][weight != 0])
    torch.testing.assert_close(samples.masses[0], weight / weight.sum(-1, keepdim=True))
    assert not samples.complete


def test_an_absent_modality_is_where_the_first_present_one_is():
    x = [torch.full((4, 3), NAN), torch.randn(0, 3), torch.randn(5, 3), torch.randn(5, 3)]
    samples = make_samples(x, [torch.zeros(4), None, None, torch.rand(5)])
    assert samples.present.tolist() == [0, 0, 1, 1]
    for m in (0, 1):
        assert torch.equal(samples.origins[m], x[2][:1])
    padded = pad_rows(samples, 4)
    assert torch.equal(padded.features[0], x[2][:1].expand(4, 3))
    assert torch.equal(padded.features[1], x[2][:1].expand(4, 3))
    assert (padded.masses[1] == 0).all()


def test_without_any_sample_all_rows_are_zero():
    samples = make_samples([torch.full((2, 3), NAN)] * 2, [torch.zeros(2)] * 2)
    assert all((x == 0).all() for x in samples.features)
    assert (samples.origins == 0).all()


@pytest.mark.parametrize("value", [NAN, torch.inf, 1e300])
def test_absent_rows_have_no_gradient(value):
    x = torch.randn(4, 2)
    x[1] = value
    x.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0, 3.0], requires_grad=True)
    samples = make_samples([x], [weight])
    (samples.features[0].square().sum() + samples.masses[0].square().sum()).backward()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_negative_or_nan_weight_shows():
    samples = make_samples([torch.randn(3, 2)], [torch.tensor([1.0, NAN, 1.0])])
    assert samples.masses[0].isnan().all()
    assert (samples.present == 1).all()


def test_complete_samples_are_uniform():
    x = [torch.randn(4, 2), torch.randn(5, 2)]
    samples = make_samples(x, [None, None])
    assert samples.complete
    assert all(torch.equal(a, b) for a, b in zip(samples.features, x, strict=True))
    assert [mass.unique().tolist() for mass in samples.masses] == [[1 / 4], [1 / 5]]
