"""What the pool is asked for: requests of leases, and the checks of all arguments."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LeaseRequest:
    """A request of a tensor that was checked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device  # a CUDA device with its index
    pin_memory: bool
    nbytes: int


def check_count(name: str, value: object) -> None:
    """Raise unless a value is an int of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int. Got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more. Got {value}.")


def check_factor(name: str, value: object) -> None:
    """Raise unless a value is a finite number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or None. Got {value!r}.")
    if not 1 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and 1 or more, or None. Got {value}.")


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as a tuple of int."""
    try:
        size = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"shape must be a sequence of int. Got {shape!r}.") from None
    if min(size, default=0) < 0:
        raise ValueError(f"shape must have no negative length. Got {size}.")
    return size


def check_device(device: torch.device | str, pin_memory: bool) -> torch.device:
    """A device that the pool serves, a CUDA device with its index."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a CPU or CUDA device. Got {device!r}.") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA device. Got {device!r}.")
    if pin_memory and place.type != "cpu":
        raise ValueError(f"device must be 'cpu' where pin_memory is True. Got {device!r}.")
    if (pin_memory or place.type == "cuda") and not torch.cuda.is_available():
        wanted = "pin_memory=True" if pin_memory else f"device={device!r}"
        raise ValueError(f"{wanted} needs a CUDA device, and torch finds none")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place
