"""Decoding with a cache equals the full causal forward, in memory that does not grow."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import DilatedKVCache, DilatedPattern, clear_caches, dilated_attention
from dilated_testing import patterns, relative_error


def decode(cache, tensors, steps, mask=None):
    """Feed the rows in chunks of the given sizes, the last of which takes the rest."""
    outs, start = [], 0
    for step in [*steps, tensors[0].shape[1]]:
        stop = min(start + step, tensors[0].shape[1])
        rows = [x[:, start:stop] for x in tensors]
        here = None if mask is None else mask[:, start:stop]
        outs.append(cache.attend(*rows, key_padding_mask=here))
        start = stop
    assert cache.length == start
    return torch.cat(outs, 1)


@given(
    patterns(max_segment=11),
    st.lists(st.integers(0, 13), max_size=6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_chunks_equal_the_full_forward(pattern, steps, kv_heads, group, padded):
    heads = kv_heads * group
    if pattern.head_groups == "split" and heads < len(pattern.segment_lengths):
        kv_heads = heads = len(pattern.segment_lengths)
    shapes = [(2, 31, heads, 3), (2, 31, kv_heads, 3), (2, 31, kv_heads, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    mask = torch.rand(2, 31) < 0.3 if padded else None
    cache = DilatedKVCache(pattern)
    actual = decode(cache, tensors, steps, mask)
    full = dilated_attention(
        *tensors, pattern, is_causal=True, key_padding_mask=mask, enable_gqa=True
    )
    assert relative_error(actual, full) < 1e-10


@pytest.mark.slow
def test_4096_tokens_one_by_one_equal_the_full_forward():
    pattern = DilatedPattern([64, 256, 1024], [1, 4, 16])
    tensors = [torch.randn(1, 4096, 4, 8) for _ in "qkv"]
    cache = DilatedKVCache(pattern)
    actual = decode(cache, tensors, [1] * 4095)
    assert relative_error(actual, dilated_attention(*tensors, pattern, is_causal=True)) < 1e-6


def test_bytes_do_not_depend_on_the_context():
    pattern = DilatedPattern([64, 256, 1024], [1, 4, 16])
    cache = DilatedKVCache(pattern)
    assert cache.nbytes == 0
    sizes = set()
    x = torch.randn(1, 8192, 4, 8)
    for _ in range(128):
        cache.attend(x, x, x)
        sizes.add(cache.nbytes)
    assert cache.length == 2**20
    rows = 64 + 256 // 4 + 1024 // 16
    # One row takes what is not kept; and the length.
    assert sizes == {(4 * rows + 1) * (2 * 8 * 4 + 1) + 8}


def test_grouped_heads_share_their_rows():
    pattern = DilatedPattern([64], [1])
    cache = DilatedKVCache(pattern)
    cache.attend(torch.randn(1, 1, 6, 8), *[torch.randn(1, 1, 2, 8)] * 2)
    assert cache.nbytes == (2 * 64 + 1) * (2 * 8 * 4 + 1) + 8


def test_reorder_follows_beams():
    pattern = DilatedPattern([4, 16], [1, 2])
    tensors = [torch.randn(3, 19, 2, 5, dtype=torch.float64) for _ in "qkv"]
    cache = DilatedKVCache(pattern)
    decode(cache, [x[:, :13] for x in tensors], [7])
    index = torch.tensor([2, 0, 0, 1])
    cache.reorder(index)
    beams = [x[index] for x in tensors]
    actual = cache.attend(*[x[:, 13:] for x in beams])
    full = dilated_attention(*beams, pattern, is_causal=True)
    assert relative_error(actual, full[:, 13:]) < 1e-10


def test_truncate_goes_back_within_the_segments():
    pattern = DilatedPattern([4, 16], [1, 2])
    tensors = [torch.randn(1, 31, 2, 5, dtype=torch.float64) for _ in "qkv"]
    full = dilated_attention(*tensors, pattern, is_causal=True)
    cache = DilatedKVCache(pattern)
    cache.attend(*[x[:, :23] for x in tensors])
    cache.truncate(21)
    junk = [torch.randn(1, 2, 2, 5, dtype=torch.float64)] * 3
    cache.attend(*junk)
    cache.truncate(20)
    actual = cache.attend(*[x[:, 20:] for x in tensors])
    assert relative_error(actual, full[:, 20:]) < 1e-10
    with pytest.raises(ValueError, match=r"multiple of segment length 4: .* Got 27"):
        cache.truncate(27)
    with pytest.raises(TypeError, match=r"length must be an int or a Tensor\. Got True"):
        cache.truncate(True)
    with pytest.raises(ValueError, match=r"length must be between 0 and 31\. Got 32"):
        cache.truncate(32)


def concatenate(rows, new):
    return [torch.cat(pair, 0) for pair in zip(rows, new, strict=True)]


@given(patterns(max_segment=11), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.data())
def test_any_order_of_operations_equals_the_full_forward(pattern, kv_heads, group, padded, data):
    heads = kv_heads * group
    if pattern.head_groups == "split" and heads < len(pattern.segment_lengths):
        kv_heads = heads = len(pattern.segment_lengths)
    shapes = (heads, 3), (kv_heads, 3), (kv_heads, 3)
    # q, k, v and the mask of each batch row so far, and its length when a row was last appended.
    nothing = [*(torch.empty(0, *shape, dtype=torch.float64) for shape in shapes), torch.empty(0)]
    nothing[3] = nothing[3].bool()
    seen, last = [nothing] * 2, [0, 0]
    scale = data.draw(st.sampled_from([None, -0.7, 0.0]))
    cache = DilatedKVCache(pattern)
    kinds = ["attend", "attend", "ragged", "truncate", "reorder", "reset", "misfit"]
    for _ in range(data.draw(st.integers(1, 9))):
        kind, batch = data.draw(st.sampled_from(kinds)), len(seen)
        if kind in ("attend", "ragged"):
            steps = data.draw(st.integers(0, 13))
            new = [torch.randn(batch, steps, *shape, dtype=torch.float64) for shape in shapes]
            mask = torch.rand(batch, steps) < (0.3 if padded else 0.0)
            given = mask if padded and data.draw(st.integers(0, 3)) else None
            counts = [steps] * batch
            if kind == "ragged":
                counts = data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
            lengths = torch.tensor(counts) if kind == "ragged" else None
            actual = cache.attend(*new, scale=scale, key_padding_mask=given, lengths=lengths)
            if given is None:
                mask = torch.zeros_like(mask)
            for b, count in enumerate(counts):
                seen[b] = concatenate(seen[b], [x[b, :count] for x in (*new, mask)])
                last[b] = len(seen[b][0]) if count else last[b]
                full = dilated_attention(
                    *(x[None] for x in seen[b][:3]), pattern, is_causal=True, scale=scale,
                    key_padding_mask=seen[b][3][None], enable_gqa=True, backend="reference",
                )[0]  # fmt: skip
                assert relative_error(actual[b, :count], full[len(full) - count :]) < 1e-10
                assert not actual[b, count:].any()
        elif kind == "truncate":
            now = [len(rows[0]) for rows in seen]
            if data.draw(st.booleans()) and cache.nbytes:
                length = torch.tensor([data.draw(st.integers(0, n)) for n in now])
                wanted = length.tolist()
            else:
                length = data.draw(st.integers(0, cache.length))
                wanted = [min(length, n) for n in now]
            allowed = all(
                new % w == 0 or new // w == max(end - 1, 0) // w
                for new, end in zip(wanted, last, strict=True)
                for w in pattern.segment_lengths
            )
            try:
                cache.truncate(length)
            except ValueError:
                assert not allowed
            else:
                assert allowed
                seen = [[x[:n] for x in rows] for rows, n in zip(seen, wanted, strict=True)]
        elif kind == "reorder" and cache.nbytes:
            index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
            cache.reorder(torch.tensor(index))
            seen, last = [seen[i] for i in index], [last[i] for i in index]
        elif kind == "reset":
            cache.reset()
            seen, last = [nothing] * batch, [0] * batch
        elif kind == "misfit" and cache.nbytes:
            new = [torch.randn(batch, 1, *shape, dtype=torch.float64) for shape in shapes]
            more = [torch.cat([x, x], 2) for x in new]
            with pytest.raises(ValueError, match="the cache's"):
                cache.attend(more[0], *new[1:])
            with pytest.raises(ValueError, match="the cache's"):
                cache.attend(*more)
        assert cache.length == max(len(rows[0]) for rows in seen)
        if cache.nbytes:
            assert cache.lengths.tolist() == [len(rows[0]) for rows in seen]


class _FailAt(TorchDispatchMode):
    """Fails at one operator that makes a tensor, as where memory runs out."""

    def __init__(self, countdown):
        super().__init__()
        self.countdown = countdown

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.countdown -= not func._schema.is_mutable
        if self.countdown == 0:
            raise MemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_call_that_fails_at_any_point_leaves_the_cache_as_it_was(steps, ragged):
    pattern = DilatedPattern([4, 16], [1, 2])
    tensors = [torch.randn(2, 17 + steps, h, 5, dtype=torch.float64) for h in (4, 2, 2)]
    mask = torch.rand(2, steps) < 0.3
    cache = DilatedKVCache(pattern)
    first = torch.tensor([11, 17]) if ragged else None
    cache.attend(*[x[:, :17] for x in tensors], lengths=first)
    held = [x.clone() for x in cache._held.tensors]
    new = [x[:, 17:] for x in tensors]
    lengths = torch.tensor([steps, 0]) if ragged else None
    failures = 0
    while True:
        try:
            with _FailAt(failures + 1):
                actual = cache.attend(*new, key_padding_mask=mask, lengths=lengths)
            break
        except MemoryError:
            failures += 1
        assert all(map(torch.equal, cache._held.tensors, held))
        assert cache.length == 17
        assert cache.lengths.tolist() == ([11, 17] if ragged else [17, 17])
        assert not cache._held.padded
    assert failures > 20
    row = (
        [torch.cat([x[:1, : first[0]], n[:1]], 1) for x, n in zip(tensors, new, strict=True)]
        if (ragged)
        else [x[:1] for x in tensors]
    )
    whole = torch.zeros(1, row[0].shape[1], dtype=torch.bool)
    whole[:, -steps:] = mask[:1]
    full = dilated_attention(*row, pattern, is_causal=True, key_padding_mask=whole, enable_gqa=True)
    assert relative_error(actual[:1], full[:, -steps:]) < 1e-10


@pytest.mark.parametrize("steps", [1, 3])
def test_a_first_call_that_fails_takes_nothing(steps):
    x = torch.randn(2, steps, 2, 5)
    cache = DilatedKVCache(DilatedPattern([4], [1]))
    for failures in itertools.count():
        clear_caches()
        try:
            with _FailAt(failures + 1):
                cache.attend(x, x, x)
        except MemoryError:
            assert cache.nbytes == cache.length == 0
        else:
            break
    assert failures > 20
    assert cache.length == steps


def test_the_last_tokens_of_a_whole_segment_can_be_taken_back():
    # As speculative decoding does: the rows of a segment are held until the next one starts.
    pattern = DilatedPattern([4, 8], [1, 2])
    tensors = [torch.randn(1, 8, 2, 5, dtype=torch.float64) for _ in "qkv"]
    full = dilated_attention(*tensors, pattern, is_causal=True)
    for steps in ([8], [1] * 8, [3, 5]):
        cache = DilatedKVCache(pattern)
        decode(cache, tensors, steps[:-1])
        cache.truncate(7)
        assert relative_error(cache.attend(*[x[:, 7:] for x in tensors]), full[:, 7:]) < 1e-10


def test_rows_that_are_gone_stay_gone_after_a_first_truncation():
    x = torch.randn(1, 1, 1, 8)
    cache = DilatedKVCache(DilatedPattern([4], [1]))
    for _ in range(6):
        cache.attend(x, x, x)
    for length in (4, 4):
        cache.truncate(length)
        with pytest.raises(
            ValueError, match=r"length must be a multiple of .* no longer held\. Got 3"
        ):
            cache.truncate(3)


def test_inference_mode_and_no_grad_can_take_turns():
    pattern = DilatedPattern([4, 8], [1, 2])
    tensors = [torch.randn(1, 9, 2, 5, dtype=torch.float64) for _ in "qkv"]
    full = dilated_attention(*tensors, pattern, is_causal=True)
    cache = DilatedKVCache(pattern)
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode) * 3):
        with mode():
            if i in (3, 4):
                cache.reorder(torch.tensor([0]))
            out = cache.attend(*[x[:, i : i + 1] for x in tensors])
        assert relative_error(out, full[:, i : i + 1]) < 1e-10


def test_a_cache_keeps_to_its_number_of_query_heads():
    x = torch.randn(1, 2, 4, 8)
    for first, second in ((2, 4), (4, 2)):
        cache = DilatedKVCache(DilatedPattern([8], [1]))
        cache.attend(x[:, :, :first], *[x[:, :, :2]] * 2)
        with pytest.raises(ValueError, match=rf"query must have the cache's {first} heads"):
            cache.attend(x[:, :, :second], *[x[:, :, :2]] * 2)
        assert cache.length == 2


def test_reset_starts_a_new_sequence_in_the_same_memory():
    pattern = DilatedPattern([4, 16], [1, 2])
    tensors = [torch.randn(1, 19, 2, 5, dtype=torch.float64) for _ in "qkv"]
    cache = DilatedKVCache(pattern)
    first = cache.attend(*tensors)
    before = cache.nbytes
    cache.reset()
    assert cache.length == 0
    assert torch.equal(cache.attend(*tensors), first)
    assert cache.nbytes == before


def test_misuse_is_named():
    pattern = DilatedPattern([4], [1])
    x = torch.randn(1, 3, 2, 5)
    cache = DilatedKVCache(pattern)
    with pytest.raises(RuntimeError, match="no gradients"):
        cache.attend(x.clone().requires_grad_(), x, x)
    cache.attend(x, x, x)
    with pytest.raises(ValueError, match=r"the cache's \(batch, key heads, head_dim\)"):
        cache.attend(*[torch.randn(2, 1, 2, 5)] * 3)
    with pytest.raises(ValueError, match=r"key must have query's length 3\. Got 2"):
        cache.attend(x, x[:, :2], x[:, :2])
    with pytest.raises(TypeError, match="pattern must be a DilatedPattern"):
        DilatedKVCache([4])
    with pytest.raises(TypeError, match=r"lengths must be a Tensor or None\. Got list"):
        cache.attend(x, x, x, lengths=[3])
    with pytest.raises(TypeError, match=r"lengths must be int64\. Got torch\.int32"):
        cache.attend(x, x, x, lengths=torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"lengths must have shape \(batch,\)=\(1,\)\. Got \(2,\)"):
        cache.attend(x, x, x, lengths=torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"lengths must be from 0 to 3, the new rows\. Got \[4\]"):
        cache.attend(x, x, x, lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match=r"length must be between 0 and 3\. Got 4"):
        cache.truncate(torch.tensor([4]))
    with pytest.raises(ValueError, match=r"length must have shape \(batch,\)=\(1,\)\. Got \(\)"):
        cache.truncate(torch.tensor(1))
    assert cache.length == 3
