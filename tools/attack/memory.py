"""The pool as a state machine, and under threads: no two live leases share memory, sums add up."""

from __future__ import annotations

import random
import sys
import threading
from contextlib import suppress
from typing import Any

import torch

from dilated_pool import PoolClosedError, PoolLimitError, PoolLockedError, UnifiedMemoryPool

Case = dict[str, Any]
KINDS = ("lease",) * 6 + ("release",) * 5 + (
    "drop", "view", "forget", "trim", "lock", "unlock", "twice", "reset", "reserve",
)  # fmt: skip


class Pool:
    """Any mix of operations in one thread; what a live lease holds is never overwritten."""

    def draw(self, rng: random.Random) -> Case:
        operations = [[rng.choice(KINDS), rng.randrange(2**16)] for _ in range(rng.randint(1, 60))]
        return {
            "operations": operations,
            "limit": rng.choice((None, None, 4096, 65536)),
            "fill": rng.choice((None, None, "poison")),
            "close": rng.random() < 0.3,
        }

    def check(self, case: Case) -> None:
        pool = UnifiedMemoryPool(case["limit"], fill=case["fill"])
        live: list[tuple[Any, float]] = []
        views: list[tuple[torch.Tensor, float]] = []
        lease: Any
        locked = False
        for step, (kind, number) in enumerate(case["operations"]):
            if kind == "lease":
                shape, dtype = _request(number)
                try:
                    lease = pool.lease(shape, dtype=dtype)
                except PoolLimitError:
                    assert case["limit"] is not None, "a limit without one"
                    continue
                except PoolLockedError:
                    assert locked, "locked without a lock"
                    continue
                assert lease.tensor.shape == shape
                assert lease.tensor.dtype == dtype
                lease.tensor.fill_(step % 100)
                live.append((lease, step % 100))
            elif kind in ("release", "twice", "drop") and live:
                lease, _ = live.pop(number % len(live))
                if kind != "drop":
                    lease.release()
                if kind == "twice":
                    lease.release()
            elif kind == "view" and live:
                lease, value = live[number % len(live)]
                views.append(
                    (lease.tensor[..., :1] if lease.tensor.ndim else lease.tensor.view(1), value)
                )
            elif kind == "forget" and views:
                views.pop(number % len(views))
            elif kind == "trim":
                pool.trim(number % 4096)
            elif kind == "lock":
                pool.lock()
                locked = True
            elif kind == "unlock":
                pool.unlock()
                locked = False
            elif kind == "reserve":
                shape, dtype = _request(number)
                with suppress(PoolLimitError, PoolLockedError):
                    pool.reserve(shape, dtype=dtype, count=number % 3)
            elif kind == "reset":
                pool.reset_peak()
            lease = None  # else the last one that was named here would live on
            self._holds(pool, live, views, case["limit"])
        live.clear()
        views.clear()
        pool.trim()
        stats = pool.stats()
        assert stats.live_leases == stats.live_bytes == stats.reserved_bytes == 0, stats
        if case["close"]:
            pool.close()
            try:
                pool.lease((1,))
            except PoolClosedError:
                return
            raise AssertionError("a closed pool lends")

    def _holds(self, pool: Any, live: Any, views: Any, limit: int | None) -> None:
        for lease, value in live:
            assert bool((lease.tensor == value).all()), "the memory of a live lease changed"
        for view, value in views:
            assert bool((view == value).all()), "memory that a view shares was lent again"
        stats = pool.stats()
        sizes = [lease.tensor.numel() * lease.tensor.itemsize for lease, _ in live]
        assert stats.live_leases == len(live), (stats, len(live))
        assert stats.live_bytes == sum(sizes), stats
        assert stats.reserved_bytes >= sum(sizes)
        assert limit is None or stats.reserved_bytes <= limit, stats
        assert len(pool.outstanding()) == len(live)


def _request(number: int) -> tuple[tuple[int, ...], torch.dtype]:
    shapes = ((), (0,), (1,), (7,), (3, 5), (16, 16), (100,), (2, 3, 4))
    dtypes = (torch.float32, torch.float64, torch.int8, torch.bfloat16)
    return shapes[number % 8], dtypes[number // 8 % 4]


class Threads:
    """Threads that lease, fill, check and release, several of them the same lease at once."""

    def draw(self, rng: random.Random) -> Case:
        return {
            "threads": rng.randint(2, 4),
            "rounds": rng.randint(5, 30),
            "seed": rng.randrange(2**31),
        }

    def check(self, case: Case) -> None:
        pool = UnifiedMemoryPool()
        errors: list[BaseException] = []
        gate = threading.Barrier(case["threads"])
        shared: list[Any] = [None]
        interval = sys.getswitchinterval()

        def work(number: int) -> None:
            rng = random.Random(case["seed"] + number)
            try:
                for turn in range(case["rounds"]):
                    if number == 0:
                        shared[0] = pool.lease((64,))
                    gate.wait(20)
                    shared[0].release()  # all at once; one of them ends it
                    mine = [pool.lease((64,)) for _ in range(rng.randint(1, 3))]
                    for k, lease in enumerate(mine):
                        lease.tensor.fill_(1000 * number + 10 * k + turn)
                    gate.wait(20)
                    for k, lease in enumerate(mine):
                        value = 1000 * number + 10 * k + turn
                        assert bool((lease.tensor == value).all()), "two leases share memory"
                    gate.wait(20)
                    for lease in mine:
                        lease.release()
            except BaseException as error:
                errors.append(error)
                gate.abort()

        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(case["threads"])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        finally:
            sys.setswitchinterval(interval)
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors, errors
        stats = pool.stats()
        assert stats.live_bytes == stats.live_leases == 0, stats
