"""A pool against a model, in any order of calls.

Each lease is filled with a value of its own. If two that live shared memory, if a view of a
released lease were lent again, or if poison were touched, a later look would find other values.
"""

import functools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dilated_pool import LeaseReleasedError, PoolLimitError, PoolLockedError
from dilated_pool._shelf import class_size

THOROUGH = settings().max_examples > 100
LIMIT = 40_000
DTYPES = [torch.uint8, torch.int16, torch.float32, torch.float64]
PICKS = st.integers(0, 100)


class PoolMachine(RuleBasedStateMachine):
    """Leases, releases, drops, views, trims, locks and the end of queued work."""

    steps = 0

    def __init__(self, make_backend):
        super().__init__()
        self.make_backend = make_backend
        self.live = {}  # lease: (value, bytes)
        self.kept = []  # (tensor, value) that outlives its lease
        self.released = []  # (lease, tensor)
        self.value = 0
        self.locked = False
        self.leased = self.leased_bytes = self.peak_live = self.peak_reserved = 0

    @initialize(
        name=st.sampled_from(["pageable", "device", "host of a device"]),
        limited=st.booleans(),
        overhead=st.sampled_from([None, 1.0, 1.25]),
        poison=st.booleans(),
    )
    def start(self, name, limited, overhead, poison):
        self.backend = self.make_backend(name)
        self.limit = LIMIT if limited else None
        fill = "poison" if poison else None
        self.pool = self.backend.pool(self.limit, overhead=overhead, fill=fill)

    @rule(
        shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
        dtype=st.sampled_from(DTYPES),
    )
    def lease(self, shape, dtype):
        before = self.pool.stats()
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = class_size(nbytes, 64)
        try:
            lease = self.pool.lease(shape, dtype=dtype)
        except PoolLimitError:
            busy = before.reserved_bytes - before.idle_bytes
            assert busy + size > self.limit
            return
        except PoolLockedError:
            assert self.locked
            return
        if self.backend.fences is not None:
            self.backend.fences.submit()
        self.value = self.value % 100 + 1
        lease.tensor.fill_(self.value)
        self.live[lease] = (self.value, nbytes)
        self.leased += 1
        self.leased_bytes += nbytes
        self.peak_live = max(self.peak_live, self.live_bytes)

    @precondition(lambda self: self.live)
    @rule(pick=PICKS, keep_view=st.booleans())
    def release(self, pick, keep_view):
        lease, (value, _) = self.pop(pick)
        tensor = lease.tensor
        if keep_view:
            self.kept.append((tensor.view(-1)[tensor.numel() // 2 :], value))
        lease.release()
        self.released.append((lease, tensor))

    @precondition(lambda self: self.live)
    @rule(pick=PICKS, keep_tensor=st.booleans())
    def drop(self, pick, keep_tensor):
        lease, (value, _) = self.pop(pick)
        if keep_tensor:
            self.kept.append((lease.tensor, value))

    @precondition(lambda self: self.released)
    @rule(pick=PICKS)
    def release_again(self, pick):
        lease, tensor = self.released[pick % len(self.released)]
        lease.release()
        try:
            tensor.sum()
        except LeaseReleasedError:
            return
        raise AssertionError("a released tensor could be used")

    @precondition(lambda self: self.released)
    @rule(pick=PICKS)
    def forget_released(self, pick):
        self.released.pop(pick % len(self.released))

    @precondition(lambda self: self.kept)
    @rule(pick=PICKS)
    def forget_kept(self, pick):
        self.kept.pop(pick % len(self.kept))

    @rule(size=st.integers(0, LIMIT))
    def trim(self, size):
        before = self.pool.stats()
        given_back = self.pool.trim(size)
        after = self.pool.stats()
        assert before.reserved_bytes - after.reserved_bytes == given_back
        assert before.live_bytes == after.live_bytes

    @rule(length=st.integers(0, 3000), count=st.integers(0, 3))
    def reserve(self, length, count):
        try:
            self.pool.reserve((length,), dtype=torch.uint8, count=count)
        except PoolLimitError:
            assert self.limit is not None
        except PoolLockedError:
            assert self.locked

    @rule()
    def reset_peak(self):
        self.pool.reset_peak()
        self.peak_live = self.live_bytes
        self.peak_reserved = 0

    @rule(locked=st.booleans())
    def lock(self, locked):
        self.locked = locked
        if locked:
            self.pool.lock()
        else:
            self.pool.unlock()

    @precondition(lambda self: self.backend.fences is not None)
    @rule(queue=st.sampled_from(["first", "second"]), finish=st.booleans())
    def device(self, queue, finish):
        if finish:
            self.backend.fences.finish(queue)
        else:
            self.backend.fences.queue = queue

    @invariant()
    def the_pool_agrees_with_the_model(self):
        type(self).steps += 1
        stats = self.pool.stats()
        assert stats.live_leases == len(self.live)
        assert stats.live_bytes == self.live_bytes
        assert stats.total_leases == self.leased
        assert stats.total_leased_bytes == self.leased_bytes
        assert stats.peak_live_bytes == self.peak_live
        assert stats.hits + stats.misses == stats.total_leases
        parts = stats.idle_bytes + stats.quarantined_bytes + stats.live_bytes + stats.waste_bytes
        assert stats.reserved_bytes == parts
        blocks = stats.idle_blocks + stats.quarantined_blocks + stats.live_leases
        assert stats.reserved_blocks == blocks
        self.peak_reserved = max(self.peak_reserved, stats.reserved_bytes)
        assert stats.peak_reserved_bytes >= self.peak_reserved
        # A view that outlives its lease, or a tensor of a dropped one, holds one block.
        assert stats.quarantined_blocks <= len(self.kept)
        assert self.limit is None or stats.peak_reserved_bytes <= self.limit

    @invariant()
    def all_values_are_intact(self):
        for lease, (value, _) in self.live.items():
            assert (lease.tensor == value).all()
        for tensor, value in self.kept:
            assert (tensor == value).all()

    def teardown(self):
        for lease in self.live:
            lease.release()
        self.kept.clear()
        self.released.clear()
        self.pool.close()
        stats = self.pool.stats()
        assert (stats.reserved_bytes, stats.live_bytes) == (0, 0)

    @property
    def live_bytes(self):
        return sum(nbytes for _, nbytes in self.live.values())

    def pop(self, pick):
        lease = list(self.live)[pick % len(self.live)]
        return lease, self.live.pop(lease)


def test_the_pool_agrees_with_its_model(backend_by_name):
    scale = settings() if THOROUGH else settings(max_examples=30)
    PoolMachine.steps = 0
    run_state_machine_as_test(
        functools.partial(PoolMachine, backend_by_name),
        settings=settings(scale, stateful_step_count=50),
    )
    print(f"{PoolMachine.steps} steps")
    assert PoolMachine.steps >= (50_000 if THOROUGH else 500)
