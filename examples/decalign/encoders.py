"""From raw modalities to decoupled features: convolution, encoders, distribution encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.decalign.dropout import Dropout

__all__ = ["Distribution", "DistributionEncoder", "Encoder", "TemporalConv", "masked_mean"]


class TemporalConv(nn.Module):
    """Convolution over time that brings one modality to the common shape T_s x d_s.

    The convolution keeps the length ("same" padding, so T = 1 works). The steps are then
    averaged over T_s equal parts of the time axis, or repeated where T < T_s.

    Args:
        dim: d_m, the features of one step.
        width: d_s.
        length: T_s.
        kernel_size: The number of steps in the kernel; odd.
        dropout: The rate for the input.
    """

    def __init__(
        self, dim: int, width: int, length: int, kernel_size: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.length = length
        self.dropout = Dropout(dropout)
        self.conv = nn.Conv1d(dim, width, kernel_size, padding="same")

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(N, T_s, d_s)` and its valid steps, from `x` `(N, T, d_m)` and its mask."""
        # torch.where, not a product, since an invalid step may hold NaN.
        x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
        x = self.conv(self.dropout(x).mT).mT
        share = mask.unsqueeze(1) * _overlap(x.shape[1], self.length, x)
        total = share.sum(-1, keepdim=True)
        valid = total > 0
        return share @ x / torch.where(valid, total, 1.0), valid.squeeze(-1)


class Encoder(nn.Sequential):
    """Two layers on each time step, for unique and for common features.

    The normalisation at the end fixes the scale of the features. Without it, shrinking them would
    reduce every alignment loss.
    """

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )


class Distribution(NamedTuple):
    """The Gaussian of each sample, `(N, d_s)`; a point if `log_variance` is None."""

    mean: Tensor
    log_variance: Tensor | None

    def sample(self) -> Tensor:
        """Draw a sample, with gradients to both parameters."""
        if self.log_variance is None:
            return self.mean
        return self.mean + (self.log_variance / 2).exp() * torch.randn_like(self.mean)


class DistributionEncoder(nn.Module):
    """The probabilistic distribution encoder (PDE) of Sec. 3.3, shared by all modalities.

    Args:
        width: d_s.
        stochastic: Whether to return a variance too. Without it the encoder is a plain MLP, as in
            the authors' released code.
    """

    def __init__(self, width: int, *, stochastic: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU())
        self.mean = nn.Linear(2 * width, width)
        self.log_variance = nn.Linear(2 * width, width) if stochastic else None
        if self.log_variance is not None:
            # Start with little noise; training adjusts it.
            nn.init.constant_(self.log_variance.bias, -4.0)

    def forward(self, common: Tensor) -> Distribution:
        """Return the distribution of each row of `(N, d_s)`."""
        hidden = self.hidden(common)
        spread = None if self.log_variance is None else self.log_variance(hidden)
        return Distribution(self.mean(hidden), spread)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `(N, T, D)` over the valid steps `(N, T)`; 0 without a valid step."""
    total = torch.where(mask.unsqueeze(-1), x, x.new_zeros(())).sum(1)
    return total / mask.sum(1, keepdim=True).clamp_min(1)


def _overlap(length: int, parts: int, like: Tensor) -> Tensor:
    """Return the overlap of each of `length` steps with each of `parts` equal parts of the axis."""
    # In units of 1 / (length * parts) of the axis, all borders are whole numbers.
    step = torch.arange(length, device=like.device) * parts
    part = torch.arange(parts, device=like.device).unsqueeze(1) * length
    shared = torch.minimum(step + parts, part + length) - torch.maximum(step, part)
    return shared.clamp_min(0).to(like.dtype)
