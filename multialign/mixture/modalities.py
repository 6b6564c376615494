"""The fit of M modalities at once: standardise, draw seeds, run EM, convert back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from multialign._samples import Samples, pad_rows
from multialign.mixture.distribution import GaussianMixture, as_mixture, parameters_of
from multialign.mixture.em import fit_standard, fit_with_posterior, posterior_moments
from multialign.mixture.options import FitOptions
from multialign.mixture.parameters import (
    Parameters,
    PosteriorMoments,
    stack_modalities,
    unstack_modalities,
    with_matrices,
)
from multialign.mixture.seeds import draw_means, start_parameters
from multialign.mixture.units import (
    from_standard,
    moments_from_standard,
    standardise,
    to_standard,
)

__all__ = ["Modalities"]

_Fields = TypeVar("_Fields", bound=tuple[Tensor, ...])


class Modalities:
    """The samples of M modalities, standardised, and the mixtures fitted to them.

    Modalities with equal N and equal K are one batch of problems, stacked along a first dimension;
    otherwise each is fitted alone. Over several ranks equal K is enough: N may be equal on one rank
    and not on another, and all ranks must take part in the same collectives.

    Args:
        samples: The samples.
        counts: K for each modality.
        options: Of the fit.
    """

    def __init__(self, samples: Samples, counts: Sequence[int], options: FitOptions) -> None:
        self.samples = samples
        self._counts, self._options = counts, options
        self._sizes = [x.shape[-2] for x in samples.features]
        self._dtype = samples.features[0].dtype
        ranks, every = options.ranks, range(len(counts))
        equal_sizes = len(set(self._sizes)) == 1 or ranks.group is not None
        together = len(set(counts)) == 1 and equal_sizes
        self._stacks = [list(every)] if together else [[m] for m in every]
        # EM takes at least one row.
        padded = pad_rows(samples, max(1, *self._sizes) if together else 1)
        self._data = standardise(
            self._stack_tensors(padded.features),
            self._stack_tensors(padded.masses),
            padded.origins.unbind(0) if len(self._stacks) == len(counts) else [padded.origins],
            options.regularization,
            ranks,
        )

    def fit(self, starts: Sequence[GaussianMixture | None] | None = None) -> list[GaussianMixture]:
        """Return the mixture of each modality after EM, from `starts` where there are any."""
        with torch.set_grad_enabled(self._options.grad):
            begin = self._begin(starts)
            fitted = [
                fit_standard(data, start, self._options)
                for data, start in zip(self._data, begin, strict=True)
            ]
        return self._mixtures(fitted)

    def fit_with_posterior(self) -> tuple[list[GaussianMixture], list[PosteriorMoments]]:
        """Return the mixtures after all iterations, and the posterior moments under them."""
        with torch.set_grad_enabled(self._options.grad):
            begin = self._begin(None)
        pairs = [
            fit_with_posterior(data, start, self._options)
            for data, start in zip(self._data, begin, strict=True)
        ]
        return self._mixtures(pair[0] for pair in pairs), self._moments(pair[1] for pair in pairs)

    def posterior_moments(self, mixtures: Sequence[GaussianMixture]) -> list[PosteriorMoments]:
        """Return the posterior moments of the samples under given mixtures."""
        return self._moments(
            posterior_moments(data, mixture, self._options)
            for data, mixture in zip(
                self._data, self._to_standard([parameters_of(m) for m in mixtures]), strict=True
            )
        )

    def _begin(self, starts: Sequence[GaussianMixture | None] | None) -> list[Parameters]:
        """Return the standardised mixtures that EM starts from, seeds where none is given."""
        given = [
            None if start is None else parameters_of(start)
            for start in starts or [None] * len(self._counts)
        ]
        known = [start for start in given if start is not None]
        if len(known) == len(given):
            return self._to_standard(known)
        seeds = self._seeds()
        if not known:
            return seeds
        seeds = [with_matrices(seed, self._options.covariance_type) for seed in seeds]
        return self._to_standard(
            [
                seed if start is None else start
                for seed, start in zip(self._from_standard(seeds), given, strict=True)
            ]
        )

    def _seeds(self) -> list[Parameters]:
        means = draw_means(
            self._data,
            self._stacks,
            self._sizes,
            self._counts,
            self.samples.weighted,
            self._options,
        )
        return [
            start_parameters(mean, data, self._options.covariance_type)
            for mean, data in zip(means, self._data, strict=True)
        ]

    def _to_standard(self, parameters: Sequence[Parameters]) -> list[Parameters]:
        fields = [self._stack_tensors(field) for field in zip(*parameters, strict=True)]
        return [
            to_standard(Parameters(*part), data)
            for *part, data in zip(*fields, self._data, strict=True)
        ]

    def _from_standard(self, parameters: Iterable[Parameters]) -> list[Parameters]:
        return self._unstack(
            [
                from_standard(part, data, self._dtype)
                for part, data in zip(parameters, self._data, strict=True)
            ]
        )

    def _mixtures(self, parameters: Iterable[Parameters]) -> list[GaussianMixture]:
        """Return the mixtures of standardised parameters, in the units of the samples."""
        covariance_type = self._options.covariance_type
        return [as_mixture(part, covariance_type) for part in self._from_standard(parameters)]

    def _moments(self, moments: Iterable[PosteriorMoments]) -> list[PosteriorMoments]:
        """Return standardised moments in the units of the samples."""
        return self._unstack(
            [
                moments_from_standard(part, data)
                for part, data in zip(moments, self._data, strict=True)
            ]
        )

    def _stack_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [stack_modalities([tensors[m] for m in stack]) for stack in self._stacks]

    def _unstack(self, records: Sequence[_Fields]) -> list[_Fields]:
        """Return a tuple of tensors for each modality from one for each stack."""
        return [
            type(record)(*fields)
            for record, stack in zip(records, self._stacks, strict=True)
            for fields in zip(*(unstack_modalities(x, len(stack)) for x in record), strict=True)
        ]
