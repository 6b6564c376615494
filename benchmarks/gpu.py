"""The CUDA kernels against eager torch, torch.compile and other libraries, on this GPU.

``python -m benchmarks.gpu FOLDER`` writes FOLDER/gpu.csv in less than 8 minutes, each row as soon
as it is measured. It needs torch and triton; OTT-JAX, geomloss and flash-sinkhorn are measured
where they can be imported. ``--tiny`` runs every line on tiny problems, on a CPU too with
TRITON_INTERPRET=1.

A time is that of one call, launches included, with a synchronisation before and after it.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import multialign
from multialign import mmd_loss, multi_marginal_sinkhorn
from multialign.ops import _triton, kernel_sums

COLUMNS = [
    "case", "size", "provider", "milliseconds", "low", "high", "ratio", "peak_mib", "error",
    "iterations", "counted", "rate", "limit", "fraction", "note",
]  # fmt: skip
TOLERANCE = 1e-3


class Table:
    """The rows of one run. Ratios are to the first provider of the same case and size."""

    def __init__(self, folder: Path, device: str, minutes: float) -> None:
        self.cuda = device == "cuda"
        self.end = time.perf_counter() + 60 * minutes
        self.first: dict[tuple[str, str], float] = {}
        name = torch.cuda.get_device_name() if self.cuda else f"{platform.machine()} interpreter"
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
        self.where = {
            "device": name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "multialign": multialign.__version__,
            "commit": commit,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "gpu.csv").open("w", newline="")
        self.writer = csv.DictWriter(self.file, [*COLUMNS, *self.where])
        self.writer.writeheader()

    def stop(self) -> None:
        """End the run in the middle of a measurement; the rows before it are written."""
        print("stopped: out of time", flush=True)
        os._exit(1)

    def synchronize(self) -> None:
        """Wait for the card."""
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, function: Callable[[], Any]) -> float:
        """Return the milliseconds of one call."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def row(self, case: str, size: str, provider: str, **values: Any) -> None:
        """Write and print one row, with the ratio of its time to that of the first provider."""
        milliseconds = values.get("milliseconds")
        if milliseconds is not None:
            first = self.first.setdefault((case, size), milliseconds)
            values["ratio"] = milliseconds / first
        if "limit" in values and "rate" in values:
            values["fraction"] = values["rate"] / values["limit"]
        values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
        self.writer.writerow(
            {"case": case, "size": size, "provider": provider} | values | self.where
        )
        self.file.flush()
        print(case, size, provider, {k: v for k, v in values.items() if v != ""}, flush=True)

    def measure(
        self,
        case: str,
        size: str,
        provider: str,
        function: Callable[[], Any],
        *,
        amount: float | None = None,
        unit: str = "",
        limit: float | None = None,
        describe: Callable[[Any], dict[str, Any]] = lambda result: {},
        seconds: float = 1.5,
    ) -> float | None:
        """Time a function and write its row; return its rate, `amount` a second.

        A function that cannot run gets a row that says why.
        """
        if time.perf_counter() > self.end:
            self.row(case, size, provider, note="skipped: out of time")
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                result = function()
                self.synchronize()
                # A first call this long, compilation included, is timed only once more.
                long = time.perf_counter() - start > 20
                peak = math.nan
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                times = [self.once(function)]
                if self.cuda:
                    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                stop = time.perf_counter() + seconds
                while not long and (
                    len(times) < 3 or (len(times) < 100 and time.perf_counter() < stop)
                ):
                    times.append(self.once(function))
            values = describe(result)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            self.row(case, size, provider, note=f"{type(error).__name__}: {text[0][:200]}")
            return None
        median = statistics.median(times)
        cuts = statistics.quantiles(times, n=5) if len(times) > 1 else [median] * 4
        values |= {"milliseconds": median, "low": cuts[0], "high": cuts[3], "peak_mib": peak}
        rate = None
        if amount is not None:
            rate = amount / median * 1e3
            values |= {"counted": f"{amount:.4g} {unit}", "rate": rate}
            if limit is not None:
                values["limit"] = limit
        self.row(case, size, provider, **values)
        return rate


def version(name: str) -> str:
    """Return a package's name and version, or its name alone if it is not installed."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


# -- Limits of the GPU ----------------------------------------------------------------------------


@triton.jit
def _product(a, b, out, n, SIDE: tl.constexpr, DEEP: tl.constexpr):  # noqa: ANN001, ANN202
    blocks = tl.cdiv(n, SIDE)
    rows = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    columns = tl.program_id(0) // blocks * SIDE + tl.arange(0, SIDE)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, n, DEEP):
        inner = start + tl.arange(0, DEEP)
        left = tl.load(a + rows[:, None] * n + inner[None, :])
        right = tl.load(b + inner[:, None] * n + columns[None, :])
        total = tl.dot(left, right, total, input_precision="tf32x3")
    tl.store(out + rows[:, None] * n + columns[None, :], total)


def three_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b by three TF32 products; sizes are multiples of 128."""
    out = torch.empty_like(a)
    n = a.shape[0]
    grid = ((n // 128) ** 2,)
    _product[grid](a, b, out, n, SIDE=128, DEEP=32, num_warps=8, enable_fp_fusion=True)
    return out


def limits(table: Table, device: str, size: int) -> tuple[float | None, float | None]:
    """Measure float32-accurate products (flop/s) and a copy (bytes/s)."""
    a, b = torch.randn(2, size, size, device=device)
    exact = a.double() @ b.double()

    def describe(result: Tensor) -> dict[str, Any]:
        return {"error": ((result - exact).norm() / exact.norm()).item()}

    run = partial(
        table.measure, "matrix product", f"{size}", amount=2 * size**3, unit="flop",
        describe=describe,
    )  # fmt: skip
    rates = [
        run("torch float32 (allow_tf32 False)", lambda: a @ b),
        run("Triton tf32x3", lambda: three_tf32(a, b)),
    ]
    x = torch.empty(2**16 if size < 1000 else 2**28, device=device)
    bytes_rate = table.measure(
        "copy", f"{4 * len(x)} bytes", "torch", x.clone, amount=8 * len(x), unit="bytes"
    )
    return max((rate for rate in rates if rate), default=None), bytes_rate


# -- The primitives -------------------------------------------------------------------------------


def factored(a: Tensor, b: Tensor) -> Tensor:
    """Return log_matmul by one product of exponentials, the fast formula of eager torch.

    It is wrong where a row and a column have their maxima far apart.
    """
    alpha, beta = a.amax(-1, keepdim=True), b.amax(-2, keepdim=True)
    return ((a - alpha).exp() @ (b - beta).exp()).log() + alpha + beta


def streamed(a: Tensor, b: Tensor) -> Tensor:
    """Return log_matmul by a log-sum-exp, some rows at a time; it is right over any range."""
    step = max(1, 2**26 // b[0].numel())
    rows = [
        torch.logsumexp(a[:, i : i + step, :, None] + b[:, None], 2)
        for i in range(0, a.shape[1], step)
    ]
    return torch.cat(rows, 1)


def clouds(sizes: Iterable[int], depth: int, device: str, batch: int = 1) -> list[Tensor]:
    """Return Gaussian clouds, each half a deviation from the one before."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, n, depth, generator=generator) + 0.5 * m).to(device)
        for m, n in enumerate(sizes)
    ]


def pair_costs(points: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Return the squared distances between all clouds."""
    return {
        (i, j): multialign.squared_euclidean_cost(points[i], points[j])
        for i, j in combinations(range(len(points)), 2)
    }


def default_epsilon(costs: dict[tuple[int, int], Tensor], relative: float = 0.05) -> float:
    """Return `relative` deviations of the sum of the costs, in the first problem."""
    variance = sum(cost[0].var(correction=0) for cost in costs.values())
    return relative * float(variance) ** 0.5


def primitives(
    table: Table, device: str, sizes: Iterable[int], product: float | None, copy: float | None
) -> None:
    """Measure log_matmul, its fused reduction and log_matvec, on tables as a solver has them."""
    for size in sizes:
        points = clouds([size] * 3, 16, device)
        costs = pair_costs(points)
        epsilon = default_epsilon(costs)
        a, b, w = (-costs[e] / epsilon for e in ((0, 1), (1, 2), (0, 2)))
        label = f"K = {size}"
        exact = factored(a.double(), b.double())

        def describe(found: Tensor, exact: Tensor = exact) -> dict[str, Any]:
            return {"error": (found - exact).abs().max().item()}

        work = {"amount": 2 * size**3, "unit": "flop", "limit": product}
        run = partial(table.measure, "log_matmul; error in log units", label, describe=describe)
        run("multialign", partial(_triton.log_matmul, a, b), **work)
        run("torch, factored", partial(factored, a, b))
        run("torch.compile, factored", partial(torch.compile(factored), a, b))
        if size <= 1024:
            run("torch, streamed", partial(streamed, a, b))
        exact = torch.logsumexp(w.double() + exact, 2)
        describe = partial(describe, exact=exact)
        run = partial(table.measure, "three-marginal update; error in log units", label)
        run("multialign", partial(_triton.log_matmul_reduce, a, b, w), describe=describe, **work)
        run(
            "torch, factored",
            lambda a=a, b=b, w=w: torch.logsumexp(w + factored(a, b), 2),
            describe=describe,
        )
        g = torch.zeros_like(a[:, 0])
        run = partial(table.measure, "log_matvec", label)
        run(
            "multialign", partial(_triton.log_matvec, a, g), amount=4 * size**2, unit="bytes",
            limit=copy,
        )  # fmt: skip
        run("torch", lambda a=a, g=g: torch.logsumexp(a + g[:, None], 2))


# -- Whole solves ---------------------------------------------------------------------------------


def sinkhorn_sweep(kernel: Tensor, x: list[Tensor], logs: list[Tensor]) -> list[Tensor]:
    """Sweep three potentials `(B, K)` over a dense log-kernel `(B, K, K, K)`."""
    x0, x1, x2 = x
    x0 = logs[0] - torch.logsumexp(kernel + x1[:, None, :, None] + x2[:, None, None], (2, 3))
    x1 = logs[1] - torch.logsumexp(kernel + x0[:, :, None, None] + x2[:, None, None], (1, 3))
    x2 = logs[2] - torch.logsumexp(kernel + x0[:, :, None, None] + x1[:, None, :, None], (1, 2))
    return [x0, x1, x2]


def eager_sinkhorn(
    costs: dict[tuple[int, int], Tensor],
    marginals: list[Tensor],
    epsilon: float,
    sweep: Callable[..., list[Tensor]] = sinkhorn_sweep,
) -> tuple[Tensor, int]:
    """Solve by plain eager code: dense, in the log domain, with the error every ten sweeps."""
    kernel = -costs[0, 1][..., None] - costs[1, 2][:, None] - costs[0, 2][:, :, None]
    kernel = kernel / epsilon
    logs = [m.log() for m in marginals]
    x = [torch.zeros_like(m) for m in marginals]
    for count in range(1, 2001):
        x = sweep(kernel, x, logs)
        if count % 10 == 0:
            plan = kernel + x[0][:, :, None, None] + x[1][:, None, :, None] + x[2][:, None, None]
            plan = plan.exp()
            error = (plan.sum((2, 3)) - marginals[0]).abs().sum(-1)
            error = error + (plan.sum((1, 3)) - marginals[1]).abs().sum(-1)
            if bool((error <= TOLERANCE).all()):
                break
    return error, count


def solution_of(solution: multialign.TransportSolution) -> dict[str, Any]:
    """Return the columns of a solution."""
    return {
        "error": float(solution.error.max()),
        "iterations": int(solution.iterations.max()),
    }


def ott_solver(points: list[Tensor], epsilon: float) -> Callable[[], Any]:
    """Return OTT's solver of the same problem, compiled, on the same device."""
    jax = importlib.import_module("jax")
    mmsinkhorn = importlib.import_module("ott.experimental.mmsinkhorn")
    if points[0].is_cuda and jax.default_backend() != "gpu":
        raise RuntimeError(f"jax sees no GPU, only {jax.default_backend()}")
    jax.config.update("jax_default_matmul_precision", "highest")
    solver = mmsinkhorn.MMSinkhorn(threshold=TOLERANCE)
    arrays = tuple(jax.numpy.asarray(p[0].tolist()) for p in points)
    compiled = jax.jit(lambda x: solver(x, epsilon=epsilon))
    return lambda: jax.block_until_ready(compiled(arrays))


def lazily(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Make a function in its first call, so that a failure becomes a row of the table."""
    made: list[Callable[[], Any]] = []

    def call() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return call


def ott_errors(output: Any) -> dict[str, Any]:
    """Return the columns of OTT's output."""
    errors = [error for error in output.errors.ravel().tolist() if error > -1]
    return {
        "error": errors[-1] if errors else math.nan,
        "iterations": 10 * len(errors),  # it records the error every ten iterations
    }


def small_solves(table: Table, device: str, cases: Iterable[tuple[int, int, float]]) -> None:
    """Measure B problems at once, of three marginals of K atoms."""
    for size, batch, relative in cases:
        points = clouds([size] * 3, 16, device, batch)
        costs = pair_costs(points)
        epsilon = default_epsilon(costs, relative)
        marginals = [torch.full((batch, size), 1 / size, device=device) for _ in range(3)]
        levels = torch.full((batch,), epsilon, device=device)
        label = f"K = {size}, M = 3, B = {batch}, epsilon = {relative} deviations"
        run = partial(table.measure, f"solve to {TOLERANCE}", label)

        def solve(method: str, backend: str, args: Any = (costs, marginals, epsilon)) -> Any:
            return multi_marginal_sinkhorn(
                *args, tolerance=TOLERANCE, method=method, backend=backend
            )

        run(
            "multialign, one launch",
            partial(
                _triton.solve_small, list(costs.values()), list(costs), marginals, levels,
                TOLERANCE, 2000,
            ),
            amount=batch,
            unit="problems",
            describe=lambda r: {"error": float(r[2].max()), "iterations": int(r[1].max())},
        )  # fmt: skip
        run("multialign", partial(solve, "auto", "auto"), describe=solution_of)
        run("multialign torch Newton", partial(solve, "newton", "torch"), describe=solution_of)
        run("multialign torch Sinkhorn", partial(solve, "sinkhorn", "torch"), describe=solution_of)
        eager = partial(eager_sinkhorn, costs, marginals, epsilon)
        columns = {"describe": lambda r: {"error": float(r[0].max()), "iterations": r[1]}}
        run("torch Sinkhorn", eager, **columns)
        run(
            "torch.compile Sinkhorn", partial(eager, sweep=torch.compile(sinkhorn_sweep)), **columns
        )
        if batch == 1:
            make = partial(ott_solver, points, epsilon)
            run(f"{version('ott-jax')} (jit)", lazily(make), describe=ott_errors)


def large_solves(table: Table, device: str, sizes: Iterable[int], ott_to: int) -> None:
    """Measure one problem of three marginals of many atoms."""
    for size in sizes:
        points = clouds([size] * 3, 16, device)
        costs = pair_costs(points)
        epsilon = default_epsilon(costs)
        marginals = [torch.full((1, size), 1 / size, device=device) for _ in range(3)]
        run = partial(
            table.measure, f"solve to {TOLERANCE}", f"K = {size}, M = 3, B = 1", seconds=3.0
        )

        def solve(
            backend: str, method: str = "auto", args: Any = (costs, marginals, epsilon)
        ) -> Any:
            return multi_marginal_sinkhorn(
                *args, tolerance=TOLERANCE, method=method, backend=backend
            )

        run("multialign", partial(solve, "auto"), describe=solution_of)
        run("multialign torch", partial(solve, "torch"), describe=solution_of)
        if size <= 1024:
            for name, backend in (
                ("multialign Sinkhorn", "auto"),
                ("multialign torch Sinkhorn", "torch"),
            ):
                run(name, partial(solve, backend, method="sinkhorn"), describe=solution_of)
        if size <= ott_to:
            make = partial(ott_solver, points, epsilon)
            run(f"{version('ott-jax')} (jit)", lazily(make), describe=ott_errors)


def two_marginals(table: Table, device: str, size: int) -> None:
    """Measure two clouds, forward, against libraries for two marginals.

    Their cost is |x-y|^2 / 2. They stop at the end of a schedule of epsilon, whatever the error;
    it is longer as `scaling` nears 1.
    """
    x, y = (p[0] for p in clouds([size] * 2, 16, device))
    epsilon = default_epsilon(pair_costs([x[None], y[None]]))
    blur = (epsilon / 2) ** 0.5
    run = partial(table.measure, "two clouds, forward", f"K = {size}")
    cost = multialign.squared_euclidean_cost(x, y)
    ones = [torch.ones(size, device=device)] * 2
    run(
        "multialign",
        lambda: multi_marginal_sinkhorn({(0, 1): cost}, ones, epsilon, tolerance=TOLERANCE),
        describe=solution_of,
    )

    def describe(potentials: tuple[Tensor, Tensor]) -> dict[str, Any]:
        f, g = (potential.flatten().double() for potential in potentials)
        plan = ((f[:, None] + g - cost.double() / 2) / blur**2).exp() / size**2
        return {"error": sum(float((plan.sum(p) - 1 / size).abs().sum()) for p in (0, 1))}

    libraries = {
        "geomloss": ("geomloss", {"backend": "tensorized"}),
        # The cost of geomloss, in float32.
        "flash-sinkhorn": ("flash_sinkhorn", {"half_cost": True, "allow_tf32": False}),
    }
    for name, (module, options) in libraries.items():
        for scaling in (0.5, 0.9, 0.99):

            def make(
                module: str = module, options: dict[str, Any] = options | {"scaling": scaling}
            ) -> Callable[[], Any]:
                losses = importlib.import_module(module)
                loss = losses.SamplesLoss(
                    "sinkhorn", p=2, blur=blur, debias=False, potentials=True, **options
                )
                return lambda: loss(x, y)

            run(f"{version(name)} (scaling {scaling})", lazily(make), describe=describe)


# -- MMD ------------------------------------------------------------------------------------------


def without_kernels(function: Callable[[], Any]) -> Any:
    """Call a function with the Gaussian forms in torch, as if triton were missing."""
    chosen = kernel_sums.choose_backend
    kernel_sums.choose_backend = lambda backend, tensor: "torch"
    try:
        return function()
    finally:
        kernel_sums.choose_backend = chosen


def mmd(table: Table, device: str, sizes: Iterable[int], product: float | None) -> None:
    """Measure `mmd_loss`, forward and backward."""
    for size in sizes:
        x = [p[0].requires_grad_() for p in clouds([size] * 2, 64, device)]

        def step(loss: Callable[[list[Tensor]], Tensor], x: list[Tensor] = x) -> Tensor:
            value = loss(x)
            torch.autograd.grad(value, x)
            return value.detach()

        ours = partial(step, partial(mmd_loss, bandwidth=8.0))
        run = partial(table.measure, "mmd, forward and backward", f"N = {size}, D = 64")
        # Four passes (x with x, y with y, x with y, y with x), each a product for the distances and
        # one for the gradient.
        run("multialign", ours, amount=4 * 2 * 2 * size**2 * 64, unit="flop", limit=product)
        run("multialign torch", partial(without_kernels, ours))

        def make(step: Callable[..., Tensor] = step) -> Callable[[], Any]:
            geomloss = importlib.import_module("geomloss")
            loss = geomloss.SamplesLoss("gaussian", blur=8.0, backend="tensorized")
            return partial(step, lambda features: 2 * loss(*features))

        run(f"{version('geomloss')} (tensorized)", lazily(make))


def main(arguments: list[str] | None = None) -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0, help="no measurement starts later")
    parser.add_argument("--tiny", action="store_true", help="only whether it runs")
    options = parser.parse_args(arguments)
    # JAX would take most of the card's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch.backends.cuda.matmul.allow_tf32 = False
    table = Table(options.folder, options.device, options.minutes)
    watch = threading.Timer(60 * (options.minutes + 1.75), table.stop)
    watch.daemon = True
    watch.start()
    device, tiny = options.device, options.tiny
    if tiny:
        table.measure = partial(table.measure, seconds=0.0)
    product, copy = limits(table, device, 128 if tiny else 4096)
    small = (
        [(2, 1, 0.05)] if tiny else [(7, 1, 0.05), (7, 1, 0.005), (7, 4096, 0.05), (32, 1, 0.05)]
    )
    small_solves(table, device, small)
    primitives(table, device, [5] if tiny else [1024, 4096], product, copy)
    large_solves(table, device, [6] if tiny else [256, 1024, 4096], 6 if tiny else 1024)
    mmd(table, device, [300] if tiny else [5000, 50_000], product)
    two_marginals(table, device, 6 if tiny else 4096)
    table.file.close()


if __name__ == "__main__":
    main()
