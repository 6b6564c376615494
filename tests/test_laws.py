"""Laws that hold for every loss, over random problems."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.losses import FUNCTIONS, LOSSES, VARIANTS, clusters

# Sweeps alone are too slow at the tolerance that laws need; tests/hostile.py holds them to its own.
LAWFUL = {
    name: loss.given(tolerance=1e-10, em_iterations=15)
    for name, loss in FUNCTIONS.items()
    if name != "sinkhorn sweeps"
}
problems = st.tuples(st.lists(st.integers(3, 7), min_size=2, max_size=4), st.integers(0, 10**6))


def those(law):
    """Walk over the losses that keep a law."""
    return pytest.mark.parametrize("name", [name for name in LAWFUL if law(LAWFUL[name])])


every_loss = those(lambda loss: True)


def make(loss, sizes, seed, batch=()):
    """Return clusters for a loss, of one size where it matches rows by their place."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    sizes = [max(loss.least, size) for size in sizes]
    sizes = [max(sizes)] * len(sizes) if loss.seeds or loss.paired else sizes
    return [x.requires_grad_() for x in clusters(sizes, batch)]


def value_and_grads(loss, features, weights=None):
    value = loss(features, weights)
    return value, torch.autograd.grad(value, features, allow_unused=True)


@those(lambda loss: loss.permutes)
@given(problems)
def test_permuting_samples_changes_nothing(name, problem):
    loss = LAWFUL[name]
    features = make(loss, *problem)
    order = torch.randperm(len(features[0]))
    orders = [order if loss.seeds or loss.paired else torch.randperm(len(f)) for f in features]
    torch.testing.assert_close(loss([f[o] for f, o in zip(features, orders)]), loss(features))


@those(lambda loss: loss.symmetric)
@given(problems)
def test_permuting_modalities_changes_nothing(name, problem):
    loss = LAWFUL[name]
    features = make(loss, *problem)
    order = torch.randperm(len(features)).tolist()
    torch.testing.assert_close(loss([features[m] for m in order]), loss(features))


@every_loss
@given(problems, st.sampled_from([torch.nan, torch.inf, 1e30, 0.0]))
def test_weight_zero_is_absence(name, problem, junk):
    loss = LAWFUL[name]
    features = make(loss, *problem)
    padded, weights = [], []
    for f in features:
        rows = torch.tensor([1, 2]) if loss.seeds or loss.paired else torch.randint(0, 2, (2,)) + 1
        before, after = (torch.full((int(r), 2), junk) for r in rows)
        padded.append(torch.cat([before, f, after]))
        weights.append(
            torch.cat([torch.zeros(len(before)), torch.ones(len(f)), torch.zeros(len(after))])
        )
        if torch.rand(()) < 0.5:
            weights[-1] = weights[-1].bool()
    value, grads = value_and_grads(loss, features)
    padded_value = loss(padded, weights)
    torch.testing.assert_close(padded_value, value)
    # Gradients by the rows that are there, and none elsewhere.
    padded_grads = torch.autograd.grad(padded_value, features)
    torch.testing.assert_close(padded_grads, grads, rtol=1e-5, atol=1e-6)
    leaves = [p.detach().requires_grad_() for p in padded]
    for grad, weight in zip(torch.autograd.grad(loss(leaves, weights), leaves), weights):
        assert (grad[weight == 0] == 0).all()


@those(lambda loss: loss.batches)
@given(problems)
def test_batch_is_the_mean_of_its_problems(name, problem):
    loss = LAWFUL[name]
    features = make(loss, *problem, batch=(2,))
    singles = [loss([f[b] for f in features]) for b in range(2)]
    torch.testing.assert_close(loss(features), torch.stack(singles).mean())


@those(lambda loss: loss.translates)
@given(problems)
def test_translating_everything_changes_nothing(name, problem):
    loss = LAWFUL[name]
    features = make(loss, *problem)
    torch.testing.assert_close(loss([f + 8.0 for f in features]), loss(features))


# With an epsilon of its own, transport does not depend on N but where its entropy counts samples.
REPEATING = {
    name: loss.given(epsilon=1.0)
    for name, loss in LAWFUL.items()
    if loss.repeats or (loss.takes("epsilon") and loss.zero)
}


@pytest.mark.parametrize("name", REPEATING)
def test_weights_count_as_repetitions(name):
    loss = REPEATING[name]
    features = make(loss, [6, 6, 6], 0)
    counts = [torch.tensor([1, 2, 3, 1, 1, 2])] * 3
    repeated = loss([f.repeat_interleave(c, 0) for f, c in zip(features, counts)])
    torch.testing.assert_close(loss(features, counts), repeated)


@every_loss
def test_an_absent_modality_is_out(name):
    loss = LAWFUL[name]
    features = make(loss, [5, 5, 5], 1)
    leaves = [features[0], torch.full((5, 2), torch.nan, requires_grad=True), features[2]]
    value, grads = value_and_grads(loss, leaves, [None, torch.zeros(5), None])
    assert value.isfinite()
    assert (grads[1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    if loss.two_of_three is not None:
        torch.testing.assert_close(value, loss.two_of_three * loss(features[::2]))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (name, count)
        for name, loss in LAWFUL.items()
        for count in (0, 4)
        if count or loss.least == 1  # the U-statistic refuses N = 0
    ],
)
def test_nothing_present_is_a_connected_zero(name, count):
    features = [torch.randn(count, 2, requires_grad=True) for _ in range(3)]
    value, grads = value_and_grads(LAWFUL[name], features, [torch.zeros(count)] * 3)
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@every_loss
def test_stacked_tensor_is_a_sequence(name):
    loss = LAWFUL[name]
    features = torch.stack(make(loss, [4, 4, 4], 2)).detach()
    weights = torch.rand(3, 4)
    torch.testing.assert_close(loss(features, weights), loss(list(features), list(weights)))


@every_loss
def test_inputs_and_global_state_are_left_alone(name):
    loss = LAWFUL[name]
    features = make(loss, [4, 4], 3)
    weights = [torch.rand(4), torch.tensor([1.0, 0.0, 1.0, 1.0])]
    before = [t.detach().clone() for t in (*features, *weights)]
    loss(features, weights).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*features, *weights)))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float64
    with torch.no_grad():
        assert not loss(features, weights).requires_grad
        assert not torch.is_grad_enabled()


@every_loss
def test_non_contiguous_input(name):
    loss = LAWFUL[name]
    features = make(loss, [5, 5], 4)
    strided = [torch.stack([f, f], -1)[..., 0].detach() for f in features]
    strided = [f.T.contiguous().T for f in strided]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(loss(strided), loss(features).detach())


# Modules


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def drawn_alike(module, inputs):
    torch.manual_seed(0)
    return module(*inputs)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "pickle"],
)
def test_modules_copy_pickle_and_print(name, copied):
    loss = VARIANTS[name]
    features = make(loss, [5, 5], 5)
    module, inputs = loss.module(**loss.sized(features).options), loss.inputs(features)
    if not loss.is_function:
        module(*inputs)  # what it remembers is copied too
    other = copied(module)
    torch.testing.assert_close(drawn_alike(other, inputs), drawn_alike(module, inputs))
    assert repr(module).startswith(type(module).__name__ + "(")
    assert repr(other) == repr(module)


# The entries, and further options.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FUNCTIONS),
        ("decoupling", {"form": "absolute", "reduction": "none"}),
        ("moments", {"moments": ("skewness",), "feature_reduction": "mean", "eps": 0.5}),
        ("mmd", {"bandwidth": (0.7, 3.0), "estimator": "unbiased"}),
        ("mmd", {"bandwidth": 2.0, "estimator": "random_features", "num_features": 7}),
    ],
)
def test_a_module_is_its_function_with_options(name, options):
    loss = FUNCTIONS[name].given(**options)
    features, weights = make(loss, [5, 5], 6), [torch.rand(5), None]
    module = loss.given(generator=torch.Generator().manual_seed(0)).make()
    assert torch.equal(module(features, weights), loss(features, weights))
    for option, value in loss.options.items():
        # Not printed, or printed without its name.
        if option not in ("backend", "method", "num_prototypes"):
            assert f"{option}={value!r}" in repr(module)
        if option != "debias":  # any value is true or false
            with pytest.raises((TypeError, ValueError), match=option):
                loss.module(**{**loss.options, option: "wrong"})


def test_repr_leaves_out_defaults():
    module = LOSSES["mmd"].make(bandwidth=(0.7, 3.0), estimator="unbiased")
    assert repr(module) == "MMDLoss(bandwidth=(0.7, 3.0), estimator='unbiased')"


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if FUNCTIONS[name].takes("process_group")]
)
def test_a_process_group_is_asked_for_its_samples(name):
    loss = FUNCTIONS[name]
    features = make(loss, [5, 5], 8)
    with pytest.raises(ValueError, match="process_group needs torch.distributed"):
        loss(features, process_group=object())
    with pytest.raises(ValueError, match="process_group needs torch.distributed"):
        loss.make(process_group=object())(features)
