"""Tensor memory: leases, limits, statistics."""

from dilated_pool.__about__ import __version__
from dilated_pool._errors import (
    LeaseReleasedError,
    PoolClosedError,
    PoolCorruptionError,
    PoolError,
    PoolLimitError,
    PoolLockedError,
    PoolReentryError,
)
from dilated_pool._events import Event, EventKind, EventLog
from dilated_pool._lease import Lease
from dilated_pool._offload import offload_activations
from dilated_pool._pool import UnifiedMemoryPool
from dilated_pool._replay import Replay, replay
from dilated_pool._report import plot_timeline, stats_table
from dilated_pool._stats import LeaseInfo, PoolStats

__all__ = [
    "Event",
    "EventKind",
    "EventLog",
    "Lease",
    "LeaseInfo",
    "LeaseReleasedError",
    "PoolClosedError",
    "PoolCorruptionError",
    "PoolError",
    "PoolLimitError",
    "PoolLockedError",
    "PoolReentryError",
    "PoolStats",
    "Replay",
    "UnifiedMemoryPool",
    "__version__",
    "offload_activations",
    "plot_timeline",
    "replay",
    "stats_table",
]
