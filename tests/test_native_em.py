"""Mixtures along the axes in the compiled core, against the definition in torch."""

import ctypes
import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch.autograd import gradcheck

from multialign import (
    GaussianMixture,
    GaussianPrototypes,
    PrototypeAlignmentLoss,
    fit_gaussian_mixture,
    prototype_alignment_loss,
)
from multialign._samples import make_samples
from multialign._validation import check_samples
from multialign.mixture import FitOptions, Modalities, unpack_moments
from multialign.ops import mixtures as core
from multialign.ops._native.library import native_function

pytestmark = pytest.mark.skipif(native_function("fit") is None, reason="there is no compiled core")

AXES = ("diag", "spherical")


@pytest.fixture
def both(monkeypatch):
    """Return a function that calls another with the core and without."""

    def run(function):
        results = []
        for used in (True, False):
            monkeypatch.setattr(core, "_USE_CORE", used)
            results.append(function())
        monkeypatch.setattr(core, "_USE_CORE", True)
        return results

    return run


def clouds(sizes, dim=4, batch=(), dtype=torch.float64):
    return [
        (torch.randn(*batch, n, dim) + 3 * torch.randint(0, 3, (n, 1))).to(dtype) for n in sizes
    ]


def fit(x, weights, counts, kind="diag", differentiate="unroll", iterations=3, seed=3):
    """Return all that a fit computes, with gradients."""
    options = FitOptions(
        covariance_type=kind,
        em_iterations=iterations,
        regularization=1e-2,
        differentiate=differentiate,
        generator=torch.Generator().manual_seed(seed),
        process_group=None,
    )
    samples = make_samples(*check_samples(x, weights))
    mixtures, moments = Modalities(samples, counts, options).fit_with_posterior()
    if isinstance(moments, torch.Tensor):
        moments = unpack_moments(moments, counts)
    parts = [part for m in mixtures for part in (m.weights, m.means, m.covariances)]
    return parts, [part for moment in moments for part in moment]


def test_logarithm():
    function = native_function("log")
    special = [0.0, -1.0, math.inf, math.nan, 5e-324, 1e-310, 1.0, 1.7976931348623157e308, -0.0]
    near = 1 + torch.linspace(-0.5, 0.5, 1001)
    x = torch.cat([torch.tensor(special), near, torch.logspace(-307, 308, 5001)])
    out = torch.empty_like(x)
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (x, out)), ctypes.c_int64(len(x)))
    torch.testing.assert_close(out, x.log(), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("differentiate", ["unroll", "last", "none"])
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize(
    ("sizes", "counts"), [((20, 20, 20), (4, 4, 4)), ((20, 15, 31), (3, 4, 1)), ((9, 9), (3, 5))]
)
def test_equals_torch(both, sizes, counts, kind, differentiate, weighted, batch):
    x = [f.requires_grad_() for f in clouds(sizes, batch=batch)]
    weights = None
    if weighted:
        weights = [torch.rand(*batch, n) * (torch.rand(*batch, n) > 0.3) for n in sizes]
        weights = [weight.requires_grad_() for weight in weights]
    inputs = [*x, *(weights or [])]
    directions = None

    def run():
        nonlocal directions
        outputs = [t for part in fit(x, weights, counts, kind, differentiate) for t in part]
        directions = directions or [torch.randn_like(t) for t in outputs]
        total = sum((t * d).sum() for t, d in zip(outputs, directions))
        return outputs, torch.autograd.grad(total, inputs, materialize_grads=True)

    (values, grads), (expected, expected_grads) = both(run)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", AXES)
def test_gradcheck(kind):
    x = [f.requires_grad_() for f in clouds((7, 6), dim=2)]
    weights = [(torch.rand(n) + 0.1).requires_grad_() for n in (7, 6)]

    def run(a, b, v, w):
        return [t for part in fit([a, b], [v, w], (2, 3), kind) for t in part]

    assert gradcheck(run, (*x, *weights))


@pytest.mark.parametrize("differentiate", ["unroll", "last"])
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("given", [False, True])
def test_stops_as_torch_does(both, kind, differentiate, given):
    (x,) = clouds((40,), batch=(3,))
    x.requires_grad_()
    parts = [torch.rand(3, 4).softmax(-1), x.detach()[:, :4].clone(), torch.rand(3, 4, 4) + 0.5]
    if kind == "spherical":
        parts[2] = parts[2][..., 0].clone()
    parts = [part.requires_grad_(given) for part in parts]

    def run():
        init = "kmeans++"
        if given:
            init = GaussianMixture(
                **dict(zip(("weights", "means", "covariances"), parts)), covariance_type=kind
            )
        mixture = fit_gaussian_mixture(
            x,
            4,
            covariance_type=kind,
            init=init,
            tolerance=1e-2,
            regularization=1e-2,
            differentiate=differentiate,
            generator=torch.Generator().manual_seed(0),
        )
        outputs = [mixture.weights, mixture.means, mixture.covariances]
        inputs = [x, *parts] if given else [x]
        total = sum((t**2).sum() for t in outputs)
        grads = torch.autograd.grad(total, inputs, materialize_grads=True)
        return [*outputs, mixture.log_likelihood, mixture.iterations, mixture.converged], grads

    (values, grads), (expected, expected_grads) = both(run)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-8, atol=1e-9)
    assert len(values[4].unique()) > 1


@pytest.mark.parametrize("kind", AXES)
def test_equals_scikit_learn(kind):
    (x,) = clouds((200,))
    start = GaussianMixture(
        weights=torch.full((3,), 1 / 3),
        means=x[:3].clone(),
        covariances=torch.ones(3, 4) if kind == "diag" else torch.ones(3),
        covariance_type=kind,
    )
    ours = fit_gaussian_mixture(
        x, 3, covariance_type=kind, init=start, iterations=5, tolerance=0.0, regularization=1e-6
    )
    floor = 1e-6 * x.var(0, correction=0).mean().item()
    theirs = SklearnMixture(
        3,
        covariance_type=kind,
        max_iter=5,
        tol=0.0,
        reg_covar=floor,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=1 / start.covariances.numpy(),
    )
    with pytest.warns(UserWarning, match="converge"):
        theirs.fit(x.numpy())
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=1e-9)
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(ours.covariances, theirs.covariances_, rtol=1e-7)
    np.testing.assert_allclose(ours.log_likelihood, theirs.score(x.numpy()), rtol=1e-9)


def _duplicates(x):
    x[:] = x[:1]


def _constant(x):
    x[:, 1] = 5.0


def _far(x):
    x += 1e6


@pytest.mark.parametrize("change", [_duplicates, _constant, _far])
@pytest.mark.parametrize("kind", AXES)
def test_degenerate_samples(both, kind, change):
    x = clouds((12, 12))
    for f in x:
        change(f)
        f.requires_grad_()

    def run():
        outputs = [t for part in fit(x, None, (3, 3), kind) for t in part]
        return outputs, torch.autograd.grad(sum(t.sum() for t in outputs), x)

    (values, grads), (expected, expected_grads) = both(run)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    if change is not _duplicates:  # of equal samples, which seeds is arbitrary
        torch.testing.assert_close(grads, expected_grads, rtol=1e-6, atol=1e-6)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_reach_the_result_and_no_other_problem(value):
    x = [f.requires_grad_() for f in clouds((12, 12), batch=(3,))]
    with torch.no_grad():
        x[0][1, 3, 2] = value
    outputs = [t for part in fit(x, None, (3, 3)) for t in part]
    for output in outputs[:3]:
        assert output[1].isnan().all()
        assert output[[0, 2]].isfinite().all()
    (grad,) = torch.autograd.grad(sum(t[[0, 2]].sum() for t in outputs), x[:1])
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (2, 5), (3, 3)])
@pytest.mark.parametrize("batch", [(), (0,), (2,)])
def test_few_samples(both, n, k, batch):
    x = [f.requires_grad_() for f in clouds((n, n), batch=batch)]

    def run():
        outputs = [t for part in fit(x, None, (k, k)) for t in part]
        return outputs, torch.autograd.grad(sum(t.sum() for t in outputs), x)

    (values, grads), (expected, _) = both(run)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("absent", [None, 0, 2])
@pytest.mark.parametrize("matching", ["index", "plan"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", AXES)
def test_loss_equals_torch(kind, reduction, matching, absent):
    x = [f.requires_grad_() for f in clouds((15, 15, 15), batch=(2,))]
    weights = [torch.rand(2, 15) * (torch.rand(2, 15) > 0.3) for _ in x]
    if absent is not None:
        weights[absent] = torch.zeros(2, 15)
    weights = [weight.requires_grad_() for weight in weights]
    results = []
    for backend in ("auto", "torch"):
        loss = prototype_alignment_loss(
            x,
            weights,
            num_prototypes=3,
            epsilon=2.0,
            covariance_type=kind,
            cost_reduction=reduction,
            matching=matching,
            tolerance=1e-12,
            backend=backend,
            generator=torch.Generator().manual_seed(0),
        )
        results.append((loss, torch.autograd.grad(loss, [*x, *weights])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(both, dtype):
    x = [f.requires_grad_() for f in clouds((15, 15), dtype=dtype)]

    def run():
        outputs = [t for part in fit(x, None, (3, 3)) for t in part]
        return outputs, torch.autograd.grad(sum(t.square().sum() for t in outputs), x)

    (values, grads), (expected, expected_grads) = both(run)
    assert values[0].dtype == torch.float32
    assert grads[0].dtype == dtype
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(grads, expected_grads, **tolerance)


def test_any_strides(both):
    x = [f.mT.contiguous().mT.requires_grad_() for f in clouds((15, 15))]

    def run():
        outputs = [t for part in fit(x, None, (3, 3)) for t in part]
        return outputs, torch.autograd.grad(sum(t.sum() for t in outputs), x)

    torch.testing.assert_close(*both(run), rtol=1e-9, atol=1e-9)


def test_same_bits_whatever_the_threads_and_the_batch():
    x = clouds((30, 30), batch=(5,))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        moved = [f.requires_grad_() for f in x]
        outputs = [t for part in fit(moved, None, (3, 3)) for t in part]
        grads = torch.autograd.grad(sum(t.sum() for t in outputs), moved)
        results.append([*outputs, *grads])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_running_mixtures_equal_torch(both):
    batches = [clouds((20, 20)) for _ in range(3)]

    def run():
        loss = PrototypeAlignmentLoss(
            3,
            epsilon=2.0,
            momentum=0.5,
            num_features=4,
            num_modalities=2,
            generator=torch.Generator().manual_seed(0),
        ).double()
        values = [loss(x) for x in batches]
        x = [f.clone().requires_grad_() for f in batches[0]]
        values += torch.autograd.grad(loss(x), x)
        return [*values, *loss.state_dict().values()]

    torch.testing.assert_close(*both(run), rtol=1e-6, atol=1e-8)


def test_second_derivatives_are_refused():
    x = [f.requires_grad_() for f in clouds((15, 15))]
    loss = prototype_alignment_loss(x, num_prototypes=3, epsilon=2.0)
    (grad,) = torch.autograd.grad(loss, x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
def test_forward_mode_takes_torch():
    x = clouds((15, 15))
    directions = [torch.randn_like(f) for f in x]

    def value(*features):
        return fit(features, None, (3, 3))[0][1].sum()

    _, tangent = torch.func.jvp(value, tuple(x), tuple(directions))
    moved = [f.clone().requires_grad_() for f in x]
    grads = torch.autograd.grad(value(*moved), moved)
    expected = sum((g * d).sum() for g, d in zip(grads, directions))
    torch.testing.assert_close(tangent, expected)


def test_vmap():
    x = clouds((12, 12), batch=(3,))

    def value(a, b):
        outputs = fit([a, b], None, (3, 3))
        return sum(t.square().sum() for part in outputs for t in part)

    options = {"randomness": "same"}
    ours = torch.func.vmap(torch.func.grad(value), **options)(*x)
    for i in range(3):
        one = [f[i].clone().requires_grad_() for f in x]
        (grad,) = torch.autograd.grad(value(*one), one[:1])
        # Under vmap a generator draws as without, but the same for all.
        torch.testing.assert_close(ours[i], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles_without_a_break(dtype):
    x = [f.requires_grad_() for f in clouds((12, 12), dtype=dtype)]

    def value(a, b):
        return prototype_alignment_loss([a, b], num_prototypes=3, epsilon=2.0)

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    ours = compiled(*x)
    grads = torch.autograd.grad(ours, x)
    torch.manual_seed(0)
    expected = value(*x)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, x))


def test_prototypes_of_one_modality_equal_torch(both):
    (x,) = clouds((20,))

    def run():
        torch.manual_seed(0)
        mixture = GaussianPrototypes(3, covariance_type="spherical")(x)
        return mixture.weights, mixture.means, mixture.covariances

    torch.testing.assert_close(*both(run), rtol=1e-12, atol=1e-12)


def test_large_samples_take_torch(monkeypatch):
    x = clouds((20, 20))
    monkeypatch.setattr(core, "_MOST_ENTRIES", 20 * 4)
    assert core.core_fits(x)
    assert not core.core_fits([*x, torch.zeros(21, 4)])
    assert not core.core_fits([f[:0] for f in x])
