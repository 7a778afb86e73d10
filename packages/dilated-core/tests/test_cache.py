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
    with pytest.raises(ValueError, match=r"length must be between 0 and 31\. Got 32"):
        cache.truncate(32)


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
