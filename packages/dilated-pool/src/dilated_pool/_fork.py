"""Pools across a fork: one handler for all pools of the process."""

import os
import threading
import weakref

from dilated_pool._bookkeeping import Bookkeeping

POOLS: weakref.WeakSet[Bookkeeping] = weakref.WeakSet()


class _Held(threading.local):
    """The pools whose locks a forking thread holds; only that thread exists in the child."""

    def __init__(self) -> None:
        self.pools: list[Bookkeeping] = []


_held = _Held()


def _before() -> None:
    """Wait until no thread is inside a pool, so that the child gets consistent ones."""
    # One order for all threads, or two that fork at once could wait for each other.
    for pool in sorted(POOLS, key=id):
        pool._lock.acquire()
        _held.pools.append(pool)


def _after_in_parent() -> None:
    while _held.pools:
        _held.pools.pop()._lock.release()


def _after_in_child() -> None:
    while _held.pools:
        _held.pools.pop()._start_as_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
