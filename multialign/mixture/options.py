"""The options that every fit of a mixture takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from multialign._distributed import ProcessGroup, Ranks
from multialign._validation import check_choice, check_count, check_positive
from multialign.mixture.parameters import COVARIANCE_TYPES, CovarianceType

__all__ = ["Differentiate", "FitOptions", "Init"]

Differentiate = Literal["unroll", "last", "none"]
Init = Literal["kmeans++", "random"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of :func:`fit_gaussian_mixture`, checked when made.

    `em_iterations` and `em_tolerance` are its `iterations` and `tolerance`; None runs them all.
    """

    covariance_type: CovarianceType
    em_iterations: int
    em_tolerance: float | None = None
    regularization: float
    differentiate: Differentiate
    init: Init = "kmeans++"
    generator: torch.Generator | None
    process_group: ProcessGroup | None

    def __post_init__(self) -> None:
        check_choice("covariance_type", self.covariance_type, COVARIANCE_TYPES)
        vars(self).update(  # numbers of NumPy become Python's
            em_iterations=check_count("em_iterations", self.em_iterations),
            regularization=check_positive("regularization", self.regularization, zero=True),
        )
        check_choice("differentiate", self.differentiate, ("unroll", "last", "none"))
        check_choice("init", self.init, ("kmeans++", "random"))

    @property
    def ranks(self) -> Ranks:
        """The ranks whose samples are fitted together."""
        return Ranks(self.process_group)

    @property
    def grad(self) -> bool:
        """Whether the mixture has a gradient."""
        return torch.is_grad_enabled() and self.differentiate != "none"
