"""Gaussian mixtures remembered between calls, in buffers that behave as those of BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multialign._distributed import GroupModule, ProcessGroup
from multialign._validation import check_count, check_positive, check_size, full_precision, lift
from multialign.mixture.distribution import GaussianMixture, as_mixture, parameters_of
from multialign.mixture.fit import Modalities, one_modality
from multialign.mixture.options import Differentiate, FitOptions, Init
from multialign.mixture.parameters import CovarianceType, Parameters, select
from multialign.ops.spectral import square_root

__all__ = ["GaussianPrototypes", "MomentumModule", "check_momentum", "running_mixtures"]

_BUFFERS = ("running_weights", "running_means", "running_covariances", "num_batches_tracked")
# What fixes their shapes.
_SHAPES = ("num_prototypes", "num_features", "num_modalities", "covariance_type")


class MomentumModule(GroupModule):
    """A Module whose option `momentum` gives it buffers: what fixes their shapes cannot be set."""

    _has_buffers: bool
    """Whether it was made with momentum. Until it is known, everything can be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_has_buffers", False) and name in _SHAPES:
            raise AttributeError(
                f"{name} fixes the shapes of the running mixtures and cannot be set: make a new "
                f"{type(self).__name__}"
            )
        if name == "momentum" and value is not None and not self.__dict__.get("_has_buffers", True):
            raise AttributeError(
                f"momentum cannot be turned on, since this {type(self).__name__} has no running "
                "mixtures: make a new one with momentum="
            )
        super().__setattr__(name, value)


class GaussianPrototypes(MomentumModule):
    r"""Gaussian mixture of the samples it is called with, remembered between calls on request.

    Without `momentum` each call fits a new mixture. With it, the module keeps a running mixture in
    its buffers: a call in training mode starts EM there, merges the result into it,

    .. math:: (1 - \text{momentum}) \; p_\text{running} + \text{momentum} \; p_\text{batch},

    component by component (each merged pair keeps its total weight, mean and covariance
    :cite:p:`cappe:09`), and returns the merged mixture; the running part carries no gradient. In
    eval mode the running mixture is returned unchanged. A batch whose mixture is not finite, or
    that has no sample, leaves the running one as it was. With a momentum of 1, which remembers no
    more than where to start, a component that no sample belongs to starts again from `init`.

    The buffers `running_weights`, `running_means`, `running_covariances` and `num_batches_tracked`
    behave as those of :class:`torch.nn.BatchNorm1d`. They have their shapes from the beginning
    ("tied" covariances are :math:`(1, D, D)`), are updated in place, and follow ``.to()``,
    ``.half()`` and checkpoints. Before the first batch they are 1/K, 0, 1 (identity matrices) and
    0. The first batch is merged with these as any later one. On data far from the origin or of
    another scale, they pull the mixture until about 1 / momentum batches have been seen:
    standardise the features, or give the first batch a `momentum` of 1. While
    `num_batches_tracked` is 0 a fit starts from `init`, in eval mode too, which keeps nothing. All
    arithmetic is in float32 or float64, also if the buffers are in half precision.

    Called ``(x, weights=None)`` with `x` :math:`(*\text{batch}, N, D)`, or :math:`(N, D)` with
    `momentum`; returns a :class:`GaussianMixture`. See :func:`fit_gaussian_mixture` for the fit and
    its errors. Options are attributes that are read at each call. With `momentum`,
    `num_prototypes`, `num_features` and `covariance_type` cannot be set; nor can `momentum` itself
    where it was None from the beginning. A copy shares the `process_group`; a pickle drops it, with
    a warning: set it again after loading, ``prototypes.process_group = group``.

    Args:
        num_prototypes: K.
        num_features: D; `momentum` needs it.
        covariance_type: "diag", "full", "tied" or "spherical".
        em_iterations: Iterations of each fit; all of them run.
        momentum: None, or the weight in (0, 1] of the newest batch.
        init: "kmeans++" or "random"; the start of a fit where there is no running mixture.
        regularization: Floor of the variances, relative to those of the data.
        differentiate: "unroll", "last" or "none".
        generator: Draws the initial means; None stands for torch's global generator.
        process_group: Given one, each fit is that of all ranks' samples together.

    Raises:
        AttributeError: An option is set that cannot be.
        RuntimeError: With `momentum` in training mode, :func:`torch.utils.checkpoint.checkpoint`
            calls it again in the backward pass, when the running mixture is another one already.
            Likewise where `generator` would draw again.

    References:
        Eq. 2-4 of :cite:t:`decalign:26`; :cite:t:`cappe:09` for the running mixture.

    Example:
        >>> import torch
        >>> from multialign import GaussianPrototypes
        >>> prototypes = GaussianPrototypes(3, num_features=4, momentum=0.1)
        >>> prototypes(torch.randn(32, 4)).means.shape
        torch.Size([3, 4])
        >>> sorted(prototypes.state_dict())
        ['num_batches_tracked', 'running_covariances', 'running_means', 'running_weights']
    """

    running_weights: Tensor | None
    running_means: Tensor | None
    running_covariances: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_prototypes: int,
        *,
        num_features: int | None = None,
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
        self.num_prototypes = num_prototypes
        self.num_features = num_features
        self.covariance_type = covariance_type
        self.em_iterations = em_iterations
        self.momentum = momentum
        self.init = init
        self.regularization = regularization
        self.differentiate = differentiate
        self.generator = generator
        self.process_group = process_group
        count = check_count("num_prototypes", num_prototypes)
        self._fit_options()  # checks them
        dim = None if num_features is None else check_count("num_features", num_features)
        buffers: dict[str, Tensor | None] = dict.fromkeys(_BUFFERS)
        if check_momentum(momentum) is not None:
            if dim is None:
                raise ValueError(
                    "momentum needs num_features, the number D of features, for the shapes of the "
                    "running mixture; got num_features=None"
                )
            shape = {
                "diag": (count, dim),
                "full": (count, dim, dim),
                "tied": (1, dim, dim),
                "spherical": (count,),
            }[covariance_type]
            buffers = {
                "running_weights": torch.empty(count),
                "running_means": torch.empty(count, dim),
                "running_covariances": torch.empty(shape),
                "num_batches_tracked": torch.empty((), dtype=torch.long),
            }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        # The counter, and its version when it was last known not to be 0.
        self._started_at: tuple[Tensor, int] | None = None
        self.reset_running_stats()
        self._has_buffers = momentum is not None

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        if self._buffers["running_weights"] is None:
            return
        weights, means, covariances, tracked = (self._buffer(name) for name in _BUFFERS)
        with torch.no_grad():
            weights.fill_(1 / len(weights))
            means.zero_()
            covariances.fill_(1)
            if self.covariance_type in ("full", "tied"):
                covariances.copy_(torch.eye(covariances.shape[-1], device=covariances.device))
            tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget all batches: the name under which tools fill modules made on the meta device."""
        self.reset_running_stats()

    @property
    def running(self) -> GaussianMixture | None:
        """The running mixture, in float32 or float64; None without `momentum`."""
        if self._buffers["running_weights"] is None:
            return None
        return as_mixture(self._running(), self.covariance_type)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> GaussianMixture:
        """Return the mixture of the rows of `x`."""
        options = self._fit_options()
        momentum = check_momentum(self.momentum)
        modality = one_modality(
            x, weights, check_count("num_prototypes", self.num_prototypes), options
        )
        if momentum is None:
            self._check_features("x", modality.samples.features[0])
            return modality.fit()[0]
        return running_mixtures([self], modality, options, momentum, self.training)[0]

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"{self.num_prototypes}, num_features={self.num_features}, "
            f"covariance_type={self.covariance_type!r}, "
            f"em_iterations={self.em_iterations}, momentum={self.momentum}"
        )

    def _fit_options(self) -> FitOptions:
        """Return the options of a fit, checked."""
        return FitOptions(
            covariance_type=self.covariance_type,
            em_iterations=self.em_iterations,
            regularization=self.regularization,
            differentiate=self.differentiate,
            init=self.init,
            generator=self.generator,
            process_group=self.process_group,
        )

    def _check_features(self, name: str, x: Tensor) -> None:
        """Raise unless `x` has D features and, with momentum, can be compared with the buffers."""
        check_size(name, "num_features", self.num_features, x.shape[-1])
        means = self._buffers["running_means"]
        if means is None or self.momentum is None:
            return
        if x.ndim != 2:
            raise ValueError(
                f"{name} must have shape (N, D), without batch dimensions, with momentum: there is "
                f"one running mixture; got {tuple(x.shape)}"
            )
        if x.device != means.device:
            raise ValueError(
                f"{name} must be on the device of the prototypes remembered, {means.device}; "
                f"got {x.device}; move the module with .to(device)"
            )
        if lift(x).dtype != _computed(means.dtype):
            raise TypeError(
                f"{name} must have the dtype of the prototypes remembered, "
                f"{_computed(means.dtype)}; got {x.dtype}; convert the module with .to(dtype)"
            )

    def _buffer(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None  # called with momentum alone
        return buffer

    def _running(self) -> Parameters:
        """Return a copy of the running mixture, in float32 or float64."""
        weights, means, covariances = (self._buffer(name) for name in _BUFFERS[:3])
        rounded = lift(covariances)
        if rounded is not covariances:
            rounded = _undo_rounding(covariances, self.covariance_type)
        if self.covariance_type == "tied":
            rounded = rounded.squeeze(0)
        # A later batch writes over the buffers.
        return Parameters(lift(weights).clone(), lift(means).clone(), rounded.clone())

    def _update(self, merged: Parameters, present: Tensor) -> None:
        """Write the merged mixture into the buffers, unless it is not finite or of no samples."""
        values = [part.detach() for part in merged]
        # A loss scaler skips the step of a batch that is not finite; here its mixture is skipped.
        kept = torch.stack([x.isfinite().all() for x in values]).all() & present
        for name, value in zip(_BUFFERS, values, strict=False):
            buffer = self._buffer(name)
            if value.dtype != buffer.dtype:
                limit = torch.finfo(buffer.dtype).max
                value = value.clamp(-limit, limit).to(buffer.dtype)
            buffer.copy_(torch.where(kept, value, buffer))
        tracked = self._buffer("num_batches_tracked")
        known = not torch.compiler.is_compiling() and self._is_known_to_have_started()
        tracked.add_(kept)
        if known:
            self._started_at = (tracked, tracked._version)

    def _is_known_to_have_started(self) -> bool:
        """Return whether the counter is the one last seen, and untouched since."""
        if self._started_at is None:
            return False
        tracked, version = self._started_at
        return tracked is self.num_batches_tracked and tracked._version == version


def running_mixtures(
    models: Sequence[GaussianPrototypes],
    modalities: Modalities,
    options: FitOptions,
    momentum: float,
    training: bool,
) -> list[GaussianMixture]:
    """Return the running mixture of each modality; in training mode, merged with this batch's.

    Args:
        models: One for each modality. Of these only the buffers are used, not the options.
        modalities: The samples.
        options: Of the fit.
        momentum: The weight of this batch.
        training: Whether to fit this batch and remember it.
    """
    samples = modalities.samples
    for m, (model, x) in enumerate(zip(models, samples.features, strict=True)):
        model._check_features(f"features[{m}]" if len(models) > 1 else "x", x)
    if training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "with momentum, a call in training mode cannot be repeated in the backward pass, as "
            "torch.utils.checkpoint does: the running mixtures have changed. Call the loss outside "
            "of the function that is checkpointed"
        )
    with full_precision(samples.features[0]):
        old = [model._running() for model in models]
        running = [as_mixture(part, options.covariance_type) for part in old]
        # A compiled graph cannot branch on values: it draws seeds and chooses.
        started = None if torch.compiler.is_compiling() else _have_started(models)
        if started is not None and all(started) and not training:
            return running
        flags = [model._buffer("num_batches_tracked") > 0 for model in models]
        if started is not None and not any(started):
            fitted = modalities.fit()
        elif started is not None and all(started):
            fitted = modalities.fit(running)
        else:
            fitted = modalities.fit(running, flags)
        new = [parameters_of(mixture) for mixture in fitted]
        if momentum == 1 and training:
            new = _restart_empty(new, modalities, options.covariance_type)
        if not training:
            chosen = [select(*triple) for triple in zip(flags, old, new, strict=True)]
            return [as_mixture(part, options.covariance_type) for part in chosen]
        merged = []
        for model, a, b, present in zip(models, old, new, samples.present, strict=True):
            both = _merge(a, b, momentum, options.covariance_type)
            if not samples.complete:
                both = select(present != 0, both, a)
            model._update(both, present != 0)
            merged.append(as_mixture(both, options.covariance_type))
        return merged


def _have_started(models: Sequence[GaussianPrototypes]) -> list[bool]:
    """Return whether each model remembers a batch.

    Counters are read, all at once, only where something else has written them: a device would have
    to be waited for.
    """
    unknown = [model for model in models if not model._is_known_to_have_started()]
    counts: dict[int, int] = {}
    if unknown:
        counters = torch.stack([model._buffer("num_batches_tracked") for model in unknown])
        counts = dict(zip(map(id, unknown), counters.tolist(), strict=True))
    for model in unknown:
        tracked = model._buffer("num_batches_tracked")
        # A tensor made in inference mode has no version.
        known = counts[id(model)] > 0 and not tracked.is_inference()
        model._started_at = (tracked, tracked._version) if known else None
    return [counts.get(id(model), 1) > 0 for model in models]


def check_momentum(momentum: object) -> float | None:
    """Return `momentum` if it is None or a number in (0, 1]."""
    if momentum is None:
        return None
    number = check_positive("momentum", momentum)
    if number > 1:
        raise ValueError(f"momentum must be None or in (0, 1]; got {number}")
    return number


def _restart_empty(
    mixtures: Sequence[Parameters], modalities: Modalities, covariance_type: CovarianceType
) -> list[Parameters]:
    """Return mixtures whose components without samples are those of newly drawn seeds.

    For a momentum of 1: nothing else would keep the weight of a component from being 0 for ever.
    """
    restarted = []
    for mixture, seed in zip(mixtures, map(parameters_of, modalities.seeds()), strict=True):
        empty = mixture.weights <= torch.finfo(torch.float64).eps
        weights = torch.where(empty, seed.weights, mixture.weights)
        means = torch.where(empty.unsqueeze(-1), seed.means, mixture.means)
        covariances = mixture.covariances
        if covariance_type != "tied":
            chosen = empty.reshape(-1, *[1] * (covariances.ndim - 1))
            covariances = torch.where(chosen, seed.covariances, covariances)
        restarted.append(Parameters(weights / weights.sum(), means, covariances))
    return restarted


def _merge(
    old: Parameters, new: Parameters, momentum: float, covariance_type: CovarianceType
) -> Parameters:
    """Return (1 - momentum) old + momentum new, each pair of components merged into one.

    The merged component has the total weight, the mean and the covariance of the pair.
    """
    a, b = (1 - momentum) * old.weights, momentum * new.weights
    weights = a + b
    share = b / torch.where(weights == 0, 1.0, weights)
    step = new.means - old.means
    means = old.means + share.unsqueeze(-1) * step
    between = share * (1 - share)
    if covariance_type in ("diag", "spherical"):
        share, spread = share.unsqueeze(-1), between.unsqueeze(-1) * step.square()
        if covariance_type == "spherical":
            share, spread = share.squeeze(-1), spread.mean(-1)
    else:
        share = share[..., None, None]
        spread = between[..., None, None] * step.unsqueeze(-1) * step.unsqueeze(-2)
        if covariance_type == "tied":
            # The pooled covariance: each component's share of it goes by its weight.
            share = momentum * torch.ones_like(share[..., 0, :, :])
            spread = (weights[..., None, None] * spread).sum(-3)
    covariances = old.covariances + share * (new.covariances - old.covariances) + spread
    return Parameters(weights, means, covariances)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic with buffers of a dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _undo_rounding(covariances: Tensor, covariance_type: CovarianceType) -> Tensor:
    """Return covariances in half precision as positive definite ones in float32.

    Rounding may have made a small variance 0 and a small eigenvalue negative.
    """
    finfo = torch.finfo(covariances.dtype)
    wide = covariances.float()
    if covariance_type in ("diag", "spherical"):
        return wide.clamp_min(finfo.smallest_normal * finfo.eps)
    root = square_root(wide)
    values = root.values.square()
    values = values.clamp_min(finfo.eps * values[..., -1:])
    # The root is NaN where the matrix is not finite.
    return ((root.vectors * values.unsqueeze(-2)) @ root.vectors.mT + 0 * root.root).float()
