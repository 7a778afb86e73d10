"""Streams, graphs, pinned memory and offloading on a real device."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from dilated_pool import UnifiedMemoryPool, offload_activations
from dilated_pool._lease import PlainLease

pytestmark = pytest.mark.gpu

LONG = 50_000_000  # cycles, some 25 ms
SIZE = 1 << 20


def test_a_block_released_on_one_stream_is_not_overwritten_from_another():
    pool = UnifiedMemoryPool()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for round_ in range(20):
        seen = torch.empty(SIZE, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(first), pool.borrow((SIZE,), device="cuda") as a:
            address = a.data_ptr()
            a.fill_(1)
            torch.cuda._sleep(LONG)
            seen.copy_(a)
        with torch.cuda.stream(second), pool.borrow((SIZE,), device="cuda") as b:
            assert b.data_ptr() != address, round_
            b.fill_(2)
        torch.cuda.synchronize()
        assert (seen == 1).all()
    assert pool.stats().misses == 2


def test_a_stream_follows_its_own_work_without_waiting():
    pool = UnifiedMemoryPool()
    with torch.cuda.stream(torch.cuda.Stream()):
        for value in range(5):
            with pool.borrow((SIZE,), device="cuda") as tensor:
                tensor.fill_(value)
                torch.cuda._sleep(LONG // 10)
        assert not torch.cuda.current_stream().query()
    assert pool.stats().misses == 1


def test_another_stream_gets_the_block_once_the_work_has_ended():
    pool = UnifiedMemoryPool()
    with torch.cuda.stream(torch.cuda.Stream()), pool.borrow((SIZE,), device="cuda") as tensor:
        address = tensor.data_ptr()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), pool.borrow((SIZE,), device="cuda") as tensor:
        assert tensor.data_ptr() == address


def test_recorded_streams_are_waited_for():
    pool = UnifiedMemoryPool()
    side = torch.cuda.Stream()
    seen = torch.empty(SIZE, device="cuda")
    lease = pool.lease((SIZE,), device="cuda")
    lease.tensor.fill_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        seen.copy_(lease.tensor)
    lease.record_stream(side)
    lease.release()
    with pool.borrow((SIZE,), device="cuda") as tensor:
        tensor.fill_(2)
    torch.cuda.synchronize()
    assert (seen == 1).all()


def test_pinned_memory_is_not_overwritten_while_a_copy_from_it_is_queued():
    pool = UnifiedMemoryPool()
    seen = []
    for value in range(4):
        with pool.borrow((SIZE,), pin_memory=True) as tensor:
            tensor.fill_(value)
            torch.cuda._sleep(LONG)
            seen.append(tensor.to("cuda", non_blocking=True))
    torch.cuda.synchronize()
    for value, tensor in enumerate(seen):
        assert (tensor == value).all()


def test_pinned_blocks_are_not_rounded_up_to_powers_of_two():
    pool = UnifiedMemoryPool()
    with pool.borrow(((1 << 24) + 4096,), dtype=torch.uint8, pin_memory=True) as tensor:
        assert tensor.is_pinned()
        assert pool.stats().reserved_bytes == (1 << 24) + (1 << 21)
        address = tensor.data_ptr()
    pool.close()
    # Its pages are registered no more, or this would be refused.
    cudart = torch.cuda.cudart()
    again = torch.empty(1 << 25, dtype=torch.uint8)
    assert int(cudart.cudaHostRegister(again.data_ptr(), 1 << 25, 0)) == 0
    assert int(cudart.cudaHostUnregister(again.data_ptr())) == 0
    assert address % 4096 == 0


def test_leases_inside_a_capture_belong_to_the_graph():
    pool = UnifiedMemoryPool()
    pool.lease((SIZE,), device="cuda").release()
    static = torch.zeros(SIZE, device="cuda")
    held = pool.lease((SIZE,), device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lease = pool.lease((SIZE,), device="cuda")
        assert isinstance(lease, PlainLease)
        lease.tensor.copy_(static)
        held.tensor.copy_(lease.tensor * 2)
        lease.release()
    for value in range(3):
        static.fill_(value)
        graph.replay()
        with pool.borrow((SIZE,), device="cuda") as other:
            other.fill_(7)
        assert (held.tensor == 2 * value).all()
    assert pool.stats().live_leases == 1
    held.release()


def test_a_release_during_a_capture_waits_until_after_it():
    pool = UnifiedMemoryPool()
    held = pool.lease((SIZE,), device="cuda")
    held.tensor.fill_(3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    result = torch.empty(SIZE, device="cuda")
    with torch.cuda.graph(graph):
        result.copy_(held.tensor)
        held.release()
        assert pool.stats().quarantined_blocks == 1
    graph.replay()
    torch.cuda.synchronize()
    assert (result == 3).all()
    assert pool.stats().idle_blocks == 1


def test_blocks_can_come_from_a_mem_pool():
    mem_pool = torch.cuda.MemPool()
    pool = UnifiedMemoryPool(cuda_mem_pool=mem_pool)
    with pool.borrow((SIZE,), device="cuda") as tensor:
        tensor.fill_(3)
        segments = mem_pool.snapshot()
        inside = [
            segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
            for segment in segments
        ]
        assert any(inside)
    assert copy.deepcopy(pool)._mem_pool is mem_pool
    with pytest.raises(TypeError, match="cuda_mem_pool cannot be pickled"):
        pickle.dumps(pool)


@pytest.mark.multi_gpu
def test_cuda_without_an_index_means_the_current_device():
    pool = UnifiedMemoryPool()
    for index in (0, 1, 0):
        with torch.cuda.device(index), pool.borrow((3,), device="cuda") as tensor:
            assert tensor.device.index == index


def encoder(layers=12, width=256):
    torch.manual_seed(0)
    layer = functools.partial(
        nn.TransformerEncoderLayer,
        width,
        4,
        4 * width,
        dropout=0.0,
        batch_first=True,
        norm_first=True,
        device="cuda",
    )
    return nn.Sequential(*(layer() for _ in range(layers)))


def train(length, offload=None, steps=3):
    """Return the losses and the peak of allocated bytes."""
    net = encoder()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    generator = torch.Generator("cuda").manual_seed(1)
    inputs = torch.randn(1, length, 256, device="cuda", generator=generator)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if offload is None:
            loss = net(inputs).square().mean()
        else:
            with offload_activations(offload):
                loss = net(inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cuda.max_memory_reserved()


def test_offloading_trains_twice_the_length_that_fits_without_it():
    length = 8192
    expected, _ = train(2 * length)
    _, peak = train(length)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.15 * peak / total)
    try:
        train(length)
        with pytest.raises(torch.OutOfMemoryError):
            train(2 * length)
        torch.cuda.empty_cache()
        pool = UnifiedMemoryPool()
        actual, _ = train(2 * length, pool)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=0)
    assert pool.outstanding() == ()
    assert set(pool.stats().reserved_by_memory) == {"cpu, pinned"}
    print(f"limit {1.15 * peak / 2**20:.0f} MiB, parked {pool.stats().peak_live_bytes / 2**20:.0f}")


def test_offloaded_gradients_are_equal_with_any_prefetch():
    net = encoder(layers=3)
    inputs = torch.randn(2, 1000, 256, device="cuda")
    results = []
    for prefetch in (None, 0, 1, 4):
        net.zero_grad()
        pool = UnifiedMemoryPool()
        if prefetch is None:
            net(inputs).square().mean().backward()
        else:
            with offload_activations(pool, min_bytes=0, prefetch=prefetch):
                loss = net(inputs).square().mean()
            loss.backward()
            assert pool.stats().total_leases > 10
        results.append([parameter.grad.clone() for parameter in net.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
