"""Losses over a process group against one process with all samples, on 2 and 3 gloo ranks."""

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from multialign import (
    GaussianMomentLoss,
    GaussianPrototypes,
    PrototypeAlignmentLoss,
    fit_gaussian_mixture,
    gaussian_moment_loss,
)
from tests.losses import VARIANTS


def statistic(mixture):
    """Return one number that all parameters of a mixture have part in."""
    dims = mixture.means.ndim - 1
    square = mixture.means.square() + mixture.component_covariances().flatten(dims).mean(
        -1, keepdim=True
    )
    return (mixture.weights.unsqueeze(-1) * square).sum()


class Fit(nn.Module):
    """A number of the mixtures fitted to each modality, in place of a loss."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, features, weights):
        return sum(
            statistic(
                fit_gaussian_mixture(x.unsqueeze(0), 3, weights=w, iterations=4, **self.options)
            )
            for x, w in zip(features, unsqueezed(weights, features), strict=True)
        )


class Running(nn.Module):
    """The same for a running mixture."""

    def __init__(self, **options):
        super().__init__()
        self.prototypes = GaussianPrototypes(3, num_features=4, momentum=0.5, **options)

    def forward(self, features, weights):
        return statistic(self.prototypes(features[0], None if weights is None else weights[0]))


class Batched(nn.Module):
    """A loss of two problems side by side, each with half of the features."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, features, weights):
        halves = [x.unflatten(1, (2, 2)).movedim(1, 0) for x in features]
        if weights is not None:
            weights = [w if w is None else w.expand(2, -1) for w in weights]
        return self.loss(halves, weights)


def unsqueezed(weights, features):
    weights = [None] * len(features) if weights is None else weights
    return [w if w is None else w.unsqueeze(0) for w in weights]


def make_losses(group=None):
    em = {"em_iterations": 3, "process_group": group}
    return {
        **{
            name: loss.given(num_prototypes=3, **em).sized(torch.empty(3, 1, 4)).make()
            for name, loss in VARIANTS.items()
            if loss.takes("process_group")
        },
        "prototypes of different numbers": PrototypeAlignmentLoss(
            [2, 3, 4], matching="plan", covariance_type="tied", **em
        ),
        "moments batched": Batched(GaussianMomentLoss(process_group=group)),
        "prototypes batched": Batched(PrototypeAlignmentLoss(2, **em)),
        "fit diag": Fit(covariance_type="diag", process_group=group),
        "fit full": Fit(covariance_type="full", tolerance=0.3, process_group=group),
        "fit tied": Fit(covariance_type="tied", differentiate="last", process_group=group),
        "fit spherical": Fit(covariance_type="spherical", init="random", process_group=group),
        "running mixture": Running(**em),
    }


def applies(name, counts):
    """Return whether a loss takes samples of these counts: one N, where its rows are matched."""
    paired = name in VARIANTS and VARIANTS[name].paired
    return not paired or all(isinstance(count, int) for count in counts)


def batches(counts, weighted):
    """Return the samples of each rank, three modalities, and weights for some.

    A count is that of every modality on a rank, or one for each. With weights, the first rank does
    not have the second modality, and the second rank gives no weights.
    """
    generator = torch.Generator().manual_seed(5)
    result = []
    for rank, count in enumerate(counts):
        sizes = count if isinstance(count, tuple) else (count,) * 3
        x = [torch.randn(size, 4, generator=generator) + m for m, size in enumerate(sizes)]
        absent = torch.zeros(sizes[1]) if rank == 0 else None
        weights = [torch.rand(sizes[0], generator=generator) > 0.3, absent, None]
        result.append((x, weights if weighted and rank != 1 else None))
    return result


def step(model, loss, batch, seed=0):
    """Return the loss of one batch and the gradients of the model."""
    x, weights = batch
    model.zero_grad()
    torch.manual_seed(seed)
    # One call of the wrapped model a step: DDP counts its backward passes.
    features = model(torch.cat(x)).split([len(f) for f in x])
    value = loss(features, weights)
    value.backward()
    return value.item(), [p.grad.clone() for p in model.parameters()]


def assert_constant_features_do_not_deviate(batch, group):
    """An offset costs no digits: all ranks measure from the same sample."""
    options = {"moments": ["covariance", "skewness"], "process_group": group}
    for offset in (0.1, 1e8 / 3):
        x, y = (torch.full_like(part, offset) for part in batch[0][:2])
        assert gaussian_moment_loss([x, y + 1e3], **options) == 0


def assert_gradient_may_be_missing_on_one_rank(batch, counts, group):
    first = dist.get_rank(group) == 0
    for name, loss in make_losses(group).items():
        if not applies(name, counts):
            continue
        x = [part.clone().requires_grad_(m > 0 or first) for m, part in enumerate(batch[0])]
        loss(x, batch[1]).backward()


# The number of samples of each rank, and whether they have weights.
CASES = [
    ((12, 12), False),
    ((7, 13), True),
    ((0, 15), False),
    (((6, 9, 4), (7, 4, 9)), False),
    ((6, 0, (9, 7, 8)), True),
]


def worker(rank, path):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=60),
    )
    try:
        for number, (counts, weighted) in enumerate(CASES):
            # A group's first rank need not be the world's.
            members = list(range(3 - len(counts), 3))
            group = dist.new_group(members)
            if rank not in members:
                continue
            model = nn.Linear(4, 4)
            model.load_state_dict(torch.load(f"{path}/model.pt", weights_only=True))
            model = DistributedDataParallel(model, process_group=group)
            member = members.index(rank)
            batch = batches(counts, weighted)[member]
            results = {}
            for name, loss in make_losses(group).items():
                if not applies(name, counts):
                    continue
                # The ranks' generators need not agree: what is drawn is drawn on the first.
                results[name] = [step(model, loss, batch, seed=member) for _ in range(2)]
            assert_constant_features_do_not_deviate(batch, group)
            assert_gradient_may_be_missing_on_one_rank(batch, counts, group)
            with open(f"{path}/{number}-{member}.pkl", "wb") as file:
                pickle.dump(results, file)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Take the steps of all cases on three processes: the folder of their results."""
    path = tmp_path_factory.mktemp("steps")
    model = nn.Linear(4, 4, dtype=torch.float64)
    torch.save(model.state_dict(), path / "model.pt")
    mp.spawn(worker, (str(path),), nprocs=3)
    return path


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ddp_step_equals_the_step_on_all_samples(case, steps):
    counts, weighted = CASES[case]
    model = nn.Linear(4, 4)
    model.load_state_dict(torch.load(steps / "model.pt", weights_only=True))
    results = []
    for rank in range(len(counts)):
        with open(steps / f"{case}-{rank}.pkl", "rb") as file:
            results.append(pickle.load(file))

    parts = batches(counts, weighted)
    x = [torch.cat([part[0][m] for part in parts]) for m in range(3)]
    weights = None
    if weighted:
        weights = [
            torch.cat(
                [torch.ones(len(x[m])) if w is None or w[m] is None else w[m] for x, w in parts]
            )
            for m in range(3)
        ]
    for name, loss in make_losses().items():
        if not applies(name, counts):
            continue
        for turn in range(2):
            value, grads = step(copy.deepcopy(model), loss, (x, weights))
            for rank_results in results:
                rank_value, rank_grads = rank_results[name][turn]
                assert rank_value == pytest.approx(value, rel=1e-6), name
                torch.testing.assert_close(rank_grads, grads, rtol=1e-6, atol=1e-9)


def test_a_group_needs_torch_distributed():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="process_group needs torch.distributed to be initialised"):
        gaussian_moment_loss([x, x], process_group=object())


@pytest.fixture
def alone(tmp_path):
    """Be the only rank of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["moments", "prototypes", "prototypes momentum", "fit full", "running mixture"]
)
def test_what_is_sent_does_not_grow_with_the_samples(name, alone, monkeypatch):
    sent = []

    def record(collective):
        original = getattr(dist, collective)

        def recorded(*args, **kwargs):
            tensor = args[1] if collective == "all_gather" else args[0]
            sent.append((collective, tensor.numel()))
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, collective, recorded)

    for collective in ("all_reduce", "all_gather", "gather", "broadcast"):
        record(collective)
    seen = []
    for count in (20, 200):
        sent.clear()
        loss = make_losses(alone)[name]
        x = [torch.randn(count, 4, requires_grad=True) for _ in range(3)]
        loss(x, None).backward()
        # Seeds are drawn where all rows are, on the first rank.
        seen.append({kind for kind in sent if kind[0] != "gather"})
    assert seen[0] == seen[1]
