"""What in the inputs of a loss would make it NaN, zero or stuck, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multialign._validation import check_samples

__all__ = ["diagnose"]

# So many indices are written out.
_SHOWN = 5
# Pairs of samples are looked at among this many of a modality.
_MOST_ROWS = 2048
# Scales of modalities that differ by this factor are worth a line.
_UNLIKE = 100.0
# A scale this large, or its inverse, is worth a line.
_LARGE = 1e4
# Features spread this unlike within a modality are worth a line.
_UNLIKE_FEATURES = 1e4
# Means this many deviations apart leave a Gaussian kernel no gradient.
_FAR = 10.0
# At this distance a Gaussian kernel of bandwidth 1 is 1e-6.
_FAR_FROM_1 = 5.26
# Fewer samples a modality than this are too few for covariances and mixtures.
_FEW = 4


def diagnose(
    features: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
) -> str:
    r"""Say in words what in these inputs would make a loss NaN, zero or stuck.

    It looks for values that are not finite, negative and missing weights, modalities without
    samples, constant features, equal samples, and scales that differ: by :math:`s_m`, the root mean
    square deviation of a feature of modality m from its mean, with

    .. math:: s_m^2 = \frac{1}{D} \sum_n p_n \|x_n - \bar x\|^2

    Each line names the modality, the rows (of the flattened batch) and the features, and what this
    does to which loss. It reads values, and so waits for a GPU; the losses never call it.

    Args:
        features: M tensors :math:`(*\text{batch}, N_m, D)`, or one stacked tensor.
        weights: None, or M tensors :math:`(*\text{batch}, N_m)` (or None), boolean or
            non-negative; rows of weight 0 are absent and are not looked at.

    Returns:
        A line for each finding, or one that says that there is none.

    Raises:
        ValueError: A shape or device is wrong.
        TypeError: An argument is no floating-point tensor, or dtypes differ.

    Example:
        >>> import torch
        >>> from multialign import diagnose
        >>> x, y = torch.randn(8, 3), torch.randn(6, 3)
        >>> y[1, 0] = torch.nan
        >>> print(diagnose([x, y]))
        features[1]: not finite in 1 of 6 rows (1), in features 0. Every loss is NaN or infinite.
    """
    tensors, checked = check_samples(features, weights)
    lines: list[str] = []
    scales: dict[int, float] = {}
    centres: dict[int, Tensor] = {}
    with torch.no_grad():
        for m, (x, weight) in enumerate(zip(tensors, checked, strict=True)):
            rows = x.detach().reshape(-1, x.shape[-1]).double()
            mass = None if weight is None else weight.detach().reshape(-1).double()
            lines += _weights(m, mass)
            present = torch.ones(len(rows), dtype=torch.bool, device=x.device)
            if mass is not None:
                present = mass != 0  # NaN, which stands for negative, is present
            lines += _absent(m, x, weight)
            lines += _not_finite(m, rows, present)
            good = present & rows.isfinite().all(-1)
            if int(good.sum()) == 0:
                continue
            chosen = rows[good]
            share = torch.ones_like(chosen[:, 0]) if mass is None else mass[good].nan_to_num(0.0)
            share = share / share.sum().clamp_min(1e-300)
            centres[m] = share @ chosen
            deviations = (share @ (chosen - centres[m]).square()).sqrt()
            scales[m] = float(deviations.square().mean().sqrt())
            lines += _spread(m, chosen, deviations)
            lines += _equal(m, chosen, good.nonzero().flatten())
        lines += _together(scales, centres)
    return "\n".join(lines) or "Nothing found: all values are finite, and the scales are alike."


def _list(indices: Tensor) -> str:
    """Write the first of some indices."""
    shown = ", ".join(str(i) for i in indices[:_SHOWN].tolist())
    return shown + (", ..." if len(indices) > _SHOWN else "")


def _weights(m: int, mass: Tensor | None) -> list[str]:
    if mass is None:
        return []
    bad = mass.isnan().nonzero().flatten()
    lines = []
    if len(bad):
        lines.append(
            f"weights[{m}]: negative or NaN at {len(bad)} of {len(mass)} rows ({_list(bad)}). "
            "Every loss is NaN."
        )
    infinite = mass.isinf().nonzero().flatten()
    if len(infinite):
        lines.append(
            f"weights[{m}]: infinite at {len(infinite)} of {len(mass)} rows ({_list(infinite)}). "
            "Every loss is NaN."
        )
    return lines


def _absent(m: int, x: Tensor, weight: Tensor | None) -> list[str]:
    """Say in which problems the modality has no or few samples."""
    count = x.shape[-2]
    if weight is None:
        there = torch.full(x.shape[:-2], count).flatten()
    else:
        there = (weight != 0).sum(-1).flatten().cpu()
    problems = f" in {{}} of {len(there)} problems" if x.ndim > 2 else ""
    lines = []
    none = int((there == 0).sum())
    if none:
        lines.append(
            f"features[{m}]: no sample is present{problems.format(none)} (weights of 0, or N = 0). "
            "The terms of every loss that need it are 0 there, without gradient."
        )
    single = int((there == 1).sum())
    if single:
        lines.append(
            f"features[{m}]: one sample alone{problems.format(single)}. gaussian_moment_loss sees "
            'no covariance, and the "unbiased" mmd_loss leaves the modality out.'
        )
    few = int(((there > 1) & (there < _FEW)).sum())
    if few:
        lines.append(
            f"features[{m}]: fewer than {_FEW} samples{problems.format(few)}. The mixtures of "
            "prototype_alignment_loss have components that share samples."
        )
    return lines


def _not_finite(m: int, rows: Tensor, present: Tensor) -> list[str]:
    bad = ~rows.isfinite() & present.unsqueeze(-1)
    where = bad.any(-1).nonzero().flatten()
    if not len(where):
        return []
    columns = bad.any(0).nonzero().flatten()
    return [
        f"features[{m}]: not finite in {len(where)} of {len(rows)} rows ({_list(where)}), in "
        f"features {_list(columns)}. Every loss is NaN or infinite."
    ]


def _spread(m: int, rows: Tensor, deviations: Tensor) -> list[str]:
    if len(rows) < 2:
        return []
    # Up to the rounding of equal values.
    level = 1e-12 * rows.abs().amax(0).clamp_min(1e-300)
    constant = (rows.amax(0) - rows.amin(0)) <= level
    columns = constant.nonzero().flatten()
    if len(columns) == rows.shape[-1]:
        return [
            f"features[{m}]: all {len(rows)} samples are equal. Covariances and skewness are 0, "
            "and a mixture has all its components in one place: an encoder may have collapsed."
        ]
    lines = []
    if len(columns):
        lines.append(
            f"features[{m}]: constant in features {_list(columns)}. Their skewness is 0; "
            "gaussian_moment_loss may be large where another modality varies there, and "
            "fit_gaussian_mixture with regularization=0 is NaN."
        )
    varying = deviations[~constant]
    if float(varying.max() / varying.min()) > _UNLIKE_FEATURES:
        widest, narrowest = (
            int(deviations.argmax()),
            int(torch.where(constant, torch.inf, deviations).argmin()),
        )
        lines.append(
            f"features[{m}]: feature {widest} varies by {float(deviations[widest]):.2g}, feature "
            f"{narrowest} by {float(deviations[narrowest]):.2g}. Distances, with them mmd_loss, "
            "multi_marginal_sinkhorn_loss and prototype_alignment_loss, see the widest alone; "
            "normalise the features."
        )
    return lines


def _equal(m: int, rows: Tensor, index: Tensor) -> list[str]:
    if not 2 <= len(rows) <= _MOST_ROWS:
        return []
    _, inverse = rows.unique(dim=0, return_inverse=True)
    distinct = int(inverse.max()) + 1
    if distinct in (1, len(rows)):
        return []
    first = torch.full((distinct,), len(rows), device=rows.device).scatter_reduce(
        0, inverse, torch.arange(len(rows), device=rows.device), "amin"
    )
    repeated = index[first[inverse] != torch.arange(len(rows), device=rows.device)]
    return [
        f"features[{m}]: {len(repeated)} of {len(rows)} rows repeat an earlier one "
        f"({_list(repeated)}). A mixture of more than {distinct} components has equal ones; "
        "padding should have weight 0."
    ]


def _together(scales: dict[int, float], centres: dict[int, Tensor]) -> list[str]:
    lines = []
    positive = {m: scale for m, scale in scales.items() if scale > 0}
    if len(positive) > 1:
        low, high = min(positive, key=positive.__getitem__), max(positive, key=positive.__getitem__)
        if positive[high] > _UNLIKE * positive[low]:
            lines.append(
                f"features[{high}] has a scale of {positive[high]:.2g}, features[{low}] one of "
                f"{positive[low]:.2g}. The losses are ruled by the wider one, "
                "gaussian_moment_loss by the fourth power of it; normalise both."
            )
        typical = sum(positive.values()) / len(positive)
        dim = len(next(iter(centres.values())))
        far = [
            (i, j, float((centres[i] - centres[j]).norm()))
            for i in centres
            for j in centres
            if i < j and float((centres[i] - centres[j]).norm()) > _FAR * typical * dim**0.5
        ]
        lines += [
            f"features[{i}] and features[{j}] are {distance:.2g} apart, each at a scale of "
            f"{typical:.2g}. mmd_loss has no gradient with a bandwidth of that scale, which "
            '"median" may be; give it the distance as bandwidth, or take gaussian_moment_loss or '
            "multi_marginal_sinkhorn_loss."
            for i, j, distance in far
        ]
        least, most = min(positive.values()), max(positive.values())
        if most > _LARGE or least < 1 / _LARGE:
            lines.append(
                f"Scales are {least:.2g} to {most:.2g}. Losses that are not "
                "dimensionless grow with the square (gaussian_moment_loss: the fourth power) of "
                "the scale; fixed bandwidths and epsilon have to fit it."
            )
        dim_scale = typical * (2 * dim) ** 0.5
        if dim_scale > _FAR_FROM_1:
            lines.append(
                f"Two samples are typically {dim_scale:.2g} apart. mmd_loss with bandwidth=1.0 has "
                "no gradient there."
            )
    return lines
