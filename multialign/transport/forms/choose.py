"""Which form of a plan is fastest."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch

from multialign.ops import Implementation, multiplies_float64_fast
from multialign.transport.forms.base import Form
from multialign.transport.forms.copies import Copies, ThreeCopies
from multialign.transport.forms.dense import Table, Vector
from multialign.transport.forms.guarded import Guarded
from multialign.transport.forms.pairwise import Pairwise
from multialign.transport.forms.triangle import Triangle
from multialign.transport.problem import Problem

__all__ = ["FormName", "make_form"]

FormName = Literal["auto", "vector", "table", "pairwise", "triangle"]

# Up to this many multiplications for its Hessian a plan is a vector: fewest operations a step.
_VECTOR_WORK = 2**18
# Up to this many entries it is a table, which takes fewer operations than elimination.
_TABLE_ENTRIES = 2**15
# From this many entries products of matrices take less time than either.
_TRIANGLE_ENTRIES = 2**9
# From this many entries float32 is enough faster to begin with it.
_LARGE_ENTRIES = 2**19
# The edges of a triangle.
_TRIANGLE = ((0, 1), (0, 2), (1, 2))


def make_form(
    problem: Problem, dtype: torch.dtype, backend: Implementation, name: FormName = "auto"
) -> Form:
    """Return a form of the plan, for "auto" the fastest; `dtype` is that of large tables."""
    plain = backend == "torch" or multiplies_float64_fast(problem.epsilon.device)
    if problem.copies > 1:
        if problem.copies == 3 and plain:
            return Guarded(ThreeCopies(problem), partial(Copies, problem, backend))
        return Copies(problem, backend)
    entries = math.prod(problem.sizes) * problem.epsilon.numel()
    if name == "auto":
        name = _fastest(problem, entries, plain)
        if entries < _LARGE_ENTRIES:
            dtype = torch.float64
    if name == "vector":
        return Vector(problem)
    if name == "table" or any(len(scope) > 2 for scope in problem.costs):
        return Table(problem)
    if name == "triangle":
        if backend == "triton":
            dtype = torch.float64  # torch may be told not to multiply exactly in float32
        safe: FormName = "table" if entries <= _TABLE_ENTRIES else "pairwise"
        return Guarded(Triangle(problem, dtype), partial(make_form, problem, dtype, backend, safe))
    return Pairwise(problem, dtype, backend)


def _fastest(problem: Problem, entries: int, plain: bool) -> FormName:
    """Return the fastest form; `plain` says whether plain products of matrices are fast."""
    sizes = problem.sizes
    if entries * sum(sizes) ** 2 <= _VECTOR_WORK:
        return "vector"
    if any(len(scope) > 2 for scope in problem.costs):
        return "table"
    if problem.forbidden or problem.relaxed:
        return "table" if entries <= _TABLE_ENTRIES else "pairwise"
    alike = len(sizes) == 3 and len(set(sizes)) == 1 and set(problem.costs) == set(_TRIANGLE)
    if alike and plain and entries >= _TRIANGLE_ENTRIES:
        return "triangle"
    return "table" if entries <= _TABLE_ENTRIES else "pairwise"
