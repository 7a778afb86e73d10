"""Where blocks come from: one interface, and its plainest backend."""

from collections.abc import Hashable, Iterable
from typing import Protocol

import torch


class Fence(Protocol):
    """The end of the work that was queued on a block before its release."""

    def done(self) -> bool:
        """Whether the work has ended, without waiting for it."""

    def wait(self) -> None:
        """Wait on the host until the work has ended."""


class Fences(Protocol):
    """How a kind of memory orders its reuse after work that still runs."""

    @property
    def stream_ordered(self) -> bool:
        """Whether a block can be reused at once by the queue that used it last."""

    def capturing(self) -> bool:
        """Whether the calling thread captures a graph, when no fence may be made."""

    def current(self) -> Hashable:
        """The queue that the calling thread's work goes to."""

    def record(self, queues: Iterable[Hashable]) -> Fence:
        """Make a fence behind all work that is queued on `queues` now."""


class MemoryKind(Protocol):
    """A kind of memory that the pool takes blocks from."""

    @property
    def name(self) -> str:
        """What statistics call it."""

    @property
    def granularity(self) -> int:
        """The power of two, in bytes, that all block sizes are multiples of."""

    @property
    def fences(self) -> Fences | None:
        """None where all work on a block has ended when the call that does it returns."""

    @property
    def empty(self) -> torch.Tensor:
        """An empty tensor on the device of the memory."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a uint8 tensor of shape (nbytes,) with a storage of its own.

        Raises:
            RuntimeError: there is not enough memory.
        """


class PageableMemory:
    """Ordinary host memory."""

    name = "cpu"
    granularity = 64
    fences = None

    def __init__(self) -> None:
        self.empty = torch.empty(0)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a uint8 tensor of shape (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
