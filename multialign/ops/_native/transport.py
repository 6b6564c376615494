"""Calls of the core's transport solver."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign.ops._native.library import native_function

__all__ = ["BLANK", "LEFT", "Outputs", "fits", "read_gradients", "solve"]

# As in problem.h.
_MAX_VARIABLES = 8
_MAX_PAIRS = _MAX_VARIABLES * (_MAX_VARIABLES - 1) // 2
# What the core solves in less time than torch: up to this many entries of a plan that it holds, or
# atoms of each of three marginals whose plan it does not.
_ENTRIES = 2**18
_TRIANGLE_ATOMS = 256
_ATOMS = 1024
# A thread is worth its start from this many entries.
_ENTRIES_PER_THREAD = 2**15

_Pairs = ctypes.c_void_p * _MAX_PAIRS
_Blocks = ctypes.c_void_p * _MAX_VARIABLES
# The status of a problem that the core has left, and what is added to that of one with a marginal
# without mass.
LEFT = 2
BLANK = 4


class _Call(ctypes.Structure):
    """`Call` of arguments.h."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64 * _MAX_VARIABLES),
        ("cost", _Pairs),
        ("full", ctypes.c_void_p),
        ("marginal", _Blocks),
        ("epsilon", ctypes.c_void_p),
        ("rho", _Blocks),
        ("single", ctypes.c_int64),
        ("prepared", ctypes.c_int64),
        ("by_sweeps", ctypes.c_int64),
        ("symmetric", ctypes.c_int64),
        ("max_iterations", ctypes.c_int64),
        ("tolerance", ctypes.c_double),
        ("potentials", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("transport_cost", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("iterations", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("marginal_gradient", ctypes.c_void_p),
        ("pairs", _Pairs),
        ("candidate", ctypes.c_void_p),
    ]


class _Weights(ctypes.Structure):
    """`Weights` of gradients.h."""

    _fields_ = [
        ("pairs", _Pairs),
        ("transport_cost", ctypes.c_void_p),
        ("cost", _Pairs),
        ("marginal", ctypes.c_void_p),
        ("epsilon", ctypes.c_void_p),
    ]


class Outputs(NamedTuple):
    """Where the core writes results: addresses, 0 for those not wanted; see `Call`."""

    potentials: int
    error: int
    iterations: int
    status: int
    offsets: int = 0
    value: int = 0
    transport_cost: int = 0
    marginal_gradient: int = 0
    pairs: Sequence[int] = ()


@cache
def fits(sizes: tuple[int, ...], has_full_table: bool) -> bool:
    """Return whether the core takes problems of these sizes, and is fast for them."""
    if native_function("transport") is None or len(sizes) > _MAX_VARIABLES:
        return False
    if sum(sizes) > _ATOMS:
        return False
    if len(sizes) == 3 and not has_full_table:
        return max(sizes) <= _TRIANGLE_ATOMS
    return math.prod(sizes) <= _ENTRIES


def solve(
    costs: Mapping[tuple[int, ...], Tensor],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    outputs: Outputs,
    *,
    tolerance: float,
    max_iterations: int,
    by_sweeps: bool,
    symmetric: bool = False,
    rho: Mapping[int, Tensor] | None = None,
    candidate: Tensor | None = None,
    prepared: bool = False,
) -> int:
    """Solve a batch of problems; see `Call` in arguments.h.

    All tensors are contiguous, with the batch first. Returns the largest status.
    """
    call = _make_call(costs, marginals, epsilon)
    call.tolerance, call.max_iterations, call.by_sweeps = tolerance, max_iterations, by_sweeps
    call.prepared, call.symmetric = prepared, symmetric
    for p, one in (rho or {}).items():
        call.rho[p] = one.data_ptr()
    call.potentials, call.error = outputs.potentials, outputs.error
    call.iterations, call.status = outputs.iterations, outputs.status
    call.offsets, call.value = outputs.offsets, outputs.value
    call.transport_cost = outputs.transport_cost
    call.marginal_gradient = outputs.marginal_gradient
    call.pairs[: len(outputs.pairs)] = outputs.pairs
    if candidate is not None:
        call.candidate = candidate.data_ptr()
    return _run("transport", call)


def read_gradients(
    costs: Mapping[tuple[int, ...], Tensor],
    marginals: Sequence[Tensor],
    epsilon: Tensor,
    potentials: Tensor,
    offsets: Tensor,
    by_cost: Tensor | None,
    by_pairs: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """Return gradients by costs, marginals and epsilon, given those by results.

    None where the core leaves a problem of the batch.
    """
    call, weights = _make_call(costs, marginals, epsilon), _Weights()
    call.potentials, call.offsets = potentials.data_ptr(), offsets.data_ptr()
    status = torch.empty(epsilon.shape, dtype=torch.int64)
    call.status = status.data_ptr()
    if by_cost is not None:
        weights.transport_cost = by_cost.data_ptr()
    for e, weight in enumerate(by_pairs):
        if weight is not None:
            weights.pairs[e] = weight.data_ptr()
    tables = [torch.empty(cost.shape, dtype=torch.float64) for cost in costs.values()]
    for edge, table in zip(costs, tables, strict=True):
        weights.cost[_places(len(marginals))[edge]] = table.data_ptr()
    by_marginals, by_epsilon = torch.empty_like(potentials), torch.empty_like(epsilon)
    weights.marginal, weights.epsilon = by_marginals.data_ptr(), by_epsilon.data_ptr()
    worst = _run("transport_backward", call, ctypes.byref(weights))
    return None if worst else (tables, by_marginals, by_epsilon)


@cache
def _places(count: int) -> dict[tuple[int, ...], int]:
    """Return the place of each pair of variables."""
    return {edge: e for e, edge in enumerate(combinations(range(count), 2))}


def _make_call(
    costs: Mapping[tuple[int, ...], Tensor], marginals: Sequence[Tensor], epsilon: Tensor
) -> _Call:
    call = _Call()
    call.batch, call.count = epsilon.numel(), len(marginals)
    call.single = marginals[0].dtype == torch.float32
    call.epsilon = epsilon.data_ptr()
    for p, marginal in enumerate(marginals):
        call.size[p] = marginal.shape[-1]
        call.marginal[p] = marginal.data_ptr()
    places = _places(len(marginals))
    for scope, cost in costs.items():
        if len(scope) == 2:
            call.cost[places[scope]] = cost.data_ptr()
        else:
            call.full = cost.data_ptr()
    return call


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="multialign")


def _run(name: str, call: _Call, *more: Any) -> int:
    """Solve the batch, in parts of whole problems on torch's number of threads."""
    function: Callable[..., int] = native_function(name)
    count, address = int(call.batch), ctypes.byref(call)
    threads = 1
    if count > 1:
        entries = count * math.prod(call.size[: call.count])
        threads = min(torch.get_num_threads(), count, entries // _ENTRIES_PER_THREAD)
    if threads < 2:
        return function(address, *more, ctypes.c_int64(0), ctypes.c_int64(count))
    ends = [count * n // threads for n in range(threads + 1)]
    tasks = [
        _executor(threads).submit(
            function, address, *more, ctypes.c_int64(begin), ctypes.c_int64(end)
        )
        for begin, end in pairwise(ends)
    ]
    return max(task.result() for task in tasks)
