"""Leases, and what becomes of a tensor when its lease ends."""

import weakref
from collections.abc import Hashable
from typing import Any, NoReturn, Protocol

import torch

from dilated_pool._errors import LeaseReleasedError
from dilated_pool._shelf import MemoryBlock
from dilated_pool._torch_internals import increment_version


class Owner(Protocol):
    """The pool of a lease, as the lease knows it; any thread may call this at any time."""

    def _end(self, number: int) -> MemoryBlock | None:
        """Let a lease end: its block for the one caller that ends it, None for all others."""

    def _take_back(self, block: MemoryBlock) -> None:
        """Take in the block of a lease that ended."""

    def _drop(self, number: int) -> None:
        """Note that a lease is gone which nobody ended; takes no lock."""

    def _use(self, number: int, queue: Hashable) -> None:
        """Note that a queue works on a lease's block; LeaseReleasedError if the lease ended."""


class ReleasedTensor(torch.Tensor):
    """The class that the tensor of a released lease becomes: every use of it is an error."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise LeaseReleasedError(
            "this tensor's lease was released, and the pool may have lent its memory again"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "<tensor of a released lease>"


class Lease:
    """The right to use a tensor until `release`. Also a context manager of the tensor.

    A lease that is dropped without a release ends when its tensor, and everything that shares the
    tensor's memory, is gone.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> lease = pool.lease((2, 3))
        >>> lease.tensor.fill_(1.0).sum()
        tensor(6.)
        >>> lease.release()
    """

    __slots__ = ("__weakref__", "_number", "_owner", "_tensor")

    def __init__(self, owner: Owner, number: int, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._owner = owner
        self._number = number

    @property
    def tensor(self) -> torch.Tensor:
        """The leased tensor, contiguous and uninitialized.

        Raises:
            LeaseReleasedError: the lease was released.
        """
        if self._tensor is None:
            raise LeaseReleasedError("the lease was released")
        return self._tensor

    def release(self) -> None:
        """End the lease; the second and later calls do nothing.

        The tensor object becomes unusable at once. If anything else still shares its memory, such
        as a view or a graph that saved it, the block is set apart until that is gone; a backward
        pass that needs the memory raises torch's error about in-place modification.
        """
        block = self._owner._end(self._number)
        if block is None:
            return
        tensor = self._tensor
        assert tensor is not None
        self._tensor = None
        increment_version((tensor,))
        if tensor._use_count() == 1:  # type: ignore[attr-defined]
            # No graph, view or operation in flight shares the tensor: it can let go of its memory,
            # so that a variable which still names it does not keep the block from being reused.
            tensor.data = block.shelf.empty
        else:
            block.ghost = weakref.ref(tensor)
        tensor.__class__ = ReleasedTensor
        self._owner._take_back(block)

    def record_stream(self, stream: Hashable) -> None:
        """Tell that work of another CUDA stream uses the tensor, before the lease is released.

        Without effect on pageable host memory.

        Raises:
            LeaseReleasedError: the lease was released.
        """
        self._owner._use(self._number, stream)

    def __enter__(self) -> torch.Tensor:
        return self.tensor

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        # The garbage collector can run this anywhere, also inside the pool: take no lock.
        if self._tensor is not None:
            self._owner._drop(self._number)

    def __repr__(self) -> str:
        if self._tensor is None:
            return "<released lease>"
        return f"<lease {self._number} of {self._tensor.dtype} {list(self._tensor.shape)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease cannot be copied or pickled: it stands for memory of this process")


class PlainLease:
    """A lease of memory from torch, for where a pool's bookkeeping cannot go along.

    That is in code that torch.compile or a torch.func transform traces, and in the capture of a
    CUDA graph: there the compiler, the transform or the graph manages the memory.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def release(self) -> None:
        """Do nothing: torch frees the memory."""

    def record_stream(self, stream: Hashable) -> None:
        """Do nothing: torch orders the reuse of the memory."""

    def __enter__(self) -> torch.Tensor:
        return self.tensor

    def __exit__(self, *error: object) -> None:
        pass
