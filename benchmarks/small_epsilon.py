"""The solver on a grid of problems down to a tiny epsilon: which method converges, and how fast.

``python -m benchmarks.small_epsilon`` takes about two hours on one core; ``--processes`` shares the
problems out, and ``--tiny`` takes a few of them. Every method gets 2,000 iterations. A problem is
solved if the L1 error of the marginals of T = exp((sum_i f_i - C) / epsilon), summed over the
marginals, is at most 1e-6 in float64, apart from the rounding of C / epsilon (at most 1e-7, at the
smallest epsilon). Where the plan has few entries it is built from the potentials for that, the same
way for every provider; elsewhere the error is the one that the solver states.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import ot
import torch
from torch import Tensor

from benchmarks import harness
from multialign import multi_marginal_sinkhorn, squared_euclidean_cost

TOLERANCE = 1e-6
MAX_ITERATIONS = 2000
LEVELS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
WEIGHTS = ("equal", "random", "heavy", "tiny")
POINTS = ("plain", "outliers", "duplicates")
# Graphs with their number of marginals, and how many points these have: the first marginal, and
# how many more each next one has. Two marginals have one graph, and three have two.
GRIDS: tuple[tuple[str, int, tuple[tuple[int, int], ...]], ...] = (
    ("pair", 2, ((2, 0), (5, 0), (20, 0), (20, 10), (100, 0), (200, 0))),
    ("complete", 3, ((2, 0), (5, 0), (20, 0), (60, 0))),
    ("chain", 3, ((2, 0), (5, 0), (20, 0), (200, 0))),
    ("complete", 4, ((2, 0), (5, 1), (12, 0))),
    ("chain", 4, ((2, 1), (20, 5), (60, 0))),
    ("star", 4, ((2, 0), (20, 0), (60, 0))),
    ("cycle", 4, ((2, 0), (5, 0), (20, 0))),
    ("complete", 5, ((2, 0), (5, 0), (8, 0))),
    ("chain", 5, ((2, 0), (20, 0), (60, 0))),
    ("star", 5, ((2, 1), (20, 5), (60, 0))),
    ("cycle", 5, ((2, 0), (5, 1), (20, 0))),
)
METHODS = ("auto", "newton", "sinkhorn")
# Plans of at most this many entries are built to measure their error, and given to MMSinkhorn.
DENSE = 2**16
# The factor by which OTT's epsilon falls in each iteration.
DECAY = 0.9
# A call is repeated until the calls took this many seconds, or this often.
ENOUGH, OFTEN = 0.1, 5


def version(package: str) -> str:
    """Return the installed version of a package."""
    return importlib.metadata.version(package)


class Problem(NamedTuple):
    """One point of the grid."""

    graph: str
    count: int
    size: tuple[int, int]
    weights: str
    points: str
    level: float

    @property
    def sizes(self) -> list[int]:
        """The number of points of each marginal."""
        first, step = self.size
        return [first + step * p for p in range(self.count)]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pairs with a cost."""
        if self.graph == "complete":
            return list(combinations(range(self.count), 2))
        if self.graph == "star":
            return [(0, j) for j in range(1, self.count)]
        chain = [(i, i + 1) for i in range(self.count - 1)]
        return [*chain, (0, self.count - 1)] if self.graph == "cycle" else chain


class Data(NamedTuple):
    """What the providers are given."""

    points: list[Tensor]
    costs: dict[tuple[int, int], Tensor]
    marginals: list[Tensor]
    epsilon: float


class Answer(NamedTuple):
    """What a provider returns."""

    potentials: Sequence[Any]
    """In units of epsilon."""
    iterations: int
    error: float | None = None
    """The error that it states, if it is measured as ours."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider on one problem."""

    graph: str
    marginals: int
    size: str
    weights: str
    points: str
    level: str
    """epsilon in standard deviations of the costs."""
    provider: str
    converged: int
    error: str
    iterations: int
    """For POT's epsilon scaling the number of levels, of up to 100 iterations each."""
    milliseconds: float


def grid(tiny: bool = False) -> Iterator[Problem]:
    """Return all problems, or a few small ones."""
    for graph, count, sizes in GRIDS:
        kinds = product(sizes, WEIGHTS, POINTS, LEVELS)
        problems = [Problem(graph, count, *kind) for kind in kinds]
        if tiny:
            largest = max(size for size in sizes if size[0] <= 5)
            # The step makes weights, points and levels vary.
            problems = [problem for problem in problems if problem.size == largest][::21]
        yield from problems


def make_points(problem: Problem) -> list[Tensor]:
    """Return Gaussian clouds in four dimensions, 0.5 apart in every feature."""
    generator = torch.Generator().manual_seed(100 * problem.count + problem.size[0])
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    points = [draw(n, 4) + 0.5 * p for p, n in enumerate(problem.sizes)]
    for x in points:
        if problem.points == "outliers":
            x[-1] *= 30
        elif problem.points == "duplicates":
            half = len(x) // 2
            x[-half:] = x[:half].clone()
    return points


def make_marginals(problem: Problem) -> list[Tensor]:
    """Return the weights, which sum to 1."""
    generator = torch.Generator().manual_seed(problem.count)
    marginals = []
    for n in problem.sizes:
        nu = torch.ones(n, dtype=torch.float64)
        if problem.weights == "random":
            nu = torch.rand(n, generator=generator, dtype=torch.float64)
        elif problem.weights == "heavy":
            nu[0] = 10 * n
        elif problem.weights == "tiny":
            nu[0] = 1e-9
        marginals.append(nu / nu.sum())
    return marginals


def make_data(problem: Problem) -> Data:
    """Return costs, weights and epsilon of a problem."""
    points = make_points(problem)
    costs = {(i, j): squared_euclidean_cost(points[i], points[j]) for i, j in problem.edges}
    pooled = torch.cat([cost.flatten() for cost in costs.values()])
    # The costs of two points each that are all equal do not vary.
    unit = pooled.std(correction=0).item() or pooled.mean().item()
    return Data(points, costs, make_marginals(problem), problem.level * unit)


def rounding(data: Data) -> float:
    """Return an error that the rounding of costs and potentials to float64 makes by itself."""
    largest = max(cost.max().item() for cost in data.costs.values()) / data.epsilon
    return len(data.marginals) * torch.finfo(torch.float64).eps / 2 * largest


def marginal_error(data: Data, potentials: Sequence[Any]) -> float:
    """Return the L1 error of exp(sum_i f_i - C / epsilon), for potentials in units of epsilon."""
    count = len(data.marginals)
    log_plan = torch.zeros([len(nu) for nu in data.marginals], dtype=torch.float64)
    for scope, table in [
        *(((i, j), -cost / data.epsilon) for (i, j), cost in data.costs.items()),
        *(((p,), torch.as_tensor(f)) for p, f in enumerate(potentials)),
    ]:
        shape = [len(data.marginals[p]) if p in scope else 1 for p in range(count)]
        log_plan = log_plan + table.reshape(shape)
    error = 0.0
    for p, nu in enumerate(data.marginals):
        others = [q for q in range(count) if q != p]
        error += (log_plan.logsumexp(others).exp() - nu).abs().sum().item()
    return error


# -- The providers: each returns a call that is measured ------------------------------------------


def ours(data: Data, method: str) -> Callable[[], Answer]:
    """Call multialign."""

    def call() -> Answer:
        solution = multi_marginal_sinkhorn(
            data.costs, data.marginals, data.epsilon, tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS, method=method,
        )  # fmt: skip
        potentials = [f / data.epsilon for f in solution.potentials]
        return Answer(potentials, int(solution.iterations), float(solution.error))

    return call


def pot_log(data: Data) -> Callable[[], Answer]:
    """Call POT's sweeps in the log domain."""
    a, b = (nu.numpy() for nu in data.marginals)
    cost = data.costs[(0, 1)].numpy()
    # POT stops at an L2 error of one marginal.
    threshold = TOLERANCE / math.sqrt(len(b))

    def call() -> Answer:
        _, log = ot.bregman.sinkhorn_log(
            a, b, cost, data.epsilon, numItermax=MAX_ITERATIONS, stopThr=threshold, log=True,
        )  # fmt: skip
        return Answer([log["log_u"], log["log_v"]], log["niter"] + 1)

    return call


def pot_scaling(data: Data) -> Callable[[], Answer]:
    """Call POT's sweeps with epsilon scaling."""
    a, b = (nu.numpy() for nu in data.marginals)
    cost = data.costs[(0, 1)].numpy()
    # POT stops at a sum of squares, over both marginals.
    threshold = TOLERANCE**2 / (len(a) + len(b))

    def call() -> Answer:
        _, log = ot.bregman.sinkhorn_epsilon_scaling(
            a, b, cost, data.epsilon, stopThr=threshold, log=True
        )
        potentials = [log["alpha"] / data.epsilon, log["beta"] / data.epsilon]
        return Answer(potentials, log["niter"] + 1)

    return call


@lru_cache
def compiled_ott(sizes: tuple[int, ...], start: float) -> Any:
    """Return OTT's two-marginal solver for these sizes; epsilon begins at `start` times its end."""
    import jax
    from jax import numpy as jnp
    from ott.geometry.epsilon_scheduler import Epsilon
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    jax.config.update("jax_enable_x64", True)
    # OTT measures the error of one marginal at the last epsilon, and the other is met at the
    # present one: it must not stop before these are the same. It looks at the error at the end of
    # every ten iterations, and gives up where it was not computed because of `min_iterations`.
    falling = math.ceil(math.log(start) / -math.log(DECAY))
    solver = Sinkhorn(
        threshold=TOLERANCE,
        min_iterations=max(0, 10 * math.ceil(falling / 10) - 1),
        max_iterations=MAX_ITERATIONS,
    )

    def solve(cost: Any, a: Any, b: Any, epsilon: Any) -> Any:
        geometry = Geometry(cost, epsilon=Epsilon(epsilon, init=start, decay=DECAY))
        output = solver(LinearProblem(geometry, a, b))
        return output.potentials, output.n_iters

    shapes = [sizes, sizes[:1], sizes[1:], ()]
    arguments = [jnp.zeros(shape, dtype=jnp.float64) for shape in shapes]
    return jax.jit(solve).lower(*arguments).compile()


def ott(data: Data, start: float) -> Callable[[], Answer]:
    """Call OTT's solver for two marginals, compiled."""
    solve = compiled_ott(tuple(len(nu) for nu in data.marginals), start)
    from jax import numpy as jnp

    arrays = [jnp.asarray(x.numpy()) for x in (data.costs[(0, 1)], *data.marginals)]
    epsilon = jnp.asarray(data.epsilon)

    def call() -> Answer:
        potentials, iterations = solve(*arrays, epsilon)
        scaled = [torch.tensor(f.tolist(), dtype=torch.float64) / data.epsilon for f in potentials]
        return Answer(scaled, int(iterations))

    return call


@lru_cache
def compiled_mmsinkhorn(sizes: tuple[int, ...], features: int) -> Any:
    """Return OTT's multi-marginal solver for clouds of these sizes."""
    import jax
    from jax import numpy as jnp
    from ott.experimental.mmsinkhorn import MMSinkhorn

    jax.config.update("jax_enable_x64", True)
    solver = MMSinkhorn(threshold=TOLERANCE, max_iterations=MAX_ITERATIONS)

    def solve(points: Any, masses: Any, epsilon: Any) -> Any:
        output = solver(points, masses, epsilon=epsilon)
        return output.potentials, output.n_iters

    points = tuple(jnp.zeros((n, features)) for n in sizes)
    masses = tuple(jnp.zeros(n) for n in sizes)
    return jax.jit(solve).lower(points, masses, jnp.zeros(())).compile()


def mmsinkhorn(data: Data) -> Callable[[], Answer]:
    """Call OTT's solver for the complete graph, compiled."""
    sizes = tuple(len(nu) for nu in data.marginals)
    solve = compiled_mmsinkhorn(sizes, data.points[0].shape[1])
    from jax import numpy as jnp

    points = tuple(jnp.asarray(x.numpy()) for x in data.points)
    masses = tuple(jnp.asarray(nu.numpy()) for nu in data.marginals)
    epsilon = jnp.asarray(data.epsilon)

    def call() -> Answer:
        potentials, iterations = solve(points, masses, epsilon)
        scaled = [torch.tensor(f.tolist(), dtype=torch.float64) / data.epsilon for f in potentials]
        return Answer(scaled, int(iterations))

    return call


def providers(problem: Problem, data: Data) -> Iterator[tuple[str, Callable[[], Answer]]]:
    """Return the providers that offer a problem, with their calls."""
    for method in METHODS:
        yield method, ours(data, method)
    if problem.count == 2:
        yield f"POT {version('POT')} sinkhorn_log", pot_log(data)
        yield f"POT {version('POT')} epsilon_scaling", pot_scaling(data)
    if importlib.util.find_spec("ott") is None:
        return
    name = f"OTT-JAX {version('ott-jax')}"
    if problem.count == 2:
        yield f"{name} Sinkhorn", ott(data, 1.0)
        # From one standard deviation of the costs down to epsilon.
        yield f"{name} Sinkhorn, epsilon falling", ott(data, 1 / problem.level)
    if problem.graph == "complete" and math.prod(problem.sizes) <= DENSE:
        yield f"{name} MMSinkhorn", mmsinkhorn(data)


# -- Running --------------------------------------------------------------------------------------


@lru_cache
def warm_up() -> None:
    """Load all code of a process."""
    torch.set_num_threads(1)
    for graph in ("chain", "complete"):
        data = make_data(Problem(graph, 3, (5, 0), "random", "plain", 1e-2))
        for method in METHODS:
            ours(data, method)()


def measure(problem: Problem) -> list[Row]:
    """Return the rows of one problem."""
    warm_up()
    data = make_data(problem)
    dense = math.prod(problem.sizes) <= DENSE
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for provider, call in providers(problem, data):
            times: list[float] = []
            while not times or (len(times) < OFTEN and sum(times) < ENOUGH):
                start = time.perf_counter()
                answer = call()
                times.append(time.perf_counter() - start)
            stated = answer.error
            error = marginal_error(data, answer.potentials) if dense or stated is None else stated
            sizes = sorted({problem.sizes[0], problem.sizes[-1]})
            rows.append(
                Row(
                    graph=problem.graph,
                    marginals=problem.count,
                    size=" to ".join(map(str, sizes)),
                    weights=problem.weights,
                    points=problem.points,
                    level=f"{problem.level:.0e}",
                    provider=provider,
                    converged=int(error <= TOLERANCE + rounding(data)),
                    error=f"{error:.1e}",
                    iterations=answer.iterations,
                    milliseconds=1e3 * min(times),
                )
            )
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one problem on one line."""
    first = rows[0]
    head = f"{first.graph} M = {first.marginals}, K = {first.size}, {first.weights}, {first.points}"
    cells = [
        f"{row.provider} {row.iterations if row.converged else '-'} ({row.milliseconds:.0f} ms)"
        for row in rows
    ]
    print(f"{head}, {first.level}: {'; '.join(cells)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=harness.RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a few small problems only")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    if not options.tiny:
        import ott  # noqa: F401  # a recorded table has all providers
    problems = list(grid(options.tiny))
    rows: list[Row] = []
    if options.processes == 1:
        results: Any = map(measure, problems)
        pool = None
    else:
        pool = multiprocessing.get_context("spawn").Pool(options.processes)
        results = pool.imap(measure, problems)
    for found in results:
        show(found)
        rows += found
    if pool is not None:
        pool.close()
    harness.write("small_epsilon", rows, options.folder, once=True)


if __name__ == "__main__":
    main()
