"""The pool: leases of tensors from blocks that are kept, under a limit that holds."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch.compiler import is_compiling

from dilated_pool._bookkeeping import Bookkeeping
from dilated_pool._errors import PoolReentryError
from dilated_pool._events import EventLog
from dilated_pool._fork import POOLS
from dilated_pool._lease import Lease, PlainLease
from dilated_pool._memory import Fences
from dilated_pool._requests import LeaseRequest, check_count, check_factor
from dilated_pool._shelf import MemoryBlock, Shelf
from dilated_pool._stats import LeaseInfo, PoolStats

_transforms_active = torch._C._are_functorch_transforms_active


class UnifiedMemoryPool(Bookkeeping):
    """Lends tensors from blocks of host and device memory that it keeps and reuses.

    All methods can be called from any thread and any asyncio task. In a forked child the pool goes
    on with the memory it had; a pickled or copied pool is an empty one with the same settings.

    Inside torch.compile, torch.func transforms and the capture of CUDA graphs, leases are plain
    tensors from torch that the pool does not count.

    Args:
        limit_bytes: the most bytes that all blocks together, leased, idle or quarantined, may
            have; None for no limit.
        overhead: a new block pushes out idle ones rather than take the reserved bytes over
            `overhead` times the peak of live bytes; None to keep all idle blocks.
        fill: "poison" overwrites idle blocks and checks, when one is lent again, that nobody wrote
            to it in between; slow, for debugging.
        stacks: keep for `outstanding` where each lease was made; slow, for debugging.
        cuda_mem_pool: a torch.cuda.MemPool to take CUDA blocks from, such as one whose memory is
            registered with NCCL; None for the caching allocator that the rest of torch uses.

    Raises:
        TypeError: limit_bytes is not an int, or overhead not a number.
        ValueError: limit_bytes is negative, overhead not finite or below 1, or fill is unknown.

    Examples:
        >>> pool = UnifiedMemoryPool(limit_bytes=1 << 20)
        >>> with pool.borrow((100, 10), dtype=torch.float32, device="cpu") as buffer:
        ...     total = buffer.fill_(2.0).sum()
        >>> total, len(pool.outstanding())
        (tensor(2000.), 0)
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        overhead: float | None = 1.25,
        fill: Literal["poison"] | None = None,
        stacks: bool = False,
        cuda_mem_pool: torch.cuda.MemPool | None = None,
    ) -> None:
        if limit_bytes is not None:
            check_count("limit_bytes", limit_bytes)
        if overhead is not None:
            check_factor("overhead", overhead)
        if fill not in (None, "poison"):
            raise ValueError(f"fill must be None or 'poison'. Got {fill!r}.")
        super().__init__(limit_bytes, overhead, fill, stacks, cuda_mem_pool)
        POOLS.add(self)

    def lease(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
    ) -> Lease | PlainLease:
        """Lend a contiguous, uninitialized tensor of `shape` until the lease is released.

        Args:
            shape: lengths, each 0 or more.
            dtype: type of the elements.
            device: a CPU or CUDA device; "cuda" means the current one.
            pin_memory: take page-locked host memory.

        Raises:
            PoolLimitError: the pool is at its limit, and what is idle does not make enough room.
            PoolLockedError: the pool is locked and no idle block fits.
            PoolClosedError: the pool is closed.
            PoolReentryError: a finalizer or signal handler interrupted this pool.
            PoolCorruptionError: with fill="poison", an idle block was written to.
            TypeError: shape is not a sequence of int, dtype not a torch.dtype, or device no device.
            ValueError: a length is negative, or there is no such device or pinned memory for it.
        """
        if is_compiling() or _transforms_active():
            return PlainLease(torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory))
        try:
            request, shelf = self._known[shape, dtype, device, pin_memory]
        except (KeyError, TypeError):
            request, shelf = self._stock.find(shape, dtype, device, pin_memory)
        if shelf.fences is not None:
            return self._lease_fenced(request, shelf, shelf.fences)
        block: MemoryBlock | None = None
        with self._lock:
            if self._busy:
                raise PoolReentryError
            self._busy = True
            try:
                if self._returned or self._dropped:
                    self._drain()
                if shelf.free:
                    block = shelf.free.pop()
                    self._book(block, request)
            finally:
                self._busy = False
        if block is None:
            block = self._grow(request, shelf, None)
        return self._open(block, request)

    borrow = lease  # the name for `with`: as a context manager, a lease gives its tensor

    def reserve(
        self,
        shape: Sequence[int],
        *,
        count: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
    ) -> None:
        """Allocate ahead, so that `count` leases of `shape` at a time, beside the live ones, hit.

        The blocks stay until `trim`, `close` or the limit takes them.

        Raises:
            TypeError, PoolError: count is not an int, or as for `lease`.
            ValueError: count is negative, or as for `lease`.
        """
        check_count("count", count)
        request, shelf = self._stock.find(shape, dtype, device, pin_memory)
        with self._section():
            self._tidy()
            for block in shelf.free[-count:] if count else []:
                block.kept = True
            missing = count - len(shelf.free)
        for _ in range(missing):
            with self._section():
                self._admit(shelf, 0)
            block = self._allocate(shelf)
            with self._section():
                self._growing_bytes -= shelf.size
                block.request = request
                block.kept = True
                if shelf.fences is not None:
                    # The allocator may have given memory on which this queue still works.
                    block.queues = {shelf.fences.current()}
                if not self._settle(block):
                    self._quarantine.append(block)

    def lock(self) -> None:
        """Make growth an error: from now on a lease that no idle block can serve raises."""
        self._locked = True

    def unlock(self) -> None:
        """Allow growth again."""
        self._locked = False

    def trim(self, target_bytes: int = 0) -> int:
        """Give idle blocks back until at most `target_bytes` are reserved.

        Blocks on which a device still works stay. Host memory goes back to the C library, CUDA
        memory to torch's caching allocator.

        Returns:
            How many bytes were given back.
        """
        with self._section():
            self._tidy()
            before = self._reserved_bytes
            self._shrink(0, target_bytes)
            return before - self._reserved_bytes

    def close(self) -> None:
        """Give all idle blocks back and refuse new leases; live leases go on until released."""
        with self._section():
            self._closed = self._prompt = True
            self._tidy()
            self._shrink(0, 0, wait=True)

    def stats(self) -> PoolStats:
        """All counters."""
        with self._lock:
            # A signal handler may ask at any time, and then gets the counters as they are.
            if not self._busy:
                self._busy = True
                try:
                    self._tidy()
                finally:
                    self._busy = False
            idle = [block for shelf in self._stock.shelves for block in shelf.free]
            live = list(self._live.values())
            by_memory: dict[str, int] = {}
            for block in [*idle, *live, *self._quarantine]:
                name = block.shelf.memory.name
                by_memory[name] = by_memory.get(name, 0) + block.shelf.size
            return PoolStats(
                limit_bytes=self._limit,
                live_bytes=self._live_bytes,
                live_leases=len(live),
                peak_live_bytes=self._peak_live_bytes,
                peak_live_leases=self._peak_live_leases,
                total_leased_bytes=self._total_leased_bytes,
                total_leases=self._total_leases,
                hits=self._total_leases - self._misses,
                misses=self._misses,
                reserved_bytes=self._reserved_bytes,
                reserved_blocks=len(idle) + len(live) + len(self._quarantine),
                peak_reserved_bytes=self._peak_reserved_bytes,
                idle_bytes=sum(block.shelf.size for block in idle),
                idle_blocks=len(idle),
                quarantined_bytes=sum(block.shelf.size for block in self._quarantine),
                quarantined_blocks=len(self._quarantine),
                waste_bytes=sum(block.shelf.size for block in live) - self._live_bytes,
                trimmed_bytes=self._trimmed_bytes,
                reserved_by_memory=by_memory,
            )

    def reset_peak(self) -> None:
        """Start the peaks of `stats` anew, from what is live and reserved now."""
        with self._section():
            self._tidy()
            self._peak_live_bytes = self._live_bytes
            self._peak_live_leases = len(self._live)
            self._peak_reserved_bytes = self._reserved_bytes

    def outstanding(self) -> tuple[LeaseInfo, ...]:
        """What is known about each live lease, the oldest first."""
        with self._section():
            self._tidy()
            live = list(self._live.items())
        return tuple(_info(number, block) for number, block in live)

    @contextlib.contextmanager
    def record(self) -> Iterator[EventLog]:
        """Record all events of the pool in a log while the context lasts.

        Raises:
            RuntimeError: the pool is being recorded already.
        """
        log = EventLog()
        with self._section():
            if self._log is not None:
                raise RuntimeError("the pool is being recorded already")
            self._drain()
            self._log, prompt, self._prompt = log, self._prompt, True
        try:
            yield log
        finally:
            with self._section():
                self._drain()
                self._log, self._prompt = None, prompt or self._closed

    def _lease_fenced(
        self, request: LeaseRequest, shelf: Shelf, fences: Fences
    ) -> Lease | PlainLease:
        """Lease memory that devices work on."""
        if fences.capturing():
            tensor = torch.empty(
                request.shape,
                dtype=request.dtype,
                device=request.device,
                pin_memory=request.pin_memory,
            )
            return PlainLease(tensor)
        queue = fences.current()
        with self._section():
            self._drain()
            block = shelf.take(queue)
            if block is not None:
                self._book(block, request)
        if block is None:
            block = self._grow(request, shelf, queue)
        block.queues = {queue}
        return self._open(block, request)

    def _config(self) -> dict[str, Any]:
        return {
            "limit_bytes": self._limit,
            "overhead": self._overhead,
            "fill": self._fill,
            "stacks": self._stacks,
        }

    def __copy__(self) -> Self:
        return type(self)(**self._config(), cuda_mem_pool=self._mem_pool)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._mem_pool is not None:
            raise TypeError("a pool with a cuda_mem_pool cannot be pickled")
        return functools.partial(type(self), **self._config()), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(limit_bytes={self._limit}, reserved={self._reserved_bytes}, "
            f"live={self._live_bytes})"
        )


def _info(number: int, block: MemoryBlock) -> LeaseInfo:
    request = block.request
    return LeaseInfo(
        number=number,
        shape=request.shape,
        dtype=request.dtype,
        device=request.device,
        pin_memory=request.pin_memory,
        nbytes=request.nbytes,
        block_bytes=block.shelf.size,
        stack=block.stack,
    )
