"""Shelves of idle blocks, each of one kind of memory and of one of the sizes that there are."""

import weakref
from collections.abc import Hashable
from sys import getrefcount

import torch

from dilated_pool._errors import PoolCorruptionError
from dilated_pool._memory import Fence, MemoryKind
from dilated_pool._requests import LeaseRequest
from dilated_pool._torch_internals import storage_use_count, tensor_use_count

POISON = 0xFF  # NaN in every floating-point type of torch that has one, -1 in signed integers
_MAX_TEMPLATES = 8


class MemoryBlock:
    """One storage of the size of its shelf, and what the pool knows about its present use.

    A lease's tensor is `template.detach()`: a new tensor object each time, without autograd
    history, which shares the storage *and its version counter* with all others made this way.
    """

    __slots__ = (
        "base",
        "fence",
        "ghost",
        "handle",
        "holders",
        "kept",
        "number",
        "owners",
        "queues",
        "request",
        "shelf",
        "stack",
        "storage",
        "templates",
    )

    def __init__(self, shelf: "Shelf", base: torch.Tensor) -> None:
        self.shelf = shelf
        self.base = base
        self.handle = base.untyped_storage()
        self.storage = self.handle._cdata
        self._count_own()
        self.templates: dict[LeaseRequest, torch.Tensor] = {}
        self.request: LeaseRequest  # of the present or the last lease
        self.queues: set[Hashable] = set()
        self.fence: Fence | None = None
        self.ghost: weakref.ref[torch.Tensor] | None = None
        self.kept = False
        self.number = 0
        self.stack: tuple[str, ...] | None = None

    def new_template(self, request: LeaseRequest) -> torch.Tensor:
        """Make and keep a request's private tensor; only while nobody else holds the storage."""
        if len(self.templates) == _MAX_TEMPLATES:
            self.templates.clear()
        with torch.inference_mode(False), torch.no_grad():
            part = self.base[: request.nbytes].view(request.dtype).view(request.shape)
            template = self.templates[request] = part.detach()
            del part
        self._count_own()
        return template

    def _count_own(self) -> None:
        """Take the references that there are now for the pool's own."""
        self.owners = storage_use_count(self.storage)
        self.holders = getrefcount(self.handle)

    def is_unshared(self) -> bool:
        """Whether only the pool holds the storage, once the released tensor let go of it."""
        tensor = self.ghost() if self.ghost is not None else None
        if tensor is not None and tensor_use_count(tensor) == 1:
            with torch._C.DisableTorchFunctionSubclass():
                tensor.data = self.shelf.empty
        alone = storage_use_count(self.storage) == self.owners
        return alone and getrefcount(self.handle) == self.holders

    def can_serve(self, queue: Hashable) -> bool:
        """Whether work of `queue` on the block would come after all earlier work on it."""
        if self.at_rest():
            return True
        fences = self.shelf.fences
        return fences is not None and fences.stream_ordered and self.queues == {queue}

    def at_rest(self) -> bool:
        """Whether no device works on the block any more."""
        return self.fence is None or self.fence.done()

    def poison(self) -> None:
        """Overwrite the block."""
        self.base.fill_(POISON)

    def check_poison(self) -> None:
        """Raise PoolCorruptionError if the block was written to since it was poisoned."""
        wrong = (self.base != POISON).nonzero()
        if len(wrong) > 0:
            raise PoolCorruptionError(
                f"{len(wrong)} bytes of an idle block of {len(self.base)} bytes were written, "
                f"the first at offset {int(wrong[0])}; it was last leased as "
                f"{self.request.dtype} {list(self.request.shape)} on {self.shelf.memory.name}"
            )


class Shelf:
    """The idle blocks of one size in one memory, the longest idle first."""

    __slots__ = ("empty", "fences", "free", "memory", "size")

    def __init__(self, memory: MemoryKind, size: int) -> None:
        self.memory = memory
        self.size = size
        self.fences = memory.fences
        self.empty = memory.empty
        self.free: list[MemoryBlock] = []

    def take(self, queue: Hashable) -> MemoryBlock | None:
        """Remove and return the block used last among those that `queue` can use now."""
        for index in range(len(self.free) - 1, -1, -1):
            if self.free[index].can_serve(queue):
                return self.free.pop(index)
        return None

    def new_block(self) -> MemoryBlock:
        """Allocate a block."""
        # Tensors born in inference mode have no version counter.
        with torch.inference_mode(False):
            return MemoryBlock(self, self.memory.allocate(self.size))


def class_size(nbytes: int, granularity: int) -> int:
    """The size in bytes of the smallest block that holds `nbytes`.

    There are eight sizes per power of two, (8 + i) * 2**k bytes, i = 1 to 8, as far as they are
    multiples of the granularity. So a request is rounded up by less than an eighth of itself, or,
    of less than eight granules, by less than one granule.

    Args:
        nbytes: requested size, 0 or more; 0 is served like 1.
        granularity: a power of two that divides all sizes.
    """
    nbytes = max(nbytes, 1)
    step = max(granularity, 1 << max((nbytes - 1).bit_length() - 4, 0))
    return -(-nbytes // step) * step
