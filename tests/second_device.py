"""A second device, emulated: its tensors hold CPU data, and what it is asked to do is counted.

`DeviceTensor` claims another device than the CPU, and behaves as a CUDA tensor does to whoever asks
`is_cuda`. `second_device` counts the launches of its operations and of the Triton kernels, which
the interpreter runs, and the waits: values read back, and copies from the host. An operation on
tensors of two devices raises, as it does on a card.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from multialign.ops import multiplies_float64_fast

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

__all__ = ["DEVICE", "DeviceTensor", "Traffic", "on_device", "second_device", "to_host"]

DEVICE = torch.device("meta")
"""What the device is called: torch has no tensors of its own there."""

# What launches nothing: views, storage, and what runs on the host.
_FREE = frozenset(
    [
        "view",
        "expand",
        "transpose",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "as_strided",
        "permute",
        "split",
        "split_with_sizes",
        "unbind",
        "alias",
        "t",
        "diagonal",
        "_unsafe_view",
        "lift_fresh",
        "_reshape_alias",
        "unfold",
        "lift",
        "view_as_real",
        "real",
        "_conj",
        "chunk",
        "movedim",
        "narrow",
        "resolve_conj",
        "resolve_neg",
        "view_as_complex",
        "imag",
        "detach_",
        "empty",
        "new_empty",
        "empty_like",
        "empty_strided",
        "new_empty_strided",
        "set_",
        "resize_",
    ]
)
# What reads values of the device, or has a result whose shape depends on them.
_WAITS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "bincount",
        "_linalg_check_errors",
        "masked_select",
        "is_nonzero",
        "equal",
        "repeat_interleave",
    ]
)
_INDEXES = ("index", "index_put", "index_put_")


@dataclass
class Traffic:
    """What a device was asked to do."""

    float64: bool = True
    """Whether it has float64; a result in float64 raises otherwise."""
    operations: Counter[str] = field(default_factory=Counter)
    """Launches by the name of the operation or kernel."""
    waiting: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Waits by their cause and by the line of multialign."""

    @property
    def launches(self) -> int:
        """Operations and kernels launched."""
        return self.operations.total()

    @property
    def waits(self) -> int:
        """Values read back, and copies from the host, for which the host waits."""
        return self.waiting.total()

    def wait(self, cause: str) -> None:
        """Count a wait, and the line that it comes from."""
        for frame in reversed(traceback.extract_stack()):
            if "/multialign/" in frame.filename:
                place = f"{frame.filename.split('/multialign/')[-1]}:{frame.lineno}"
                self.waiting[cause, place] += 1
                return
        self.waiting[cause, "elsewhere"] += 1


_traffic = Traffic()


class DeviceTensor(torch.Tensor):
    """A tensor of the second device, with its data in `inner` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        if inner.dtype == torch.float64 and not _traffic.float64:
            raise TypeError("this device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner})"

    def tolist(self) -> Any:
        _traffic.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor of a device has no array of NumPy")

    def new_tensor(self, data: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        return _tensor(data, dtype=dtype or self.dtype, device=DEVICE)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, list):
            index = _tensor(index, device=DEVICE)
        return super().__getitem__(index)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


def on_device(x: Tensor) -> DeviceTensor:
    """Return a copy of a CPU tensor on the device, which is no part of the traffic."""
    with _disable_current_modes():
        return DeviceTensor(x.detach().clone())


def to_host(x: Tensor) -> Tensor:
    """Return the data of a tensor of either device, which is no part of the traffic."""
    return _inner(x.detach())


@contextmanager
def second_device(*, float64: bool = True) -> Iterator[Traffic]:
    """Run the body with a second device and count what it is asked to do."""
    global _traffic
    before, _traffic = _traffic, Traffic(float64=float64)
    with ExitStack() as stack:
        stack.callback(globals().update, _traffic=before)
        stack.enter_context(patch.object(torch, "tensor", _tensor))
        stack.enter_context(patch.object(torch, "autocast", _autocast))
        # The device is a card with fast float64.
        stack.enter_context(_replaced("multiplies_float64_fast", multiplies_float64_fast, _yes))
        if find_spec("triton"):
            from multialign.ops._triton.launch import launch

            stack.enter_context(_replaced("launch", launch, _launch))
        lifts = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Mode())
        yield _traffic


_host_tensor, _host_autocast = torch.tensor, torch.autocast


@contextmanager
def _replaced(name: str, function: Any, other: Any) -> Iterator[None]:
    """Replace a function of multialign wherever it was imported."""
    with ExitStack() as stack:
        ours = [module for key, module in sys.modules.items() if key.startswith("multialign")]
        for module in ours:
            if getattr(module, name, None) is function:
                stack.enter_context(patch.object(module, name, other))
        yield


def _yes(device: torch.device) -> bool:
    return True


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    if device is None or torch.device(device) != DEVICE:
        return _host_tensor(data, device=device, **kwargs)
    _traffic.wait("copy to the device")
    with torch._C._DisableTorchDispatch(), _disable_current_modes():
        return DeviceTensor(_host_tensor(data, dtype=kwargs.get("dtype")))


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    return _host_autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    if programs > 0:
        _traffic.operations[kernel.fn.__name__] += 1
        _check_places(kernel.fn.__name__, arguments)
        with torch._C._DisableTorchDispatch(), _disable_current_modes():
            kernel[(programs,)](*map(_inner, arguments), enable_fp_fusion=True, **options)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


def _check_places(name: str, values: Any) -> None:
    """Raise if a CPU tensor with dimensions stands beside tensors of the device."""
    if any(isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and x.ndim for x in values):
        raise RuntimeError(f"{name} is given tensors of two devices")


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.name().split("::")[1].split(".")[0]
    flat = tree_flatten((args, kwargs))[0]
    ours = [x for x in flat if isinstance(x, DeviceTensor)]
    if ours and function.namespace == "multialign":
        with _Mode():
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            return function._op_dk(key, *args, **kwargs)
    if ours and torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    ):
        with _Mode():
            return function.decompose(*args, **kwargs)
    device = kwargs.get("device")
    goes = device is not None and torch.device(device) == DEVICE
    stays = bool(ours) and (device is None or goes)
    host_kwargs = tree_map(_inner, {**kwargs, "device": torch.device("cpu")} if goes else kwargs)
    host_args = tree_map(_inner, args)
    if name in ("_to_copy", "copy_"):
        from_device = isinstance(args[1 if name == "copy_" else 0], DeviceTensor)
        to_device = isinstance(args[0], DeviceTensor) if name == "copy_" else goes or stays
        if from_device and to_device:
            _traffic.operations[name] += 1
        elif from_device != to_device:
            _traffic.wait("copy to the device" if to_device else "copy to the host")
    elif stays or goes:
        if ours:
            _check_places(name, flat)
        _count(name, args)
    result = function(*host_args, **host_kwargs)
    if not (stays or goes):
        return result

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DeviceTensor):
            return x
        for one in ours:
            if one.inner is x:  # an operation in place returns the very tensor that it was given
                return one
        return DeviceTensor(x)

    return tree_map(place, result)


def _count(name: str, args: Any) -> None:
    if name in _WAITS:
        _traffic.wait(name)
        return
    if name in _INDEXES and any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(args[1])[0]
    ):
        _traffic.wait("boolean index")
    if name not in _FREE:
        _traffic.operations[name] += 1
