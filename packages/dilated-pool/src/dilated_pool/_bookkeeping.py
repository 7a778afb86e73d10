"""The bookkeeping of a pool: which blocks there are, who has them, and what they add up to.

The first methods are called without the lock, those after `_tidy` with it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from sys import getrefcount

import torch

from dilated_pool import _callers
from dilated_pool._errors import (
    LeaseReleasedError,
    PoolClosedError,
    PoolLimitError,
    PoolLockedError,
    PoolReentryError,
)
from dilated_pool._events import EventKind, EventLog
from dilated_pool._lease import Lease
from dilated_pool._requests import LeaseRequest
from dilated_pool._shelf import MemoryBlock, Shelf
from dilated_pool._stock import Stock
from dilated_pool._torch_internals import check_use_counts, storage_use_count


class Bookkeeping:
    """What UnifiedMemoryPool does behind its public methods."""

    def __init__(
        self,
        limit_bytes: int | None,
        overhead: float | None,
        fill: str | None,
        stacks: bool,
        cuda_mem_pool: torch.cuda.MemPool | None,
    ) -> None:
        check_use_counts()
        self._limit = limit_bytes
        self._overhead = overhead
        self._fill = fill
        self._stacks = stacks
        self._mem_pool = cuda_mem_pool

        self._stock = Stock(cuda_mem_pool)
        self._known = self._stock.known
        # Re-entrant only so that a finalizer or signal handler which interrupts the pool finds
        # `_busy` set instead of waiting for itself.
        self._lock = threading.RLock()
        self._busy = False
        self._closed = False
        self._locked = False
        self._log: EventLog | None = None
        # Whether what is returned must be gone through at once.
        self._prompt = fill is not None

        self._live: dict[int, MemoryBlock] = {}
        # What ended, until a call that holds the lock goes through it: blocks that were released,
        # and numbers of leases that were dropped.
        self._returned: deque[MemoryBlock] = deque()
        self._dropped: deque[int] = deque()
        self._quarantine: list[MemoryBlock] = []
        self._growing_bytes = 0
        self._live_bytes = 0
        self._reserved_bytes = 0
        self._peak_live_bytes = 0
        self._peak_live_leases = 0
        self._peak_reserved_bytes = 0
        self._total_leases = 0
        self._total_leased_bytes = 0
        self._misses = 0
        self._trimmed_bytes = 0

    def _open(self, block: MemoryBlock, request: LeaseRequest) -> Lease:
        """Make the lease of a block that was booked."""
        try:
            if self._fill is not None:
                block.check_poison()
            if self._stacks:
                block.stack = _callers.stack()
            template = block.templates.get(request)
            if template is None:
                template = block.new_template(request)
            return Lease(self, block.number, template.detach())
        except BaseException:
            if self._end(block.number) is not None:
                self._take_back(block)
            raise

    def _grow(self, request: LeaseRequest, shelf: Shelf, queue: Hashable) -> MemoryBlock:
        """Book a block that came back from quarantine meanwhile, or else a new one."""
        with self._section():
            self._tidy()
            block = shelf.take(queue)
            if block is not None:
                self._book(block, request)
                return block
            self._admit(shelf, request.nbytes)
        block = self._allocate(shelf)
        with self._section():
            self._growing_bytes -= shelf.size
            self._misses += 1
            self._book(block, request)
        return block

    def _allocate(self, shelf: Shelf) -> MemoryBlock:
        """Allocate a block that was admitted; where memory is short, trim and try once more."""
        try:
            try:
                block = shelf.new_block()
            except RuntimeError:
                with self._section():
                    self._tidy()
                    self._shrink(0, 0)
                block = shelf.new_block()
            if self._fill is not None:
                block.poison()
            return block
        except BaseException:
            with self._section():
                self._growing_bytes -= shelf.size
                self._reserved_bytes -= shelf.size
            raise

    def _end(self, number: int) -> MemoryBlock | None:
        # One step, which no other thread can divide: only one caller gets the block.
        return self._live.pop(number, None)

    def _drop(self, number: int) -> None:
        self._dropped.append(number)

    def _use(self, number: int, queue: Hashable) -> None:
        block = self._live.get(number)
        if block is None:
            raise LeaseReleasedError("the lease was released")
        block.queues.add(queue)

    def _take_back(self, block: MemoryBlock) -> None:
        """As `Owner`, without the lock: the next call that holds it goes through what returned."""
        fences = block.shelf.fences
        if fences is not None:
            block.queues.add(fences.current())
        self._returned.append(block)
        if fences is None and not self._prompt:
            return
        with self._lock:
            if not self._busy:
                self._busy = True
                try:
                    self._drain()
                finally:
                    self._busy = False

    @contextlib.contextmanager
    def _section(self) -> Iterator[None]:
        """Hold the lock, as only one call at a time may, even within one thread."""
        with self._lock:
            if self._busy:
                raise PoolReentryError
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _tidy(self) -> None:
        """Take in all that was returned, and what left quarantine."""
        self._drain()
        if self._quarantine:
            self._quarantine = [block for block in self._quarantine if not self._settle(block)]

    def _drain(self) -> None:
        """Count what was returned as released, and shelve or quarantine it."""
        while self._dropped:
            dropped = self._live.pop(self._dropped.popleft(), None)
            if dropped is not None:
                self._returned.append(dropped)
        returned = self._returned
        while returned:
            block = returned.popleft()
            self._live_bytes -= block.request.nbytes
            if self._log is not None:
                self._write(EventKind.RELEASE, block)
            if not self._settle(block):
                self._quarantine.append(block)

    def _book(self, block: MemoryBlock, request: LeaseRequest) -> None:
        """Count a block as leased."""
        number = self._total_leases + 1
        self._total_leases = block.number = number
        block.request = request
        live = self._live
        live[number] = block
        nbytes = request.nbytes
        self._total_leased_bytes += nbytes
        live_bytes = self._live_bytes + nbytes
        self._live_bytes = live_bytes
        if live_bytes > self._peak_live_bytes:
            self._peak_live_bytes = live_bytes
        if len(live) > self._peak_live_leases:
            self._peak_live_leases = len(live)
        if self._log is not None:
            self._write(EventKind.LEASE, block)

    def _settle(self, block: MemoryBlock) -> bool:
        """Shelve a block if only the pool holds its memory; whether it does."""
        if block.ghost is not None:
            if not block.is_unshared():
                return False
            block.ghost = None
        elif (  # the same, without a call on the usual way
            storage_use_count(block.storage) != block.owners
            or getrefcount(block.handle) != block.holders
        ):
            return False
        shelf = block.shelf
        if (shelf.fences is not None or self._prompt) and not self._prepare(block):
            return False
        shelf.free.append(block)
        if self._closed:
            self._shrink(0, 0, wait=True)
        return True

    def _prepare(self, block: MemoryBlock) -> bool:
        """Poison and fence a block; whether that could be done."""
        fences = block.shelf.fences
        if fences is not None and fences.capturing():
            return False
        if self._fill is not None:
            if fences is not None:
                fences.record(block.queues).wait()
                block.queues.add(fences.current())
            block.poison()
        if fences is not None:
            block.fence = fences.record(block.queues)
        return True

    def _admit(self, shelf: Shelf, nbytes: int) -> None:
        """Count a new block of a shelf as reserved, after idle ones made room for it."""
        if self._closed:
            raise PoolClosedError(f"the pool is closed, and {_callers.caller()} asked for memory")
        if self._locked:
            raise PoolLockedError(
                f"the pool is locked, and {_callers.caller()} needs a new block of {shelf.size} "
                f"bytes of {shelf.memory.name} memory: reserve it before lock()"
            )
        if self._overhead is not None and nbytes > 0:
            most = int(self._overhead * max(self._peak_live_bytes, self._live_bytes + nbytes))
            self._shrink(shelf.size, most, spare_kept=True)
        if self._limit is not None:
            # At the limit the pool even waits for devices before it gives up.
            fits = (
                self._shrink(shelf.size, self._limit, spare_kept=True)
                or self._shrink(shelf.size, self._limit)
                or self._shrink(shelf.size, self._limit, wait=True)
            )
            if not fits:
                raise PoolLimitError(shelf.size, self._limit, self._situation())
        self._growing_bytes += shelf.size
        self._reserved_bytes += shelf.size
        if self._reserved_bytes > self._peak_reserved_bytes:
            self._peak_reserved_bytes = self._reserved_bytes
        if self._log is not None:
            self._write(EventKind.GROW, None)

    def _shrink(
        self, size: int, most: int, *, spare_kept: bool = False, wait: bool = False
    ) -> bool:
        """Free idle blocks until `size` more bytes make at most `most`; whether they do."""
        while (excess := self._reserved_bytes + size - most) > 0:
            if not self._evict(excess, spare_kept=spare_kept, wait=wait):
                return False
        return True

    def _evict(self, excess: int, *, spare_kept: bool = False, wait: bool = False) -> bool:
        """Free one idle block: the smallest that makes up for `excess`, else the largest.

        Returns:
            Whether there was a block to free.
        """
        candidates: list[MemoryBlock] = []
        for shelf in self._stock.shelves:
            for block in shelf.free:
                if not (spare_kept and block.kept) and (wait or block.at_rest()):
                    candidates.append(block)
                    break
        if not candidates:
            return False
        block = min(candidates, key=lambda x: (x.shelf.size < excess, abs(x.shelf.size - excess)))
        if block.fence is not None:
            block.fence.wait()
        block.shelf.free.remove(block)
        size = block.shelf.size
        # The memory goes before it is counted as gone, or the limit could be exceeded meanwhile.
        del block, candidates
        self._reserved_bytes -= size
        self._trimmed_bytes += size
        if self._log is not None:
            self._write(EventKind.TRIM, None)
        return True

    def _situation(self) -> str:
        quarantined = sum(block.shelf.size for block in self._quarantine)
        return (
            f"{self._reserved_bytes} bytes are reserved, {quarantined} of them quarantined, and "
            f"{len(self._live)} leases are live"
        )

    def _write(self, kind: EventKind, block: MemoryBlock | None) -> None:
        assert self._log is not None
        self._log.add(kind, block, self._live_bytes, self._reserved_bytes)

    def _start_as_child(self) -> None:
        """Go on in a forked child, where only the thread that forked exists."""
        self._lock = threading.RLock()
        self._busy = False
        self._reserved_bytes -= self._growing_bytes
        self._growing_bytes = 0
