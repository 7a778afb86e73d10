"""Which calls the `triton` backend can serve, and doors to launch kernels by."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HERE = nullcontext()


def unsupported(query: Tensor, key: Tensor) -> str | None:
    """Why the backend cannot serve these tensors (..., heads, head_dim); None if it can."""
    if query.device.type != "cuda":
        return f"it needs CUDA tensors, these are on {query.device.type}"
    if not _HAS_TRITON:
        return "triton is not installed"
    if query.dtype not in _DTYPES:
        return f"it computes in float16, bfloat16 and float32, these are {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"its head_dim is at most {MAX_HEAD_DIM}, this is {query.shape[-1]}"
    if max(query.shape[-3], key.shape[-3]) >= 2**31 - 2**16:
        return "its positions are 32-bit integers"
    # torch.compile takes the properties of a device as constants, and warns of caches.
    capability = _capability if torch.compiler.is_compiling() else _known_capability
    if torch.version.hip is None and capability(query.device.index or 0) < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def _capability(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


_known_capability = cache(_capability)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels are launched where a tensor is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def relaunched(kernel: Any) -> Callable[..., None]:
    """A kernel of triton behind a door of its own, which knows the binaries it has launched."""
    from dilated_core._triton._triton_internals import Relaunch

    return Relaunch(kernel)
