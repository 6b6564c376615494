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

from multialign import GaussianMomentLoss, MMDLoss, PrototypeAlignmentLoss, gaussian_moment_loss


def make_losses(group=None):
    return {
        "moments": GaussianMomentLoss(process_group=group),
        "mmd": MMDLoss(bandwidth="median", process_group=group),
        "mmd unbiased": MMDLoss(estimator="unbiased", process_group=group),
        "random features": MMDLoss(
            estimator="random_features", num_features=50, process_group=group
        ),
        "prototypes": PrototypeAlignmentLoss(3, process_group=group),
        "prototypes momentum": PrototypeAlignmentLoss(3, momentum=0.5, process_group=group),
        "prototypes plan": PrototypeAlignmentLoss(
            3, matching="plan", covariance_type="full", process_group=group
        ),
    }


def batches(counts, weighted):
    """Return the samples of each rank, three modalities, with a weight for some."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for count in counts:
        x = [torch.randn(count, 4, generator=generator) + m for m in range(3)]
        weights = [torch.rand(count, generator=generator) > 0.3, None, None]
        result.append((x, weights if weighted else None))
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


def worker(rank, counts, weighted, path):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=len(counts),
        timeout=timedelta(seconds=60),
    )
    try:
        model = nn.Linear(4, 4)
        model.load_state_dict(torch.load(f"{path}/model.pt"))
        model = DistributedDataParallel(model)
        batch = batches(counts, weighted)[rank]
        results = {}
        for name, loss in make_losses(dist.group.WORLD).items():
            # The ranks' generators need not agree: what is drawn is drawn on the first.
            results[name] = [step(model, loss, batch, seed=rank) for _ in range(2)]
        with open(f"{path}/{rank}.pkl", "wb") as file:
            pickle.dump(results, file)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("counts", "weighted"),
    [((12, 12), False), ((7, 13), True), ((15, 0), False), ((6, 0, 9), True)],
)
def test_ddp_step_equals_the_step_on_all_samples(counts, weighted, tmp_path):
    model = nn.Linear(4, 4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    mp.spawn(worker, (counts, weighted, str(tmp_path)), nprocs=len(counts))
    results = []
    for rank in range(len(counts)):
        with open(tmp_path / f"{rank}.pkl", "rb") as file:
            results.append(pickle.load(file))

    parts = batches(counts, weighted)
    x = [torch.cat([part[0][m] for part in parts]) for m in range(3)]
    weights = None
    if weighted:
        ones = torch.ones(sum(counts))
        weights = [torch.cat([part[1][0] for part in parts]), ones, ones]
    for name, loss in make_losses().items():
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
