"""The triton backend on a CUDA device: against the float64 oracle, as exact as fused attention."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dilated_core._call import DilatedCall
from dilated_core.extending import Scores, Upstream
from dilated_sparse import (
    BlockLayout,
    block_sparse_attention,
    layouts,
    select_backend,
)
from dilated_sparse._call import BlockCall
from dilated_sparse._operators import TRITON
from dilated_sparse._reference import attend as reference
from dilated_testing import poisoned
from mixed_precision import NAMES, rounded_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIZES = [16, 32, 48, 64, 100, 128, 200, 256]


class DenseMask:
    """A layout as the pattern that the yardstick asks for multiplicities."""

    def __init__(self, layout):
        self.layout = layout

    def multiplicity(self, length, heads, *, is_causal, key_length):
        seen = self.layout.to_dense().expand(heads, -1, -1)
        if is_causal:
            last = torch.arange(length, device=seen.device)[:, None] + key_length - length
            seen = seen & (torch.arange(key_length, device=seen.device) <= last)
        return seen.long()

    def zero_keys(self, length, heads, *, key_length):
        return torch.zeros(heads, length)


def random_layout(heads, length, key_length, block_size):
    """Full, empty and random blocks, and rows and columns of blocks that are empty."""
    kind = torch.rand(heads, -(-length // block_size), -(-key_length // block_size))
    kind[:, torch.rand(kind.shape[1]) < 0.1] = 1.0
    kind[:, :, torch.rand(kind.shape[2]) < 0.1] = 1.0
    kind = kind.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
    kind = kind[:, :length, :key_length]
    seen = (kind < 0.4) | ((kind < 0.6) & (torch.rand(heads, length, key_length) < 0.5))
    return BlockLayout.from_dense(seen, block_size=block_size)


def draw(batch, length, key_length, heads, kv_heads, head_dim, dtype):
    shapes = (length, heads), (key_length, kv_heads), (key_length, kv_heads)
    return [torch.randn(batch, n, h, head_dim, device=DEVICE).to(dtype) for n, h in shapes]


def run(function, call, inputs, upstream):
    tensors = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(call, *tensors)
    grad_lse = upstream[1].masked_fill(lse == -math.inf, 0.0)
    grads = torch.autograd.grad(
        (out, lse), tensors, (upstream[0].to(out.dtype), grad_lse.to(lse.dtype))
    )
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def difference(actual, expected):
    """The norm of the difference over finite entries; infinities agree and NaN never passes."""
    actual, expected = actual.detach(), expected.detach()
    assert torch.equal(actual.isinf(), expected.isinf())
    assert not actual.isnan().any()
    finite = expected.isfinite()
    return float(torch.linalg.vector_norm((actual.double() - expected)[finite]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 19, 48, 64, 80, 96, 128, 256])
# Shrinking would compile kernels at every step.
@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    block_size=st.sampled_from(SIZES),
    lengths=st.tuples(st.integers(20, 900), st.integers(20, 900)),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    per_head=st.booleans(),
    is_causal=st.booleans(),
    padding=st.sampled_from([0.0, 0.0, 0.3]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.2]),
    seed=st.integers(0, 2**31),
)
def test_every_result_is_as_exact_as_fused_attention(
    head_dim, dtype, block_size, lengths, heads, per_head, is_causal, padding, dropout_p, seed
):
    torch.manual_seed(seed)
    length, key_length = sorted(lengths) if is_causal else lengths
    layout = random_layout(heads[0] if per_head else 1, length, key_length, block_size)
    # Enough rows that rounding errors average out.
    batch = 2 + 600 // min(lengths)
    inputs = draw(batch, length, key_length, *heads, head_dim, dtype)
    upstream = (
        torch.randn(inputs[0].shape, device=DEVICE).to(dtype),
        torch.randn(batch, heads[0], length, device=DEVICE),
    )
    mask = torch.rand(batch, key_length, device=DEVICE) < padding if padding else None
    drop = torch.randint(2**62, (), device=DEVICE) if dropout_p else None
    scores = Scores(is_causal, head_dim**-0.5, mask, dropout_p, drop)
    call = BlockCall(layout, scores)
    actual = run(TRITON.attend, call, inputs, upstream)
    expected = run(reference, call, [x.double() for x in inputs], upstream)
    upstream = upstream[0], upstream[1].masked_fill(expected["lse"] == -math.inf, 0.0)
    rounded = rounded_attention(DilatedCall(DenseMask(layout), scores), inputs, upstream)
    for name in NAMES:
        same_scores = difference(rounded[name], expected[name])
        # Where little is visible, rounding may all but vanish on one side: a few units remain.
        least = 2 * torch.finfo(torch.float32).eps * expected[name].numel() ** 0.5
        assert difference(actual[name], expected[name]) <= 2 * max(same_scores, least), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_size", SIZES)
def test_every_element_is_written(is_causal, block_size, monkeypatch):
    from dilated_core._triton import _launch
    from dilated_sparse import _triton_backend

    for name in ("empty_like", "empty_lse", "empty_grads"):
        monkeypatch.setattr(_launch, name, poisoned(getattr(_launch, name)))
    for heads in (1, 6):
        inputs = draw(2, 517, 701, 6, 2, 48, torch.bfloat16)
        layout = random_layout(heads, 517, 701, block_size)
        call = BlockCall(layout, Scores(is_causal, 0.2))
        total = _triton_backend.forward(call, *inputs)
        upstream = Upstream(torch.randn_like(total.out), None, *inputs, total)
        grads = _triton_backend.backward(call, upstream)
        assert not any(x.isnan().any() for x in (*total, *grads))


def test_the_same_inputs_give_the_same_bits():
    inputs = draw(2, 2000, 2000, 6, 2, 64, torch.bfloat16)
    upstream = torch.randn_like(inputs[0]), torch.randn(2, 6, 2000, device=DEVICE)
    layout = random_layout(6, 2000, 2000, 64)
    scores = Scores(True, 0.125, None, 0.1, torch.tensor(7, device=DEVICE))
    call = BlockCall(layout, scores)
    first, second = (run(TRITON.attend, call, inputs, upstream) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_a_captured_graph_replays():
    inputs = draw(1, 1500, 1500, 4, 4, 64, torch.float16)
    layout = random_layout(1, 1500, 1500, 128)
    call = BlockCall(layout, Scores(False, 0.125))
    TRITON.attend(call, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = TRITON.attend(call, *inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, TRITON.attend(call, *inputs).out)


def test_capturing_an_unseen_layout_says_to_run_once_before():
    inputs = draw(1, 500, 500, 4, 4, 64, torch.float16)
    call = BlockCall(layouts.sliding_window(500, 77), Scores(False, 0.125))
    with warnings.catch_warnings():
        # torch warns that the captured graph is empty.
        warnings.simplefilter("ignore")
        with (
            pytest.raises(RuntimeError, match="before a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            TRITON.attend(call, *inputs)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_second_call_needs_no_host_sync(where):
    inputs = [x.requires_grad_() for x in draw(1, 1000, 1000, 4, 4, 64, torch.float16)]
    layout = layouts.bigbird(1000, block_size=64).to(where)

    def step():
        out = block_sparse_attention(*inputs, layout, backend="triton")
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_compiles_to_one_graph():
    inputs = draw(1, 300, 300, 4, 2, 64, torch.float16)
    layout = random_layout(1, 300, 300, 64)

    def function(query, key, value):
        return block_sparse_attention(query, key, value, layout, is_causal=True, enable_gqa=True)

    upstream = torch.randn_like(inputs[0])
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        tensors = [x.detach().requires_grad_() for x in inputs]
        out = call(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_picked_where_it_can_serve():
    inputs = draw(1, 10, 10, 1, 1, 64, torch.float16)
    layout = layouts.sliding_window(10, 3)
    assert select_backend(*inputs[:2], layout=layout).backend == "triton"
    choice = select_backend(*(x.double() for x in inputs[:2]), layout=layout)
    assert choice.backend == "torch"
    assert "float64" in dict(choice.rejected)["triton"]


def test_another_layout_or_length_compiles_no_kernel():
    from dilated_core._triton import _kernels

    def compiled():
        kernels = (
            _kernels.forward_kernel, _kernels.query_gradient_kernel, _kernels.key_gradient_kernel
        )  # fmt: skip
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    def step(length, share):
        x = [t.requires_grad_() for t in draw(1, length, length, 2, 2, 64, torch.float16)]
        seen = torch.rand(length, length) < share
        seen[:, 128:256] = True
        layout = BlockLayout.from_dense(seen, block_size=128)
        out = block_sparse_attention(*x, layout, backend="triton")
        torch.autograd.grad(out, x, torch.ones_like(out))

    # Strides that 16 divides are compiled apart from others.
    step(1024, 0.5)
    step(777, 0.1)
    before = compiled()
    for length, share in ((555, 0.1), (2048, 0.9), (640, 0.3), (901, 0.6)):
        step(length, share)
    assert compiled() == before


@pytest.mark.slow
def test_a_million_tokens_agree_on_sampled_rows():
    length = 1_000_003
    layout = layouts.sliding_window(length, 700, block_size=128)
    layout |= layouts.global_tokens(length, 100, block_size=128)
    query, key, value = draw(1, length, length, 2, 2, 64, torch.bfloat16)
    call = BlockCall(layout, Scores(True, 0.125))
    out, lse = TRITON.attend(call, query, key, value)
    positions = torch.arange(length, device=DEVICE)
    for row in (0, 99, 100, 5003, 999_999, length - 1):
        seen = (positions <= row) & ((positions < 100) | ((row - positions) <= 700) | (row < 100))
        scores = (key[0, seen, 1].double() @ query[0, row, 1].double()) * 0.125
        assert abs(float(lse[0, 1, row]) - float(scores.logsumexp(0))) < 1e-4
        expected = torch.softmax(scores, 0) @ value[0, seen, 1].double()
        torch.testing.assert_close(out[0, row, 1].double(), expected, rtol=2e-2, atol=2e-3)
