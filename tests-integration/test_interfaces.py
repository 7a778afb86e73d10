"""Packages meet in core's interfaces without importing each other."""

import pytest
import torch

core_interfaces = pytest.importorskip(
    "dilated_core.interfaces", reason="dilated-core is not installed"
)


def test_the_pool_is_a_buffer_source():
    pool_package = pytest.importorskip("dilated_pool", reason="dilated-pool is not installed")
    pool = pool_package.UnifiedMemoryPool()
    assert isinstance(pool, core_interfaces.BufferSource)
    with pool.borrow((3, 5), dtype=torch.float32, device="cpu") as buffer:
        assert buffer.shape == (3, 5)
    lease = pool.lease((7,), dtype=torch.int64, device="cpu")
    assert lease.tensor.dtype == torch.int64
    lease.release()
    lease.release()
    assert not pool.outstanding()
