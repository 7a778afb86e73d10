"""All shelves of a pool, and which of them serves a request."""

from collections.abc import Sequence
from typing import Any

import torch

from dilated_pool._cuda import CudaMemory, PinnedMemory
from dilated_pool._memory import MemoryKind, PageableMemory
from dilated_pool._requests import LeaseRequest, check_device, check_shape
from dilated_pool._shelf import Shelf, class_size

_MAX_KNOWN = 4096

_Arguments = tuple[Any, torch.dtype, torch.device | str, bool]


class Stock:
    """Checks requests and finds their shelves; remembers in `known` what it found.

    Args:
        mem_pool: where CUDA blocks are allocated; None for torch's caching allocator.
    """

    def __init__(self, mem_pool: torch.cuda.MemPool | None) -> None:
        self.known: dict[_Arguments, tuple[LeaseRequest, Shelf]] = {}
        self.memories: dict[tuple[torch.device, bool], MemoryKind] = {}
        self._shelves: dict[tuple[MemoryKind, int], Shelf] = {}
        self._mem_pool = mem_pool

    @property
    def shelves(self) -> list[Shelf]:
        """All shelves that there are now."""
        return list(self._shelves.values())

    def find(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, pin: bool
    ) -> tuple[LeaseRequest, Shelf]:
        """A request, and the shelf whose blocks fit it best."""
        place = check_device(device, pin)
        size = check_shape(shape)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype. Got {dtype!r}.")
        key = (size, dtype, place, pin)
        found = self.known.get(key)
        if found is None:
            nbytes = dtype.itemsize
            for length in size:
                nbytes *= length
            found = LeaseRequest(size, dtype, place, pin, nbytes), self._shelf(place, pin, nbytes)
            self._remember(key, found)
        if place == torch.device(device):
            # Else the index was left out, and means another device once the current one changes.
            self._remember((size, dtype, device, pin), found)
        return found

    def _remember(self, key: _Arguments, found: tuple[LeaseRequest, Shelf]) -> None:
        if len(self.known) >= _MAX_KNOWN:
            self.known.clear()
        self.known[key] = found

    def _shelf(self, device: torch.device, pin: bool, nbytes: int) -> Shelf:
        place = device, pin
        # setdefault is atomic: two threads get the same memory, and the same shelf.
        memory = self.memories.get(place)
        memory = memory or self.memories.setdefault(place, self._new_memory(device, pin))
        key = memory, class_size(nbytes, memory.granularity)
        return self._shelves.get(key) or self._shelves.setdefault(key, Shelf(*key))

    def _new_memory(self, device: torch.device, pin: bool) -> MemoryKind:
        if device.type == "cuda":
            return CudaMemory(device, self._mem_pool)
        return PinnedMemory() if pin else PageableMemory()
