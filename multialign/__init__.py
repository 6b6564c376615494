"""Differentiable alignment losses for multimodal learning in PyTorch."""

__version__ = "0.1.0"

from multialign.costs import bures_wasserstein_cost, squared_euclidean_cost
from multialign.decoupling import CosineDecouplingLoss, cosine_decoupling_loss
from multialign.mixture import GaussianMixture, GaussianPrototypes, fit_gaussian_mixture
from multialign.mmd import MMDLoss, mmd_loss
from multialign.moments import GaussianMomentLoss, gaussian_moment_loss
