"""Mixtures along the axes in the compiled core: whole fits, and costs between their components.

The definition of what they compute is `multialign.mixture` and `multialign.costs`, in torch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multialign.ops._native.library import native_function
from multialign.ops.operators import (
    apply_function,
    operator,
    register_fake,
    register_leading_vmap,
)

__all__ = ["AxesFit", "FitSettings", "core_fits", "fit_axes", "pair_terms"]

# Samples of up to so many entries N D stay in the second cache, with all that the core makes of
# them. Measured with 5 steps: faster than torch at 64,000 (N = 1,000), no more so at 256,000.
_MOST_ENTRIES = 2**16
_USE_CORE = native_function("fit") is not None


class FitSettings(NamedTuple):
    """Options of a fit along the axes; see :func:`fit_gaussian_mixture`."""

    spherical: bool
    differentiate: str
    iterations: int
    """0: the samples are only attributed to the components of a start, of whatever variance."""
    regularization: float
    tolerance: float


class AxesFit(NamedTuple):
    """Mixtures of M modalities, and moments of their samples."""

    weights: list[Tensor]
    """`(*batch, K_m)`."""
    means: list[Tensor]
    """`(*batch, K_m, D)`."""
    covariances: list[Tensor]
    """`(*batch, K_m, D)`, or `(*batch, K_m)` for spherical ones."""
    moments: Tensor
    """Posterior moments `(*batch, sum K, D + 2)` in float64: mass, scatter and mean of each."""
    report: Tensor
    """`(*batch, M, 3)` in float64: iterations, 1 if it converged, log-likelihood."""


def core_fits(features: Sequence[Tensor]) -> bool:
    """Return whether the core takes these samples `(*batch, N, D)`, and is faster than torch."""
    return _USE_CORE and all(
        x.device.type == "cpu" and 0 < x.shape[-2] * x.shape[-1] <= _MOST_ENTRIES for x in features
    )


def fit_axes(
    features: Sequence[Tensor],
    masses: Sequence[Tensor],
    origins: Sequence[Tensor],
    starts: Sequence[Tensor],
    draws: tuple[Sequence[Tensor], Sequence[Tensor]],
    counts: Sequence[int],
    settings: FitSettings,
) -> AxesFit:
    """Fit a mixture to each of M modalities. It has first derivatives only.

    Args:
        features: M tensors `(*batch, N_m, D)`.
        masses: M tensors `(*batch, N_m)` of sum 1 or 0.
        origins: M present samples `(*batch, 1, D)`.
        starts: Weights, means and covariances of each modality, or nothing for seeds.
        draws: For seeds: a normal direction and uniform numbers for the modalities together, and
            those for each modality alone; either may be empty.
        counts: K of each modality.
        settings: Of the fit.
    """
    groups = [list(group) for group in (features, masses, origins, starts, *draws)]
    tensors = [x for group in groups for x in group]
    sizes = tuple(len(group) for group in groups)
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    steps = {"unroll": settings.iterations, "last": 1, "none": 0}[settings.differentiate]
    states = 2 + steps if needed else 2
    parts = apply_function(_Fit, sizes, tuple(counts), settings, states, *tensors)
    mixtures, m = parts[: 3 * len(counts)], len(counts)
    return AxesFit(
        list(mixtures[:m]), list(mixtures[m : 2 * m]), list(mixtures[2 * m :]), *parts[3 * m :][:2]
    )


def pair_terms(
    sets: Sequence[tuple[Tensor, Tensor]],
    moments: Tensor,
    present: Tensor,
    scale: float,
) -> tuple[list[Tensor], Tensor | None]:
    """Return Bures-Wasserstein costs of all pairs of mixtures, and the prototype term of Eq. 9.

    Args:
        sets: Means and variances of each mixture, `(*batch, K_m, D)`.
        moments: As in :class:`AxesFit`.
        present: Which modalities have samples, `(*batch, M)` in float64.
        scale: What multiplies all squared distances.

    Returns:
        Tables `(*batch, K_i, K_j)`, and the term `(*batch)` in float64, by the numbers of the
        components: None if modalities differ in K.
    """
    means, variances = zip(*sets, strict=True)
    parts = apply_function(_Pairs, len(means), scale, *means, *variances, moments, present)
    alike = len({x.shape[-2] for x in means}) == 1
    return list(parts[:-1]), parts[-1] if alike else None


class _Fit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        sizes: tuple[int, ...],
        counts: tuple[int, ...],
        settings: FitSettings,
        states: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        groups = _split(tensors, sizes)
        return tuple(torch.ops.multialign.fit_mixtures(*groups, counts, *settings, states))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, counts, settings, states = inputs[:4]
        ends = 3 * len(counts)
        constant = output[:ends] if settings.differentiate == "none" else ()
        ctx.mark_non_differentiable(*constant, *output[ends + 1 :])
        ctx.save_for_backward(*inputs[4 : 4 + sum(sizes[:4])], *output[ends + 1 :])
        ctx.options = sizes, counts, settings, states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes, counts, settings, states = ctx.options
        # Only a recorded derivative has a derivative to refuse.
        run = _FitBack.apply if torch.is_grad_enabled() else _FitBack.forward
        given = grads[: 3 * len(counts) + 1]
        parts = run(
            (*sizes[:4], 3, len(given)), counts, settings, states, *ctx.saved_tensors, *given
        )
        m = len(counts)
        nothing = [None] * sizes[2], [None] * sum(sizes[4:])
        return (None,) * 4 + (*parts[: 2 * m], *nothing[0], *parts[2 * m :], *nothing[1])


class _FitBack(torch.autograd.Function):
    """The first derivative. It refuses the second, which would be wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        sizes: tuple[int, ...],
        counts: tuple[int, ...],
        settings: FitSettings,
        states: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        groups = _split(tensors, sizes)
        return tuple(torch.ops.multialign.fit_mixtures_back(*groups, counts, *settings, states))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            'EM for covariance_type="diag" and "spherical" has first derivatives only; '
            "regularization below 1e-07 takes a slower path that has them all"
        )


class _Pairs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, scale: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        groups = _split(tensors, (count, count, 1, 1))
        return tuple(torch.ops.multialign.mixture_pairs(*groups[:2], *tensors[-2:], scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.options = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = _PairsBack.apply if torch.is_grad_enabled() else _PairsBack.forward
        return (None, None, *run(*ctx.options, *ctx.saved_tensors, *grads), None)


class _PairsBack(torch.autograd.Function):
    """The first derivative. It refuses the second: what comes before has none either."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, scale: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        groups = _split(tensors, (count, count, 2, len(tensors) - 2 * count - 2))
        return tuple(
            torch.ops.multialign.mixture_pairs_back(*groups[:2], *groups[2], scale, groups[3])
        )

    setup_context = _FitBack.setup_context
    backward = _FitBack.backward


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Return the tensors in groups of these sizes."""
    groups, start = [], 0
    for size in sizes:
        groups.append(list(tensors[start : start + size]))
        start += size
    return groups


# -- Operators ------------------------------------------------------------------------------------

_SETTINGS = (
    "int[] counts, bool spherical, str differentiate, int iterations, float regularization, "
    "float tolerance, int states"
)
_SAMPLES = "Tensor[] features, Tensor[] masses, Tensor[] origins, Tensor[] starts"
_PAIRS = "Tensor[] means, Tensor[] variances, Tensor moments, Tensor present, float scale"


def _structure(name: str, fields: str) -> Any:
    """Return a structure of C: integers, numbers (with #) and pointers (with *)."""
    kinds = {"*": ctypes.c_void_p, "#": ctypes.c_double}
    entries = [(f.strip("*#"), kinds.get(f[0], ctypes.c_int64)) for f in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": entries})


# As in mixture.h and prototypes.h.
_FitArguments = _structure(
    "_FitArguments",
    "single spherical differentiate iterations states batch modalities dim *rows *counts "
    "#regularization #tolerance *features *masses *origins *starts *paired *own *mixtures "
    "*moments *report *seeds *history",
)
_PairsArguments = _structure(
    "_PairsArguments",
    "single batch modalities dim *counts #scale *means *variances *moments *present *costs *term",
)


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """Return an array of the addresses of contiguous tensors; None if there are none."""
    if not tensors:
        return None
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def _address(array: Any) -> int | None:
    return None if array is None else ctypes.addressof(array)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _call(name: str, arguments: Any, *others: Any) -> None:
    """Call a function of the core."""
    function = native_function(name)
    if not function(ctypes.byref(arguments), *others):
        raise MemoryError("there is no memory for the scratch of a fit")


def _call_fit(
    name: str,
    samples: Sequence[Sequence[Tensor]],
    draws: Sequence[Sequence[Tensor]],
    results: Sequence[Tensor],
    settings: Sequence[Any],
    *others: Any,
) -> None:
    counts, spherical, differentiate, iterations, regularization, tolerance, states = settings
    first, m = samples[0][0], len(counts)
    inputs = [_contiguous(group) for group in (*samples, *draws)]
    # Modality by modality: weights, means and covariances.
    mixtures = [results[i * m + j] for j in range(m) for i in range(3)]
    arrays = [_pointers(group) for group in (*inputs, mixtures)]
    rows = (ctypes.c_int64 * m)(*[x.shape[-2] for x in samples[0]])
    numbers = (ctypes.c_int64 * m)(*counts)
    arguments = _FitArguments(
        first.dtype == torch.float32,
        spherical,
        ("none", "last", "unroll").index(differentiate),
        iterations,
        states,
        math.prod(first.shape[:-2]),
        m,
        first.shape[-1],
        ctypes.addressof(rows),
        ctypes.addressof(numbers),
        regularization,
        tolerance,
        *map(_address, arrays),
        *[x.data_ptr() for x in results[3 * m :]],
    )
    _call(name, arguments, *others)


def _new_fit(
    features: list[Tensor],
    masses: list[Tensor],
    origins: list[Tensor],
    starts: list[Tensor],
    paired: list[Tensor],
    own: list[Tensor],
    counts: list[int],
    spherical: bool,
    differentiate: str,
    iterations: int,
    regularization: float,
    tolerance: float,
    states: int,
) -> list[Tensor]:
    """Return tensors for the results of a fit."""
    new, (*batch, _, dim), wide = features[0].new_empty, features[0].shape, torch.float64
    total = sum(counts)
    return [
        *[new((*batch, k)) for k in counts],
        *[new((*batch, k, dim)) for k in counts],
        *[new((*batch, k) if spherical else (*batch, k, dim)) for k in counts],
        new((*batch, total, dim + 2), dtype=wide),
        new((*batch, len(counts), 3), dtype=wide),
        new((*batch, total), dtype=torch.int64),
        new((*batch, states * total * (1 + 2 * dim)), dtype=wide),
    ]


def _run_fit(*arguments: Any) -> list[Tensor]:
    results = _new_fit(*arguments)
    _call_fit("fit", arguments[:4], arguments[4:6], results, arguments[6:])
    return results


def _new_derivatives(
    features: list[Tensor],
    masses: list[Tensor],
    origins: list[Tensor],
    starts: list[Tensor],
    *others: Any,
) -> list[Tensor]:
    """Return tensors for the derivatives of a fit."""
    tensors = (*features, *masses, *starts)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _run_fit_back(*arguments: Any) -> list[Tensor]:
    results = _new_derivatives(*arguments)
    saved, grads = _contiguous(arguments[4]), _contiguous(arguments[5])
    m = len(arguments[0])
    groups = results[:m], results[m : 2 * m], results[2 * m :]
    arrays = [_pointers(group) for group in groups]
    _call_fit("fit_back", arguments[:4], ([], []), [*grads, *saved], arguments[6:], *arrays)
    return results


def _new_pairs(
    means: list[Tensor], variances: list[Tensor], moments: Tensor, present: Tensor, scale: float
) -> list[Tensor]:
    """Return tensors for costs and the term."""
    batch = means[0].shape[:-2]
    costs = [
        means[0].new_empty((*batch, x.shape[-2], y.shape[-2])) for x, y in combinations(means, 2)
    ]
    return [*costs, moments.new_empty(batch)]


def _call_pairs(
    name: str,
    mixtures: Sequence[Sequence[Tensor]],
    others: Sequence[Tensor],
    scale: float,
    results: Sequence[Tensor],
    *derivatives: Any,
) -> None:
    first, sizes = mixtures[0][0], [x.shape[-2] for x in mixtures[0]]
    inputs = [_contiguous(group) for group in (*mixtures, others, results)]
    counts = (ctypes.c_int64 * len(sizes))(*sizes)
    arrays = [_pointers(group) for group in (*inputs[:2], inputs[3][:-1])]
    arguments = _PairsArguments(
        first.dtype == torch.float32,
        math.prod(first.shape[:-2]),
        len(sizes),
        first.shape[-1],
        ctypes.addressof(counts),
        scale,
        _address(arrays[0]),
        _address(arrays[1]),
        *[x.data_ptr() for x in inputs[2]],
        _address(arrays[2]),
        inputs[3][-1].data_ptr() if len(set(sizes)) == 1 else None,
    )
    _call(name, arguments, *derivatives)


def _run_pairs(
    means: list[Tensor], variances: list[Tensor], moments: Tensor, present: Tensor, scale: float
) -> list[Tensor]:
    results = _new_pairs(means, variances, moments, present, scale)
    _call_pairs("pairs", (means, variances), (moments, present), scale, results)
    return results


def _new_pairs_back(
    means: list[Tensor], variances: list[Tensor], moments: Tensor, *others: Any
) -> list[Tensor]:
    """Return tensors for the derivatives by mixtures and moments."""
    layout = torch.contiguous_format
    mixtures = [torch.empty_like(x, memory_format=layout) for x in (*means, *variances)]
    return [*mixtures, torch.zeros_like(moments, memory_format=layout)]


def _run_pairs_back(
    means: list[Tensor],
    variances: list[Tensor],
    moments: Tensor,
    present: Tensor,
    scale: float,
    grads: list[Tensor],
) -> list[Tensor]:
    results, m = _new_pairs_back(means, variances, moments), len(means)
    arrays = _pointers(results[:m]), _pointers(results[m : 2 * m])
    address = ctypes.c_void_p(results[-1].data_ptr())
    _call_pairs(
        "pairs_back", (means, variances), (moments, present), scale, grads, *arrays, address
    )
    return results


for _schema, _run, _fake in (
    (f"fit_mixtures({_SAMPLES}, Tensor[] paired, Tensor[] own, {_SETTINGS})", _run_fit, _new_fit),
    (
        f"fit_mixtures_back({_SAMPLES}, Tensor[] saved, Tensor[] grads, {_SETTINGS})",
        _run_fit_back,
        _new_derivatives,
    ),
    (f"mixture_pairs({_PAIRS})", _run_pairs, _new_pairs),
    (f"mixture_pairs_back({_PAIRS}, Tensor[] grads)", _run_pairs_back, _new_pairs_back),
):
    _operator = operator(f"{_schema} -> Tensor[]", "CPU")(_run)
    register_fake(_operator)(_fake)
    register_leading_vmap(_operator)
