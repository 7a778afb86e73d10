"""A block: one storage, and the private tensors that leases are detached from."""

import weakref
from collections.abc import Hashable
from sys import getrefcount
from typing import TYPE_CHECKING

import torch

from dilated_pool._errors import PoolCorruptionError
from dilated_pool._memory import Fence
from dilated_pool._torch_internals import storage_use_count, tensor_use_count

if TYPE_CHECKING:
    from dilated_pool._shelf import Plan, Shelf

POISON = 0xFF  # NaN in every floating-point type of torch that has one, -1 in signed integers
_MAX_TEMPLATES = 8


class Block:
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
        "plan",
        "queues",
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
        self.templates: dict[Plan, torch.Tensor] = {}
        self.plan: Plan  # of the present or the last lease
        self.queues: set[Hashable] = set()
        self.fence: Fence | None = None
        self.ghost: weakref.ref[torch.Tensor] | None = None
        self.kept = False
        self.number = 0
        self.stack: tuple[str, ...] | None = None

    def new_template(self, plan: "Plan") -> torch.Tensor:
        """Make and keep the private tensor of a plan; only while nobody else holds the storage."""
        if len(self.templates) == _MAX_TEMPLATES:
            self.templates.clear()
        with torch.inference_mode(False), torch.no_grad():
            part = self.base[: plan.nbytes].view(plan.dtype).view(plan.shape)
            template = self.templates[plan] = part.detach()
            del part
        self._count_own()
        return template

    def _count_own(self) -> None:
        """Take the references that there are now for the pool's own."""
        self.owners = storage_use_count(self.storage)
        self.holders = getrefcount(self.handle)

    def is_unshared(self) -> bool:
        """Tell whether only the pool holds the storage, once the released tensor let go of it."""
        tensor = self.ghost() if self.ghost is not None else None
        if tensor is not None and tensor_use_count(tensor) == 1:
            with torch._C.DisableTorchFunctionSubclass():
                tensor.data = self.shelf.empty
        alone = storage_use_count(self.storage) == self.owners
        return alone and getrefcount(self.handle) == self.holders

    def can_serve(self, queue: Hashable) -> bool:
        """Tell whether work of `queue` on the block would come after all earlier work on it."""
        if self.at_rest():
            return True
        fences = self.shelf.fences
        return fences is not None and fences.stream_ordered and self.queues == {queue}

    def at_rest(self) -> bool:
        """Tell whether no device works on the block any more."""
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
                f"the first at offset {int(wrong[0])}; it was last leased as {self.plan}"
            )
