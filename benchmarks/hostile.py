"""Hostile inputs for multialign and its peers: which results are right, and which warn.

``python -m benchmarks.hostile`` takes a few minutes. Every provider has its own process, which is
restarted if a call hangs or crashes. Expected values are those of plain float64 implementations
(tests/reference.py) on the same numbers that the providers get.

The peers are called with their defaults, except for:

- geomloss: ``SamplesLoss("sinkhorn", blur=sqrt(epsilon / 2), scaling=0.9)``, more accurate than its
  default of 0.5. Its cost is half of multialign's, so its value is doubled.
  ``SamplesLoss("gaussian", blur=bandwidth)`` is half of the squared MMD.
- POT: ``ot.sinkhorn2`` with the costs of ``ot.dist``; it returns <T, C>. Once with its default
  method and once with "sinkhorn_log", which its documentation advises for a small regularisation.
- OTT-JAX: ``MMSinkhorn()``, whose ``ent_reg_cost`` is <T, C> + epsilon sum T log T.
- scikit-learn: ``GaussianMixture(K, random_state=0)``; multialign also fits full covariances.

Weights are normalised before the call. A provider has warned if it gave a warning, or if a flag of
its result says that the solver did not converge. Gradients are those with respect to the points.
"""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import multiprocessing.connection
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor

from benchmarks import harness
from multialign import (
    fit_gaussian_mixture,
    mmd_loss,
    multi_marginal_sinkhorn,
    multi_marginal_sinkhorn_loss,
    squared_euclidean_cost,
)
from tests import reference

# A call that takes longer counts as hanging.
TIMEOUT = 30.0
# The largest error of a right value: geomloss and OTT stop early by default.
ACCURACY = 0.02

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem."""

    task: str
    """"divergence", "transport", "mmd" or "mixture"."""
    name: str
    points: list[Tensor]
    """Clouds `(N_m, D)`; one for a mixture."""
    weights: list[Tensor] | None = None
    level: float = 0.0
    """Epsilon, the bandwidth, or the number of components."""
    expected: str = "value"
    """ "value"; "finite" where any finite result is right; "not finite" where none is."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a provider for a case."""

    task: str
    case: str
    provider: str
    outcome: str
    """"right", "wrong", "not finite", "gradient not finite", "raises", "hangs", "crashes"."""
    warned: bool
    """Whether it warned, or a flag of its result says that it did not converge."""
    value: float
    expected: float
    error: float
    """Relative to the mean cost or the expected value, whichever is larger; for MMD relative to the
    expected value; for mixtures in nats per feature."""
    seconds: float
    detail: str
    """The exception, or the first warning."""


class Answer(NamedTuple):
    """The result of a call."""

    value: float
    gradients_finite: bool
    warning: str
    """The first warning, or the flag that says the solver did not converge; else empty."""


# -- The cases ------------------------------------------------------------------------------------


def clouds(
    count: int = 2, size: int = 20, dim: int = 5, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return Gaussian clouds, 0.5 apart. Points are multiples of 1/8, so an offset is exact."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [((8 * x).round() / 8 + 0.5 * m).to(dtype) for m, x in enumerate(draws)]


def mean_cost(points: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> float:
    """Return the mean cost between two clouds, over points of positive weight."""
    kept = present(points, weights)
    pairs = list(combinations(kept, 2))
    return sum(float(cdist(x, y, "sqeuclidean").mean()) for x, y in pairs) / len(pairs)


def present(points: Sequence[Tensor], weights: Sequence[Tensor] | None) -> list[Array]:
    """Return the points of positive weight, in float64."""
    if weights is None:
        return [x.double().numpy() for x in points]
    return [x.double()[w > 0].numpy() for x, w in zip(points, weights, strict=True)]


def padded(points: Sequence[Tensor], padding: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return clouds with half as many additional rows of weight 0, and the weights."""
    rows, weights = [], []
    for x in points:
        extra = x.new_full((len(x) // 2, x.shape[1]), padding)
        rows.append(torch.cat([x, extra]))
        weights.append(torch.cat([x.new_ones(len(x)), x.new_zeros(len(extra))]) / len(x))
    return rows, weights


def replace_one(points: Sequence[Tensor], value: float) -> list[Tensor]:
    """Return the clouds with one number replaced by `value`."""
    x = points[0].clone()
    x[3, 1] = value
    return [x, *points[1:]]


def shapes() -> dict[str, list[Tensor]]:
    """Return float32 clouds of hostile shape, location or scale."""
    x, y = clouds()
    many = clouds(size=200)[1]
    generator = torch.Generator().manual_seed(1)
    close = 0.01 * torch.randn(2, 50, 160, generator=generator)
    thin_x, thin_y = x.clone(), y.clone()
    thin_x[:, 1:] = thin_y[:, 1:] = 3.0
    return {
        "ordinary": [x, y],
        "one point each, the same": [x[:1], x[:1]],
        "one point against 200": [x[:1], many],
        "equal clouds": [x, x.clone()],
        "all points equal": [x[:1].repeat(20, 1)] * 2,
        "3 distinct points of 20": [x[torch.arange(20) % 3], y[torch.arange(20) % 3]],
        "all features but one constant": [thin_x, thin_y],
        "two close clouds of 160 features": list(close),
        "an outlier at 1e6": replace_one([x, y], 1e6),
        "offset 1e4": [x + 1e4, y + 1e4],
        "offset 1e6": [x + 1e6, y + 1e6],
        "scale 1e-18": [1e-18 * x, 1e-18 * y],
        "scale 1e18": [1e18 * x, 1e18 * y],
    }


def non_finite() -> dict[str, tuple[list[Tensor], list[Tensor] | None]]:
    """Return clouds for which no finite result is right."""
    points = clouds()
    negative = [torch.full((20,), 1 / 20), torch.full((20,), 1 / 20)]
    negative[0][2] = -1 / 20
    return {
        "a NaN in a sample": (replace_one(points, math.nan), None),
        "an infinity in a sample": (replace_one(points, math.inf), None),
        "a negative weight": (points, negative),
    }


def weighted() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Return clouds with hostile weights."""
    points = clouds()
    half = [torch.where(torch.arange(20) % 2 == m, 0.1, 0.0) for m in (0, 1)]
    wide = [10.0 ** -torch.linspace(0, 30, 20) for _ in points]
    wide = [w / w.sum() for w in (wide[0], wide[1].flip(0))]
    return {
        "half of the weights 0": (points, half),
        "weights from 1 to 1e-30": (points, wide),
        "padding of weight 0, zeros": padded(points, 0.0),
        "padding of weight 0, NaN": padded(points, math.nan),
    }


def transport_cases(task: str) -> list[Case]:
    """Return the cases of entropic transport or its divergence."""
    result = []
    for name, points in shapes().items():
        if task == "transport" and name == "two close clouds of 160 features":
            continue
        level = 0.05 * mean_cost(points) or 1.0
        if name.startswith("an outlier"):
            level = 0.05 * mean_cost(clouds())
        result.append(Case(task=task, name=name, points=points, level=level))
    level = 0.05 * mean_cost(clouds())
    for name, (points, weights) in weighted().items():
        result.append(Case(task=task, name=name, points=points, weights=weights, level=level))
    for dtype, parts in ((torch.float32, (1e-3, 1e-4, 1e-6)), (torch.float64, (1e-3, 1e-6))):
        for part in parts:
            name = f"epsilon {part:g} of the mean cost, {str(dtype)[6:]}"
            points = clouds(dtype=dtype)
            result.append(Case(task=task, name=name, points=points, level=part * mean_cost(points)))
    points = clouds()
    result.append(
        Case(task=task, name="epsilon 1e6 mean costs", points=points, level=1e6 * mean_cost(points))
    )
    for dtype in (torch.float16, torch.bfloat16):
        points = clouds(dtype=dtype)
        result.append(Case(task=task, name=str(dtype)[6:], points=points, level=level))
    if task == "transport":
        for name, points in (
            ("three clouds", clouds(3, 10)),
            ("three clouds, one point each", [x[:1] for x in clouds(3, 10)]),
            ("three clouds, offset 1e6", [x + 1e6 for x in clouds(3, 10)]),
            ("three clouds, float16", clouds(3, 10, dtype=torch.float16)),
        ):
            size = 0.05 * mean_cost(points)
            result.append(Case(task=task, name=name, points=points, level=size))
        points = clouds(3, 10)
        rows, weights = padded(points, math.nan)
        result.append(
            Case(
                task=task,
                name="three clouds, padding of weight 0, NaN",
                points=rows,
                weights=weights,
                level=0.05 * mean_cost(points),
            )
        )
    for name, (points, own) in non_finite().items():
        result.append(
            Case(
                task=task, name=name, points=points, weights=own, level=level, expected="not finite"
            )
        )
    return result


def mmd_cases() -> list[Case]:
    """Return the cases of MMD."""
    result = []
    for name, points in shapes().items():
        level = math.sqrt(mean_cost(points) or 1.0)
        if name.startswith("an outlier"):
            level = math.sqrt(mean_cost(clouds()))
        result.append(Case(task="mmd", name=name, points=points, level=level))
    level = math.sqrt(mean_cost(clouds()))
    for name, (points, weights) in weighted().items():
        result.append(Case(task="mmd", name=name, points=points, weights=weights, level=level))
    for size in (20, 300):
        points = [1e3 * x for x in clouds(size=size, dim=129)]
        name = f"bandwidth far below all distances, N = {size}"
        result.append(Case(task="mmd", name=name, points=points, level=1.0))
    points = [x + 1e6 for x in clouds(size=300)]
    result.append(Case(task="mmd", name="offset 1e6, N = 300", points=points, level=level))
    for dtype in (torch.float16, torch.bfloat16):
        points = clouds(dtype=dtype)
        result.append(Case(task="mmd", name=str(dtype)[6:], points=points, level=level))
    for name, (points, own) in non_finite().items():
        result.append(
            Case(
                task="mmd",
                name=name,
                points=points,
                weights=own,
                level=level,
                expected="not finite",
            )
        )
    return result


def two_clusters(dtype: torch.dtype = torch.float32, dim: int = 3) -> Tensor:
    """Return 60 samples of two clusters that overlap a little, multiples of 1/8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, dim, generator=generator, dtype=torch.float64)
    return ((8 * x).round() / 8 + 4 * (torch.arange(60) % 2)[:, None]).to(dtype)


def mixture_cases() -> list[Case]:
    """Return the cases of mixtures."""
    x = two_clusters()
    thin = x.clone()
    thin[:, 2] = 0.1
    ladder = torch.tensor([0.0] * 25 + [1.0, 2.0, 3.0, 4.0, 5.0])[:, None]
    narrow = torch.cat([torch.zeros(50, 1), 100 + 1e-2 * torch.arange(50.0)[:, None]])
    far = x.clone()
    far[0] = 1e6
    rows, weights = padded([x], 0.0)
    nan_rows, _ = padded([x], math.nan)
    named: list[tuple[str, Tensor, int, str]] = [
        ("ordinary", x, 2, "value"),
        ("offset 1e4", x + 1e4, 2, "value"),
        ("offset 1e6", x + 1e6, 2, "value"),
        ("scale 1e-4", 1e-4 * x, 2, "value"),
        ("scale 1e-18", 1e-18 * x, 2, "value"),
        ("scale 1e18", 1e18 * x, 2, "value"),
        ("a narrow cluster of width 0.3 at 1e4", narrow + 1e4, 2, "finite"),
        ("an outlier at 1e6", far, 3, "finite"),
        ("a constant feature", thin, 2, "finite"),
        ("25 duplicates of 30 numbers", ladder, 2, "finite"),
        ("all rows equal", torch.full((10, 2), 0.3), 2, "finite"),
        ("3 samples, 5 components", x[:3], 5, "finite"),
        ("1 sample, 1 component", x[:1], 1, "finite"),
        ("8 samples of 64 features", two_clusters(dim=64)[:8], 2, "finite"),
        ("float16", two_clusters(torch.float16), 2, "value"),
        ("bfloat16", two_clusters(torch.bfloat16), 2, "value"),
        ("a NaN in a sample", replace_one([x], math.nan)[0], 2, "not finite"),
        ("an infinity in a sample", replace_one([x], math.inf)[0], 2, "not finite"),
    ]
    result = [
        Case(task="mixture", name=name, points=[points], level=count, expected=expected)
        for name, points, count, expected in named
    ]
    for name, padding in (
        ("padding of weight 0, zeros", rows),
        ("padding of weight 0, NaN", nan_rows),
    ):
        result.append(Case(task="mixture", name=name, points=padding, weights=weights, level=2))
    return result


@cache
def all_cases() -> list[Case]:
    """Return all cases, the same in every process."""
    return [
        *transport_cases("divergence"),
        *transport_cases("transport"),
        *mmd_cases(),
        *mixture_cases(),
    ]


# -- Expected values ------------------------------------------------------------------------------


class Expected(NamedTuple):
    """The right results of a case."""

    value: float
    """The divergence, MMD, <T, C>, or the mean log-density of a mixture in units of its data."""
    regularised: float
    """<T, C> + epsilon sum T log T."""
    size: float
    """The mean cost."""


def expectation(case: Case) -> Expected:
    """Compute the right results in float64; NaN where no value is right."""
    if case.expected != "value":
        return Expected(math.nan, math.nan, math.nan)
    kept = present(case.points, case.weights)
    masses = [np.full(len(x), 1 / len(x)) for x in kept]
    if case.weights is not None:
        masses = [w[w > 0].double().numpy() for w in case.weights]
        masses = [w / w.sum() for w in masses]
    if case.task == "mixture":
        return Expected(best_log_density(kept[0], int(case.level)), math.nan, math.nan)
    if case.task == "mmd":
        return Expected(reference.mmd(kept, [case.level], weights=masses), math.nan, math.nan)
    # The cost does not depend on the origin; dividing by its unit keeps all numbers in range.
    size = mean_cost(case.points, case.weights)
    unit = math.sqrt(size) or 1.0
    kept = [(x - kept[0][0]) / unit for x in kept]
    cost, regularised = transport(kept, masses, case.level / unit**2)
    if case.task == "divergence":
        self_terms = [
            transport([x, x], [w, w], case.level / unit**2)[1]
            for x, w in zip(kept, masses, strict=True)
        ]
        value = regularised - sum(self_terms) / 2
        return Expected(value * unit**2, math.nan, size or 1.0)
    return Expected(cost * unit**2, regularised * unit**2, size or 1.0)


def transport(points: list[Array], masses: list[Array], epsilon: float) -> tuple[float, float]:
    """Return <T, C> and the value with the entropy term, for points with a mean cost of 1."""
    costs = {
        (i, j): cdist(points[i], points[j], "sqeuclidean")
        for i, j in combinations(range(len(points)), 2)
    }
    cost = reference.dense_cost(costs, [len(x) for x in points])
    if epsilon < 0.005 and cost.any():
        # The cost is at most epsilon log n above that of the linear program, far below `ACCURACY`.
        exact = reference.exact_transport(cost, masses)
        return exact, exact - epsilon * math.log(cost.shape[0])
    plan = reference.transport_plan(cost, masses, epsilon, tolerance=1e-7)
    return float((plan * cost).sum()), float(reference.transport_value(plan, cost, epsilon))


def best_log_density(x: Array, count: int) -> float:
    """Return the mean log-density of the best of 20 fits to the standardised data."""
    from sklearn.mixture import GaussianMixture

    x = standard(x)
    model = GaussianMixture(count, n_init=20, tol=1e-8, max_iter=1000, random_state=0)
    return float(model.fit(x).score(x))


def standard(x: Array) -> Array:
    """Return data of mean 0 and mean variance 1."""
    centred: Array = x - x.mean(0)
    return centred / math.sqrt(centred.var(0).mean())


def log_density(case: Case, weights: Array, means: Array, covariances: Array) -> float:
    """Return the mean log-density of the data under a mixture; both in the data's units."""
    (x,) = present(case.points, case.weights)
    if not all(np.isfinite(part).all() for part in (weights, means, covariances)):
        return math.nan
    if case.expected != "value":
        # Any mixture is right whose covariances have no negative eigenvalue.
        lowest = min(np.linalg.eigvalsh(c / np.abs(c).max()).min() for c in covariances)
        return 0.0 if lowest > -1e-6 else math.nan
    unit = math.sqrt(x.var(0).mean())
    parts = [
        math.log(max(w, 1e-300))
        + multivariate_normal((m - x.mean(0)) / unit, c / unit**2, allow_singular=True).logpdf(
            standard(x)
        )
        for w, m, c in zip(weights, means, covariances, strict=True)
    ]
    return float(logsumexp(parts, axis=0).mean())


# -- The providers --------------------------------------------------------------------------------


def by_torch(case: Case, loss: Callable[[list[Tensor]], Tensor]) -> Answer:
    """Return the value of a loss of the points, with its gradients by autograd."""
    points = [x.clone().requires_grad_() for x in case.points]
    value = loss(points)
    gradients = torch.autograd.grad(value, points, allow_unused=True)
    finite = all(g is not None and bool(g.isfinite().all()) for g in gradients)
    return Answer(float(value), finite, "")


def ours(case: Case) -> Answer:
    """Call multialign."""
    if case.task == "divergence":
        return by_torch(
            case, lambda x: multi_marginal_sinkhorn_loss(x, case.weights, epsilon=case.level)
        )
    if case.task == "mmd":
        return by_torch(case, lambda x: mmd_loss(x, case.weights, bandwidth=case.level))
    if case.task == "mixture":
        x = case.points[0].clone().requires_grad_()
        mixture = fit_gaussian_mixture(
            x,
            int(case.level),
            covariance_type="full",
            weights=None if case.weights is None else case.weights[0],
            generator=torch.Generator().manual_seed(0),
        )
        (gradient,) = torch.autograd.grad(mixture.means.sum() + mixture.weights[0], x)
        parts = (mixture.weights, mixture.means, mixture.covariances)
        value = log_density(case, *(part.detach().double().numpy() for part in parts))
        return Answer(value, bool(gradient.isfinite().all()), "")

    def cost(points: list[Tensor]) -> Tensor:
        costs = {
            (i, j): squared_euclidean_cost(points[i], points[j])
            for i, j in combinations(range(len(points)), 2)
        }
        weights = case.weights or [x.new_ones(len(x)) for x in points]
        return multi_marginal_sinkhorn(costs, weights, case.level).transport_cost

    return by_torch(case, cost)


def geomloss(case: Case) -> Answer:
    """Call geomloss."""
    from geomloss import SamplesLoss

    if case.task == "mmd":
        loss = SamplesLoss("gaussian", blur=case.level)
    else:
        loss = SamplesLoss("sinkhorn", blur=math.sqrt(case.level / 2), scaling=0.9)

    def call(points: list[Tensor]) -> Tensor:
        x, y = points
        if case.weights is None:
            return 2 * loss(x, y)
        return 2 * loss(case.weights[0], x, case.weights[1], y)

    return by_torch(case, call)


def pot(case: Case, method: str) -> Answer:
    """Call POT."""
    import ot

    def call(points: list[Tensor]) -> Tensor:
        weights = case.weights or [x.new_full((len(x),), 1 / len(x)) for x in points]
        cost = ot.dist(*points)
        return ot.sinkhorn2(*weights, cost, case.level, method=method, warn=True)

    return by_torch(case, call)


def ott(case: Case) -> Answer:
    """Call OTT-JAX."""
    import jax
    from jax import numpy as jnp
    from ott.experimental.mmsinkhorn import MMSinkhorn, MMSinkhornOutput

    jax.config.update("jax_enable_x64", case.points[0].dtype == torch.float64)
    # numpy has no bfloat16.
    dtype = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}.get(case.points[0].dtype)
    points = tuple(jnp.asarray(x.double().numpy(), dtype or x.numpy().dtype) for x in case.points)
    weights = None
    if case.weights is not None:
        weights = tuple(jnp.asarray(w.numpy()) for w in case.weights)

    def call(points: Any) -> tuple[Any, MMSinkhornOutput]:
        output = MMSinkhorn()(points, weights, epsilon=case.level)
        return output.ent_reg_cost, output

    (value, output), gradients = jax.value_and_grad(call, has_aux=True)(points)
    finite = all(bool(jnp.isfinite(g).all()) for g in gradients)
    return Answer(float(value), finite, "" if bool(output.converged) else "converged=False")


def sklearn(case: Case) -> Answer:
    """Call scikit-learn, which has no gradients."""
    from sklearn.mixture import GaussianMixture

    x = case.points[0]
    # numpy has no bfloat16.
    x = x.float() if x.dtype == torch.bfloat16 else x
    model = GaussianMixture(int(case.level), random_state=0).fit(x.numpy())
    parts = (model.weights_, model.means_, model.covariances_)
    return Answer(log_density(case, *(np.asarray(part, float) for part in parts)), True, "")


def version(package: str) -> str:
    """Return the installed version of a package."""
    return importlib.metadata.version(package)


PROVIDERS: dict[str, tuple[str, Callable[[Case], Answer]]] = {
    "multialign": ("divergence transport mmd mixture", ours),
    f"geomloss {version('geomloss')}": ("divergence mmd", geomloss),
    f"POT {version('POT')} sinkhorn": ("transport", lambda case: pot(case, "sinkhorn")),
    f"POT {version('POT')} sinkhorn_log": ("transport", lambda case: pot(case, "sinkhorn_log")),
    f"OTT-JAX {version('ott-jax')} MMSinkhorn": ("transport", ott),
    f"scikit-learn {version('scikit-learn')}": ("mixture", sklearn),
}


def supports(provider: str, case: Case) -> bool:
    """Return whether a provider offers the task of a case, with its weights and clouds."""
    tasks, _ = PROVIDERS[provider]
    if case.task not in tasks.split():
        return False
    if provider.startswith("POT") and len(case.points) > 2:
        return False
    return not (provider.startswith("scikit-learn") and case.weights is not None)


# -- Running --------------------------------------------------------------------------------------


def serve(provider: str, pipe: multiprocessing.connection.Connection) -> None:
    """Receive numbers of cases, and send the answers of a provider."""
    torch.set_num_threads(1)
    _, call = PROVIDERS[provider]
    pipe.send("ready")
    while True:
        number = pipe.recv()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value, finite, flag = call(all_cases()[number])
                messages = [
                    str(w.message).split("\n")[0][:200]
                    for w in caught
                    if issubclass(w.category, (UserWarning, RuntimeWarning))
                    and "requires_grad" not in str(w.message)  # from `float(value)` above
                ]
                pipe.send(Answer(value, finite, flag or next(iter(messages), "")))
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])


class ProviderProcess:
    """A process that runs the calls of one provider, restarted after one that hangs or crashes."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(self._provider, other), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()

    def run(self, number: int) -> Answer | str:
        """Return the answer for a case, or the text of an exception, "hangs" or "crashes"."""
        self._pipe.send(number)
        try:
            if self._pipe.poll(TIMEOUT):
                answer: Answer | str = self._pipe.recv()
                return answer
            failure = "hangs"
        except EOFError:
            failure = "crashes"
        self.stop()
        self._start()
        return failure

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def judge(case: Case, expected: Expected, provider: str, answer: Answer | str) -> dict[str, Any]:
    """Return the fields of a Row that compare an answer with the expected values."""
    fields = {"warned": False, "value": math.nan, "error": math.nan, "detail": ""}
    wanted = expected.regularised if provider.startswith("OTT") else expected.value
    fields["expected"] = wanted
    if isinstance(answer, str):
        raised = answer not in ("hangs", "crashes")
        outcome = "raises" if raised else answer
        if raised and case.expected == "not finite":
            outcome = "right"
        return fields | {"outcome": outcome, "detail": answer if raised else ""}
    fields |= {"warned": bool(answer.warning), "value": answer.value, "detail": answer.warning}
    finite = math.isfinite(answer.value)
    if case.expected == "not finite":
        return fields | {"outcome": "wrong" if finite else "right"}
    if not finite:
        return fields | {"outcome": "not finite"}
    if case.expected == "value":
        size = max(expected.size, abs(wanted))
        if case.task == "mixture":
            size = case.points[0].shape[1]
        elif case.task == "mmd":
            size = wanted if wanted > 1e-6 else 1.0
        error = abs(answer.value - wanted) / size
        fields["error"] = error
        if not error <= ACCURACY:
            return fields | {"outcome": "wrong"}
    return fields | {"outcome": "right" if answer.gradients_finite else "gradient not finite"}


def main() -> None:
    """Run every provider on every case, print the rows and write them."""
    torch.set_num_threads(1)
    processes = {provider: ProviderProcess(provider) for provider in PROVIDERS}
    rows = []
    for number, case in enumerate(all_cases()):
        expected = expectation(case)
        for provider, process in processes.items():
            if not supports(provider, case):
                continue
            began = time.perf_counter()
            answer = process.run(number)
            seconds = time.perf_counter() - began
            row = Row(
                task=case.task,
                case=case.name,
                provider=provider,
                seconds=seconds,
                **judge(case, expected, provider, answer),
            )
            rows.append(row)
            print(
                f"{row.task:10} {row.case:45} {row.provider:30} {row.outcome:20} "
                f"{'warned' if row.warned else '':8} {row.value:12.5g} {row.expected:12.5g} "
                f"{row.error:8.1e} {row.seconds:5.1f} s {row.detail}",
                flush=True,
            )
    for process in processes.values():
        process.stop()
    harness.write("hostile", rows)


if __name__ == "__main__":
    main()
