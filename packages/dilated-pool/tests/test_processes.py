"""Forks, spawned processes, pickles and copies."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch

from dilated_pool import UnifiedMemoryPool

# Newer Pythons warn of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CONFIG = {"limit_bytes": 1 << 20, "overhead": None, "fill": "poison", "stacks": True}


def in_child(work, seconds=30):
    """Fork, run `work` in the child, and fail if it raises or hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hung")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@needs_fork
@pytest.mark.distributed
def test_a_child_goes_on_with_the_pool_and_leaves_the_parents_alone():
    pool = UnifiedMemoryPool()
    lease = pool.lease((100,))
    lease.tensor.fill_(3)
    pool.lease((200,)).release()

    def child():
        assert (lease.tensor == 3).all()
        lease.tensor.fill_(4)
        lease.release()
        with pool.borrow((100,)) as tensor:
            tensor.fill_(5)
        assert pool.outstanding() == ()
        assert pool.stats().live_bytes == 0

    in_child(child)
    assert (lease.tensor == 3).all()
    assert len(pool.outstanding()) == 1
    lease.release()
    assert pool.stats().idle_blocks == 2


@needs_fork
@pytest.mark.distributed
def test_a_fork_among_busy_threads_gives_a_pool_that_works():
    pools = [UnifiedMemoryPool(1 << 20) for _ in range(3)]
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            for pool in pools:
                with pool.borrow((333,)):
                    pass
                pool.trim()

    def child():
        for pool in pools:
            for _ in range(3):
                pool.lease((333,)).release()
            stats = pool.stats()
            # At most one block each was on its way in the two threads that are gone.
            assert stats.reserved_blocks <= 1 + 2
            assert stats.reserved_bytes >= stats.idle_bytes + stats.live_bytes
            pool.close()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            in_child(child)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for pool in pools:
        assert pool.outstanding() == ()


@needs_fork
@pytest.mark.distributed
def test_a_fork_in_a_thread_that_holds_the_lock_elsewhere_waits_for_it():
    pool = UnifiedMemoryPool()
    holds, done = threading.Event(), threading.Event()

    def hold():
        with pool._section():
            holds.set()
            done.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    in_child(lambda: pool.lease((3,)).release())
    thread.join()
    pool.lease((3,)).release()


@pytest.mark.distributed
def test_a_spawned_process_gets_an_empty_pool():
    pool = UnifiedMemoryPool(limit_bytes=1 << 20)
    pool.lease((1000,)).release()
    # Methods of the package, since a spawned process cannot import this file.
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply_async(UnifiedMemoryPool.stats, (pool,)).get(120).reserved_bytes == 0
        assert processes.apply_async(UnifiedMemoryPool._config, (pool,)).get(120) == pool._config()
        processes.apply_async(UnifiedMemoryPool.reserve, (pool, (1000,))).get(120)
    assert pool.stats().reserved_bytes == 4096


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_duplicate_is_empty_and_has_the_same_settings(duplicate):
    pool = UnifiedMemoryPool(**CONFIG)
    lease = pool.lease((100,))
    other = duplicate(pool)
    assert other is not pool
    assert other._config() == pool._config() == CONFIG
    assert other.stats().reserved_bytes == 0
    assert len(pool.outstanding()) == 1
    lease.release()


def test_a_module_with_a_pool_can_be_copied_and_saved():
    module = torch.nn.Linear(2, 3)
    module.buffers_from = UnifiedMemoryPool()
    assert copy.deepcopy(module).buffers_from is not module.buffers_from
    assert pickle.loads(pickle.dumps(module)).buffers_from.stats().reserved_bytes == 0


def test_a_lease_cannot_be_copied_or_pickled():
    lease = UnifiedMemoryPool().lease((3,))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a lease cannot be copied or pickled"):
            duplicate(lease)


@pytest.mark.distributed
def test_the_package_imports_neither_its_extra_nor_its_siblings():
    code = (
        "import sys, dilated_pool\n"
        "names = {'rich', 'matplotlib', 'dilated_core', 'dilated_ring', 'dilated_factory'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
