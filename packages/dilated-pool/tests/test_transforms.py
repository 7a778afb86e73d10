"""Under torch.compile and torch.func, leases are plain tensors."""

import pytest
import torch

from dilated_pool import UnifiedMemoryPool


def test_compiled_code_uses_plain_tensors_without_a_graph_break():
    pool = UnifiedMemoryPool()

    def step(x):
        with pool.borrow((5, 7), dtype=torch.float32, device="cpu") as buffer:
            buffer.copy_(x)
            lease = pool.lease((5, 7))
            lease.tensor.copy_(buffer)
            result = lease.tensor * 2
            lease.release()
        return result

    x = torch.randn(5, 7)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), 2 * x)
    assert pool.stats().total_leases == 0
    assert torch.equal(step(x), 2 * x)
    assert pool.stats().total_leases == 2


def test_a_compiled_function_takes_leases_as_inputs():
    pool = UnifiedMemoryPool()
    compiled = torch.compile(lambda x: x.sin().sum(), fullgraph=True, backend="eager")
    for _ in range(3):
        with pool.borrow((5, 7)) as tensor:
            tensor.zero_()
            assert compiled(tensor) == 0
    assert pool.stats().live_bytes == 0


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_torch_func_use_plain_tensors(transform):
    pool = UnifiedMemoryPool()

    def square(x):
        with pool.borrow(x.shape) as buffer:
            return (buffer.zero_() + x).square().sum()

    x = torch.randn(5, 7)
    if transform == "grad":
        torch.testing.assert_close(torch.func.grad(square)(x), 2 * x)
    else:
        torch.testing.assert_close(torch.func.vmap(square)(x), x.square().sum(1))
    assert pool.stats().total_leases == 0
