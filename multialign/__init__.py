"""Differentiable alignment losses for multimodal learning in PyTorch."""

from multialign._versions import show_versions
from multialign.costs import bures_wasserstein_cost, squared_euclidean_cost
from multialign.decoupling import CosineDecouplingLoss, cosine_decoupling_loss
from multialign.diagnose import diagnose
from multialign.hsic import HSICLoss, hsic_loss
from multialign.matching_gap import MatchingGapLoss, matching_gap_loss
from multialign.mixture import GaussianMixture, GaussianPrototypes, fit_gaussian_mixture
from multialign.mmd import MMDLoss, mmd_loss
from multialign.moments import GaussianMomentLoss, gaussian_moment_loss
from multialign.prototypes import (
    PrototypeAlignment,
    PrototypeAlignmentLoss,
    prototype_alignment_loss,
)
from multialign.sinkhorn import MultiMarginalSinkhornLoss, multi_marginal_sinkhorn_loss
from multialign.transport import ConvergenceWarning, TransportSolution, multi_marginal_sinkhorn
from multialign.two_sample import MMDTest, mmd_test

__version__ = "0.1.0"

__all__ = [
    "ConvergenceWarning",
    "CosineDecouplingLoss",
    "GaussianMixture",
    "GaussianMomentLoss",
    "GaussianPrototypes",
    "HSICLoss",
    "MMDLoss",
    "MMDTest",
    "MatchingGapLoss",
    "MultiMarginalSinkhornLoss",
    "PrototypeAlignment",
    "PrototypeAlignmentLoss",
    "TransportSolution",
    "bures_wasserstein_cost",
    "cosine_decoupling_loss",
    "diagnose",
    "fit_gaussian_mixture",
    "gaussian_moment_loss",
    "hsic_loss",
    "matching_gap_loss",
    "mmd_loss",
    "mmd_test",
    "multi_marginal_sinkhorn",
    "multi_marginal_sinkhorn_loss",
    "prototype_alignment_loss",
    "show_versions",
    "squared_euclidean_cost",
]
