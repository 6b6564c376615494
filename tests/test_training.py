"""Every loss in a training loop: a bad batch is skipped, one seed gives one result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.losses import LOSSES, VARIANTS, each, loss_of

ROOT = Path(__file__).parents[1]

# Sweeps alone get an epsilon at which they are fast.
TRAINED = {
    name: loss.given(epsilon=0.5) if loss.options.get("method") == "sinkhorn" else loss
    for name, loss in VARIANTS.items()
}
WIDTH = 4


class Model(nn.Module):
    """A linear map of each of three modalities, and a loss that brings them together."""

    def __init__(self, loss):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(d, WIDTH, dtype=torch.float32) for d in (5, 6, 7))
        self.loss = loss.float()

    def forward(self, inputs):
        features = [f(x) for f, x in zip(self.maps, inputs)]
        # What keeps them from becoming one point.
        anchor = sum((f.square().mean() - 1).square() for f in features)
        return self.loss(features) + anchor


def make(name):
    """Return the Module of an entry for the features of `Model`."""
    return TRAINED[name].sized(torch.empty(3, 1, WIDTH)).make()


def make_batches(count):
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(16, d, generator=generator, dtype=torch.float32) for d in (5, 6, 7)]
        for _ in range(count)
    ]


def train(loss, batches, scaler, clip=None):
    """Do what the documentation of torch.amp shows; return the model and what each step did."""
    torch.manual_seed(0)
    model = Model(loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for batch in batches:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = model(batch)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        changed = not all(map(torch.equal, before, model.parameters()))
        history.append((value.item(), scaler.get_scale(), changed))
    return model, history


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_that_is_not_finite_is_skipped(name, junk, clip):
    """One bad entry in one modality: a non-finite gradient, which GradScaler steps over."""
    batches = make_batches(6)
    batches[2][1][3, 2] = junk
    model, history = train(make(name), batches, _scaler(), clip)
    values, scales, changed = zip(*history)
    assert changed == (True, True, False, True, True, True)
    assert not torch.tensor(values[2]).isfinite()
    assert torch.tensor(values[:2] + values[3:]).isfinite().all()
    # Halved once, by the bad batch, and by no other.
    assert scales == (2.0**10,) * 2 + (2.0**9,) * 4
    assert all(p.isfinite().all() for p in model.state_dict().values())
    if "random" in name or TRAINED[name].seeds:
        return  # the skipped batch has drawn numbers too
    # Training goes on as if the batch had not been there, in the same scale.
    alone, _ = train(make(name), batches[:2] + batches[3:], _scaler(), clip)
    for one, two in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_clipping_can_refuse_a_batch_that_is_not_finite():
    """Without a scaler: what `error_if_nonfinite` raises comes before the step."""
    for name in TRAINED:
        model = Model(make(name))
        (batch,) = make_batches(1)
        batch[0][0, 0] = torch.nan
        model(batch).backward()
        with pytest.raises(RuntimeError, match="total norm of order 2.0 .* is non-finite"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        assert name


def _scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)


# --- the same seed, the same result -------------------------------------------------------------

# Sizes at which torch divides the work between threads, and the loss between its own blocks.
SIZES = each(
    {
        "decoupling": 20_000,
        "moments": 20_000,
        "mmd": 700,
        "hsic": 700,
        "matching": 60,
        "sinkhorn": 60,
        "prototypes": 200,
    },
    LOSSES,
)
BOUNDS = {torch.float32: 2e-4, torch.float64: 1e-10}
"""How far value and gradient may be apart with another number of threads, relative to their norm.

README and docs/conventions.rst name these numbers."""


def digest(threads):
    """Return the bits of each loss and of its gradients; run in a process of its own."""
    torch.set_num_threads(threads)
    found = {}
    for dtype in BOUNDS:
        for name, loss in TRAINED.items():
            torch.manual_seed(0)
            size = SIZES[loss_of(name)]
            leaves = [(torch.randn(size, 24, dtype=dtype) + m).requires_grad_() for m in range(3)]
            value = loss.sized(leaves).make().to(dtype)(leaves)
            grads = torch.autograd.grad(value, leaves)
            parts = [value.detach().flatten(), *(g.flatten() for g in grads)]
            found[f"{name}, {dtype}"] = torch.cat(parts).double()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run `digest` twice on one thread and twice on two, each in a new process."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for threads in (1, 2):
        for attempt in range(2):
            path = folder / f"{threads}_{attempt}.pt"
            command = [sys.executable, "-W", "ignore", "-m", "tests.test_training", str(threads)]
            environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            environment["OMP_WAIT_POLICY"] = "passive"  # other tests run on these cores too
            done = subprocess.run(
                [*command, path], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["threads"] == threads
            found[threads, attempt] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(runs, threads):
    one, two = runs[threads, 0], runs[threads, 1]
    assert len(one) == len(two) == 2 * len(TRAINED)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_threads_change_no_more_than_rounding(runs):
    for name, one in runs[1, 0].items():
        two = runs[2, 0][name]
        bound = BOUNDS[torch.float32 if "float32" in name else torch.float64]
        assert (one[0] - two[0]).abs() <= bound * one[0].abs(), name
        assert (one[1:] - two[1:]).norm() <= bound * one[1:].norm(), name


@pytest.mark.parametrize("name", [name for name in TRAINED if TRAINED[name].takes("generator")])
def test_the_same_generator_gives_the_same_bits_whatever_was_drawn_before(name):
    features = [torch.randn(20, 3) + m for m in range(3)]

    def value():
        return (
            TRAINED[name].sized(features).make(generator=torch.Generator().manual_seed(7))(features)
        )

    first = value()
    torch.rand(5)
    assert torch.equal(value(), first)


if __name__ == "__main__":
    torch.save(digest(int(sys.argv[1])), sys.argv[2])
    print(json.dumps({"threads": torch.get_num_threads()}))
