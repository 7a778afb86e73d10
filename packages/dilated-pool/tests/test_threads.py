"""Threads, tasks, signals and the garbage collector can come at any moment."""

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch

from dilated_pool import LeaseReleasedError, PoolLimitError, PoolReentryError, UnifiedMemoryPool


def run_threads(work, count):
    """Run `work(index)` in threads, and raise the first error of any."""
    errors = []

    def guarded(index):
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def stress(seconds, backend, threads=32):
    """Lease, check, keep, drop, trim and look from many threads; nothing is lost or shared."""
    pool = backend.pool(4 << 20)
    stop = time.monotonic() + seconds
    counts = [0] * threads

    def work(index):
        rng = random.Random(index)
        held = []
        while time.monotonic() < stop:
            action = rng.random()
            if action < 0.5 and len(held) < 6:
                try:
                    lease = pool.lease((rng.choice([3, 100, 700, 5000]),))
                except PoolLimitError:
                    continue
                value = counts[index] % 97 + index * 100.0
                lease.tensor.fill_(value)
                held.append((lease, value))
                counts[index] += 1
            elif action < 0.9 and held:
                lease, value = held.pop(rng.randrange(len(held)))
                assert (lease.tensor == value).all()
                if action < 0.7:
                    view = lease.tensor[1:]
                    lease.release()
                    assert (view == value).all()
                elif action < 0.85:
                    lease.release()
                else:
                    del lease
            elif action < 0.92:
                pool.trim(rng.randrange(4 << 20))
            elif action < 0.95:
                backend.finish()
            else:
                stats = pool.stats()
                assert stats.reserved_bytes <= 4 << 20
                assert stats.live_bytes >= 0
        for lease, value in held:
            assert (lease.tensor == value).all()
            lease.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the interpreter lets another thread run wherever it may
    try:
        run_threads(work, threads)
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    stats = pool.stats()
    assert pool.outstanding() == ()
    assert stats.total_leases == sum(counts) > 0
    assert (stats.live_bytes, stats.quarantined_bytes) == (0, 0)
    assert stats.reserved_bytes == stats.idle_bytes
    assert stats.peak_reserved_bytes <= 4 << 20
    pool.close()
    assert pool.stats().reserved_bytes == 0
    return sum(counts)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["pageable", "device"])
def test_thirty_two_threads_lose_and_share_nothing(backend_by_name, name):
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    print(f"{stress(60 if thorough else 4, backend_by_name(name))} leases")


def test_of_many_releases_of_one_lease_one_counts():
    pool = UnifiedMemoryPool()
    for _ in range(200):
        lease = pool.lease((100,))
        barrier = threading.Barrier(8)

        def work(_, lease=lease, barrier=barrier):
            barrier.wait()
            lease.release()

        run_threads(work, 8)
    stats = pool.stats()
    assert (stats.live_bytes, stats.idle_blocks, stats.misses) == (0, 1, 1)


def test_a_finalizer_does_not_wait_for_the_lock():
    pool = UnifiedMemoryPool()
    leases = [pool.lease((100,)) for _ in range(3)]
    holds, done = threading.Event(), threading.Event()

    def hold():
        with pool._lock:
            holds.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    start = time.monotonic()
    leases.clear()
    took = time.monotonic() - start
    done.set()
    thread.join()
    assert took < 5
    assert pool.outstanding() == ()


def test_a_finalizer_does_not_enter_a_busy_pool():
    pool = UnifiedMemoryPool()
    leases = [pool.lease((100,)) for _ in range(3)]
    with pool._section():
        leases.pop()
        leases.pop().release()
        with pytest.raises(PoolReentryError, match="finalizer or signal handler"):
            pool.lease((100,))
        assert pool.stats().live_bytes == 1200
    assert len(pool.outstanding()) == 1
    leases.pop().release()


class Knot:
    """Garbage that only the cycle collector finds, with a finalizer that uses the pool."""

    def __init__(self, pool, seen):
        self.me = self
        self.lease = pool.lease((50,))
        self.pool = pool
        self.seen = seen

    def __del__(self):
        try:
            self.pool.lease((60,)).release()
            self.pool.stats()
        except PoolReentryError:
            self.seen["reentry"] += 1
        self.seen["finalized"] += 1


def test_a_storm_of_garbage_collections_neither_deadlocks_nor_loses():
    pool = UnifiedMemoryPool(8 << 20)
    seen = {"reentry": 0, "finalized": 0}
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:

        def work(index):
            for step in range(60):
                Knot(pool, seen)
                with pool.borrow((step + 1,)) as tensor:
                    tensor.fill_(index)
                    assert (tensor == index).all()
                if step % 7 == 0:
                    pool.stats()
                    pool.trim()

        run_threads(work, 4)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert seen["finalized"] == 240
    assert pool.outstanding() == ()
    stats = pool.stats()
    assert (stats.live_bytes, stats.quarantined_bytes) == (0, 0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_a_signal_handler_can_look_at_the_pool_it_interrupts():
    pool = UnifiedMemoryPool()
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(pool.stats().live_leases))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        stop = time.monotonic() + 0.5
        while time.monotonic() < stop:
            with pool.borrow((10,)):
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(seen) > 10
    assert set(seen) <= {0, 1}
    assert pool.outstanding() == ()


def test_tasks_take_turns_while_they_hold_leases():
    pool = UnifiedMemoryPool()

    async def work(value):
        for _ in range(5):
            with pool.borrow((37,)) as tensor:
                tensor.fill_(value)
                await asyncio.sleep(0)
                assert (tensor == value).all()
            with pytest.raises(LeaseReleasedError):
                tensor.sum()

    async def main():
        await asyncio.gather(*(work(value) for value in range(11)))
        waiting = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def hold():
        with pool.borrow((37,)):
            await asyncio.sleep(60)

    asyncio.run(main())
    assert pool.outstanding() == ()
    assert pool.stats().misses == 11


def test_a_generator_that_is_not_finished_returns_its_lease():
    pool = UnifiedMemoryPool()

    def rows():
        with pool.borrow((3, 5)) as tensor:
            yield from tensor.fill_(1)

    generator = rows()
    next(generator)
    assert len(pool.outstanding()) == 1
    generator.close()
    assert pool.outstanding() == ()
    assert torch.is_grad_enabled()
