import warnings

import geomloss
import pytest
import torch
from scipy.stats import energy_distance
from torch.autograd import gradcheck, gradgradcheck

from multialign import MMDLoss, mmd_loss
from tests import reference


@pytest.mark.parametrize("sizes", [(2, 2), (40, 3), (5, 17, 40), (2, 3, 4, 5), (7, 7, 7, 7, 7)])
@pytest.mark.parametrize("bandwidth", [1.0, 2, [0.5, 1.0, 4.0], "median"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_matches_oracle(sizes, bandwidth, estimator):
    features = [torch.randn(n, 4) + m / 2 for m, n in enumerate(sizes)]
    weights = [torch.rand(n) for n in sizes]
    arrays = [x.numpy() for x in features]
    sigmas = [reference.median_distance(arrays)] if bandwidth == "median" else bandwidth
    sigmas = sigmas if isinstance(sigmas, list) else [sigmas]
    for given in (None, weights):
        loss = mmd_loss(features, given, bandwidth=bandwidth, estimator=estimator)
        expected = reference.mmd(arrays, sigmas, estimator, given)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [1.0, [0.5, 2.0]])
@pytest.mark.parametrize("estimator", ["biased", "unbiased", "random_features"])
def test_gradients(bandwidth, estimator):
    features = [torch.randn(n, 3, requires_grad=True) for n in (4, 5, 6)]
    weight = torch.rand(4, requires_grad=True)

    def loss(x, y, z, w):
        return mmd_loss(
            [x, y, z],
            [w, None, None],
            bandwidth=bandwidth,
            estimator=estimator,
            num_features=7,
            generator=torch.Generator().manual_seed(1),
        )

    assert gradcheck(loss, (*features, weight))


def test_median_carries_no_gradient():
    x, y = torch.randn(5, 2, requires_grad=True), torch.randn(6, 2)
    sigma = reference.median_distance([x.detach().numpy(), y.numpy()])
    (by_median,) = torch.autograd.grad(mmd_loss([x, y], bandwidth="median"), x)
    (by_number,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=float(sigma)), x)
    torch.testing.assert_close(by_median, by_number)


def test_median_skips_absent_samples():
    x, y = torch.randn(5, 2), torch.randn(6, 2)
    padded = torch.cat([x, torch.full((2, 2), torch.nan)])
    mask = torch.tensor([True] * 5 + [False] * 2)
    torch.testing.assert_close(
        mmd_loss([padded, y], [mask, None], bandwidth="median"),
        mmd_loss([x, y], bandwidth="median"),
    )


def test_random_features_approach_the_biased_estimate():
    x, y = torch.randn(30, 3), torch.randn(40, 3) + 1
    generator = torch.Generator().manual_seed(0)
    options = {"bandwidth": [1.0, 2.0]}
    approximate = mmd_loss(
        [x, y], **options, estimator="random_features", num_features=200_000, generator=generator
    )
    torch.testing.assert_close(approximate, mmd_loss([x, y], **options), rtol=2e-2, atol=0)


def test_agrees_with_geomloss():
    # geomloss: half the squared MMD, kernel exp(-|x-y|^2 / (2 blur^2))
    x, y = torch.randn(20, 3), torch.randn(30, 3)
    theirs = geomloss.SamplesLoss("gaussian", blur=0.7, backend="tensorized")(x, y)
    torch.testing.assert_close(mmd_loss([x, y], bandwidth=0.7), 2 * theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 1300])  # direct differences, and the matrix product
def test_zero_at_equality_and_never_far_below(dtype, size):
    x = torch.randn(size, 5, dtype=dtype)
    assert mmd_loss([x, x.clone(), x.clone()], bandwidth=1.0) == 0
    assert mmd_loss([x, x + 1e-3], bandwidth=1.0) > -1e-6


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidth", [1.5, [0.5, 1.0, 4.0], "median"])
class TestStreaming:
    """Blocks of a kernel matrix that is not held, here of 3 x 3 entries."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        self.stream = lambda: monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
        monkeypatch.setattr("multialign.ops.kernel_sums._BLOCK", 3)

    def test_equals_the_held_matrix(self, estimator, bandwidth):
        features = [torch.randn(2, n, 4) + m for m, n in enumerate((7, 5, 9))]
        weights = [torch.rand(2, n) for n in (7, 5, 9)]
        weights[1][0, 3] = 0
        inputs = [t.requires_grad_() for t in (*features, *weights)]
        results = []
        for _ in range(2):
            loss = mmd_loss(inputs[:3], inputs[3:], bandwidth=bandwidth, estimator=estimator)
            results.append((loss, torch.autograd.grad(loss, inputs)))
            self.stream()
        torch.testing.assert_close(results[0], results[1])

    def test_gradients(self, estimator, bandwidth):
        if bandwidth == "median":
            bandwidth = 2.0  # its own gradient, which is left out, would show
        self.stream()
        features = [torch.randn(n, 3, requires_grad=True) for n in (4, 5)]
        weight = torch.rand(4, requires_grad=True)

        def loss(x, y, w):
            return mmd_loss([x, y], [w, None], bandwidth=bandwidth, estimator=estimator)

        assert gradcheck(loss, (*features, weight))

    def test_zero_at_equality(self, estimator, bandwidth):
        self.stream()
        x = torch.randn(8, 3).float()
        loss = mmd_loss([x, x.clone()], bandwidth=bandwidth, estimator=estimator)
        assert loss == 0 if estimator == "biased" else loss < 0

    @pytest.mark.transforms
    def test_func_and_compile(self, estimator, bandwidth):
        self.stream()
        x, y = torch.randn(3, 7, 2), torch.randn(3, 5, 2) + 1

        def loss(x, y):
            return mmd_loss([x, y], bandwidth=bandwidth, estimator=estimator)

        expected = torch.stack([loss(x[b], y[b]) for b in range(3)])
        torch.testing.assert_close(torch.func.vmap(loss)(x, y), expected)
        leaf = x[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf, y[0]), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(x[0], y[0]), grad)
        mapped = torch.func.vmap(torch.func.grad(loss))(x, y)
        torch.testing.assert_close(mapped[0], grad)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (by_compiled,) = torch.autograd.grad(compiled(leaf, y[0]), leaf)
        torch.testing.assert_close(by_compiled, grad)


def test_second_derivatives_of_a_streamed_matrix_are_refused(monkeypatch):
    x = torch.randn(4, 2, requires_grad=True)
    y = torch.randn(4, 2)
    (grad,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=1.0), x, create_graph=True)
    grad.sum().backward()
    monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
    (grad,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=1.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"streamed .* first derivatives only; .*has them all"):
        grad.sum().backward()


def test_median_of_many_samples_is_that_of_every_kth(monkeypatch):
    monkeypatch.setattr("multialign.kernels._MEDIAN_SAMPLES", 10)
    x, y = torch.randn(12, 3), torch.randn(13, 3)
    sigma = float(reference.median_distance([torch.cat([x, y])[::3].numpy()]))
    torch.testing.assert_close(
        mmd_loss([x, y], bandwidth="median"), mmd_loss([x, y], bandwidth=sigma)
    )


def test_large_offset_costs_nothing():
    x, y = torch.randn(50, 4).float(), torch.randn(60, 4).float() + 1
    offset = 2.0**13
    moved = [(x + offset), (y + offset)]
    exact = mmd_loss([m.double() - offset for m in moved], bandwidth=1.0)
    torch.testing.assert_close(mmd_loss(moved, bandwidth=1.0).double(), exact, rtol=1e-5, atol=1e-7)


def test_all_points_equal():
    x = torch.ones(4, 2, requires_grad=True)
    loss = mmd_loss([x, torch.ones(3, 2)], bandwidth="median")
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_learns_with_default_options():
    """In 64 dimensions, where a bandwidth of 1 leaves no gradient."""
    x, y = torch.randn(100, 64) + 1, torch.randn(100, 64).requires_grad_()
    loss = MMDLoss()([x, y])
    (grad,) = torch.autograd.grad(loss, y)
    torch.testing.assert_close(loss, mmd_loss([x, y], bandwidth="median"))
    assert (grad.mean(0) < 0).all()  # towards x
    assert grad.norm() > 1e-3


SMALL = "every kernel entry between distinct samples is below 1e-06"


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "random_features"])
@pytest.mark.parametrize("size", [20, 300])
def test_a_bandwidth_without_gradient_is_worth_a_warning(estimator, size):
    x, y = torch.randn(2, size, 3), torch.randn(2, size, 3)
    x[1], y[1] = 1e3 * x[1], 1e3 * y[1]
    pooled = torch.cat([x, y], 1)
    nearest = (
        torch.cdist(pooled, pooled)
        .flatten(1)
        .masked_fill(torch.eye(2 * size).bool().flatten(), 1e9)
    )
    limit = nearest.min() / (2 * torch.tensor(1e6).log()).sqrt()
    for features in ([x, y], [x, torch.cat([y, x[:, :1]], 1)]):
        with pytest.warns(UserWarning, match=SMALL):
            mmd_loss(features, bandwidth=float(limit) * 0.999, estimator=estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mmd_loss(features, bandwidth=float(limit) * 1.001, estimator=estimator)
            mmd_loss(features, bandwidth=[float(limit) * 0.5, float(limit) * 2])
            mmd_loss(features, estimator=estimator)
    with pytest.warns(UserWarning, match=SMALL):
        mmd_loss([x, y], bandwidth=[float(limit) * 0.5, float(limit) * 0.9], estimator=estimator)


def test_equal_and_absent_samples_are_worth_no_warning():
    x = torch.ones(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mmd_loss([x, x], bandwidth=1e-6) == 0
        x, y = torch.tensor([[0.0], [1.0], [9e9]]), torch.tensor([[0.0], [2.0]])
        mmd_loss([x, y], [torch.tensor([True, True, False]), None], bandwidth=0.5)


def test_errors():
    x = torch.ones(4, 2)
    with pytest.raises(
        ValueError, match='"unbiased" needs at least 2 .* features\\[1\\] has N = 1'
    ):
        mmd_loss([x, x[:1]], estimator="unbiased")
    with pytest.raises(ValueError, match="bandwidth must be a finite number > 0; got -1.0"):
        MMDLoss(bandwidth=-1.0)
    with pytest.raises(ValueError, match="bandwidth must hold at least one number"):
        MMDLoss(bandwidth=[])
    with pytest.raises(ValueError, match="must be one of 'median'; got 'mean'"):
        MMDLoss(bandwidth="mean")
    with pytest.raises(TypeError, match="bandwidth must be a finite number > 0; got None"):
        MMDLoss(bandwidth=None)
    with pytest.raises(ValueError, match="estimator must be one of"):
        MMDLoss(estimator="exact")
    with pytest.raises(ValueError, match="num_features must be an integer >= 1; got 0"):
        MMDLoss(num_features=0)


def test_median_of_two_samples_is_their_distance():
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    expected = mmd_loss([x, y], bandwidth=5.0)
    torch.testing.assert_close(mmd_loss([x, y], bandwidth="median"), expected)
    padded = [torch.cat([x, x + 1]), torch.cat([y - 1, y])]
    weights = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    torch.testing.assert_close(mmd_loss(padded, weights, bandwidth="median"), expected)


def test_median_counts_the_pairs_of_equal_samples():
    # Distances 0, 0, 0 and 5, 5, 5.
    x, y = torch.zeros(2, 1), torch.tensor([[0.0], [5.0]])
    torch.testing.assert_close(
        mmd_loss([x, y], bandwidth="median"), mmd_loss([x, y], bandwidth=2.5)
    )


def test_median_has_the_scale_of_each_problem():
    x, y = torch.randn(2, 6, 3), torch.randn(2, 5, 3) + 1
    expected = mmd_loss([x, y], bandwidth="median")
    scale = torch.tensor([1e-12, 1e12])[:, None, None]
    torch.testing.assert_close(mmd_loss([x * scale, y * scale], bandwidth="median"), expected)


def test_a_single_sample_has_a_bandwidth_too():
    features = [torch.zeros(2, 3, 0, 2), torch.zeros(2, 3, 1, 2)]
    assert mmd_loss(features, bandwidth="median") == 0


def test_random_features_are_measured_near_the_data():
    x, y = torch.randn(30, 3).float(), torch.randn(30, 3).float() + 1
    options = {"estimator": "random_features", "num_features": 50}
    near, far = (
        mmd_loss([x + o, y + o], generator=torch.Generator().manual_seed(0), **options)
        for o in (0.0, 2.0**12)
    )
    torch.testing.assert_close(near, far, rtol=1e-2, atol=0)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_single_sample_is_out_of_the_unbiased_estimate_alone(estimator):
    features = [torch.randn(2, n, 3) for n in (4, 5, 6)]
    # In the first problem one sample of the first modality is there, in the second two.
    weights = [torch.tensor([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0]]), None, None]
    first = 1 if estimator == "biased" else 0
    x, y, z = features
    options = {"bandwidth": 1.0, "estimator": estimator}
    pair = mmd_loss([y[0], z[0]], **options)
    pairs = [mmd_loss([x[0, :1], other[0]], bandwidth=1.0) for other in (y, z)]
    expected = [
        (pair + first * sum(pairs)) / 3,
        mmd_loss([x[1, :2], y[1], z[1]], **options),
    ]
    torch.testing.assert_close(mmd_loss(features, weights, **options), torch.stack(expected).mean())


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "random_features"])
def test_the_median_of_float32_features(estimator):
    features = [torch.randn(n, 3) + n / 8 for n in (5, 6)]
    losses = [
        mmd_loss(
            [x.to(dtype) for x in features],
            bandwidth="median",
            estimator=estimator,
            num_features=2000,
            generator=torch.Generator().manual_seed(0),
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert losses[0].dtype == torch.float32
    # The frequencies are drawn in the dtype of the features, so they are others.
    rtol = 0.1 if estimator == "random_features" else 1e-4
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=rtol, atol=1e-6)


def test_the_table_of_the_median_has_a_bound(monkeypatch):
    features = [torch.randn(2, 3, count, 4) for count in (4, 6)]
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 10 * 10)
    assert mmd_loss(features, bandwidth="median").isfinite()
    monkeypatch.setattr("multialign._validation.MAX_ENTRIES", 2 * 3 * 10 * 10 - 1)
    with pytest.raises(MemoryError, match="; give the bandwidth as a number, or smaller batches$"):
        mmd_loss(features, bandwidth="median")
    assert mmd_loss(features, bandwidth=1.0).isfinite()


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "random_features"])
@pytest.mark.parametrize("bandwidth", [1.5, (0.5, 2.0), "median"])
def test_it_is_computed_where_the_features_are(estimator, bandwidth):
    features = [torch.randn(n, 3) for n in (4, 5)]
    weights = [torch.tensor([1.0, 0.0, 2.0, 1.0]), None]

    def loss():
        generator = torch.Generator("cpu").manual_seed(0)
        return mmd_loss(
            features, weights, bandwidth=bandwidth, estimator=estimator, generator=generator
        )

    expected = loss()
    with torch.device("meta"):
        torch.testing.assert_close(loss(), expected)


def test_random_features_are_measured_from_each_feature_of_each_problem():
    # On a grid of 2^-8, which float32 keeps at every offset.
    x, y = ((256 * torch.randn(2, n, 3)).round() / 256 + m for m, n in enumerate((30, 20)))
    offset = 2.0**15 * torch.tensor([[[1.0, 0, -1.0]], [[-1.0, 1.0, 0]]])
    near, far, equal = (
        mmd_loss(
            [(t + o).float() for t in (x, y)],
            estimator="random_features",
            num_features=50,
            generator=torch.Generator().manual_seed(0),
        )
        for o in (0.0, offset, 2.0**15)
    )
    torch.testing.assert_close(far, near, rtol=1e-5, atol=0)
    torch.testing.assert_close(equal, near, rtol=1e-5, atol=0)


def test_1024_random_features_unless_told_otherwise():
    features = [torch.randn(n, 3) for n in (4, 5)]
    values = [
        loss(features)
        for loss in (
            MMDLoss(estimator="random_features", generator=torch.Generator().manual_seed(0)),
            lambda x: mmd_loss(
                x, estimator="random_features", generator=torch.Generator().manual_seed(0)
            ),
            lambda x: mmd_loss(
                x,
                estimator="random_features",
                num_features=1024,
                generator=torch.Generator().manual_seed(0),
            ),
        )
    ]
    assert values[0] == values[1] == values[2]


def test_random_features_are_drawn():
    x = [torch.randn(20, 3) + m for m in range(2)]
    found = [
        mmd_loss(
            x,
            estimator="random_features",
            num_features=5,
            generator=torch.Generator().manual_seed(seed),
        ).item()
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


# The energy distance


@pytest.mark.parametrize("sizes", [(2, 2), (5, 17, 40), (2, 3, 4, 5), (300, 250)])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_energy_matches_oracle(sizes, estimator):
    features = [torch.randn(n, 4) + m / 2 for m, n in enumerate(sizes)]
    weights = [torch.rand(n) for n in sizes]
    for given in (None, weights):
        loss = mmd_loss(features, given, kernel="energy", estimator=estimator)
        expected = reference.mmd([x.numpy() for x in features], None, estimator, given)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-12)


def test_energy_agrees_with_scipy_and_geomloss():
    x, y = torch.randn(30), torch.randn(20) + 0.3
    p, q = torch.rand(30), torch.rand(20)
    loss = mmd_loss([x[:, None], y[:, None]], [p, q], kernel="energy")
    # scipy: the square root, of one feature.
    torch.testing.assert_close(loss.sqrt().item(), energy_distance(x, y, p, q))
    x, y = torch.randn(30, 3), torch.randn(20, 3)
    # geomloss: half of it, with distances of at least 1e-4, as those on the diagonals are.
    theirs = 2 * geomloss.SamplesLoss("energy", backend="tensorized")(x, y)
    theirs = theirs + 1e-4 * (1 / 30 + 1 / 20)
    torch.testing.assert_close(mmd_loss([x, y], kernel="energy"), theirs, rtol=1e-8, atol=0)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("streamed", [False, True])
def test_energy_gradients(estimator, streamed, monkeypatch):
    if streamed:
        monkeypatch.setattr("multialign.kernels._DENSE_ENTRIES", 0)
        monkeypatch.setattr("multialign.ops.kernel_sums._BLOCK", 3)
    features = [torch.randn(n, 3, requires_grad=True) for n in (4, 5, 4)]
    weight = torch.rand(4, requires_grad=True)

    def loss(x, y, z, w):
        return mmd_loss([x, y, z], [w, None, None], kernel="energy", estimator=estimator)

    assert gradcheck(loss, (*features, weight))
    if not streamed:
        assert gradgradcheck(loss, (*features, weight))


@pytest.mark.parametrize("size", [12, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_at_coincident_points(size, dtype):
    """0 at equality, exactly, and gradients of points that have others in their place."""
    x = torch.randn(size, 20, dtype=dtype)
    x[1::2] = x[::2]
    assert mmd_loss([x, x.clone(), x.clone()], kernel="energy") == 0
    y = torch.cat([x[: size // 2], x[: size // 2] + 1]).requires_grad_()
    (grad,) = torch.autograd.grad(mmd_loss([x, y], kernel="energy"), y)
    assert grad.isfinite().all()
    assert grad.abs().max() < 10 / size  # each pair pulls by 1 at most


def test_energy_pulls_at_any_distance():
    x, y = torch.randn(20, 3), (torch.randn(20, 3) + 1e6).requires_grad_()
    (grad,) = torch.autograd.grad(mmd_loss([x, y], kernel="energy"), y)
    torch.testing.assert_close(grad.sum(0).norm().item(), 2.0, rtol=1e-4, atol=0)
    (gone,) = torch.autograd.grad(mmd_loss([x, y], bandwidth=1.0), y)
    assert gone.sum(0).norm() < 1e-6


def test_energy_has_the_unit_of_the_features():
    x, y = torch.randn(2, 8, 3), torch.randn(2, 9, 3) + 1
    single = [mmd_loss([x[b], y[b]], kernel="energy") for b in range(2)]
    for dtype, scale in ((torch.float32, 1e-24), (torch.float32, 1e30), (torch.float64, 1e200)):
        scales = torch.tensor([1.0, scale])[:, None, None]
        loss = mmd_loss([(scales * x).to(dtype), (scales * y).to(dtype)], kernel="energy")
        expected = (single[0] + scale * single[1]) / 2
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_energy_refuses_random_features_and_ignores_the_bandwidth():
    x, y = torch.randn(5, 2), torch.randn(6, 2)
    with pytest.raises(ValueError, match='kernel="energy" has no random features'):
        mmd_loss([x, y], kernel="energy", estimator="random_features")
    with pytest.raises(ValueError, match='kernel="energy" has no random features'):
        MMDLoss(kernel="energy", estimator="random_features")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [mmd_loss([x, y], kernel="energy", bandwidth=b) for b in (1e-9, "median")]
    assert losses[0] == losses[1]
    assert repr(MMDLoss(kernel="energy")).endswith("kernel='energy')")
