"""The kernels compile for layouts, as far as Triton goes without a GPU."""

import pytest
import torch

from dilated_core._call import Scores, Upstream
from dilated_sparse import layouts
from triton_compiling import kernels_are_compiled


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_every_pass_compiles(
    is_causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = torch.zeros(3, 1, 512, 2, 64, dtype=torch.bfloat16).unbind()
    mask = torch.zeros(1, 512, dtype=torch.bool) if padded else None
    scores = Scores(is_causal, 0.125, mask)
    # Blocks that are seen in part: bits say which rows see which columns.
    layout = layouts.sliding_window(512, window=70, block_size=48)
    with kernels_are_compiled() as launched:
        from dilated_core._triton import _launch, _triton_internals
        from dilated_sparse._triton_backend import LayoutTiling

        monkeypatch.setattr(_triton_internals, "can_relaunch", lambda: False)
        call = _launch.KernelCall(scores, LayoutTiling(layout), query, key, value)
        total = _launch.forward(call)
        grad_out = torch.zeros_like(total.out)
        _launch.backward(call, Upstream(grad_out, None, query, key, value, total))
    assert [kernel for kernel, _ in launched] == [
        "forward_kernel",
        "query_gradient_kernel",
        "key_gradient_kernel",
    ]
