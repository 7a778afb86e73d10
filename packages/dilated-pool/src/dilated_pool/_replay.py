"""Run a recorded log against a pool."""

import dataclasses
import time
from collections.abc import Iterable

import torch

from dilated_pool._events import Event, EventKind
from dilated_pool._lease import Lease, PlainLease
from dilated_pool._pool import UnifiedMemoryPool
from dilated_pool._stats import PoolStats


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay took and left.

    Attributes:
        seconds: time for all leases and releases.
        stats: the pool's counters at the end.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> with pool.record() as log:
        ...     pool.lease((16,)).release()
        >>> replay(log, UnifiedMemoryPool()).stats.total_leases
        1
    """

    seconds: float
    stats: PoolStats


def replay(
    events: Iterable[Event], pool: UnifiedMemoryPool, *, device: torch.device | str | None = None
) -> Replay:
    """Make and release the leases of a log in its order; nothing is written to the tensors.

    Leases that the log does not release are released at the end.

    Args:
        events: an EventLog, or some of its events.
        pool: the pool to lease from.
        device: where to lease instead of the recorded devices, then without pinned memory.

    Raises:
        PoolError: the pool could not serve a lease.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> with pool.record() as log:
        ...     pool.lease((16,)).release()
        >>> replay(log, UnifiedMemoryPool(overhead=None)).stats.reserved_blocks
        1
    """
    steps = [event for event in events if event.kind in (EventKind.LEASE, EventKind.RELEASE)]
    leases: dict[int | None, Lease | PlainLease] = {}
    start = time.perf_counter()
    for event in steps:
        if event.kind is EventKind.LEASE:
            leases[event.lease] = _lease(event, pool, device)
        elif event.lease in leases:  # else it began before the recording
            leases.pop(event.lease).release()
    for lease in leases.values():
        lease.release()
    return Replay(time.perf_counter() - start, pool.stats())


def _lease(
    event: Event, pool: UnifiedMemoryPool, device: torch.device | str | None
) -> Lease | PlainLease:
    assert event.shape is not None
    assert event.dtype is not None
    assert event.device is not None
    return pool.lease(
        event.shape,
        dtype=getattr(torch, event.dtype),
        device=event.device if device is None else device,
        pin_memory=bool(event.pin_memory) and device is None,
    )
