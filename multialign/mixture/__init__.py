"""Gaussian mixtures fitted by expectation-maximisation, batched and differentiable."""

from multialign.mixture.distribution import GaussianMixture
from multialign.mixture.fit import Modalities, Moments, fit_gaussian_mixture
from multialign.mixture.options import Differentiate, FitOptions
from multialign.mixture.parameters import CovarianceType, unpack_moments
from multialign.mixture.running import (
    GaussianPrototypes,
    MomentumModule,
    check_momentum,
    running_mixtures,
)

__all__ = [
    "CovarianceType",
    "Differentiate",
    "FitOptions",
    "GaussianMixture",
    "GaussianPrototypes",
    "Modalities",
    "Moments",
    "MomentumModule",
    "check_momentum",
    "fit_gaussian_mixture",
    "running_mixtures",
    "unpack_moments",
]
