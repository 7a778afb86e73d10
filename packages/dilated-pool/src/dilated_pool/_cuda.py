"""CUDA memory, pinned host memory, and the events that order their reuse."""

import mmap
import weakref
from collections.abc import Hashable, Iterable
from typing import cast

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts of the process


class CudaFence:
    """One event for each stream that used a block."""

    def __init__(self, streams: Iterable[torch.cuda.Stream]) -> None:
        self._events = [stream.record_event() for stream in streams]

    def done(self) -> bool:
        """Whether all events have completed."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Wait on the host for all events."""
        for event in self._events:
            event.synchronize()


class CudaFences:
    """Fences made of CUDA events.

    Args:
        device: the device whose current stream counts; None for the current device.
        stream_ordered: whether work of one stream may follow on a block without waiting. False for
            host memory, which the host can overwrite while a copy from it is still queued.
    """

    def __init__(self, device: torch.device | None, *, stream_ordered: bool) -> None:
        self._device = device
        self.stream_ordered = stream_ordered

    def capturing(self) -> bool:
        """Whether the current stream captures a graph."""
        return torch.cuda.is_current_stream_capturing()

    def current(self) -> Hashable:
        """The current stream."""
        return torch.cuda.current_stream(self._device)

    def record(self, queues: Iterable[Hashable]) -> CudaFence:
        """Record an event on each stream."""
        return CudaFence(cast("Iterable[torch.cuda.Stream]", queues))


class CudaMemory:
    """Memory of a CUDA device, from torch's caching allocator.

    Args:
        device: a CUDA device with its index.
        mem_pool: the torch.cuda.MemPool to allocate from; None for the allocator's shared memory.
    """

    granularity = 512  # what the caching allocator rounds to

    def __init__(self, device: torch.device, mem_pool: torch.cuda.MemPool | None) -> None:
        self.name = str(device)
        self.fences = CudaFences(device, stream_ordered=True)
        self.empty = torch.empty(0, device=device)
        self._device = device
        self._mem_pool = mem_pool

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a uint8 tensor of shape (nbytes,)."""
        if self._mem_pool is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        with torch.cuda.use_mem_pool(self._mem_pool, self._device):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


class PinnedMemory:
    """Page-locked host memory, which a device copies from and to without the host waiting.

    Ordinary pages are registered with CUDA, since torch's own pinned allocator rounds sizes up to
    powers of two. They are mapped, not allocated: `Tensor.is_pinned` asks about the first byte of
    the storage, so that has to be the first byte of the pages.
    """

    name = "cpu, pinned"
    granularity = mmap.PAGESIZE

    def __init__(self) -> None:
        self.fences = CudaFences(None, stream_ordered=False)
        self.empty = torch.empty(0)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a pinned uint8 tensor of shape (nbytes,) that starts on a page."""
        block = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        address = block.data_ptr()
        _register(address, nbytes)
        # Registered pages must not outlive the memory; at exit the process takes both along.
        weakref.finalize(block, _unregister, address).atexit = False
        return block


def _register(address: int, nbytes: int) -> None:
    torch.cuda.init()
    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if code != 0:
        raise RuntimeError(f"cudaHostRegister refused {nbytes} bytes with error {code}")


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
