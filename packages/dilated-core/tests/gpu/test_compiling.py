"""All kernels compile, as far as Triton goes without a GPU."""

from typing import Any

import pytest
import torch

from dilated_core import DilatedKVCache, DilatedPattern
from dilated_core._call import DilatedCall, Scores, Upstream
from triton_compiling import kernels_are_compiled

LENGTH = 2048
# Only their length and causal order hide columns of runs.
LONG = DilatedPattern([1024, 2048], [1, 2])
PLAIN = DilatedPattern([11, 37, 53], [1, 3, 4])
PADDING = DilatedPattern([7, 13, 60], [1, 2, 6], count_padding=True)

# By name: pattern, head_dim, dtype, the plan's mask, options.
CASES: dict[str, tuple[DilatedPattern, int, torch.dtype, int, dict[str, Any]]] = {
    "no mask": (LONG, 64, torch.bfloat16, 0, {}),
    "causal": (LONG, 64, torch.bfloat16, 1, {"is_causal": True}),
    "causal, 128": (LONG, 128, torch.bfloat16, 1, {"is_causal": True}),
    "segments, in two blocks": (PLAIN, 48, torch.float16, 2, {}),
    "segments, causal": (PLAIN, 80, torch.bfloat16, 2, {"is_causal": True}),
    "float32": (LONG, 19, torch.float32, 1, {"is_causal": True}),
    "zero keys": (PADDING, 64, torch.float16, 2, {}),
    "padding mask": (LONG, 64, torch.float16, 0, {"padded": True}),
    "padding mask, causal": (LONG, 64, torch.bfloat16, 1, {"padded": True, "is_causal": True}),
    "dropout": (PLAIN, 64, torch.bfloat16, 2, {"dropout": True}),
    "packed": (
        PLAIN, 96, torch.bfloat16, 2, {"packed": True, "is_causal": True, "scale": -0.1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_pass_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, head_dim, dtype, mask_kind, options = CASES[name]
    query, key, value = (torch.zeros(1, LENGTH, h, head_dim, dtype=dtype) for h in (4, 2, 2))
    mask = torch.zeros(1, LENGTH, dtype=torch.bool) if "padded" in options else None
    drop = (0.1, torch.tensor(7)) if "dropout" in options else (0.0, None)
    scores = Scores(options.get("is_causal", False), options.get("scale", 0.125), mask, *drop)
    ends = torch.tensor([0, 100, LENGTH], dtype=torch.int32) if "packed" in options else None
    with kernels_are_compiled() as launched:
        from dilated_core._triton import _launch, _triton_internals

        monkeypatch.setattr(_triton_internals, "can_relaunch", lambda: False)
        call = _launch.pattern_call(DilatedCall(pattern, scores, ends), query, key, value)
        total = _launch.forward(call)
        for grad_lse in (None, torch.zeros_like(total.lse)):
            upstream = Upstream(torch.zeros_like(total.out), grad_lse, query, key, value, total)
            _launch.backward(call, upstream)
    kernels = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    assert {(kernel, given["MASK"]) for kernel, given in launched} == {
        (kernel, mask_kind) for kernel in kernels
    }


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_of_a_cache_compiles(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_core._held_rows import HeldRows

    cache = DilatedKVCache(PLAIN)
    rows = [torch.zeros(2, 1, h, 64, dtype=torch.bfloat16) for h in (4, 2, 2)]
    cache.attend(*rows)
    monkeypatch.setattr(HeldRows, "has_kernel", True)
    mask = torch.zeros(2, 1, dtype=torch.bool) if padded else None
    lengths = torch.ones(2, dtype=torch.int64) if padded else None
    with kernels_are_compiled() as launched:
        cache.attend(*rows, key_padding_mask=mask, lengths=lengths)
    assert [kernel for kernel, _ in launched] == ["decode_kernel", "merge_kernel"]
