"""The kernels of models compile, as far as Triton goes without a GPU."""

import pytest
import torch

from triton_compiling import kernels_are_compiled


@pytest.mark.parametrize("features", [5, 48, 97, 3072, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_compile(features: int, dtype: torch.dtype) -> None:
    with kernels_are_compiled() as launched:
        from dilated_factory.models import _norm_kernels as kernels

        x, wide = torch.zeros(3, features, dtype=dtype), torch.zeros(3, features)
        weight, moments = torch.ones(features), torch.zeros(2, 3)
        for gelu in (True, False):
            kernels.forward(x, None, weight, weight, None, x.clone(), moments, 1e-5, gelu)
            kernels.backward(x, None, x, weight, moments, x.clone(), None, gelu)
        kernels.forward(wide, x, weight, weight, wide.clone(), x.clone(), moments, 1e-5, False)
        for of_total in (None, wide):
            kernels.backward(x, of_total, wide, weight, moments, wide.clone(), x.clone(), False)
    both = ["_norm_kernel", "_norm_backward_kernel"]
    assert [kernel for kernel, _ in launched] == [*3 * both, both[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_generation_compiles(dtype: torch.dtype) -> None:
    with kernels_are_compiled() as launched:
        from dilated_factory.models import _norm_kernels
        from dilated_factory.models import _row_kernels as kernels

        rows = torch.zeros(3, 80, dtype=dtype)
        for positions in (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)):
            kernels.turn(rows, positions, torch.zeros(5, dtype=torch.int64), 4, 2)
        hidden, weight = torch.zeros(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
        outs = hidden.clone(), hidden.clone()
        _norm_kernels.forward(hidden, hidden, weight, weight, *outs, None, 1e-5, gelu=False)
    assert [kernel for kernel, _ in launched] == ["_turn_kernel", "_turn_kernel", "_norm_kernel"]
