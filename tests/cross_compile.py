"""Compile the kernels for a GPU that this machine need not have, and print what they take of it.

``python -m tests.cross_compile 90`` prints one JSON object a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from multialign.ops import _triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """Names a GPU to compile for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def usage(kernel):
    """Return the registers of a thread, and the bytes of stack to which it spills others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert {"REG", "STACK", "LOCAL"} <= found.keys(), text
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def zeros(*shape, dtype):
    return torch.zeros(1, *shape, dtype=dtype)


def matmul(dtype, size):
    _triton.log_matmul(zeros(size, size, dtype=dtype), zeros(size, size, dtype=dtype))


def reduce(dtype, size, transposed=False):
    """Call the kernel, on transposed tables too, as a sweep does."""
    tables = [zeros(size, size, dtype=dtype) for _ in range(3)]
    _triton.log_matmul_reduce(*[table.mT if transposed else table for table in tables])


def matvec(dtype, size, transposed=False):
    table = zeros(size, size, dtype=dtype)
    _triton.log_matvec(table.mT if transposed else table, zeros(size, dtype=dtype))


def matvec_points(dtype, size):
    points = [zeros(size, 3, dtype=dtype) for _ in range(2)]
    _triton.log_matvec_points(*points, zeros(size, dtype=dtype), torch.ones(1, dtype=dtype))


def gaussian(dtype, size, depth):
    x, p = zeros(size, depth, dtype=dtype), zeros(size, dtype=dtype)
    _triton.gaussian_form(x, x, p, p, torch.ones(1, 1, dtype=dtype), False, False)


def small(dtype, size, count, full=False):
    scopes = [tuple(range(count))] if full else list(combinations(range(count), 2))
    costs = [zeros(*[size] * len(scope), dtype=dtype) for scope in scopes]
    marginals = [zeros(size, dtype=dtype) for _ in range(count)]
    _triton.solve_small(costs, scopes, marginals, torch.ones(1, dtype=dtype), 1e-4, 100)


SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
CASES = {
    "matmul 7": (matmul, SINGLE, 7),
    "matmul 1024": (matmul, SINGLE, 1024),
    "matmul 4096": (matmul, SINGLE, 4096),
    "matmul 4095": (matmul, SINGLE, 4095),
    "matmul 4096 bfloat16": (matmul, HALF, 4096),
    "matmul 7 float64": (matmul, DOUBLE, 7),
    "matmul 1024 float64": (matmul, DOUBLE, 1024),
    "reduce 4096": (reduce, SINGLE, 4096),
    "reduce 4096 transposed": (reduce, SINGLE, 4096, True),
    "reduce 1024 float64": (reduce, DOUBLE, 1024),
    "matvec 4096": (matvec, SINGLE, 4096),
    "matvec 4096 float64": (matvec, DOUBLE, 4096),
    "matvec 4096 transposed": (matvec, SINGLE, 4096, True),
    "matvec 4096 transposed float64": (matvec, DOUBLE, 4096, True),
    "matvec points 4096": (matvec_points, SINGLE, 4096),
    "matvec points 4096 float64": (matvec_points, DOUBLE, 4096),
    "gaussian 300, D = 5": (gaussian, SINGLE, 300, 5),
    "gaussian 5000, D = 64": (gaussian, SINGLE, 5000, 64),
    "gaussian 5000, D = 300": (gaussian, SINGLE, 5000, 300),
    "solve 7, M = 2": (small, SINGLE, 7, 2),
    "solve 7, M = 3": (small, SINGLE, 7, 3),
    "solve 7, M = 3, float64": (small, DOUBLE, 7, 3),
    "solve 7, M = 4": (small, SINGLE, 7, 4),
    "solve 7, M = 4, full cost": (small, SINGLE, 7, 4, True),
    "solve 16, M = 3": (small, SINGLE, 16, 3),
    "solve 32, M = 3": (small, SINGLE, 32, 3),
    "solve 32, M = 3, float64": (small, DOUBLE, 32, 3),
    "solve 32, M = 4": (small, SINGLE, 32, 4),
    "solve 32, M = 4, full cost": (small, SINGLE, 32, 4, True),
}


def main(capability):
    torch.set_num_threads(1)
    driver.set_active(Driver(capability))
    launch = JITFunction.run
    compiled = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    for case, (build, *arguments) in CASES.items():
        compiled.clear()
        build(*arguments)
        for name, kernel in compiled:
            found = {
                "case": case,
                "kernel": name,
                **usage(kernel),
                "shared": kernel.metadata.shared,
                "tensor_cores": bool(re.search(r"\b(wgmma|mma\.sync)", kernel.asm["ptx"])),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
