"""Decoding with a cache equals the full causal forward, in memory that does not grow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedKVCache, DilatedPattern, dilated_attention
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
    assert sizes == {4 * rows * (2 * 8 * 4 + 1)}


def test_grouped_heads_share_their_rows():
    pattern = DilatedPattern([64], [1])
    cache = DilatedKVCache(pattern)
    cache.attend(torch.randn(1, 1, 6, 8), *[torch.randn(1, 1, 2, 8)] * 2)
    assert cache.nbytes == 2 * 64 * (2 * 8 * 4 + 1)


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
    with pytest.raises(TypeError, match=r"length must be an int\. Got True"):
        cache.truncate(True)
    with pytest.raises(ValueError, match=r"length must be between 0 and 31\. Got 32"):
        cache.truncate(32)


@given(patterns(max_segment=11), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.data())
def test_any_order_of_operations_equals_the_full_forward(pattern, kv_heads, group, padded, data):
    heads = kv_heads * group
    if pattern.head_groups == "split" and heads < len(pattern.segment_lengths):
        kv_heads = heads = len(pattern.segment_lengths)
    shapes = [(2, 0, heads, 3), (2, 0, kv_heads, 3), (2, 0, kv_heads, 3)]
    seen = [torch.empty(shape, dtype=torch.float64) for shape in shapes]  # q, k, v so far
    mask = torch.empty(2, 0, dtype=torch.bool)
    scale = data.draw(st.sampled_from([None, -0.7, 0.0]))
    cache, went_back = DilatedKVCache(pattern), False
    kinds = ["attend", "attend", "truncate", "reorder", "reset", "misfit"]
    for _ in range(data.draw(st.integers(1, 9))):
        kind = data.draw(st.sampled_from(kinds))
        if kind == "attend":
            steps = data.draw(st.integers(0, 13))
            new = [torch.randn(2, steps, *x.shape[2:], dtype=x.dtype) for x in seen]
            ignored = torch.rand(2, steps) < (0.3 if padded else 0.0)
            seen = [torch.cat(pair, 1) for pair in zip(seen, new, strict=True)]
            mask = torch.cat([mask, ignored], 1)
            given = ignored if padded and data.draw(st.integers(0, 3)) else None
            if given is None:
                mask[:, mask.shape[1] - steps :] = False
            actual = cache.attend(*new, scale=scale, key_padding_mask=given)
            full = dilated_attention(
                *seen, pattern, is_causal=True, scale=scale, key_padding_mask=mask, enable_gqa=True,
                backend="reference",
            )  # fmt: skip
            assert relative_error(actual, full[:, full.shape[1] - steps :]) < 1e-10
        elif kind == "truncate":
            length = data.draw(st.integers(0, cache.length))
            last = max(cache.length - 1, 0)
            starts = [last // w * w for w in pattern.segment_lengths]
            whole = all(length % w == 0 for w in pattern.segment_lengths)
            must = whole or (not went_back and length >= max(starts))
            try:
                cache.truncate(length)
            except ValueError:
                assert not must
            else:
                went_back = went_back or length < cache.length or length < seen[0].shape[1]
                seen, mask = [x[:, :length] for x in seen], mask[:, :length]
        elif kind == "reorder" and cache.length:
            index = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
            cache.reorder(index)
            seen, mask = [x[index] for x in seen], mask[index]
        elif kind == "reset":
            cache.reset()
            seen, mask = [x[:, :0] for x in seen], mask[:, :0]
        elif kind == "misfit" and cache.nbytes:
            more = [torch.randn(2, 1, 2 * x.shape[2], 3, dtype=x.dtype) for x in seen]
            with pytest.raises(ValueError, match="the cache's"):
                cache.attend(more[0], *[torch.randn(2, 1, kv_heads, 3).double()] * 2)
            with pytest.raises(ValueError, match="the cache's"):
                cache.attend(*more)
        assert cache.length == seen[0].shape[1]


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
