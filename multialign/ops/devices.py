"""What devices can do: their arithmetic in float64."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["has_float64", "multiplies_float64_fast"]

# Compute capabilities of the cards with at least half as many float64 units as float32 ones: P100,
# V100, A100, H100 and H200, B200. All others have one for every 32 or 64.
_FULL_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64 at all; Apple's do not."""
    return device.type != "mps"


def multiplies_float64_fast(device: torch.device) -> bool:
    """Return whether a device is a card on which float64 products of matrices take little time."""
    return device.type == "cuda" and _capability(device) in _FULL_FLOAT64


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
