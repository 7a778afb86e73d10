"""One lease has one end, however many threads want to be the one that ends it."""

import threading
import time

import pytest
import torch

from dilated_pool import Lease, UnifiedMemoryPool


class SlowToRead(dict):
    """A dict that lets other threads run after each look into it: what is read may be old.

    A claim of one step, `pop`, is as ever; one that looks first and takes then is divided.
    """

    def get(self, *arguments):
        found = super().get(*arguments)
        time.sleep(0.002)
        return found

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.002)
        return found

    def __getitem__(self, key):
        found = super().__getitem__(key)
        time.sleep(0.002)
        return found


def end_at_once(lease: Lease, threads: int) -> list[BaseException]:
    gate, errors = threading.Barrier(threads), []

    def release():
        gate.wait(20)
        try:
            lease.release()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=release) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    return errors


@pytest.mark.parametrize("threads", [2, 3])
def test_a_lease_that_threads_release_at_once_ends_once(threads):
    pool = UnifiedMemoryPool()
    pool._live = SlowToRead(pool._live)
    for _ in range(20):
        lease = pool.lease((16,))
        assert end_at_once(lease, threads) == []
        assert len(pool._returned) == 1
        one, other = pool.lease((16,)), pool.lease((16,))
        one.tensor.fill_(1.0)
        other.tensor.fill_(2.0)
        assert torch.equal(one.tensor, torch.ones(16))
        one.release()
        other.release()
        stats = pool.stats()
        assert (stats.live_bytes, stats.live_leases) == (0, 0)
        assert stats.reserved_blocks == 2


def divided(pool, number):
    block = pool._live.get(number)
    pool._live.pop(number, None)
    return block


def looked_up_first(pool, number):
    return pool._live.pop(number) if number in pool._live else None


@pytest.mark.parametrize("claim", [divided, looked_up_first])
def test_a_claim_in_two_steps_is_caught(claim, monkeypatch):
    """So that the test above cannot pass for nothing."""
    monkeypatch.setattr(UnifiedMemoryPool, "_end", claim)
    with pytest.raises(AssertionError):
        test_a_lease_that_threads_release_at_once_ends_once(3)
