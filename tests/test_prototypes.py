import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch.autograd import gradcheck

from multialign import PrototypeAlignmentLoss, prototype_alignment_loss
from tests import reference
from tests.test_mixture import DEGENERATE, TYPES, dense_covariances


def features(sizes, dim=3):
    return [torch.randn(n, dim) + m for m, n in enumerate(sizes)]


def seeded(**options):
    return {"generator": torch.Generator().manual_seed(0), "tolerance": 1e-12, **options}


def remembering(count, momentum, dim=3, **options):
    """Return a loss of two modalities with running mixtures."""
    return PrototypeAlignmentLoss(
        count, momentum=momentum, num_features=dim, num_modalities=2, **options
    )


@pytest.mark.parametrize("objective", ["transport", "regularized"])
@pytest.mark.parametrize("matching", ["index", "plan"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("sizes", [(20, 20), (15, 15, 15), (12, 20, 16)])
def test_matches_oracle(sizes, covariance_type, reduction, matching, objective):
    x = features(sizes)
    options = {"objective": objective, "matching": matching, "cost_reduction": reduction}
    module = PrototypeAlignmentLoss(
        2,
        epsilon=2.0,
        covariance_type=covariance_type,
        transport_weight=0.7,
        prototype_weight=1.3,
        # one sample alone has a nearly singular covariance, on which oracles disagree
        regularization=1e-2,
        **seeded(**options),
    )
    parts = module.solve(x)
    mixtures = [
        (m.weights.numpy(), m.means.numpy(), dense_covariances(m).numpy()) for m in parts.mixtures
    ]
    expected = reference.prototype_alignment(
        [f.numpy() for f in x],
        mixtures,
        2.0,
        objective,
        matching,
        scale=1 / 3 if reduction == "mean" else 1.0,
        transport=0.7,
        prototype=1.3,
    )
    torch.testing.assert_close(parts.loss.item(), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(0.7 * parts.transport_loss + 1.3 * parts.prototype_loss, parts.loss)


def oracle_em(x, start, covariance_type, iterations, regularization):
    """EM in numpy around scikit-learn's E-step; returns weights, means and full covariances."""
    weights, means, covariances = start
    dim = x.shape[1]
    floor = regularization * x.var(0).mean()
    for _ in range(iterations):
        joint = oracle_posterior(x, weights, means, covariances)
        weights = joint.mean(0)
        means = joint.T @ x / joint.sum(0)[:, None]
        covariances = np.stack(
            [np.cov(x, rowvar=False, bias=True, aweights=r) + floor * np.eye(dim) for r in joint.T]
        )
        if covariance_type == "tied":
            covariances[:] = np.einsum("k,kij->ij", weights, covariances)
        elif covariance_type == "diag":
            covariances = covariances * np.eye(dim)
        elif covariance_type == "spherical":
            covariances = np.trace(covariances, axis1=1, axis2=2)[:, None, None] / dim * np.eye(dim)
    return weights, means, covariances


def oracle_posterior(x, weights, means, covariances):
    model = SklearnMixture(len(weights), covariance_type="full")
    model.weights_, model.means_, model.covariances_ = weights, means, covariances
    model.precisions_cholesky_ = np.stack(
        [np.linalg.inv(np.linalg.cholesky(c)).T for c in covariances]
    )
    return model.predict_proba(x)


def oracle_loss(features, starts, covariance_type, objective, matching):
    """Eq. 9 from given starts: scikit-learn's E-step, scipy's sqrtm, the dense plan."""
    mixtures = [oracle_em(x, start, covariance_type, 2, 1e-2) for x, start in zip(features, starts)]
    count = len(features)
    costs = {}
    for i, j in itertools.combinations(range(count), 2):
        costs[i, j] = np.array(
            [
                [
                    ((m - n) ** 2).sum() + np.trace(a + b - 2 * sqrtm(sqrtm(a) @ b @ sqrtm(a))).real
                    for n, b in zip(*mixtures[j][1:])
                ]
                for m, a in zip(*mixtures[i][1:])
            ]
        )
    marginals = [weights for weights, _, _ in mixtures]
    cost = reference.dense_cost(costs, [len(w) for w in marginals])
    plan = reference.transport_plan(cost, marginals, 2.0)
    if objective == "regularized":
        total = reference.transport_value(plan, cost, 2.0)
    else:
        total = (plan * cost).sum()
    for i, j in itertools.permutations(range(count), 2):
        targets = mixtures[j][1]
        if matching == "plan":
            table = plan.sum(tuple(q for q in range(count) if q not in (i, j)))
            table = table if i < j else table.T
            targets = table / table.sum(1, keepdims=True) @ targets
        posterior = oracle_posterior(features[i], *mixtures[i])
        squares = cdist(features[i], targets, "sqeuclidean")
        total += (posterior * squares).sum(1).mean() / (count * (count - 1))
    return total


@pytest.mark.parametrize("objective", ["transport", "regularized"])
@pytest.mark.parametrize("matching", ["index", "plan"])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_loss_and_gradient_match_an_oracle_from_known_starts(covariance_type, matching, objective):
    options = {"covariance_type": covariance_type, "matching": matching, "objective": objective}
    module = PrototypeAlignmentLoss(
        2,
        epsilon=2.0,
        momentum=1.0,  # forgets the past but starts there
        num_features=2,
        num_modalities=3,
        em_iterations=2,
        regularization=1e-2,
        **seeded(**options),
    )
    module(features((15, 15, 15), dim=2))
    starts = [
        (m.weights.numpy(), m.means.numpy(), dense_covariances(m).numpy())
        for m in (model.running for model in module.prototypes)
    ]
    x = [f.requires_grad_() for f in features((15, 12, 9), dim=2)]
    loss = module(x)
    grads = torch.autograd.grad(loss, x)

    def oracle(move=0.0):
        moved = [(f.detach() + move * d).numpy() for f, d in zip(x, directions)]
        return oracle_loss(moved, starts, covariance_type, objective, matching)

    directions = [torch.randn_like(f) for f in x]
    torch.testing.assert_close(loss.item(), oracle(), rtol=1e-8, atol=1e-9)
    for m in range(len(x)):
        directions = [torch.randn_like(f) * (m == n) for n, f in enumerate(x)]
        slope = (oracle(1e-5) - oracle(-1e-5)) / 2e-5
        torch.testing.assert_close(
            (grads[m] * directions[m]).sum().item(), slope, rtol=1e-5, atol=1e-6
        )


def test_function_and_module_agree():
    x = features((20, 20, 20))
    options = {"epsilon": 0.5, "covariance_type": "full", "matching": "plan"}
    loss = prototype_alignment_loss(x, num_prototypes=3, **seeded(**options))
    torch.testing.assert_close(loss, PrototypeAlignmentLoss(3, **seeded(**options))(x))


@pytest.mark.parametrize("differentiate", ["unroll", "none"])
@pytest.mark.parametrize("objective", ["transport", "regularized"])
@pytest.mark.parametrize("matching", ["index", "plan"])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_gradients(covariance_type, matching, objective, differentiate):
    x = [f.requires_grad_() for f in features((6, 6), dim=2)]
    weight = (torch.rand(6) + 0.5).requires_grad_()
    if differentiate == "none":
        # Mixtures that do not move with the samples: a second module keeps them.
        module = PrototypeAlignmentLoss(
            2,
            momentum=1.0,
            num_features=2,
            num_modalities=2,
            covariance_type=covariance_type,
            matching=matching,
            objective=objective,
            regularization=1e-2,
            tolerance=1e-12,
        )
        module(x)
        module.eval()

    def loss(a, b, w):
        if differentiate == "none":
            return module([a, b], [w, None])
        return prototype_alignment_loss(
            [a, b],
            [w, None],
            num_prototypes=2,
            em_iterations=2,
            covariance_type=covariance_type,
            matching=matching,
            objective=objective,
            regularization=1e-2,
            **seeded(),
        )

    assert gradcheck(loss, (*x, weight), atol=1e-6)


def test_last_and_none_give_their_gradients():
    x = [f.requires_grad_() for f in features((8, 8))]
    options = seeded(num_prototypes=2, em_iterations=3)
    losses = {}
    for differentiate in ("unroll", "last", "none"):
        options["generator"].manual_seed(0)
        losses[differentiate] = prototype_alignment_loss(x, differentiate=differentiate, **options)
    torch.testing.assert_close(losses["unroll"], losses["last"])
    torch.testing.assert_close(losses["unroll"], losses["none"])
    grads = [torch.autograd.grad(loss, x[0])[0] for loss in losses.values()]
    assert not torch.allclose(grads[0], grads[1])
    assert not torch.allclose(grads[1], grads[2])
    assert all(grad.isfinite().all() for grad in grads)


def test_paired_samples_seed_the_same_components():
    centres = 20 * torch.eye(4)
    labels = torch.arange(4).repeat(10)
    order = torch.randperm(4)
    x = [centres[labels] + torch.randn(40, 4), centres[order][labels] + torch.randn(40, 4) + 3]
    mixtures = PrototypeAlignmentLoss(4, **seeded(tolerance=1e-9)).solve(x).mixtures
    for k in range(4):
        members = mixtures[0].posterior(x[0])[:, k] > 0.5
        assert 10 <= members.sum() < 40
        assert (mixtures[1].posterior(x[1])[members, k] > 0.5).all()


def test_plan_matching_finds_components_numbered_otherwise():
    """Unpaired samples of the same clusters: matched by the plan, not by their number."""
    centres = 30 * torch.eye(3)
    x = [centres.repeat(n, 1) + torch.randn(3 * n, 3) for n in (10, 15)]
    losses = {}
    for seed in range(5):
        for matching in ("index", "plan"):
            generator = torch.Generator().manual_seed(seed)
            module = PrototypeAlignmentLoss(3, matching=matching, generator=generator)
            losses[matching, seed] = module.solve(x).prototype_loss
    assert all(losses["plan", seed] < 10 for seed in range(5))
    assert any(losses["index", seed] > 500 for seed in range(5))


def test_prototypes_may_differ_in_number():
    x = features((20, 25, 30))
    parts = PrototypeAlignmentLoss([2, 3, 4], matching="plan", **seeded()).solve(x)
    assert parts.solution.plan().shape == (2, 3, 4)
    assert parts.loss.isfinite()


@pytest.mark.parametrize("permuted", [(1, 0, 2), (2, 0, 1)])
def test_symmetric_in_modalities_and_samples(permuted):
    x, rows = features((20, 20, 20)), torch.randperm(20)
    # Scaled to one spread, paired modalities seed the same rows in any order.
    loss = prototype_alignment_loss(x, num_prototypes=2, em_iterations=60, **seeded(epsilon=1.0))
    shuffled = prototype_alignment_loss(
        [f[rows] for f in x], num_prototypes=2, em_iterations=60, **seeded(epsilon=1.0)
    )
    torch.testing.assert_close(shuffled, loss)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("matching", ["index", "plan"])
def test_the_order_of_the_batch_does_not_matter(matching, momentum):
    """After few steps too, which keep more of where they started."""
    x, rows = features((20, 20, 20)), torch.randperm(20)
    losses = []
    for batch in (x, [f[rows] for f in x]):
        sizes = {"num_features": 3, "num_modalities": 3}
        options = {"em_iterations": 2, "matching": matching, "momentum": momentum, **sizes}
        module = PrototypeAlignmentLoss(4, **seeded(epsilon=1.0, **options))
        losses.append(module(batch))
        if momentum is not None:
            losses[-1] = losses[-1] + module([f.flip(0) for f in batch])  # a warm start
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_samples(case, covariance_type):
    """Also with a modality whose components lie elsewhere and stay without samples."""
    x = DEGENERATE[case].double()
    scale = x.abs().max()
    far = x / scale + torch.tensor([100.0, 0.0])
    module = remembering(
        4, 0.5, dim=2, covariance_type=covariance_type, epsilon=0.5, tolerance=1e-6
    )
    for pair in ([x / scale, far], [far, x / scale]):
        pair = [f.clone().requires_grad_() for f in pair]
        loss = module(pair)
        loss.backward()
        assert loss.isfinite()
        assert all(f.grad.isfinite().all() for f in pair)
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("covariance_type", ["diag", "full", "tied", "spherical"])
def test_a_modality_may_appear_after_others_are_remembered(covariance_type):
    x = features((12, 12))
    module = remembering(2, 0.5, covariance_type=covariance_type)
    module(x, [None, torch.zeros(12)])
    parts = module.solve(x)
    assert parts.loss.isfinite()
    assert all(part.weights.sum() == pytest.approx(1.0) for part in parts.mixtures)


def test_what_has_no_weight_is_not_computed(monkeypatch):
    x = [f.requires_grad_() for f in features((8, 8))]
    both = PrototypeAlignmentLoss(2, **seeded()).solve(x)

    def refuse(*args, **kwargs):
        raise AssertionError("solved")

    with monkeypatch.context() as patch:
        patch.setattr("multialign.prototypes.solve", refuse)
        module = PrototypeAlignmentLoss(2, transport_weight=0.0, **seeded())
        torch.testing.assert_close(module(x), both.prototype_loss)
        with pytest.raises(AssertionError, match="solved"):
            module.solve(x)
        with pytest.raises(AssertionError, match="solved"):
            PrototypeAlignmentLoss(2, transport_weight=0.0, matching="plan")(x)
        # Nothing at all is left, but a gradient, so that no rank waits for another.
        nothing = PrototypeAlignmentLoss(2, transport_weight=0.0, prototype_weight=0.0)(x)
        assert nothing == 0
        nothing.backward()
    module = PrototypeAlignmentLoss(2, prototype_weight=0.0, **seeded())
    torch.testing.assert_close(module(x), both.transport_loss)


def test_missing_modality_is_out():
    # Clusters so far apart that every draw of seeds ends in the same mixture.
    x = [20 * torch.eye(3).repeat(4, 1) + f for f in features((12, 12, 12))]
    x[1] = torch.full_like(x[1], torch.nan)
    weights = [None, torch.zeros(12), None]
    parts = PrototypeAlignmentLoss(3, **seeded()).solve(x, weights)
    pair = PrototypeAlignmentLoss(3, **seeded()).solve(x[::2])
    torch.testing.assert_close(parts.transport_loss, pair.transport_loss)
    # The normaliser keeps M: one pair of three is left.
    torch.testing.assert_close(parts.prototype_loss, pair.prototype_loss / 3)
    assert parts.mixtures[1].means.isfinite().all()


def test_missing_samples_are_out():
    x = [f.requires_grad_() for f in features((12, 12))]
    weights = [torch.ones(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)]
    weights[0][[1, 5]] = False
    weights[1][[1, 7, 8]] = False
    poisoned = [f.masked_fill(~w[:, None], torch.nan) for f, w in zip(x, weights)]
    loss = prototype_alignment_loss(poisoned, weights, num_prototypes=3, **seeded())
    loss.backward()
    assert loss.isfinite()
    for f, w in zip(x, weights):
        assert f.grad.isfinite().all()
        assert (f.grad[~w] == 0).all()
        assert (f.grad[w] != 0).any()


def test_no_complete_row():
    """Each sample has one modality: nothing to pair, and still a loss."""
    x = [f.requires_grad_() for f in features((12, 12))]
    first = torch.arange(12) < 6
    loss = prototype_alignment_loss(
        x, [first, ~first], num_prototypes=2, matching="plan", **seeded()
    )
    loss.backward()
    assert loss.isfinite()
    assert (x[0].grad[6:] == 0).all()
    assert (x[0].grad[:6] != 0).any()


def test_nothing_present():
    x = [f.requires_grad_() for f in features((5, 5, 5))]
    loss = prototype_alignment_loss(x, [torch.zeros(5)] * 3, num_prototypes=2)
    loss.backward()
    assert loss == 0
    assert all((f.grad == 0).all() for f in x)
    empty = [torch.zeros(0, 3, requires_grad=True) for _ in range(2)]
    prototype_alignment_loss(empty, num_prototypes=2).backward()


class TestMomentum:
    def test_state_follows_the_batches_and_round_trips(self):
        module = remembering(3, 0.2)
        x = features((20, 20))
        module(x)
        first = copy.deepcopy(module.state_dict())
        assert len(first) == 8
        module(x)
        assert any((a != b).any() for a, b in zip(first.values(), module.state_dict().values()))
        other = remembering(3, 0.2)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other.eval()(x), module.eval()(x))

    def test_eval_mode_keeps_the_state(self):
        module = remembering(3, 0.2)
        module(features((20, 20)))
        before = copy.deepcopy(module.state_dict())
        module.eval()
        loss = module(features((4, 6)))
        torch.testing.assert_close(module.state_dict(), before)
        assert loss.isfinite()

    def test_a_first_call_in_eval_mode_does_not_keep_it_from_learning(self):
        module = remembering(3, 0.2).eval()
        module(features((20, 20)))
        assert all(model.num_batches_tracked == 0 for model in module.prototypes)
        module.training = True  # as Lightning restores it, which knows only the modules it saw
        module(features((20, 20)))
        assert all(model.num_batches_tracked == 1 for model in module.prototypes)

    def test_gradient_reaches_small_batches(self):
        module = remembering(5, 0.1, em_iterations=1)
        for _ in range(3):
            x = [f.requires_grad_() for f in features((4, 4))]
            module(x).backward()
            assert all(f.grad.isfinite().all() and (f.grad != 0).any() for f in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype):
    x = [f.to(dtype) for f in features((20, 20))]
    loss = prototype_alignment_loss(x, num_prototypes=2, **seeded(tolerance=1e-4))
    assert loss.dtype == torch.float32
    exact = prototype_alignment_loss([f.double() for f in x], num_prototypes=2, **seeded())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)


def test_batch_is_the_mean_of_its_problems():
    x = [torch.randn(3, 16, 2) for _ in range(2)]
    module = PrototypeAlignmentLoss(2, tolerance=1e-10)
    parts = module.solve(x)
    singles = []
    for b in range(3):
        # Alone, and with the mixture that the problem has in the batch.
        single = remembering(2, 1.0, dim=2, tolerance=1e-10).eval()
        for model, mixture in zip(single.prototypes, parts.mixtures):
            model.running_weights.copy_(mixture.weights[b])
            model.running_means.copy_(mixture.means[b])
            model.running_covariances.copy_(mixture.covariances[b])
            model.num_batches_tracked.fill_(1)
        singles.append(single([f[b] for f in x]))
    torch.testing.assert_close(parts.loss, torch.stack(singles).mean())


def test_nan_reaches_the_loss():
    x = features((10, 10))
    x[0][2, 1] = torch.nan
    assert not prototype_alignment_loss(x, num_prototypes=2).isfinite()


def test_errors():
    x = features((6, 6))
    with pytest.raises(ValueError, match='"index" needs the same num_prototypes.*got \\[2, 3\\]'):
        prototype_alignment_loss(x, num_prototypes=[2, 3])
    with pytest.raises(ValueError, match="num_prototypes must be an integer or 2 of them"):
        prototype_alignment_loss(x, num_prototypes=[2, 2, 2], matching="plan")
    with pytest.raises(TypeError, match="num_prototypes must be an integer >= 1; got 2.5"):
        prototype_alignment_loss(x, num_prototypes=2.5)
    for name, value in itertools.product(("objective", "matching", "cost_reduction"), ("other",)):
        with pytest.raises(ValueError, match=f"{name} must be one of .* got 'other'"):
            PrototypeAlignmentLoss(2, **{name: value})
    with pytest.raises(ValueError, match="transport_weight must be a finite number >= 0; got -1"):
        PrototypeAlignmentLoss(2, transport_weight=-1)
    with pytest.raises(ValueError, match="momentum must be None or in"):
        PrototypeAlignmentLoss(2, momentum=1.5)
    module = remembering(2, 0.1)
    module(x)
    with pytest.raises(ValueError, match="features must have num_modalities = 2; got 3"):
        module([*x, x[0]])
