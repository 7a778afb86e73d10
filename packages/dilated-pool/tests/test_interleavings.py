"""Two calls at once, one divided by the other at every instruction: nothing is lost or shared."""

import itertools
import sys
import threading
from collections.abc import Callable

import pytest

import dilated_pool
from dilated_pool import PoolClosedError, PoolLimitError, UnifiedMemoryPool

SOURCES = dilated_pool.__path__[0]
NEVER = sys.maxsize


class Divided:
    """A call that once does something else, before an instruction or line inside the package."""

    def __init__(self, call: Callable[[], object], event: str, stop: int) -> None:
        self._call, self._event, self._left = call, event, stop
        self.stopped = False
        self.errors: list[BaseException] = []

    def run(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = meanwhile
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            self._call()
        except (PoolClosedError, PoolLimitError):
            pass  # which of two comes too late is open
        except BaseException as error:
            self.errors.append(error)
        finally:
            sys.settrace(before)
        if not self.stopped:
            meanwhile()

    def _enter(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        return self._step

    def _step(self, frame, event, argument):
        if event == self._event and not self.stopped:
            self._left -= 1
            if self._left < 0:
                self.stopped = True
                self._meanwhile()
        return self._step


class WatchedLock:
    """The lock of a pool, which says when a thread must wait for it."""

    def __init__(self, lock, waits: threading.Event) -> None:
        self._lock, self._waits = lock, waits

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            self._waits.set()
            self._lock.acquire()

    def __exit__(self, *error):
        self._lock.release()


def divide(pool, first, second, stops: tuple[int, int], event: str) -> tuple[bool, bool]:
    """Run one call up to a point, the other up to a point, then the rest; which had their point."""
    one, other = Divided(first, event, stops[0]), Divided(second, event, stops[1])
    theirs, ours = threading.Event(), threading.Event()  # whose turn it is
    lock, pool._lock = pool._lock, WatchedLock(pool._lock, ours)

    def pause():
        ours.set()
        theirs.wait(20)

    def work():
        other.run(pause)

    thread = threading.Thread(target=work)

    def switch():
        thread.start()
        assert ours.wait(20)

    one.run(switch)
    theirs.set()
    thread.join(20)
    assert not thread.is_alive()
    pool._lock = lock
    for error in one.errors + other.errors:
        raise error
    return one.stopped, other.stopped


class Scene:
    """A pool with one idle block, a lease that both calls know, and what else was leased."""

    def __init__(self, pool: UnifiedMemoryPool) -> None:
        self.pool = pool
        self.leases = [pool.lease((16,)) for _ in range(3)]
        self.leases.pop().release()

    def release(self) -> None:
        self.leases[0].release()

    def lease(self) -> None:
        for _ in range(2):  # the idle block, then a new one
            self.leases.append(self.pool.lease((16,)))

    def drop(self) -> None:
        self.leases[1:2] = []

    def trim(self) -> None:
        self.pool.trim()

    def reserve(self) -> None:
        self.pool.reserve((16,), count=2)

    def look(self) -> None:
        self.pool.stats()
        self.pool.outstanding()

    def close(self) -> None:
        self.pool.close()

    def holds(self) -> None:
        """Raise unless each block is lent once, idle ones too, and all sums add up."""
        pool, live = self.pool, [each for each in self.leases if each._tensor is not None]
        stats = pool.stats()
        assert stats.live_leases == len(live) == len(pool.outstanding())
        assert stats.live_bytes == 64 * len(live)
        assert stats.quarantined_blocks == 0
        assert stats.reserved_bytes == 64 * stats.reserved_blocks
        if not pool._closed:
            live += [pool.lease((16,)) for _ in range(stats.idle_blocks)]
            assert pool.stats().misses == stats.misses
        assert len({each.tensor.data_ptr() for each in live}) == len(live)
        for each in live:
            each.release()
        pool.close()
        stats = pool.stats()
        assert (stats.live_leases, stats.live_bytes, stats.reserved_bytes) == (0, 0, 0)


def attempt(backend, fill, calls: tuple[str, str], stops: tuple[int, int], event: str):
    pool = backend.pool(64 * 5, fill=fill)
    scene = Scene(pool)
    had = divide(pool, *(getattr(scene, call) for call in calls), stops, event)
    backend.finish()
    scene.holds()
    return had


BACKENDS = [("pageable", None), ("device", "poison")]
CALLS = ("release", "lease", "drop", "trim", "reserve", "look", "close")
# Each of their instructions; of the others, each line.
SHORT = ("release", "lease", "drop")


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize(("name", "fill"), BACKENDS)
def test_a_call_divided_anywhere_by_another(backend_by_name, name, fill, first):
    for second in CALLS:
        stops = itertools.count()
        event = "opcode" if first in SHORT else "line"
        while attempt(backend_by_name(name), fill, (first, second), (next(stops), NEVER), event)[0]:
            pass
        assert next(stops) > 9


@pytest.mark.parametrize(("name", "fill"), BACKENDS)
def test_two_releases_of_one_lease_divided_by_each_other(backend_by_name, name, fill):
    for first in itertools.count():
        for second in itertools.count():
            calls = ("release", "release")
            had = attempt(backend_by_name(name), fill, calls, (first, second), "line")
            if not all(had):
                break
        if not had[0]:
            break
    assert first > 9


@pytest.mark.parametrize(
    "claim",
    [
        "block = self._live.get(number); self._live.pop(number, None); return block",
        "return self._live.pop(number) if number in self._live else None",
    ],
)
def test_a_claim_in_two_steps_is_caught(backend_by_name, claim, monkeypatch):
    """So that what is above cannot pass for nothing."""
    space = {}
    code = f"def _end(self, number): {claim}"
    exec(compile(code, f"{SOURCES}/mutant.py", "exec"), space)
    monkeypatch.setattr(UnifiedMemoryPool, "_end", space["_end"])
    with pytest.raises((AssertionError, KeyError)):
        test_a_call_divided_anywhere_by_another(backend_by_name, "pageable", None, "release")
