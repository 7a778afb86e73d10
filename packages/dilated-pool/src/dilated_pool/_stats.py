"""What a pool tells about itself."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """A pool's counters at one moment; all sizes in bytes.

    A live byte was asked for and not released yet. A reserved byte belongs to a block, which is
    leased, idle, or quarantined: released while something still shared its memory. Peaks are since
    the pool's creation or the last `reset_peak`, totals since its creation.

    Examples:
        >>> pool = UnifiedMemoryPool(limit_bytes=1 << 20)
        >>> pool.lease((16,)).release()
        >>> stats = pool.stats()
        >>> stats.live_bytes, stats.reserved_blocks
        (0, 1)
    """

    limit_bytes: int | None
    live_bytes: int
    live_leases: int
    peak_live_bytes: int
    peak_live_leases: int
    total_leased_bytes: int
    total_leases: int
    hits: int
    misses: int
    reserved_bytes: int
    reserved_blocks: int
    peak_reserved_bytes: int
    idle_bytes: int
    idle_blocks: int
    quarantined_bytes: int
    quarantined_blocks: int
    waste_bytes: int
    trimmed_bytes: int
    reserved_by_memory: dict[str, int]

    @property
    def hit_rate(self) -> float:
        """The part of all leases that needed no new block; 0 before the first lease."""
        return self.hits / max(self.total_leases, 1)

    @property
    def fragmentation(self) -> float:
        """Peak reserved over peak live bytes; 0 before the first lease."""
        return self.peak_reserved_bytes / self.peak_live_bytes if self.peak_live_bytes else 0.0


@dataclasses.dataclass(frozen=True)
class LeaseInfo:
    """A live lease.

    Attributes:
        number: counts the leases of the pool, from 1.
        nbytes: bytes asked for.
        block_bytes: bytes of the block that serves them.
        stack: where the lease was made, outermost call first, if the pool has `stacks=True`.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> lease = pool.lease((2, 3))
        >>> [info.nbytes for info in pool.outstanding()]
        [24]
    """

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pin_memory: bool
    nbytes: int
    block_bytes: int
    stack: tuple[str, ...] | None
