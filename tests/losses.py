"""Every loss of multialign: its Module, function and options, its laws, and small inputs.

A new loss is one entry of `VARIANTS`, and a new option worth walking over is one more. The tests of
all losses walk over `VARIANTS`, over `FUNCTIONS` where they need no Module, or over `LOSSES` where
options do not matter. A test file whose rules differ by loss passes them through `each`, which
fails for an entry without a rule.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from multialign import (
    CosineDecouplingLoss,
    GaussianMomentLoss,
    HSICLoss,
    MatchingGapLoss,
    MMDLoss,
    MultiMarginalSinkhornLoss,
    PrototypeAlignmentLoss,
    cosine_decoupling_loss,
    gaussian_moment_loss,
    hsic_loss,
    matching_gap_loss,
    mmd_loss,
    multi_marginal_sinkhorn_loss,
    prototype_alignment_loss,
)

Rule = TypeVar("Rule")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss with some options, and the laws it keeps: all of them, unless the entry says no."""

    module: type[nn.Module]
    function: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    partner: Callable[[Tensor], Tensor] | None = None
    """Makes common features from unique ones, for a loss that compares these two."""

    degree: int | None = None
    """Features times s give s^degree times the loss; None: no such degree."""
    translates: bool = True
    """Adding one vector to all samples changes nothing."""
    rotates: bool = True
    """Rotating all samples changes nothing."""
    symmetric: bool = True
    """The order of modalities does not matter."""
    permutes: bool = True
    """The order of samples does not matter."""
    pads: bool = True
    """Padding changes no step on the way to the result."""
    repeats: bool = True
    """A whole weight equals as many copies."""
    batches: bool = True
    """Takes batches, whose loss is the mean of their problems'."""
    nonnegative: bool = True
    zero: bool = True
    """It is 0 where all modalities are equal."""
    compares: bool = True
    """float32 comes near float64 on any data."""
    seeds: bool = False
    """Fits from samples drawn at random, and numbers its prototypes by them. Laws hold where the
    best fit is clear, and for one order of samples in all modalities."""
    paired: bool = False
    """Row n of all modalities is one sample: they have one N, and laws hold for one order of rows.
    A row absent in one modality is out in all."""
    masks: bool = False
    """Takes boolean weights alone, which other ones become by where they are not 0."""
    least: int = 1
    """How many samples a modality needs."""
    two_of_three: float | None = 1.0
    """Times the loss of two modalities, that of the two and an absent third; None: another."""
    size: Callable[[float, int], float] = lambda spread, dim: 1.0
    """Its natural size, from the mean squared distance from the mean and D."""
    edges: Callable[[int], list[tuple[int, int]]] | None = None
    """The pairs with a cost, where epsilon is taken from the costs: 1 if they are all 0."""
    unit: float | None = None
    """A length of its own beside those of the data: the bandwidth."""

    def __call__(
        self, features: Tensor | Sequence[Tensor], weights: Any = None, **options: Any
    ) -> Tensor:
        """Evaluate the function, with the same random numbers in every call."""
        if self.takes("generator"):
            options = {"generator": torch.Generator().manual_seed(0), **options}
        weights = masks(weights) if self.masks else weights
        return self.function(*self.inputs(features), weights, **{**self.options, **options})

    def inputs(self, features: Any) -> tuple[Any, ...]:
        """Return the features as the arguments of this loss."""
        return (features,) if self.partner is None else (features, [*map(self.partner, features)])

    def make(self, **options: Any) -> nn.Module:
        """Return the Module, called with features and weights."""
        module = self.module(**{**self.options, **options})
        return module if self.partner is None else Partnered(module, self.partner, self.masks)

    def takes(self, name: str) -> bool:
        """Return whether the Module has this option."""
        return name in inspect.signature(self.module).parameters

    def given(self, **options: Any) -> "Loss":
        """Return the loss with those of the options that it has."""
        taken = {name: value for name, value in options.items() if self.takes(name)}
        return replace(self, options={**self.options, **taken})

    def sized(self, features: Sequence[Tensor]) -> "Loss":
        """Return the loss with the sizes that momentum needs."""
        if "momentum" not in self.options:
            return self
        return self.given(num_features=features[0].shape[-1], num_modalities=len(features))

    @property
    def is_function(self) -> bool:
        """Whether the function has all these options: it remembers nothing between calls."""
        return self.options.keys() <= inspect.signature(self.function).parameters.keys()


class Partnered(nn.Module):
    """A loss of unique and common features as a loss of one list of features."""

    def __init__(
        self, module: nn.Module, partner: Callable[[Tensor], Tensor], needs_masks: bool
    ) -> None:
        super().__init__()
        self.module, self.partner, self.needs_masks = module, partner, needs_masks

    def forward(self, features: Sequence[Tensor], weights: Any = None) -> Tensor:
        weights = masks(weights) if self.needs_masks else weights
        return self.module(features, [self.partner(x) for x in features], weights)


def masks(weights: Any) -> Any:
    """Return where weights, a tensor or a sequence, are not 0."""
    if weights is None or isinstance(weights, Tensor):
        return weights if weights is None else weights != 0
    return [weight if weight is None else weight != 0 for weight in weights]


def _first(x: Tensor) -> Tensor:
    return x[..., :1]


def _flipped(x: Tensor) -> Tensor:
    return x.flip(-1)


def _square(spread: float, dim: int) -> float:
    return spread


def _chain(count: int) -> list[tuple[int, int]]:
    return [(m, m + 1) for m in range(count - 1)]


def _cycle(count: int) -> list[tuple[int, int]]:
    return sorted({*_chain(count), (0, count - 1)})


def _complete(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


_decoupling = Loss(
    module=CosineDecouplingLoss,
    function=cosine_decoupling_loss,
    partner=_flipped,
    degree=0,
    translates=False,
    rotates=False,
    batches=False,
    zero=False,
)
_moments = Loss(
    module=GaussianMomentLoss,
    function=gaussian_moment_loss,
    rotates=False,
    compares=False,  # of a feature constant up to rounding, skewness is that of the rounding
    two_of_three=1 / 3,  # the normaliser keeps M: one pair of three is left
    size=lambda spread, dim: spread + spread**2 + 1e3 * dim,
)
_mmd = Loss(
    module=MMDLoss,
    function=mmd_loss,
    options={"bandwidth": 1.0},
    two_of_three=1 / 3,
    unit=1.0,
)
_sinkhorn = Loss(
    module=MultiMarginalSinkhornLoss,
    function=multi_marginal_sinkhorn_loss,
    degree=2,
    repeats=False,  # the default epsilon depends on N
    size=_square,
    edges=_complete,
)
_sinkhorn_chain = replace(
    _sinkhorn,
    options={"graph": "chain"},
    symmetric=False,
    nonnegative=False,
    two_of_three=None,
    edges=_chain,
)
_matching = Loss(
    module=MatchingGapLoss,
    function=matching_gap_loss,
    degree=2,
    repeats=False,  # copies of a row are rows of their own to match
    zero=False,  # the best plan between equal views is not the identity
    paired=True,
    two_of_three=0.0,
    size=_square,
    edges=_complete,
)
_hsic = Loss(
    module=HSICLoss,
    function=hsic_loss,
    options={"bandwidth": 1.0},
    partner=_first,
    rotates=False,
    zero=False,
    unit=1.0,
)
_prototypes = Loss(
    module=PrototypeAlignmentLoss,
    function=prototype_alignment_loss,
    options={"num_prototypes": 2},
    rotates=False,
    nonnegative=False,
    zero=False,
    compares=False,
    seeds=True,
    two_of_three=None,
    size=_square,
)


def _prototypes_with(**options: Any) -> Loss:
    return replace(_prototypes, options={**_prototypes.options, **options})


VARIANTS = {
    "decoupling": _decoupling,
    "moments": _moments,
    "moments mean": replace(
        _moments,
        options={"moments": ("mean",)},
        degree=2,
        rotates=True,
        compares=True,
        size=_square,
    ),
    "moments covariance": replace(
        _moments,
        options={"moments": ("covariance",)},
        degree=4,
        rotates=True,
        compares=True,
        size=lambda spread, dim: spread**2,
    ),
    "moments skewness": replace(
        _moments,
        options={"moments": ("skewness",), "eps": 0.0},
        degree=0,
        size=lambda spread, dim: 1e3 * dim,
    ),
    "mmd": _mmd,
    "mmd bandwidths": replace(_mmd, options={"bandwidth": (0.5, 2.0)}, unit=0.5),
    "mmd median": replace(
        _mmd,
        options={},
        rotates=False,  # of equal samples, distances of 0 become distances of a rounding
        repeats=False,
        compares=False,
        unit=None,
    ),
    "mmd unbiased": replace(
        _mmd,
        options={"bandwidth": 1.0, "estimator": "unbiased"},
        repeats=False,
        nonnegative=False,
        zero=False,
        least=2,
    ),
    "mmd random features": replace(
        _mmd,
        options={"bandwidth": 1.0, "estimator": "random_features", "num_features": 16},
        rotates=False,
        compares=False,
        unit=None,
    ),
    "mmd energy": replace(
        _mmd,
        options={"kernel": "energy"},
        degree=1,
        size=lambda spread, dim: spread**0.5,
        unit=None,
    ),
    "hsic": _hsic,
    "hsic median": replace(
        _hsic, options={"bandwidth": ("median", 2.0)}, repeats=False, compares=False, unit=None
    ),
    "hsic unbiased": replace(
        _hsic,
        options={"bandwidth": 1.0, "estimator": "unbiased"},
        repeats=False,
        nonnegative=False,
        masks=True,
        least=4,
    ),
    "hsic normalized": replace(
        _hsic, options={"bandwidth": 1.0, "normalize": True}, compares=False
    ),
    "matching": _matching,
    "matching chain": replace(_matching, options={"graph": "chain"}, symmetric=False, edges=_chain),
    "sinkhorn": _sinkhorn,
    "sinkhorn chain": _sinkhorn_chain,
    "sinkhorn biased": replace(
        _sinkhorn_chain,
        options={"graph": "chain", "debias": False},
        # Of costs equal up to rounding, epsilon is of the size of the rounding.
        pads=False,
        translates=False,
        zero=False,
    ),
    # At a small epsilon sweeps stop early, with a warning: what has to hold is what holds of any
    # state.
    "sinkhorn sweeps": replace(
        _sinkhorn_chain,
        options={"graph": "cycle", "method": "sinkhorn", "backend": "torch"},
        permutes=False,
        pads=False,
        zero=False,
        edges=_cycle,
    ),
    "prototypes": _prototypes,
    "prototypes plan": _prototypes_with(matching="plan", objective="regularized"),
    "prototypes full": _prototypes_with(covariance_type="full", matching="plan"),
    "prototypes tied": _prototypes_with(covariance_type="tied"),
    "prototypes spherical": _prototypes_with(covariance_type="spherical", matching="plan"),
    "prototypes momentum": _prototypes_with(momentum=0.5),
}
"""By name: a loss and its options, the loss alone first."""

LOSSES = {name: loss for name, loss in VARIANTS.items() if " " not in name}
"""One entry for each loss."""

FUNCTIONS = {name: loss for name, loss in VARIANTS.items() if loss.is_function}
"""The entries that are functions too."""


def each(rules: Mapping[str, Rule], entries: Mapping[str, Loss] = VARIANTS) -> dict[str, Rule]:
    """Return the rules of a test file; fail unless there is one for each entry and no other."""
    assert rules.keys() == entries.keys(), (
        f"without a rule: {sorted(entries.keys() - rules.keys())}; "
        f"without an entry: {sorted(rules.keys() - entries.keys())}"
    )
    return dict(rules)


def loss_of(name: str) -> str:
    """Return which of `LOSSES` an entry is a variant of."""
    return name.split()[0]


def clusters(sizes: Sequence[int], batch: tuple[int, ...] = ()) -> list[Tensor]:
    """Return modalities of two clusters far apart: one best mixture of two, whatever the seeds."""
    centres = (torch.where(torch.arange(n) % 2 == 0, 0.0, 30.0).unsqueeze(-1) for n in sizes)
    return [torch.randn(*batch, len(c), 2) + c for c in centres]
