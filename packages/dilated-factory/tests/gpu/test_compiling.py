"""The kernels of models compile, as far as Triton goes without a GPU."""

import pytest
import torch

from triton_compiling import kernels_are_compiled


@pytest.mark.parametrize("features", [5, 48, 97, 3072, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_and_norm_compile(features: int, dtype: torch.dtype) -> None:
    with kernels_are_compiled() as launched:
        from dilated_factory.models import _gelu_norm_kernels as kernels

        x = torch.zeros(3, features, dtype=dtype)
        weight, moments = torch.ones(features), torch.zeros(2, 3)
        kernels.forward(x, weight, weight, x.clone(), moments, 1e-5)
        kernels.backward(x, x, weight, moments, x.clone())
    assert [kernel for kernel, _ in launched] == ["_forward_kernel", "_backward_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_generation_compiles(dtype: torch.dtype) -> None:
    with kernels_are_compiled() as launched:
        from dilated_factory.models import _row_kernels as kernels

        rows = torch.zeros(3, 80, dtype=dtype)
        for positions in (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)):
            kernels.turn(rows, positions, torch.zeros(5, dtype=torch.int64), 4, 2)
        hidden, weight = torch.zeros(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
        kernels.add_norm(hidden, hidden, weight, weight, 1e-5)
    assert [kernel for kernel, _ in launched] == [
        "_turn_kernel",
        "_turn_kernel",
        "_add_norm_kernel",
    ]
