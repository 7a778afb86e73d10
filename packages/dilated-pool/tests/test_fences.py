"""Reuse on other queues, and by the host, waits for work that still runs.

The device is fake, the code of the pool is real.
"""

import gc

import pytest
import torch

from dilated_pool import PoolLimitError, PoolLockedError
from dilated_pool._lease import PlainLease


def use(backend, pool, queue, shape=(64,)):
    """Lease on a queue, submit work on it, release; return the address."""
    backend.fences.queue = queue
    with pool.borrow(shape) as tensor:
        backend.fences.submit()
        return tensor.data_ptr()


def test_no_queue_gets_a_block_on_which_another_still_works(fake):
    pool = fake.pool()
    address = use(fake, pool, "A")
    fake.fences.queue = "B"
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address
    fake.fences.finish("A")
    fake.fences.queue = "B"
    leases = [pool.lease((64,)) for _ in range(2)]
    assert address in {lease.tensor.data_ptr() for lease in leases}


def test_a_stream_may_follow_its_own_work_and_the_host_may_not(fake):
    pool = fake.pool()
    address = use(fake, pool, "A")
    follows = use(fake, pool, "A") == address
    assert follows == (fake.name == "device")


def test_work_of_a_recorded_stream_is_waited_for(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    lease = pool.lease((64,))
    address = lease.tensor.data_ptr()
    fake.fences.queue = "side"
    fake.fences.submit()
    lease.record_stream("side")
    fake.fences.queue = "A"
    lease.release()
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address
    fake.fences.finish("side")
    fake.fences.queue = "B"
    leases = [pool.lease((64,)) for _ in range(2)]
    assert address in {lease.tensor.data_ptr() for lease in leases}


def test_work_of_the_releasing_queue_is_waited_for(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    lease = pool.lease((64,))
    address = lease.tensor.data_ptr()
    fake.fences.queue = "B"
    fake.fences.submit()
    lease.release()
    fake.fences.queue = "A"
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address


def test_a_dropped_lease_is_fenced_too(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    lease = pool.lease((64,))
    address = lease.tensor.data_ptr()
    fake.fences.submit()
    del lease
    gc.collect()
    fake.fences.queue = "B"
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address


def test_work_on_a_quarantined_block_is_waited_for(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    lease = pool.lease((64,))
    view = lease.tensor[1:]
    address = lease.tensor.data_ptr()
    lease.release()
    pool.stats()
    fake.fences.submit()  # on the view, after the release
    del view
    pool.stats()
    fake.fences.queue = "B"
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address


def test_trim_spares_blocks_in_use_and_close_waits_for_them(fake):
    pool = fake.pool()
    use(fake, pool, "A")
    assert pool.trim() == 0
    assert fake.fences.waits == 0
    pool.close()
    assert fake.fences.waits == 1
    assert pool.stats().reserved_bytes == 0


def test_the_limit_waits_before_it_fails(fake):
    pool = fake.pool(1024)
    use(fake, pool, "A", (256,))
    fake.fences.queue = "B"
    with pool.borrow((128,)):
        assert fake.fences.waits == 1
        with pytest.raises(PoolLimitError):
            pool.lease((256,))


def test_a_capture_gets_memory_of_its_own(fake):
    pool = fake.pool()
    use(fake, pool, "A")
    fake.fences.finish("A")
    fake.fences.graph = True
    lease = pool.lease((64,), dtype=torch.int32)
    assert isinstance(lease, PlainLease)
    with lease as tensor:
        assert (tensor.shape, tensor.dtype) == ((64,), torch.int32)
    lease.release()
    assert tensor.sum() is not None
    fake.fences.graph = False
    assert pool.stats().total_leases == 1


def test_a_release_during_a_capture_is_fenced_after_it(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    lease = pool.lease((64,))
    address = lease.tensor.data_ptr()
    fake.fences.graph = True
    lease.release()
    assert pool.stats().quarantined_blocks == 1
    fake.fences.graph = False
    fake.fences.submit()
    assert pool.stats().idle_blocks == 1
    fake.fences.queue = "B"
    with pool.borrow((64,)) as tensor:
        assert tensor.data_ptr() != address


def test_a_reserved_block_is_first_for_the_queue_it_was_made_on(fake):
    pool = fake.pool()
    fake.fences.queue = "A"
    fake.fences.submit()
    pool.reserve((64,))
    fake.fences.queue = "B"
    pool.lock()
    with pytest.raises(PoolLockedError):
        pool.lease((64,))
    fake.fences.finish("A")
    pool.lease((64,)).release()


def test_poison_waits_for_work_that_still_runs(fake):
    pool = fake.pool(fill="poison")
    use(fake, pool, "A")
    assert fake.fences.waits == 1
