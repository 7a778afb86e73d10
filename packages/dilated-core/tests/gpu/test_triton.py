"""The triton backend on a CUDA device: against the float64 oracle and torch's fused attention."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._reference import attend as reference
from dilated_core._triton import attend, unsupported
from dilated_core.interfaces import KeyRows, SpanCall
from dilated_testing import poisoned
from mixed_precision import NAMES, rounded_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NESTED = DilatedPattern([128, 256, 512, 1024], [1, 2, 4, 8])
PLAIN = DilatedPattern([100, 333, 700], [1, 3, 5])
PATTERNS = [
    NESTED,
    PLAIN,
    DilatedPattern([64, 128, 256, 512, 1024], [1, 2, 4, 6, 12]),
    DilatedPattern([32, 181, 1024, 5793], [1, 2, 4, 8], head_offsets="blocked"),
    DilatedPattern([37, 64, 200], [2, 3, 6], head_offsets="blocked"),
    DilatedPattern([50, 90, 400], [1, 2, 6], count_padding=True),
    DilatedPattern([64, 128, 256], [1, 2, 4], head_groups="split"),
    DilatedPattern([7, 3], [9, 2]),
]
HEADS = [(4, 4), (6, 2), (3, 1)]


def differences(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Norms of the difference and of what is expected.

    Only finite entries count; infinities must agree and NaN never passes.
    """
    actual, expected = actual.detach(), expected.detach()
    assert torch.equal(actual.isinf(), expected.isinf())
    assert not actual.isnan().any()
    finite = expected.isfinite()
    difference = torch.linalg.vector_norm((actual.double() - expected)[finite])
    return float(difference), float(expected[finite].norm())


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error."""
    difference, norm = differences(actual, expected)
    return difference / norm if norm else math.inf


def draw(batch: int, length: int, key_length: int, heads: int, kv_heads: int, head_dim: int,
         dtype: torch.dtype) -> list[Tensor]:  # fmt: skip
    shapes = (length, heads), (key_length, kv_heads), (key_length, kv_heads)
    return [torch.randn(batch, n, h, head_dim, device=DEVICE).to(dtype) for n, h in shapes]


def asked(
    pattern: DilatedPattern, is_causal: bool, *rest: Any, ends: Tensor | None = None
) -> DilatedCall:
    """A call: scale, and then, if any, padding mask, dropout_p and seed; ends of sequences."""
    return DilatedCall(pattern, Scores(is_causal, *rest), ends)


def run(
    function: Any, options: DilatedCall, inputs: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    tensors = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(options, *tensors)
    grads = torch.autograd.grad(
        (out, lse), tensors,
        (upstream[0].to(out.dtype), upstream[1].masked_fill(lse == -math.inf, 0.0).to(lse.dtype)),
    )  # fmt: skip
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def fused_attention(
    options: DilatedCall, inputs: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Fused attention of torch with dense scores; it takes no gradient to lse."""
    head_dim, length, heads = inputs[0].shape[-1], inputs[0].shape[1], inputs[0].shape[2]
    tensors = [x.detach().requires_grad_() for x in inputs]
    padded = [
        F.pad(x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2), (0, -head_dim % 8))
        for x in tensors
    ]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *padded, None, True, scale=options.scores.scale
    )
    out = out.transpose(1, 2)[..., :head_dim]
    grads = torch.autograd.grad(out, tensors, upstream[0].to(out.dtype))
    return dict(zip(NAMES, (out, lse[..., :length], *grads), strict=True))


@cache
def fused_errors(
    head_dim: int, dtype: torch.dtype, length: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of torch's fused attention on dense scores, and of `rounded_attention` on the same.

    About 1000 rows, in sequences of a length.
    """
    torch.manual_seed(0)
    batch = 1024 // length
    inputs = draw(batch, length, length, 4, 4, head_dim, dtype)
    upstream = torch.randn_like(inputs[0]), torch.zeros(batch, 4, length, device=DEVICE)
    options = asked(DilatedPattern([length], [1]), False, head_dim**-0.5)
    exact = run(reference, options, [x.double() for x in inputs], upstream)
    found = (f(options, inputs, upstream) for f in (fused_attention, rounded_attention))
    fused, rounded = ({n: error(x[n], exact[n]) for n in NAMES} for x in found)
    return fused, rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_yardstick_is_no_longer_than_fused_attention(head_dim: int, dtype: torch.dtype) -> None:
    fused, rounded = fused_errors(head_dim, dtype, 512)
    for name in NAMES:
        assert rounded[name] <= 1.1 * fused[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 19, 43, 48, 64, 72, 80, 96, 100, 128, 131, 160, 256])
# Shrinking would compile kernels at every step.
@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    pattern=st.sampled_from(PATTERNS),
    lengths=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    heads=st.sampled_from(HEADS),
    is_causal=st.booleans(),
    padding=st.sampled_from([0.0, 0.0, 0.3]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.2]),
    sequences=st.sampled_from([0, 0, 3]),
    seed=st.integers(0, 2**31),
)
def test_every_result_is_as_exact_as_fused_attention(
    head_dim: int, dtype: torch.dtype, pattern: DilatedPattern, lengths: tuple[int, int],
    heads: tuple[int, int], is_causal: bool, padding: float, dropout_p: float, sequences: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    length, key_length = sorted(lengths) if is_causal else lengths
    # Enough rows that rounding errors average out.
    batch, ends = 2 + 600 // min(lengths), None
    if sequences:
        batch, length = 1, key_length
        cuts = torch.randint(0, length + 1, (sequences - 1,)).sort().values.tolist()
        ends = torch.tensor([0, *cuts, length], device=DEVICE, dtype=torch.int32)
    inputs = draw(batch, length, key_length, *heads, head_dim, dtype)
    upstream = (
        torch.randn(inputs[0].shape, device=DEVICE).to(dtype),
        torch.randn(batch, heads[0], length, device=DEVICE),
    )
    mask = torch.rand(batch, key_length, device=DEVICE) < padding if padding else None
    drop = torch.randint(2**62, (), device=DEVICE) if dropout_p else None
    options = asked(pattern, is_causal, head_dim**-0.5, mask, dropout_p, drop, ends=ends)
    actual = run(attend, options, inputs, upstream)
    expected = run(reference, options, [x.double() for x in inputs], upstream)
    rounded = rounded_attention(options, inputs, upstream)
    fused, _ = fused_errors(head_dim, dtype, 512)
    single, _ = fused_errors(head_dim, dtype, 1)
    # The log-sum-exp of one key is its score; of many, their errors average out.
    fused = fused | {"lse": max(fused["lse"], single["lse"])}
    least = dict.fromkeys(NAMES, 0.0)
    if lengths == (1, 1) and not (ends is not None or padding or dropout_p):
        # Gradients through the one score cancel: what fused attention leaves of them here.
        plain = upstream[0], torch.zeros_like(upstream[1])
        exact = run(reference, options, [x.double() for x in inputs], plain)
        left = fused_attention(options, inputs, plain)
        least |= {name: differences(left[name], exact[name])[0] for name in ("dq", "dk")}
    for name in NAMES:
        difference, norm = differences(actual[name], expected[name])
        same_scores, _ = differences(rounded[name], expected[name])
        assert difference <= 2 * max(same_scores, fused[name] * norm, least[name]), name


@pytest.mark.parametrize("padding", [0, 500])
@pytest.mark.parametrize("deviation", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_any_size_are_as_exact(
    dtype: torch.dtype, deviation: float, padding: int
) -> None:
    torch.manual_seed(0)
    length = 1201
    inputs = draw(1, length, length, 4, 4, 64, dtype)
    # What the first keys say of a row's weights is wrong for the others, by any factor.
    inputs[1] *= torch.linspace(0.1, 1.0, length, device=DEVICE).to(dtype)[:, None, None]
    upstream = torch.randn_like(inputs[0]), torch.zeros(1, 4, length, device=DEVICE)
    mask = torch.arange(length, device=DEVICE)[None] < padding if padding else None
    # A weight of scores so large is what float32 leaves of their difference: in torch's, too.
    dense = asked(DilatedPattern([length], [1]), False, deviation / 8)
    exact = run(reference, dense, [x.double() for x in inputs], upstream)
    theirs = fused_attention(dense, inputs, upstream)
    fused = {name: error(theirs[name], exact[name]) for name in NAMES}
    for is_causal in (False, True):
        options = asked(NESTED, is_causal, deviation / 8, mask)
        actual = run(attend, options, inputs, upstream)
        expected = run(reference, options, [x.double() for x in inputs], upstream)
        rounded = rounded_attention(options, inputs, upstream)
        for name in NAMES:
            difference, norm = differences(actual[name], expected[name])
            same_scores, _ = differences(rounded[name], expected[name])
            least = max(torch.finfo(dtype).eps / 4, fused[name]) * norm
            assert difference <= 2 * max(same_scores, least), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_causal", [False, True])
def test_spans_of_a_sequence_make_the_whole(is_causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    length, heads, head_dim = 1100, 4, 64
    spans = [range(first, min(length, first + 400)) for first in range(0, length, 400)]
    inputs = draw(1, length, length, heads, heads, head_dim, torch.bfloat16)
    upstream = torch.randn_like(inputs[0]), torch.randn(1, heads, length, device=DEVICE)
    whole = {"out": torch.empty_like(inputs[0]), "lse": torch.empty_like(upstream[1])}
    whole |= {name: torch.zeros(inputs[0].shape, device=DEVICE) for name in ("dq", "dk", "dv")}
    for span in spans:
        call = SpanCall(span, length, is_causal, head_dim**-0.5)
        here = slice(span.start, span.stop)
        query, key, value, grad_out = (x[:, here] for x in (*inputs, upstream[0]))
        packed, places = [], []
        for keys in spans:
            if keys != span:
                rows = NESTED.spans.packed_rows(span, keys, heads, heads, is_causal=is_causal)
                row, head = rows.index()
                packed.append(rows)
                places.append((row.to(DEVICE) + keys.start, head.to(DEVICE)))
        row, head = (torch.cat(column) for column in zip(*places, strict=True))
        remote = KeyRows(inputs[1][:, row, head], inputs[2][:, row, head])
        total = NESTED.spans.attend_span(call, query, KeyRows(key, value))
        NESTED.spans.attend_packed_(call, total, query, remote, packed)
        whole["out"][:, here], whole["lse"][:, :, here] = total.out, total.lse
        grad_lse = upstream[1][:, :, here]
        grads = NESTED.spans.attend_span_backward(
            call, grad_out, grad_lse, query, KeyRows(key, value), total
        )
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            whole[name][:, here] += grad
        home = KeyRows(*(torch.empty(x.shape, device=DEVICE) for x in remote[:2]))
        add_to = NESTED.spans.attend_packed_backward(
            call, grad_out, grad_lse, query, remote, packed, total, home
        )
        add_to(whole["dq"][:, here])
        for name, grad in (("dk", home.key), ("dv", home.value)):
            whole[name].index_put_((torch.tensor([0], device=DEVICE), row, head), grad[0], True)
    options = asked(NESTED, is_causal, head_dim**-0.5)
    expected = run(reference, options, [x.double() for x in inputs], upstream)
    rounded = rounded_attention(options, inputs, upstream)
    ratios = {n: error(whole[n], expected[n]) / error(rounded[n], expected[n]) for n in NAMES}
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_element_is_written(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_core._triton import _launch

    for name in ("empty_like", "empty_lse", "empty_grads"):
        monkeypatch.setattr(_launch, name, poisoned(getattr(_launch, name)))
    for pattern in PATTERNS:
        inputs = draw(2, 517, 701, 6, 2, 48, torch.bfloat16)
        options = asked(pattern, is_causal, 0.2)
        call = _launch.pattern_call(options, *inputs)
        total = _launch.forward(call)
        upstream = Upstream(torch.randn_like(total.out), None, *inputs, total)
        grads = _launch.backward(call, upstream)
        assert not any(x.isnan().any() for x in (*total, *grads))


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs = draw(2, 2000, 2000, 6, 2, 64, torch.bfloat16)
    upstream = torch.randn_like(inputs[0]), torch.randn(2, 6, 2000, device=DEVICE)
    options = asked(PLAIN, True, 0.125, None, 0.1, torch.tensor(7, device=DEVICE))
    first, second = (run(attend, options, inputs, upstream) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_one_allocation_have_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dilated_core._triton import _launch

    inputs = draw(2, 701, 701, 6, 2, 47, dtype)
    upstream = torch.randn_like(inputs[0]), torch.randn(2, 6, 701, device=DEVICE)
    options = asked(PLAIN, True, 0.125)
    tensors = [x.requires_grad_() for x in inputs]
    found = []
    for most in (_launch._ONE_ALLOCATION, 0):
        monkeypatch.setattr(_launch, "_ONE_ALLOCATION", most)
        _launch._rooms.cache_clear()
        results = attend(options, *tensors)
        found.append(torch.autograd.grad(results, tensors, upstream))
    monkeypatch.undo()
    _launch._rooms.cache_clear()
    together, apart = found
    assert len({x.untyped_storage().data_ptr() for x in together}) == 1
    assert len({x.untyped_storage().data_ptr() for x in apart}) == 3
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_known_launches_serve_another_stream_too() -> None:
    inputs = draw(1, 701, 701, 4, 4, 64, torch.bfloat16)
    options = asked(NESTED, False, 0.125)
    expected = [attend(options, *inputs) for _ in range(3)][-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [attend(options, *inputs) for _ in range(3)]
    torch.cuda.synchronize()
    assert all(torch.equal(x.out, expected.out) for x in found)


def test_a_graph_on_the_stream_of_known_launches_keeps_their_tables() -> None:
    inputs = draw(1, 709, 709, 4, 4, 64, torch.bfloat16)
    options = asked(NESTED, True, 0.125)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [attend(options, *inputs) for _ in range(3)][-1]
    with torch.cuda.graph(graph, stream=stream):
        out, _ = attend(options, *inputs)
    for length in range(100, 140):
        attend(options, *draw(1, length, length, 4, 4, 64, torch.bfloat16))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected.out)


def test_memory_above_results_is_small() -> None:
    pattern = DilatedPattern([2048 * 2**k for k in range(5)], [2**k for k in range(5)])
    inputs = draw(1, 65536, 65536, 12, 12, 64, torch.bfloat16)
    size = sum(x.numel() * x.element_size() for x in inputs)
    tensors = [x.requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])
    options = asked(pattern, False, 0.125)

    def step() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = attend(options, *tensors)
        grads = torch.autograd.grad(out, tensors, upstream)
        kept = sum(x.numel() * x.element_size() for x in (out, lse, *grads))
        return torch.cuda.max_memory_allocated() - before - kept

    step()
    assert step() < 0.05 * size


def test_a_captured_graph_replays() -> None:
    inputs = draw(1, 1500, 1500, 4, 4, 64, torch.float16)
    options = asked(NESTED, True, 0.125)
    attend(options, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(options, *inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    expected = attend(options, *inputs)
    assert torch.equal(out, expected.out)
    assert torch.equal(lse, expected.lse)


def test_capturing_an_unseen_shape_says_to_run_once_before() -> None:
    inputs = draw(1, 1501, 1501, 4, 4, 64, torch.float16)
    options = asked(DilatedPattern([31], [3]), False, 0.125)
    with warnings.catch_warnings():
        # torch warns that the captured graph is empty.
        warnings.simplefilter("ignore")
        with (
            pytest.raises(RuntimeError, match="before a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            attend(options, *inputs)


def test_a_call_needs_no_host_sync() -> None:
    inputs = draw(1, 1000, 1000, 4, 4, 64, torch.float16)
    ends = torch.tensor([0, 300, 1000], device=DEVICE, dtype=torch.int32)
    options = asked(PLAIN, True, 0.125)
    expected = [attend(options._replace(cu_seqlens=rest), *inputs).out for rest in (None, ends)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = [attend(options._replace(cu_seqlens=rest), *inputs).out for rest in (None, ends)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_compiles_to_one_graph(is_causal: bool) -> None:
    inputs = draw(1, 300, 300, 4, 2, 64, torch.float16)

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert unsupported(query, key) is None
        out, lse = attend(asked(PLAIN, is_causal, 0.125), query, key, value)
        return out * 2, lse

    upstream = torch.randn_like(inputs[0])
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        tensors = [x.detach().requires_grad_() for x in inputs]
        out, lse = call(*tensors)
        results.append([out, lse, *torch.autograd.grad(out, tensors, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_pass_opcheck() -> None:
    from dilated_core._triton import _operators

    tensors = [x.requires_grad_() for x in draw(1, 100, 100, 4, 2, 16, torch.float32)]
    arguments = (*tensors, None, None, None, PLAIN.code, True, 0.25, 0.0)
    torch.library.opcheck(_operators.OPERATORS.forward, arguments, atol=1e-4, rtol=1e-4)
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    out, lse = _operators.OPERATORS.forward(q, k, v, *rest)
    grads = torch.randn_like(out), torch.randn_like(lse)
    given = (*grads, q, k, v, out, lse, *rest)
    torch.library.opcheck(_operators.OPERATORS.backward, given, atol=1e-4, rtol=1e-4)


def test_strided_inputs_are_read_in_place() -> None:
    packed = torch.randn(2, 400, 3, 4, 64, device=DEVICE, dtype=torch.float16)
    inputs = [x.detach() for x in packed.unbind(2)]
    options = asked(PLAIN, False, 0.125)
    expected = attend(options, *(x.contiguous() for x in inputs))
    assert torch.equal(attend(options, *inputs).out, expected.out)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert torch.equal(attend(options, *turned).out, expected.out)


@pytest.mark.slow
def test_more_than_2_31_elements_are_addressed() -> None:
    pattern = DilatedPattern([2048, 1 << 21], [1, 1024])
    inputs = draw(1, 1_500_000, 1_500_000, 12, 12, 128, torch.bfloat16)
    assert inputs[0].numel() > 2**31
    options = asked(pattern, False, 128**-0.5)
    last = [x[:, :, 11:].clone() for x in inputs]
    whole = attend(options, *inputs)
    # Head 11 of 12 has offset 11; alone it would have offset 0, so compare head 0's rows too.
    rows = torch.arange(11, 1_500_000, 1024, device=DEVICE)[-64:]
    query, key, value = (x[0, :, 0].float() for x in last)
    kept = torch.arange(11, 1_500_000, 1024, device=DEVICE)
    for row in rows[::21].tolist():
        low = row // 2048 * 2048
        keys = torch.cat([torch.arange(low, min(low + 2048, 1_500_000), device=DEVICE), kept])
        weights = torch.softmax(key[keys] @ query[row] * 128**-0.5, 0)
        torch.testing.assert_close(
            whole.out[0, row, 11].float(), weights @ value[keys], rtol=2e-2, atol=2e-3
        )


def test_unsupported_says_why() -> None:
    inputs = draw(1, 10, 10, 1, 1, 64, torch.float16)
    assert unsupported(*inputs[:2]) is None
    assert "float64" in str(unsupported(*(x.double() for x in inputs[:2])))
    assert "cpu" in str(unsupported(*(x.cpu() for x in inputs[:2])))
    wide = draw(1, 10, 10, 1, 1, 257, torch.float16)
    assert "257" in str(unsupported(*wide[:2]))
