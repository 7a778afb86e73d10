"""From the arguments of a request to its plan."""

import operator
from collections.abc import Sequence
from typing import Any

import torch

from dilated_pool._cuda import CudaMemory, PinnedMemory
from dilated_pool._memory import Memory, PageableMemory
from dilated_pool._shelf import Plan, Shelves

_MAX_PLANS = 4096

Request = tuple[Any, torch.dtype, "torch.device | str", bool]


class Planner:
    """Checks requests, and remembers what it checked.

    Args:
        mem_pool: where CUDA blocks are allocated; None for torch's caching allocator.
    """

    def __init__(self, mem_pool: torch.cuda.MemPool | None) -> None:
        self.plans: dict[Request, Plan] = {}
        self.shelves = Shelves()
        self.memories: dict[tuple[torch.device, bool], Memory] = {}
        self._mem_pool = mem_pool

    def plan(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, pin: bool
    ) -> Plan:
        """Return the plan of a request."""
        place = check_device(device, pin)
        size = check_shape(shape)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        key = (size, dtype, place, pin)
        plan = self.plans.get(key)
        if plan is None:
            nbytes = dtype.itemsize
            for length in size:
                nbytes *= length
            shelf = self.shelves.find(self._memory(place, pin), nbytes)
            plan = Plan(size, dtype, place, pin, nbytes, shelf)
            self._remember(key, plan)
        if place == torch.device(device):
            # Else the index was left out, and means another device once the current one changes.
            self._remember((size, dtype, device, pin), plan)
        return plan

    def _remember(self, key: Request, plan: Plan) -> None:
        if len(self.plans) >= _MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan

    def _memory(self, device: torch.device, pin: bool) -> Memory:
        known = self.memories.get((device, pin))
        return known or self.memories.setdefault((device, pin), self._new_memory(device, pin))

    def _new_memory(self, device: torch.device, pin: bool) -> Memory:
        if device.type == "cuda":
            return CudaMemory(device, self._mem_pool)
        return PinnedMemory() if pin else PageableMemory()


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple of int."""
    try:
        size = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"shape must be a sequence of int, got {shape!r}") from None
    if min(size, default=0) < 0:
        raise ValueError(f"shape must have no negative length, got {size}")
    return size


def check_device(device: torch.device | str, pin_memory: bool) -> torch.device:
    """Return a device that the pool serves, a CUDA device with its index."""
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA device, got {device!r}")
    if pin_memory and place.type != "cpu":
        raise ValueError(f"pin_memory=True needs device='cpu', got {device!r}")
    if (pin_memory or place.type == "cuda") and not torch.cuda.is_available():
        wanted = "pin_memory=True" if pin_memory else f"device={device!r}"
        raise ValueError(f"{wanted} needs a CUDA device, and torch finds none")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place
