"""Decoding on a CUDA device: against the float64 state on the CPU, and in a CUDA graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedKVCache, DilatedPattern

pytestmark = pytest.mark.gpu
PATTERNS = [
    DilatedPattern([128, 512, 2048], [1, 4, 16]),
    DilatedPattern([100, 333, 700], [1, 3, 5]),
    DilatedPattern([37, 64, 200], [2, 3, 6], head_offsets="blocked"),
    DilatedPattern([64, 128], [1, 2], head_groups="split"),
]
HEADS = [(6, 6), (6, 2), (5, 1)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, h, head_dim, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double().cpu() - expected
    return float(difference.norm() / expected.norm())


@pytest.mark.parametrize(
    ("pattern", "heads", "dtype", "padded"),
    [
        *itertools.product(PATTERNS, HEADS, [torch.float32], [False, True]),
        *itertools.product(PATTERNS[:2], HEADS[1:2], [torch.bfloat16, torch.float16], [True]),
    ],
    ids=str,
)
def test_any_chunks_equal_the_state_of_the_cpu(
    pattern: DilatedPattern, heads: tuple[int, int], dtype: torch.dtype, padded: bool
) -> None:
    tensors = [x.to(dtype) for x in draw(3, 799, *heads, 67)]
    mask = torch.rand(3, 799) < 0.3
    counts = torch.tensor([0, 1, 1])
    ours, theirs = DilatedKVCache(pattern), DilatedKVCache(pattern)
    start = 0
    for steps in [351, *[1] * 9, 57, *[1] * 7, 300, 1, 2, 71]:
        # From here on batch rows are of different lengths.
        lengths = counts if start >= 420 and steps == 1 else None
        rows = [x[:, start : start + steps] for x in tensors]
        ignored = mask[:, start : start + steps] if padded else None
        expected = theirs.attend(
            *(x.double() for x in rows), key_padding_mask=ignored, lengths=lengths
        )
        actual = ours.attend(
            *(x.cuda() for x in rows),
            key_padding_mask=None if ignored is None else ignored.cuda(),
            lengths=None if lengths is None else lengths.cuda(),
        )
        if expected.any():
            assert error(actual, expected) < BOUNDS[dtype]
        assert ours.lengths.tolist() == theirs.lengths.tolist()
        assert ours.length == theirs.length
        start += steps


def test_a_graph_of_a_step_continues_wherever_each_row_is() -> None:
    pattern = PATTERNS[0]
    tensors = draw(2, 700, 12, 12, 64)
    ours, theirs = DilatedKVCache(pattern), DilatedKVCache(pattern)
    real = torch.tensor([401, 177])
    first = [x[:, :401] for x in tensors]
    ours.attend(*(x.cuda() for x in first), lengths=real.cuda())
    theirs.attend(*(x.double() for x in first), lengths=real)
    one = [torch.zeros(2, 1, 12, 64, device="cuda") for _ in tensors]
    ours.attend(*one)
    ours.truncate(real)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours.attend(*one)
    nbytes = ours.nbytes
    for i in range(401, 700):
        if i == 550:
            back = ours.lengths.cpu() - torch.tensor([3, 0])
            ours.truncate(back.cuda())
            theirs.truncate(back)
        if i == 600:
            ours.reorder(torch.tensor([1, 0], device="cuda"))
            theirs.reorder(torch.tensor([1, 0]))
        new = [x[:, i : i + 1] for x in tensors]
        for mine, x in zip(one, new, strict=True):
            mine.copy_(x)
        graph.replay()
        assert error(out, theirs.attend(*(x.double() for x in new))) < 2e-6
        assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.length == theirs.length
    assert ours.nbytes == nbytes


def test_what_a_graph_cannot_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 2, 16, device="cuda")
    cache = DilatedKVCache(PATTERNS[0])
    cache.attend(x, x, x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph can hold"):
        cache.attend(x, x, x)
    assert cache.length == 2
    new = DilatedKVCache(PATTERNS[0])
    with pytest.raises(RuntimeError, match="after a first call outside"):
        new.attend(*[x[:, :1]] * 3)
    assert new.nbytes == 0


def test_lengths_out_of_range_count_as_the_nearest() -> None:
    tensors = [x.cuda() for x in draw(2, 9, 3, 3, 16)]
    caches = [DilatedKVCache(PATTERNS[1]) for _ in range(2)]
    for cache, wrong, right in ((caches[0], -3, 0), (caches[1], 99, 9)):
        found = cache.attend(*tensors, lengths=torch.tensor([wrong, 5], device="cuda"))
        expected = DilatedKVCache(PATTERNS[1]).attend(
            *tensors, lengths=torch.tensor([right, 5], device="cuda")
        )
        assert torch.equal(found, expected)
        cache.attend(*(x[:, :1] for x in tensors), lengths=torch.tensor([-1, 7], device="cuda"))
        assert cache.lengths.tolist() == [right, 6]
