"""Gaussian mixtures remembered between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from multialign._distributed import ProcessGroup
from multialign._validation import check_count, check_positive, lift
from multialign.mixture.distribution import GaussianMixture, as_mixture, parameters_of
from multialign.mixture.fit import Modalities, fit_one
from multialign.mixture.options import Differentiate, FitOptions, Init
from multialign.mixture.parameters import CovarianceType, Parameters, select

__all__ = ["GaussianPrototypes", "check_momentum", "running_mixtures"]


class GaussianPrototypes(nn.Module):
    r"""Gaussian mixture of the samples it is called with, remembered between calls on request.

    Without `momentum` each call fits a new mixture. With it, the module keeps a running mixture in
    its buffers: a call in training mode starts EM there, merges the result into it,

    .. math:: (1 - \text{momentum}) \; p_\text{running} + \text{momentum} \; p_\text{batch},

    component by component (each merged pair keeps its total weight, mean and covariance
    :cite:p:`cappe:09`), and returns the merged mixture; the running part carries no gradient. In
    eval mode the running mixture is returned unchanged. A batch whose mixture is not finite leaves
    the running one as it was.

    Called ``(x, weights=None)`` with `x` :math:`(*\text{batch}, N, D)`; returns a
    :class:`GaussianMixture`. See :func:`fit_gaussian_mixture` for the fit and its errors.

    Args:
        num_prototypes: K.
        covariance_type: "diag", "full", "tied" or "spherical".
        em_iterations: Iterations of each fit; all of them run.
        momentum: None, or the weight in (0, 1] of the newest batch.
        init: "kmeans++" or "random"; the start of a fit where there is no running mixture.
        regularization: Floor of the variances, relative to those of the data.
        differentiate: "unroll", "last" or "none".
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, each fit is that of all ranks' samples together.

    References:
        Eq. 2-4 of :cite:t:`decalign:26`; :cite:t:`cappe:09` for the running mixture.

    Example:
        >>> import torch
        >>> from multialign import GaussianPrototypes
        >>> prototypes = GaussianPrototypes(3, momentum=0.1)
        >>> prototypes(torch.randn(32, 4)).means.shape
        torch.Size([3, 4])
        >>> sorted(prototypes.state_dict())
        ['running_covariances', 'running_means', 'running_weights']
    """

    running_weights: Tensor | None
    running_means: Tensor | None
    running_covariances: Tensor | None

    def __init__(
        self,
        num_prototypes: int,
        *,
        covariance_type: CovarianceType = "diag",
        em_iterations: int = 10,
        momentum: float | None = None,
        init: Init = "kmeans++",
        regularization: float = 1e-6,
        differentiate: Differentiate = "unroll",
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_count("num_prototypes", num_prototypes)
        check_momentum(momentum)
        self.num_prototypes = num_prototypes
        self.covariance_type = covariance_type
        self.em_iterations = em_iterations
        self.momentum = momentum
        self.init = init
        self.regularization = regularization
        self.differentiate = differentiate
        self.generator = generator
        self.process_group = process_group
        self._fit_options()  # checks them
        for name in ("running_weights", "running_means", "running_covariances"):
            self.register_buffer(name, None)

    @property
    def running(self) -> GaussianMixture | None:
        """The running mixture; None before the first call in training mode."""
        weights, means, covariances = (
            self.running_weights,
            self.running_means,
            self.running_covariances,
        )
        if weights is None or means is None or covariances is None:
            return None
        return GaussianMixture(
            weights=weights,
            means=means,
            covariances=covariances,
            covariance_type=self.covariance_type,
        )

    def forward(self, x: Tensor, weights: Tensor | None = None) -> GaussianMixture:
        """Return the mixture of the rows of `x`."""
        running = self.running
        if running is not None and not self.training:
            return running
        if running is not None:
            _check_remembered("x", x, running)
        mixture, samples = fit_one(x, weights, self.num_prototypes, self._fit_options(), running)
        return self.remember(mixture, None if samples.complete else samples.present[0] != 0)

    def remember(self, mixture: GaussianMixture, present: Tensor | None = None) -> GaussianMixture:
        """Merge a batch's mixture into the running one and return the result.

        Args:
            mixture: The batch's mixture, fitted from the running one.
            present: None, or `(*batch)`: whether the batch had any sample; if not, the running
                mixture stays as it is.
        """
        if self.momentum is None or not self.training:
            return mixture
        running = self.running
        if running is not None:
            mixture = _merge(running, mixture, self.momentum, present)
        elif present is not None and not bool(present.all()):
            return mixture  # a mixture of no samples is no start for a later fit
        kept = Parameters(*(part.detach().clone() for part in parameters_of(mixture)))
        # A loss scaler skips the step of a batch that is not finite; here its mixture is skipped.
        batch_dims = mixture.weights.ndim - 1
        finite = torch.stack([x.isfinite().flatten(batch_dims).all(-1) for x in kept]).all(0)
        if running is not None:
            kept = select(finite, kept, parameters_of(running))
        # The first batch; a compiled graph cannot read a value.
        elif not (torch.compiler.is_compiling() or bool(finite.all())):
            return mixture
        self.running_weights, self.running_means, self.running_covariances = kept
        return mixture

    def _fit_options(self) -> FitOptions:
        return FitOptions(
            covariance_type=self.covariance_type,
            em_iterations=self.em_iterations,
            regularization=self.regularization,
            differentiate=self.differentiate,
            init=self.init,
            generator=self.generator,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"{self.num_prototypes}, covariance_type={self.covariance_type!r}, "
            f"em_iterations={self.em_iterations}, momentum={self.momentum}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The buffers' shapes are known from the first batch on, or from a checkpoint.
        for name in ("running_weights", "running_means", "running_covariances"):
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def running_mixtures(
    models: Sequence[GaussianPrototypes], modalities: Modalities
) -> list[GaussianMixture]:
    """Return the running mixture of each modality; in training mode, merged with this batch's."""
    samples = modalities.samples
    running = [model.running for model in models]
    for n, (mixture, x) in enumerate(zip(running, samples.features, strict=True)):
        if mixture is not None:
            _check_remembered(f"features[{n}]", x, mixture)
    known = [mixture for mixture in running if mixture is not None]
    if len(known) == len(models) and not any(model.training for model in models):
        return known
    fitted = modalities.fit(running)
    return [
        model.remember(mixture, None if samples.complete else present != 0)
        for model, mixture, present in zip(models, fitted, samples.present, strict=True)
    ]


def _check_remembered(name: str, x: Tensor, running: GaussianMixture) -> None:
    """Raise unless `x` can be compared with the prototypes that a module remembers."""
    if x.device != running.means.device:
        raise ValueError(
            f"{name} must be on the device of the prototypes remembered, {running.means.device}; "
            f"got {x.device}; move the module with .to(device)"
        )
    if lift(x).dtype != running.means.dtype:
        raise TypeError(
            f"{name} must have the dtype of the prototypes remembered, {running.means.dtype}; "
            f"got {x.dtype}; convert the module with .to(dtype)"
        )


def check_momentum(momentum: float | None) -> None:
    """Raise unless `momentum` is None or in (0, 1]."""
    if momentum is not None:
        check_positive("momentum", momentum)
        if momentum > 1:
            raise ValueError(f"momentum must be None or in (0, 1]; got {momentum}")


def _merge(
    old: GaussianMixture, new: GaussianMixture, momentum: float, present: Tensor | None
) -> GaussianMixture:
    """Return (1 - momentum) old + momentum new, each pair of components merged into one.

    The merged component has the total weight, the mean and the covariance of the pair.
    """
    a, b = (1 - momentum) * old.weights, momentum * new.weights
    weights = a + b
    share = b / torch.where(weights == 0, 1.0, weights)
    step = new.means - old.means
    means = old.means + share.unsqueeze(-1) * step
    between = share * (1 - share)
    if old.covariance_type in ("diag", "spherical"):
        share, spread = share.unsqueeze(-1), between.unsqueeze(-1) * step.square()
        if old.covariance_type == "spherical":
            share, spread = share.squeeze(-1), spread.mean(-1)
    else:
        share = share[..., None, None]
        spread = between[..., None, None] * step.unsqueeze(-1) * step.unsqueeze(-2)
        if old.covariance_type == "tied":
            # The pooled covariance: each component's share of it goes by its weight.
            share = momentum * torch.ones_like(share[..., 0, :, :])
            spread = (weights[..., None, None] * spread).sum(-3)
    covariances = old.covariances + share * (new.covariances - old.covariances) + spread
    merged = replace(old, weights=weights, means=means, covariances=covariances)
    if present is None:
        return merged
    chosen = select(present, parameters_of(merged), parameters_of(old))
    return as_mixture(chosen, old.covariance_type)
