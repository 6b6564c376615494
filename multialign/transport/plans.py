"""The forms that a plan may take, and which one is fastest."""

from __future__ import annotations

import math
from functools import partial

import torch

from multialign.transport.copies import Copies
from multialign.transport.elimination import Worker
from multialign.transport.pairwise import Pairwise
from multialign.transport.plan import Plan
from multialign.transport.problem import Problem
from multialign.transport.tables import Table, Vector
from multialign.transport.triangle import Triangle

__all__ = ["make_plan"]

# Up to this many multiplications for its Hessian a plan is kept whole, in a few operations a step.
_VECTOR_WORK = 2**18
# Up to this many entries it is kept as a table, which takes fewer operations than elimination.
_TABLE_ENTRIES = 2**15
# From this many entries products of matrices take less time than either.
_TRIANGLE_ENTRIES = 2**9
# From this many entries float32 is so much faster that it pays to begin with it.
_LARGE_ENTRIES = 2**19
# The edges of a triangle.
_TRIANGLE = ((0, 1), (0, 2), (1, 2))


def make_plan(problem: Problem, dtype: torch.dtype, backend: Worker = "torch") -> Plan:
    """Return the form of the plan that is fastest; `dtype` is that of large tables."""
    if problem.copies > 1:
        return Copies(problem, backend)
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    if entries * sum(problem.sizes) ** 2 <= _VECTOR_WORK:
        return Vector(problem)
    if entries < _LARGE_ENTRIES:
        dtype = torch.float64
    alike = len(problem.sizes) == 3 and len(set(problem.sizes)) == 1
    triangle = alike and set(problem.costs) == set(_TRIANGLE)
    in_logarithms = partial(_in_logarithms, problem, dtype, backend)
    if triangle and backend == "torch" and entries >= _TRIANGLE_ENTRIES:
        return Triangle(problem, dtype, in_logarithms)
    return in_logarithms()


def _in_logarithms(problem: Problem, dtype: torch.dtype, backend: Worker) -> Plan:
    """Return a form of the plan that is right at any range."""
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    if entries <= _TABLE_ENTRIES or any(len(scope) > 2 for scope in problem.costs):
        return Table(problem)
    return Pairwise(problem, dtype, backend)
