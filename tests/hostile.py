"""What has to hold for every loss on each of the problems of hostile_problems.py.

Hypothesis and `make fuzz` draw problems with the same function and check the same laws.
"""

import math
import random
import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

from multialign import ConvergenceWarning
from tests.hostile_problems import Problem, Recipe, build, spread
from tests.losses import FUNCTIONS, Loss

LOSSES = FUNCTIONS


def evaluate(loss: Loss, problem: Problem) -> torch.Tensor:
    """Evaluate the loss with the options that hostile problems ask for."""
    options = {}
    if loss.seeds:
        # Epsilon in the data's own unit. Far below it plans are permutations, which are degenerate.
        unit = spread(problem)
        epsilon = 0.1 * unit if 0 < unit < math.inf else 0.1
        options = {"num_prototypes": 3, "em_iterations": 4, "epsilon": epsilon}
    elif loss.options.get("method") == "sinkhorn":
        # At a small epsilon sweeps are slow: what has to hold is what holds of any state.
        options = {"max_iterations": 100}
    return loss(problem.features, problem.weights, **options)


def applies(name: str, recipe: Recipe) -> Recipe:
    """Return the recipe as this loss can take it."""
    least = LOSSES[name].least
    sizes = tuple(max(least, n) for n in recipe.sizes)
    recipe = replace(recipe, sizes=(min(sizes),) * len(sizes) if LOSSES[name].paired else sizes)
    if not LOSSES[name].batches:
        recipe = replace(recipe, batch=())
    if name == "mmd random features":  # of larger phases the digits are lost
        recipe = replace(recipe, scale=min(recipe.scale, 1e3))
    if name in ("prototypes full", "prototypes tied"):
        recipe = replace(recipe, dim=min(recipe.dim, 48))
    return recipe


# What is checked. Each takes the name of a loss and a recipe, and raises AssertionError.


def finite(name: str, recipe: Recipe) -> None:
    """Finite in, finite out: value and every gradient; and nothing else is touched."""
    loss, problem = LOSSES[name], build(recipe)
    before = [None if t is None else t.detach().clone() for t in _tensors(problem)]
    with state_unchanged():
        value = evaluate(loss, problem)
        grads = _gradients(value, problem)
    for old, new in zip(before, _tensors(problem)):
        assert old is None or torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)), "input changed"
    wide = problem.double()
    exact = evaluate(loss, wide)
    exact_grads = _gradients(exact, wide)
    limit = torch.finfo(value.dtype).max / 1e3
    assert value.ndim == 0
    assert value.dtype == (torch.float64 if recipe.dtype == "float64" else torch.float32)
    if loss.unit and spread(wide) > limit:
        return  # a kernel is a function of squared distances in this unit
    if not _representable(exact, limit):
        assert recipe.dtype != "float64", f"float64 gives {exact}"
        return
    assert value.isfinite(), f"{value} where float64 gives {exact}"
    lifted_grads = grads
    if recipe.dtype in ("float16", "bfloat16"):
        lifted = problem.to(torch.float32)
        lifted_grads = _gradients(evaluate(loss, lifted), lifted)
    for m, (x, grad, ideal) in enumerate(zip(problem.features, grads, exact_grads)):
        if grad is None:
            continue
        assert grad.shape == x.shape
        assert ideal.isfinite().all() or recipe.dtype != "float64", f"gradient {m} in float64"
        # In half precision it is that of float32, whose rounding alone may be more than fits.
        for dtype, found, expected in (
            (value.dtype, lifted_grads[m], ideal),
            (x.dtype, grad, lifted_grads[m]),
        ):
            if not _representable(expected, torch.finfo(dtype).max / 1e3):
                continue
            bad = (~found.isfinite()).sum()
            assert bad == 0, f"gradient {m} has {bad} of {grad.numel()} not finite"
        absent = ~problem.present()[m]
        assert (grad[absent] == 0).all(), f"gradient {m} at absent samples"
    if loss.compares:
        size = loss.size(spread(wide), recipe.dim)
        # Samples at a large offset are read to that many digits.
        unit = torch.finfo(value.dtype).eps * (1 + recipe.offset + 6 * recipe.gap)
        if name.startswith("mmd"):  # squared distances come from products, in units of 1 here
            unit += torch.finfo(value.dtype).eps * spread(wide)
        # Below the normal numbers each of up to D^2 terms is rounded to a multiple of the least.
        number = torch.finfo(value.dtype)
        least = number.smallest_normal * number.eps * recipe.dim**2
        close(value.double(), exact, 1e-3 + 100 * unit, (1e-3 + 100 * unit) * size + least)


def non_finite(name: str, recipe: Recipe) -> None:
    """Non-finite in, non-finite out, from any sample that is there."""
    problem = build(recipe)
    present = problem.present()
    if LOSSES[name].paired:
        present = [torch.stack(present).all(0)] * len(present)
    there = [m for m, rows in enumerate(present) if bool(rows.any())]
    if len(there) < 2:
        return
    m = there[recipe.seed % len(there)]
    rows = present[m].nonzero()
    row = tuple(rows[recipe.seed % len(rows)].tolist())
    x = problem.features[m].detach().clone()
    x[(*row, recipe.seed % recipe.dim)] = (math.nan, math.inf, -math.inf)[recipe.seed % 3]
    problem.features[m] = x
    if min(int(p.sum(-1).min()) for p in present) < LOSSES[name].least > 1:
        return  # such a modality is out
    if any(not bool(p.any(-1).all()) for p in present):
        return  # in some problem of the batch it may be the only one
    value = evaluate(LOSSES[name], problem)
    assert not value.isfinite(), f"{value} with a non-finite sample"


def translation(name: str, recipe: Recipe) -> None:
    """Adding one vector to all samples changes nothing."""
    loss = LOSSES[name]
    problem = build(_exact(recipe)).double()
    shift = 4 * recipe.scale * torch.randn(recipe.dim, dtype=torch.float64)
    _same(loss, problem, problem.map(lambda x: x + shift), recipe)


def rotation(name: str, recipe: Recipe) -> None:
    """Rotating all samples changes nothing."""
    loss = LOSSES[name]
    recipe = replace(_exact(recipe), dim=min(recipe.dim, 65))
    problem = build(recipe).double()
    q, _ = torch.linalg.qr(torch.randn(recipe.dim, recipe.dim, dtype=torch.float64))
    turned = problem.map(lambda x: x.nan_to_num(0.0, 0.0, 0.0) @ q)
    _same(loss, problem, turned, recipe)


def scale(name: str, recipe: Recipe) -> None:
    """Features times s give s^degree times the loss."""
    loss = LOSSES[name]
    problem = build(_exact(recipe)).double()
    # A power of two: nothing is rounded.
    factor = 2.0 ** (recipe.seed % 21 - 10)
    _same(loss, problem, problem.map(lambda x: x * factor), recipe, factor**loss.degree)


def samples_permuted(name: str, recipe: Recipe) -> None:
    """The order of samples does not matter."""
    loss = LOSSES[name]
    problem = build(_exact(recipe)).double()
    order = torch.randperm(recipe.sizes[0])
    orders = [order if loss.paired else torch.randperm(n) for n in recipe.sizes]
    turned = Problem(
        [x[..., o, :] for x, o in zip(problem.features, orders)],
        [None if w is None else w[..., o] for w, o in zip(problem.weights, orders)],
    )
    _same(loss, problem, turned, recipe)


def modalities_permuted(name: str, recipe: Recipe) -> None:
    """The order of modalities does not matter."""
    loss = LOSSES[name]
    problem = build(_exact(recipe)).double()
    order = torch.randperm(len(recipe.sizes)).tolist()
    turned = Problem([problem.features[m] for m in order], [problem.weights[m] for m in order])
    _same(loss, problem, turned, recipe)


def padding(name: str, recipe: Recipe) -> None:
    """Rows of weight 0, whatever stands in them, change neither value nor gradients."""
    loss = LOSSES[name]
    problem = build(_exact(recipe)).double()
    padded = Problem([], [])
    for x, w in zip(problem.features, problem.weights):
        rows = x.new_full((*x.shape[:-2], 3, x.shape[-1]), recipe.junk)
        w = x.new_ones(x.shape[:-1]) if w is None else w
        padded.features.append(torch.cat([rows[..., :1, :], x, rows[..., 1:, :]], -2))
        padded.weights.append(torch.nn.functional.pad(w, (1, 2)))
    value = _same(loss, problem, padded, recipe)
    if value is None or not any(x.requires_grad for x in problem.features):
        return
    length = max(spread(problem), 1e-300) ** 0.5
    size, rounding = loss.size(spread(problem), recipe.dim) / length, 0.0
    if loss.unit:
        # A kernel's slope is a distance in this unit, or less. Distances are differences of
        # products, to the digits of the samples.
        size = min(length, 1 / length)
        rounding = 10 * torch.finfo(torch.float64).eps * length
    grads, padded_grads = (
        _gradients(evaluate(loss, problem), problem),
        _gradients(evaluate(loss, padded), problem),
    )
    for grad, padded_grad in zip(grads, padded_grads):
        if grad is not None:
            close(padded_grad, grad, 1e-3, 1e-3 * size + rounding)


def batch(name: str, recipe: Recipe) -> None:
    """The loss of a batch is the mean of its problems'."""
    loss = LOSSES[name]
    recipe = replace(_exact(recipe), batch=(2,))
    problem = build(recipe).double()
    singles = [
        evaluate(
            loss,
            Problem(
                [x[b] for x in problem.features],
                [None if w is None else w[b] for w in problem.weights],
            ),
        )
        for b in range(2)
    ]
    value = evaluate(loss, problem)
    size = _size(loss, problem, recipe.dim)
    close(value, torch.stack(singles).mean(), 1e-6, _accuracy(name, recipe) * size)


def sign(name: str, recipe: Recipe) -> None:
    """Not negative, and 0 where all modalities are equal."""
    loss, problem = LOSSES[name], build(recipe)
    size = _size(loss, problem.double(), recipe.dim)
    slack = max(_accuracy(name, recipe), 30 * torch.finfo(problem.features[0].dtype).eps) * size
    if loss.nonnegative:
        value = evaluate(loss, problem)
        assert not value < -slack, f"{value} is negative (slack {slack:.2g})"
    if loss.zero:
        count = len(problem.features)
        equal = Problem([problem.features[0]] * count, [problem.weights[0]] * count)
        value = evaluate(loss, equal)
        size = _size(loss, equal.double(), recipe.dim)
        slack = max(_accuracy(name, recipe), 30 * torch.finfo(value.dtype).eps) * size
        representable = size < torch.finfo(value.dtype).max / 1e6
        assert not representable or value.abs() <= slack, f"{value} at equality ({slack:.2g})"


CHECKS = {
    check.__name__: check
    for check in (
        finite,
        non_finite,
        translation,
        rotation,
        scale,
        samples_permuted,
        modalities_permuted,
        padding,
        batch,
        sign,
    )
}


# Here other seeds give another fit: tests/test_laws.py has these laws where there is one best fit.
SEEDED = {"translation", "samples_permuted", "modalities_permuted", "padding", "batch"}


def holds(check: str, name: str) -> bool:
    """Return whether a law is one of this loss."""
    loss = LOSSES[name]
    if loss.seeds and check in SEEDED:
        return False
    return {
        "translation": loss.translates,
        "rotation": loss.rotates,
        "scale": loss.degree is not None,
        "samples_permuted": loss.permutes,
        "modalities_permuted": loss.symmetric,
        "padding": loss.pads,
        "batch": loss.batches,
        "sign": loss.nonnegative or loss.zero,
    }.get(check, True)


JOBS = [(check, name) for name in LOSSES for check in CHECKS if holds(check, name)]


def run(check: str, name: str, recipe: Recipe) -> int:
    """Check one law of one loss on one problem; return how many warnings of convergence it gave."""
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        # An honest flag is no failure.
        warnings.simplefilter("always", ConvergenceWarning)
        # A bandwidth is taken as it comes; test_mmd.py has the warning.
        warnings.filterwarnings("ignore", "the bandwidth is so small")
        CHECKS[check](name, applies(name, recipe))
    return len(caught)


@contextmanager
def state_unchanged():
    """Fail if grad mode, dtype, TF32 flags or the global generator are not as before."""

    def state():
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.get_rng_state().sum().item(),
            torch.is_autocast_enabled("cpu"),
            random.getstate(),
        )

    before = state()
    yield
    assert state() == before, "global state changed"


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """Assert that two results are close, non-finite ones included."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def _exact(recipe: Recipe) -> Recipe:
    """Laws are tested in float64; half precision would only round the data."""
    return replace(recipe, dtype="float64", scale=min(max(recipe.scale, 1e-18), 1e18))


def _accuracy(name: str, recipe: Recipe) -> float:
    """Return the error allowed, relative to the natural size of the loss."""
    # The transport solver stops at this distance from the marginals.
    solver = 1e-4 if recipe.dtype != "float64" else 1e-6
    rounding = 1e-14 * (1 + recipe.offset + 6 * recipe.gap) ** 2
    if name == "mmd random features":
        rounding += 1e-13 * recipe.scale  # of phases, which are in units of the bandwidth
    elif name == "mmd energy":
        rounding = rounding**0.5  # of squared distances
    elif name.startswith("mmd"):
        # Of squared distances, in units of the bandwidth, as matrix products have it.
        rounding += 1e-15 * 1e4 * recipe.dim * recipe.scale**2
    return (solver if name.startswith(("sinkhorn", "matching")) else 1e-8) + rounding


def _same(loss, problem, other, recipe, factor=1.0):
    name = next(key for key, value in LOSSES.items() if value is loss)
    value, changed = evaluate(loss, problem), evaluate(loss, other)
    size = _size(loss, problem, recipe.dim)
    close(changed, factor * value, 1e-5, factor * _accuracy(name, recipe) * size)
    return value


def _size(loss: Loss, problem: Problem, dim: int) -> float:
    """Return the natural size of the loss of a problem."""
    size = loss.size(spread(problem), dim)
    if loss.edges is None:
        return size
    costly = torch.zeros(problem.features[0].shape[:-2], dtype=torch.bool)
    present = problem.present()
    for i, j in loss.edges(len(problem.features)):
        apart = (problem.features[i].unsqueeze(-2) != problem.features[j].unsqueeze(-3)).any(-1)
        apart = apart & present[i].unsqueeze(-1) & present[j].unsqueeze(-2)
        costly |= apart.flatten(-2).any(-1)
    return size if bool(costly.all()) else max(size, 1.0)


def _tensors(problem: Problem) -> list[torch.Tensor | None]:
    return [*problem.features, *problem.weights]


def _gradients(value: torch.Tensor, problem: Problem) -> list[torch.Tensor | None]:
    """Return the gradient of each modality that wants one."""
    leaves = [x for x in problem.features if x.requires_grad]
    if not leaves:
        assert not value.requires_grad
        return [None] * len(problem.features)
    found = iter(torch.autograd.grad(value, leaves, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in problem.features]


def _representable(x: torch.Tensor, limit: float) -> bool:
    return bool((x.abs() <= limit).all())
