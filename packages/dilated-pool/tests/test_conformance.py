"""What every backend does alike."""

import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.dlpack import from_dlpack, to_dlpack

from dilated_pool import (
    LeaseReleasedError,
    PoolClosedError,
    PoolCorruptionError,
    PoolError,
    PoolLimitError,
    PoolLockedError,
    UnifiedMemoryPool,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def counters_balance(pool):
    stats = pool.stats()
    live = pool.outstanding()
    assert stats.live_leases == len(live)
    assert stats.live_bytes == sum(info.nbytes for info in live)
    assert stats.waste_bytes == sum(info.block_bytes - info.nbytes for info in live)
    parts = stats.idle_bytes + stats.quarantined_bytes + stats.live_bytes + stats.waste_bytes
    assert stats.reserved_bytes == parts == sum(stats.reserved_by_memory.values())
    blocks = stats.idle_blocks + stats.quarantined_blocks + stats.live_leases
    assert stats.reserved_blocks == blocks
    assert stats.hits + stats.misses == stats.total_leases
    assert stats.live_bytes <= stats.peak_live_bytes
    assert stats.reserved_bytes <= stats.peak_reserved_bytes
    return stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lease_is_a_contiguous_tensor_of_what_was_asked_for(backend, dtype):
    pool = backend.pool()
    for shape in [(), (0, 3), (5,), (2, 3, 7)]:
        with pool.borrow(shape, dtype=dtype, **backend.place) as tensor:
            assert tensor.shape == shape
            assert tensor.dtype == dtype
            assert tensor.device.type == torch.device(backend.place["device"]).type
            assert tensor.is_pinned() == (backend.name == "pinned")
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % min(backend.granule, 256) == 0
            assert not tensor.requires_grad
            tensor.fill_(1)
            assert tensor.to(torch.complex64).real.sum().item() == math.prod(shape)
        assert pool.outstanding() == ()
        backend.finish()
    counters_balance(pool)


def test_released_memory_is_reused_for_any_dtype_and_shape(backend):
    pool = backend.pool()
    with pool.borrow((8, 128), dtype=torch.float32, **backend.place) as first:
        address = first.data_ptr()
    for shape, dtype in [((4096,), torch.uint8), ((2, 16, 128), torch.bool), ((512,), torch.int64)]:
        backend.finish()
        with pool.borrow(shape, dtype=dtype, **backend.place) as tensor:
            assert tensor.data_ptr() == address
    assert counters_balance(pool).misses == 1


def test_live_leases_do_not_share_memory(backend):
    pool = backend.pool()
    leases = [pool.lease((5, 7), **backend.place) for _ in range(11)]
    for value, lease in enumerate(leases):
        lease.tensor.fill_(value)
    for value, lease in enumerate(leases):
        assert (lease.tensor == value).all()
        lease.release()
    assert counters_balance(pool).idle_blocks == 11


def test_a_second_release_does_nothing(backend):
    pool = backend.pool()
    lease = pool.lease((5, 7), **backend.place)
    lease.release()
    lease.release()
    backend.finish()
    first, second = (pool.lease((5, 7), **backend.place) for _ in range(2))
    lease.release()
    assert first.tensor.data_ptr() != second.tensor.data_ptr()
    assert counters_balance(pool).live_leases == 2


def test_every_use_of_a_released_tensor_is_an_error(backend):
    pool = backend.pool()
    lease = pool.lease((5, 7), **backend.place)
    tensor, other = lease.tensor, torch.ones(5, 7, device=backend.place["device"])
    lease.release()
    uses = [
        tensor.sum,
        lambda: tensor.shape,
        lambda: tensor[0],
        tensor.data_ptr,
        lambda: tensor.fill_(0),
        lambda: other + tensor,
        lambda: other.copy_(tensor),
        lambda: torch.stack([other, tensor]),
        lambda: torch.nn.functional.linear(other, tensor),
        tensor.tolist,
        tensor.numpy,
        lambda: lease.tensor,
        lease.__enter__,
    ]
    for use in uses:
        with pytest.raises(LeaseReleasedError, match="released"):
            use()
    assert repr(tensor) == "<tensor of a released lease>"
    assert repr(lease) == "<released lease>"


def test_a_variable_that_still_names_the_tensor_does_not_keep_the_block(backend):
    pool = backend.pool()
    with pool.borrow((5, 7), **backend.place) as tensor:
        pass
    stats = counters_balance(pool)
    assert (stats.idle_blocks, stats.quarantined_blocks) == (1, 0)
    del tensor


def test_a_block_with_a_view_is_set_apart_until_the_view_is_gone(backend):
    pool = backend.pool()
    lease = pool.lease((5, 7), **backend.place)
    lease.tensor.fill_(3)
    view = lease.tensor[2:4]
    lease.release()
    assert counters_balance(pool).quarantined_blocks == 1
    with pool.borrow((5, 7), **backend.place) as tensor:
        tensor.fill_(4)
        assert (view == 3).all()
    del view
    stats = counters_balance(pool)
    assert (stats.idle_blocks, stats.quarantined_blocks) == (2, 0)


def test_a_released_tensor_and_its_view_can_go_in_any_order(backend):
    pool = backend.pool()
    for first in ("tensor", "view"):
        lease = pool.lease((5, 7), **backend.place)
        held = {"tensor": lease.tensor, "view": lease.tensor[1]}
        lease.release()
        assert pool.stats().quarantined_blocks == 1
        del held[first]
        assert pool.stats().quarantined_blocks == (first == "tensor")
        held.clear()
        assert counters_balance(pool).quarantined_blocks == 0
        backend.finish()


@pytest.mark.parametrize(
    "share",
    [
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.view(torch.int32),
        torch.nn.Parameter,
        lambda tensor: from_dlpack(to_dlpack(tensor)),
        lambda tensor: torch.empty(0, device=tensor.device).set_(tensor),
    ],
    ids=["storage", "detach", "view", "parameter", "dlpack", "set_"],
)
def test_whatever_shares_the_memory_keeps_the_block_apart(backend, share):
    pool = backend.pool()
    lease = pool.lease((5, 7), **backend.place)
    other = share(lease.tensor)
    lease.release()
    assert counters_balance(pool).quarantined_blocks == 1
    del other
    gc.collect()
    assert counters_balance(pool).quarantined_blocks == 0


def test_a_numpy_array_keeps_the_block_apart():
    numpy = pytest.importorskip("numpy")
    pool = UnifiedMemoryPool()
    lease = pool.lease((5, 7))
    array = lease.tensor.fill_(3).numpy()
    lease.release()
    assert counters_balance(pool).quarantined_blocks == 1
    with pool.borrow((5, 7)) as tensor:
        tensor.fill_(4)
        assert numpy.all(array == 3)
    del array
    assert counters_balance(pool).quarantined_blocks == 0


def test_backward_after_release_is_torchs_error_and_not_garbage(backend):
    pool = backend.pool()
    weight = torch.ones(5, 7, device=backend.place["device"], requires_grad=True)
    with pool.borrow((5, 7), **backend.place) as tensor:
        tensor.fill_(2)
        loss = (weight * tensor).sum()
    assert counters_balance(pool).quarantined_blocks == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    del loss
    assert counters_balance(pool).quarantined_blocks == 0
    del tensor


def test_autograd_goes_through_a_lease_and_leaves_no_history_behind(backend):
    pool = backend.pool()
    weight = torch.full((5, 7), 3.0, device=backend.place["device"], requires_grad=True)
    for _ in range(2):
        with pool.borrow((5, 7), **backend.place) as tensor:
            assert tensor.grad_fn is None
            tensor.copy_(weight)
            (gradient,) = torch.autograd.grad((tensor * tensor).sum(), weight)
            assert (gradient == 6).all()
        backend.finish()
    assert counters_balance(pool).misses == 1
    with pool.borrow((5, 7), **backend.place) as tensor:
        tensor.fill_(2).requires_grad_()
        tensor.sum().backward()
    backend.finish()
    with pool.borrow((5, 7), **backend.place) as tensor:
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_an_exception_returns_the_lease(backend):
    pool = backend.pool()
    with pytest.raises(ZeroDivisionError), pool.borrow((5, 7), **backend.place):
        raise ZeroDivisionError
    assert pool.outstanding() == ()
    assert counters_balance(pool).idle_blocks == 1


def test_a_dropped_lease_ends_with_its_tensor(backend):
    pool = backend.pool()
    tensor = pool.lease((5, 7), **backend.place).tensor.fill_(3)
    gc.collect()
    assert pool.outstanding() == ()
    assert counters_balance(pool).quarantined_blocks == 1
    with pool.borrow((5, 7), **backend.place) as other:
        other.fill_(4)
        assert (tensor == 3).all()
    del tensor
    assert counters_balance(pool).quarantined_blocks == 0


def test_the_limit_is_reached_exactly_and_never_exceeded(backend):
    size = 8 * backend.granule
    pool = backend.pool(3 * size)
    leases = [pool.lease((size,), dtype=torch.uint8, **backend.place) for _ in range(3)]
    assert counters_balance(pool).reserved_bytes == 3 * size
    with pytest.raises(PoolLimitError) as caught:
        pool.lease((1,), dtype=torch.uint8, **backend.place)
    assert caught.value.needed_bytes == backend.granule
    assert caught.value.limit_bytes == 3 * size
    assert str(caught.value.needed_bytes) in str(caught.value)
    assert str(caught.value.limit_bytes) in str(caught.value)
    leases.pop().release()
    # The idle block makes room for another size.
    with pool.borrow((size // 2 + 1,), dtype=torch.uint8, **backend.place):
        stats = counters_balance(pool)
        assert stats.reserved_bytes < 3 * size
        assert stats.trimmed_bytes == size
    assert counters_balance(pool).peak_reserved_bytes == 3 * size


def test_one_byte_less_than_a_block_is_too_small_a_limit(backend):
    size = 16 * backend.granule
    request = {"shape": (size,), "dtype": torch.uint8, **backend.place}
    with backend.pool(size).borrow(**request):
        pass
    with pytest.raises(PoolLimitError):
        backend.pool(size - 1).lease(**request)


def test_a_quarantined_block_counts_towards_the_limit(backend):
    pool = backend.pool(16 * backend.granule)
    request = {"shape": (9 * backend.granule,), "dtype": torch.uint8, **backend.place}
    lease = pool.lease(**request)
    view = lease.tensor[1:]
    lease.release()
    with pytest.raises(PoolLimitError, match=f"{9 * backend.granule} of them quarantined"):
        pool.lease(**request)
    del view
    pool.lease(**request).release()


def test_growth_of_a_locked_pool_is_an_error_that_names_the_caller(backend):
    pool = backend.pool()
    pool.reserve((5, 7), count=2, **backend.place)
    pool.lock()
    held = [pool.lease((5, 7), **backend.place) for _ in range(2)]
    with pytest.raises(PoolLockedError, match=r"test_conformance\.py:\d+ in test_growth"):
        pool.lease((5, 7), **backend.place)
    assert len(held) == 2
    pool.unlock()
    pool.lease((50, 70), **backend.place).release()
    assert counters_balance(pool).misses == 1


def test_reserved_blocks_are_spared_until_the_limit_needs_them(backend):
    granule = backend.granule
    pool = backend.pool(64 * granule)
    pool.reserve((4 * granule,), count=3, dtype=torch.uint8, **backend.place)
    pool.reserve((4 * granule,), count=2, dtype=torch.uint8, **backend.place)
    assert counters_balance(pool).idle_blocks == 3
    pool.lease((granule,), dtype=torch.uint8, **backend.place).release()
    assert counters_balance(pool).idle_blocks == 4
    backend.finish()
    pool.lease((60 * granule,), dtype=torch.uint8, **backend.place).release()
    assert counters_balance(pool).reserved_bytes == 64 * granule
    pool.lease((64 * granule,), dtype=torch.uint8, **backend.place).release()
    assert counters_balance(pool).reserved_blocks == 1


def test_trim_gives_back_no_more_than_it_must(backend):
    pool = backend.pool(overhead=None)
    leases = [
        pool.lease((k * 8 * backend.granule,), dtype=torch.uint8, **backend.place)
        for k in (1, 2, 4)
    ]
    for lease in leases:
        lease.release()
    backend.finish()
    assert pool.trim(48 * backend.granule) == 8 * backend.granule
    assert pool.stats().idle_bytes == 48 * backend.granule
    assert pool.trim() == 48 * backend.granule
    assert counters_balance(pool).reserved_bytes == 0


def test_a_closed_pool_refuses_and_takes_back_what_is_live(backend):
    with backend.pool() as pool:
        lease = pool.lease((5, 7), **backend.place)
        lease.tensor.fill_(3)
        view = lease.tensor[0]
    pool.close()
    with pytest.raises(PoolClosedError, match=r"test_conformance\.py"):
        pool.lease((5, 7), **backend.place)
    assert (lease.tensor == 3).all()
    lease.release()
    assert pool.stats().quarantined_blocks == 1
    del view
    assert counters_balance(pool).reserved_bytes == 0


def test_idle_blocks_are_poisoned_and_checked(backend):
    pool = backend.pool(fill="poison")
    with pool.borrow((5, 7), **backend.place) as tensor:
        assert tensor.isnan().all()
        tensor.fill_(1)
        address = tensor.data_ptr()
    backend.finish()
    with pool.borrow((5, 7), **backend.place) as tensor:
        assert tensor.data_ptr() == address
        assert tensor.isnan().all()
    idle = next(block for shelf in pool._stock.shelves for block in shelf.free)
    idle.base[17] = 3
    backend.finish()
    with pytest.raises(PoolCorruptionError, match=r"1 bytes .* the first at offset 17.*\[5, 7\]"):
        pool.lease((5, 7), **backend.place)
    assert pool.outstanding() == ()
    backend.finish()
    with pool.borrow((5, 7), **backend.place) as tensor:
        assert tensor.isnan().all()
    counters_balance(pool)


def test_new_and_reserved_blocks_are_poisoned_too(backend):
    pool = backend.pool(fill="poison")
    pool.reserve((3,), **backend.place)
    for shape in [(3,), (300,)]:
        with pool.borrow(shape, **backend.place) as tensor:
            assert tensor.isnan().all()


def test_peaks_start_anew_on_request(backend):
    pool = backend.pool()
    with pool.borrow((1000,), **backend.place), pool.borrow((1000,), **backend.place):
        pass
    pool.trim()
    backend.finish()
    pool.trim()
    stats = counters_balance(pool)
    assert (stats.peak_live_bytes, stats.peak_live_leases) == (8000, 2)
    pool.reset_peak()
    stats = counters_balance(pool)
    assert (stats.peak_live_bytes, stats.peak_live_leases) == (0, 0)
    assert stats.peak_reserved_bytes == 0
    assert (stats.total_leases, stats.total_leased_bytes) == (2, 8000)


def test_outstanding_tells_what_and_where(backend):
    pool = backend.pool(stacks=True)
    lease = pool.lease((5, 7), dtype=torch.int16, **backend.place)
    (info,) = pool.outstanding()
    assert info.shape == (5, 7)
    assert info.dtype == torch.int16
    assert (info.nbytes, info.number) == (70, 1)
    assert info.pin_memory == (backend.name == "pinned")
    assert "test_conformance.py" in info.stack[-1]
    lease.release()


def test_leases_of_inference_mode_serve_training_later(backend):
    pool = backend.pool()
    with torch.inference_mode(), pool.borrow((5, 7), **backend.place) as tensor:
        tensor.fill_(3)
        assert not tensor.is_inference()
    backend.finish()
    weight = torch.ones(5, 7, device=backend.place["device"], requires_grad=True)
    with pool.borrow((5, 7), **backend.place) as tensor:
        tensor.fill_(3)
        (weight * tensor).sum().backward()
    assert (weight.grad == 3).all()
    assert counters_balance(pool).misses == 1


def test_idle_blocks_make_way_for_growth_beyond_the_overhead(backend):
    granule = backend.granule
    pool = backend.pool(overhead=1.25)
    for size in range(64, 128, 8):
        pool.lease((size * granule,), dtype=torch.uint8, **backend.place).release()
        backend.finish()
        stats = counters_balance(pool)
        assert stats.reserved_bytes <= 1.25 * stats.peak_live_bytes
    pool = backend.pool(overhead=None)
    for size in range(64, 128, 8):
        pool.lease((size * granule,), dtype=torch.uint8, **backend.place).release()
        backend.finish()
    assert counters_balance(pool).idle_blocks == 8


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 200_000)),
        min_size=1,
        max_size=60,
    )
)
def test_reserved_bytes_stay_within_the_overhead_of_the_live_peak(steps):
    pool = UnifiedMemoryPool(overhead=1.25)
    live = []
    for release, index, length in steps:
        if release and live:
            live.pop(index % len(live)).release()
        else:
            # From eight granules on, rounding up to a class costs less than an eighth.
            live.append(pool.lease((length + 512,), dtype=torch.uint8))
    assert counters_balance(pool).fragmentation <= 1.25
    for lease in live:
        lease.release()


def test_memory_that_runs_short_is_trimmed_and_asked_for_once_more(backend_by_name):
    backend = backend_by_name("device")
    pool = backend.pool(overhead=None)
    pool.lease((300,)).release()
    allocate, calls = backend.memory.allocate, []

    def short_once(nbytes):
        calls.append(pool.stats().idle_blocks)
        if len(calls) == 1:
            raise RuntimeError("not enough memory")
        return allocate(nbytes)

    backend.memory.allocate = short_once
    pool.lease((5000,)).release()
    assert calls == [1, 0]

    def short(nbytes):
        raise RuntimeError("not enough memory")

    backend.memory.allocate = short
    with pytest.raises(RuntimeError, match="not enough memory"):
        pool.lease((50_000,))
    assert counters_balance(pool).reserved_bytes == pool.stats().idle_bytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (2, -1)}, ValueError, r"shape .* Got \(2, -1\)"),
        ({"shape": 3}, TypeError, "shape .* Got 3"),
        ({"shape": (2.5,)}, TypeError, r"shape .* Got \(2.5,\)"),
        ({"shape": (2,), "dtype": float}, TypeError, "dtype .* Got <class 'float'>"),
        ({"shape": (2,), "device": "meta"}, ValueError, "device .* Got 'meta'"),
        ({"shape": (2,), "device": "nowhere"}, ValueError, "device .* Got 'nowhere'"),
        ({"shape": (2,), "device": [7]}, TypeError, "device"),
        ({"shape": (2,), "device": "cuda", "pin_memory": True}, ValueError, "pin_memory"),
    ],
)
def test_wrong_requests_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        UnifiedMemoryPool().lease(**arguments)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"limit_bytes": -1}, ValueError, "limit_bytes .* Got -1"),
        ({"limit_bytes": 2.5}, TypeError, "limit_bytes .* Got 2.5"),
        ({"limit_bytes": True}, TypeError, "limit_bytes .* Got True"),
        ({"overhead": 0.5}, ValueError, "overhead .* Got 0.5"),
        ({"overhead": math.inf}, ValueError, "overhead .* Got inf"),
        ({"overhead": math.nan}, ValueError, "overhead .* Got nan"),
        ({"overhead": "unlimited"}, TypeError, "overhead .* Got 'unlimited'"),
        ({"fill": "zero"}, ValueError, "fill .* Got 'zero'"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings, error, message):
    with pytest.raises(error, match=message):
        UnifiedMemoryPool(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("place", [{"device": "cuda"}, {"pin_memory": True}])
def test_what_needs_a_device_says_so_where_there_is_none(place):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        UnifiedMemoryPool().lease((2,), **place)


def test_a_negative_reservation_is_refused():
    with pytest.raises(ValueError, match=r"count .* Got -1"):
        UnifiedMemoryPool().reserve((2,), count=-1)


def test_a_stream_cannot_be_recorded_once_the_lease_was_released():
    lease = UnifiedMemoryPool().lease((2, 3))
    lease.record_stream("a queue")
    lease.release()
    with pytest.raises(LeaseReleasedError, match="released"):
        lease.record_stream("a queue")


def test_lists_and_sizes_are_shapes_too():
    pool = UnifiedMemoryPool()
    for shape in ([2, 3], torch.Size([2, 3])):
        with pool.borrow(shape) as tensor:
            assert tensor.shape == (2, 3)


def test_many_shapes_do_not_pile_up():
    pool = UnifiedMemoryPool()
    for length in range(5000):
        pool.lease((length % 60, 1)).release()
        pool.lease((length,)).release()
    assert len(pool._stock.known) <= 4096
    blocks = [block for shelf in pool._stock.shelves for block in shelf.free]
    assert max(len(block.templates) for block in blocks) <= 8
    counters_balance(pool)


def test_all_errors_are_pool_errors():
    for error in (PoolLimitError, PoolLockedError, PoolClosedError, LeaseReleasedError):
        assert issubclass(error, PoolError)
