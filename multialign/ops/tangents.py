"""Whether forward-mode automatic differentiation is at work on a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["has_tangent"]


def has_tangent(*tensors: Tensor) -> bool:
    """Return whether any of the tensors carries a tangent, as under :func:`torch.func.jvp`.

    An operator with a reverse derivative of its own has no forward one; who asks takes plain
    operations instead. Compiled graphs are not asked: there torch looks into the operator.
    """
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
