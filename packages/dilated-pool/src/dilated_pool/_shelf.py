"""Shelves of idle blocks, and plans that lead from a request to its shelf."""

from collections.abc import Hashable, Iterator

import torch

from dilated_pool._block import Block
from dilated_pool._memory import Memory
from dilated_pool._size_classes import class_size


class Shelf:
    """The idle blocks of one size in one memory, the longest idle first."""

    __slots__ = ("empty", "fences", "free", "memory", "size")

    def __init__(self, memory: Memory, size: int) -> None:
        self.memory = memory
        self.size = size
        self.fences = memory.fences
        self.empty = memory.empty
        self.free: list[Block] = []

    def take(self, queue: Hashable) -> Block | None:
        """Remove and return the block used last among those that `queue` can use now."""
        for index in range(len(self.free) - 1, -1, -1):
            if self.free[index].can_serve(queue):
                return self.free.pop(index)
        return None

    def new_block(self) -> Block:
        """Allocate a block."""
        # Tensors born in inference mode have no version counter.
        with torch.inference_mode(False):
            return Block(self, self.memory.allocate(self.size))


class Plan:
    """A request that was checked: what is leased, and from which shelf."""

    __slots__ = ("device", "dtype", "nbytes", "pin_memory", "shape", "shelf")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        pin_memory: bool,
        nbytes: int,
        shelf: Shelf,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.pin_memory = pin_memory
        self.nbytes = nbytes
        self.shelf = shelf

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} on {self.shelf.memory.name}"


class Shelves:
    """All shelves of a pool by memory and size."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[Memory, int], Shelf] = {}

    def __iter__(self) -> Iterator[Shelf]:
        return iter(list(self._shelves.values()))

    def find(self, memory: Memory, nbytes: int) -> Shelf:
        """Return the shelf whose blocks fit `nbytes` best."""
        key = memory, class_size(nbytes, memory.granularity)
        # setdefault is atomic: two threads get the same shelf.
        return self._shelves.get(key) or self._shelves.setdefault(key, Shelf(*key))
