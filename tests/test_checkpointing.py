"""Every loss and the solver inside torch.utils.checkpoint: recomputed, they are what they were."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from multialign import (
    fit_gaussian_mixture,
    multi_marginal_sinkhorn,
    prototype_alignment_loss,
    squared_euclidean_cost,
)
from tests.losses import FUNCTIONS, VARIANTS, clusters

# Of more than 2^16 pairs, kernel matrices are streamed; of so many atoms, plans are not built.
SIZES = [6, 300]
kinds = pytest.mark.parametrize("reentrant", [False, True])


def gradients(function, tensors, reentrant=None):
    """Return value and gradients, with a checkpoint unless `reentrant` is None."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    torch.manual_seed(1)
    if reentrant is None:
        value = function(*inputs)
    else:
        value = checkpoint(function, *inputs, use_reentrant=reentrant)
    torch.rand(3)  # what is drawn in between does not change what is drawn again
    value.backward()  # the reentrant kind knows no torch.autograd.grad
    return value.detach(), [x.grad for x in inputs]


@kinds
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.long)], ids=str
)
def test_every_loss(name, size, reentrant):
    loss, features = FUNCTIONS[name].given(em_iterations=2), clusters([size, size])
    weight = torch.rand(size)

    def call(x, y):
        # Without a generator the draws are those of torch's own, whose state is kept.
        options = {"generator": None} if loss.takes("generator") else {}
        return loss([x, y], [weight, None], **options)

    plain, again = (gradients(call, features, kind) for kind in (None, reentrant))
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


@kinds
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_streamed_kernel_matrix(estimator, reentrant):
    loss, features = FUNCTIONS["mmd"].given(estimator=estimator), clusters([260, 260])
    plain, again = (
        gradients(lambda *x: loss(list(x)), features, kind) for kind in (None, reentrant)
    )
    torch.testing.assert_close(again, plain)


@kinds
@pytest.mark.parametrize("size", [4, 30])
@pytest.mark.parametrize("result", ["value", "transport_cost", "potentials", "marginal", "plan"])
def test_the_solver(result, size, reentrant):
    points = [torch.randn(size, 2) for _ in range(3)]
    direction = torch.randn(size, size)

    def call(*points):
        pairs = [(0, 1), (0, 2), (1, 2)]
        costs = {(i, j): squared_euclidean_cost(points[i], points[j]) for i, j in pairs}
        solution = multi_marginal_sinkhorn(costs, [torch.ones(size)] * 3, 1.0)
        if result == "potentials":
            return sum((f * direction[0]).sum() for f in solution.potentials)
        if result == "marginal":
            return (solution.pairwise_marginal(0, 1) * direction).sum()
        if result == "plan":
            return (solution.plan() * direction).sum()
        return getattr(solution, result)

    plain, again = (gradients(call, points, kind) for kind in (None, reentrant))
    torch.testing.assert_close(again, plain)


@kinds
def test_seeds_drawn_by_torchs_own_generator_are_drawn_again(reentrant):
    """Data without clusters: other seeds would make another fit."""
    features = [torch.randn(40, 3) for _ in range(2)]

    def call(*x):
        return prototype_alignment_loss(x, num_prototypes=5)

    plain, again = (gradients(call, features, kind) for kind in (None, reentrant))
    torch.testing.assert_close(again, plain)
    torch.manual_seed(2)
    assert not torch.isclose(call(*features), plain[0])


# Those that take a generator, and whether they draw at all.
DRAWING = {
    name: loss.seeds or loss.options.get("estimator") == "random_features"
    for name, loss in VARIANTS.items()
    if loss.takes("generator")
}


@kinds
@pytest.mark.parametrize("name", DRAWING)
def test_a_generator_of_ones_own_is_refused_where_it_would_draw_again(name, reentrant):
    features = clusters([6, 6])
    generator = torch.Generator().manual_seed(0)
    module = VARIANTS[name].sized(features).given(em_iterations=1).make(generator=generator)

    def call(*x):
        return module(list(x))

    if not DRAWING[name]:
        plain, again = (gradients(call, features, kind) for kind in (None, reentrant))
        torch.testing.assert_close(again, plain)
        return
    inputs = [x.requires_grad_() for x in features]
    with pytest.raises(RuntimeError, match="in the backward pass, as torch.utils.checkpoint"):
        checkpoint(call, *inputs, use_reentrant=reentrant).backward()
    assert all(x.grad is None for x in inputs)


@kinds
@pytest.mark.parametrize("draw", ["fit", "sample"])
def test_a_mixtures_generator_is_refused_where_it_would_draw_again(draw, reentrant):
    generator = torch.Generator().manual_seed(0)

    def call(x):
        mixture = fit_gaussian_mixture(x, 2, generator=generator if draw == "fit" else None)
        if draw == "sample":
            x = mixture.sample(3, generator=generator)
        return mixture.log_prob(x).sum()

    x = torch.randn(8, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="in the backward pass, as torch.utils.checkpoint"):
        checkpoint(call, x, use_reentrant=reentrant).backward()
