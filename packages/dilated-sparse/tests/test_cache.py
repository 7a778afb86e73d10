"""`BlockSparseKVCache`: whatever the steps, the full causal forward; and no more rows than seen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_sparse import (
    BlockLayout,
    BlockSparseAttention,
    BlockSparseKVCache,
    block_sparse_attention,
    layouts,
)

LENGTH, HEADS, KV_HEADS, DIM, BLOCK = 47, 4, 2, 5, 8
RANDOM = layouts.random_blocks(LENGTH, 2, seed=3, heads=HEADS, block_size=BLOCK)
NAMED = {
    "window": layouts.sliding_window(LENGTH, 6, block_size=BLOCK),
    "dilated": layouts.dilated_window(LENGTH, 3, 3, block_size=BLOCK),
    "strided": layouts.strided(LENGTH, 5, block_size=BLOCK),
    "fixed": layouts.fixed(LENGTH, 7, 2, block_size=BLOCK),
    "longformer": layouts.longformer(LENGTH, 4, 3, block_size=BLOCK),
    "document": layouts.document([11, 23, 13], block_size=BLOCK),
    "heads": RANDOM | layouts.sliding_window(LENGTH, 2, block_size=BLOCK),
    "blind": layouts.global_positions(LENGTH, [20, 33], block_size=BLOCK)
    & BlockLayout.from_dense(
        torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1), block_size=BLOCK
    ),
}


def tensors(batch, length=LENGTH, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@given(
    st.sampled_from(sorted(NAMED)),
    st.lists(st.integers(1, 19), max_size=6),
    st.booleans(),
)
def test_tokens_chunks_and_prompts_equal_the_full_forward(name, cuts, padded):
    layout, inputs = NAMED[name], tensors(2)
    padding = None
    if padded:
        padding = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.2
    wanted = block_sparse_attention(
        *inputs, layout, is_causal=True, key_padding_mask=padding, enable_gqa=True, scale=0.7,
        backend="reference",
    )  # fmt: skip
    cache, outs, start = BlockSparseKVCache(layout), [], 0
    while start < LENGTH:
        stop = min(LENGTH, start + (cuts.pop() if cuts else 1))
        part = [x[:, start:stop] for x in inputs]
        mask = None if padding is None else padding[:, start:stop]
        outs.append(cache.attend(*part, scale=0.7, key_padding_mask=mask))
        start = stop
        assert cache.length == stop
    same(torch.cat(outs, 1), wanted)


def test_batch_rows_of_different_lengths_are_what_each_is_alone():
    layout, inputs = NAMED["longformer"], tensors(3)
    wanted = block_sparse_attention(
        *inputs, layout, is_causal=True, enable_gqa=True, backend="reference"
    )
    cache = BlockSparseKVCache(layout)
    seen = [0, 0, 0]
    for counts in ([9, 4, 0], [1, 1, 1], [0, 7, 3], [1, 1, 1], [3, 0, 5], [1, 0, 1]):
        most = max(counts)
        part = []
        for x in inputs:
            padded = torch.full_like(x[:, :most], 1e9)
            for i, count in enumerate(counts):
                padded[i, :count] = x[i, seen[i] : seen[i] + count]
            part.append(padded)
        positions = cache.next_positions(2, torch.device("cpu"))
        assert positions.expand(3, 2).tolist() == [[n, n + 1] for n in seen]
        out = cache.attend(*part, lengths=torch.tensor(counts))
        for i, count in enumerate(counts):
            same(out[i, :count], wanted[i, seen[i] : seen[i] + count])
            assert not out[i, count:].any()
            seen[i] += count
        assert cache.lengths.tolist() == seen


@pytest.mark.parametrize(("name", "most"), [("window", 6), ("document", 22), ("longformer", 7)])
def test_no_more_rows_are_held_than_later_queries_see(name, most):
    layout, inputs = NAMED[name], tensors(2)
    cache = BlockSparseKVCache(layout)
    assert cache.nbytes == 0
    causal = layout.causal().to_dense()[0]
    for n in range(1, LENGTH):
        cache.attend(*(x[:, n - 1 : n] for x in inputs))
        held = cache._positions[0]
        wanted = causal[n:, :n].any(0).nonzero()[:, 0]
        assert torch.equal(held[held >= 0].sort().values, wanted)
    assert cache._keys.shape[1] == most + 1
    longer = BlockSparseKVCache(NAMED["window"], 10 * LENGTH)
    longer.attend(*(x[:, :1] for x in inputs))
    assert longer._keys.shape[1] == 7
    assert longer.nbytes == 2 * 7 * (2 * KV_HEADS * DIM * 8 + 8 + 1)


def test_a_named_layout_goes_on_to_the_length_of_the_cache():
    inputs = tensors(1, 101)
    cache = BlockSparseKVCache(NAMED["strided"], 101)
    found = torch.cat([cache.attend(*(x[:, i : i + 1] for x in inputs)) for i in range(101)], 1)
    layout = NAMED["strided"].at(101)
    same(found, block_sparse_attention(*inputs, layout, is_causal=True, enable_gqa=True))
    with pytest.raises(ValueError, match=r"key must end within the cache's 101 positions"):
        cache.attend(*(x[:, :1] for x in inputs))


def test_a_call_that_fails_changes_nothing(monkeypatch):
    inputs = tensors(2)
    part, after = ([x[:, rows] for x in inputs] for rows in (slice(9), slice(9, 12)))
    cache, kept = BlockSparseKVCache(NAMED["window"]), BlockSparseKVCache(NAMED["window"])
    for steps in (part, after):
        with monkeypatch.context() as broken:
            broken.setattr(Tensor, "cumsum", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                cache.attend(*steps)
        assert (cache.length, cache.nbytes) == (kept.length, kept.nbytes)
        same(cache.attend(*steps), kept.attend(*steps))


def test_a_refused_call_changes_nothing_and_reset_starts_anew():
    inputs = tensors(2)
    cache = BlockSparseKVCache(NAMED["window"])
    first = cache.attend(*(x[:, :9] for x in inputs))
    with pytest.raises(ValueError, match=r"dtype and device of the rows held"):
        cache.attend(*(x[:, :1].float() for x in inputs))
    with pytest.raises(ValueError, match=r"lengths must be from 0 to 1"):
        cache.attend(*(x[:, :1] for x in inputs), lengths=torch.tensor([0, 2]))
    assert cache.length == 9
    cache.reset()
    assert cache.length == 0
    same(cache.attend(*(x[:, :9] for x in inputs)), first)


def test_rows_are_taken_back_as_far_as_they_are_held_and_beams_reordered():
    inputs = tensors(3)
    wanted = block_sparse_attention(*inputs, NAMED["strided"], is_causal=True, enable_gqa=True)
    cache = BlockSparseKVCache(NAMED["strided"])
    cache.attend(*(x[:, :30] for x in inputs))
    cache.truncate(torch.tensor([27, 30, 29]))
    assert cache.lengths.tolist() == [27, 30, 29]
    cache.truncate(27)
    index = torch.tensor([2, 0])
    cache.reorder(index)
    same(cache.attend(*(x[index, 27:31] for x in inputs)), wanted[index, 27:31])
    window = BlockSparseKVCache(NAMED["window"])
    window.attend(*(x[:, :30] for x in inputs))
    window.truncate(30)
    with pytest.raises(ValueError, match=r"leave rows that are held. Got 29, from where position"):
        window.truncate(29)
    window.truncate(0)
    same(window.attend(*(x[:, :3] for x in inputs)), BlockSparseKVCache(NAMED["window"]).attend(
        *(x[:, :3] for x in inputs)
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_stay_what_they_are(dtype):
    inputs = tensors(2, dtype=dtype)
    cache = BlockSparseKVCache(NAMED["window"])
    found = torch.cat([cache.attend(*(x[:, i : i + 1] for x in inputs)) for i in range(20)], 1)
    assert found.dtype == dtype
    wanted = block_sparse_attention(
        *(x[:, :20] for x in inputs), NAMED["window"].at(20), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_told():
    window, inputs = NAMED["window"], tensors(1)
    with pytest.raises(TypeError, match=r"layout must be a BlockLayout. Got int"):
        BlockSparseKVCache(3)
    reordered = layouts.longnet(32, DilatedPattern((16,), (2,)))
    for layout in (BlockLayout.stack([window, window]), window.at(3, 9), reordered):
        with pytest.raises(ValueError, match=r"layout must be one for all batch rows"):
            BlockSparseKVCache(layout)
        assert not BlockSparseAttention(layout).keeps_state
    with pytest.raises(ValueError, match=r"at most 47 for a layout that is made from a mask"):
        BlockSparseKVCache(NAMED["blind"], 48)
    with pytest.raises(RuntimeError, match=r"gives no gradients"):
        BlockSparseKVCache(window).attend(*(x[:, :1].requires_grad_() for x in inputs))
    with pytest.raises(ValueError, match=r"layout must have 1 head or query's 2. Got 4"):
        BlockSparseKVCache(RANDOM).attend(*(x[:, :1, :2].detach() for x in inputs))
    module = BlockSparseAttention(window)
    with pytest.raises(TypeError, match=r"cache must be a BlockSparseKVCache. Got dict"):
        module.check_cache({})
    with pytest.raises(ValueError, match=r"cache must have the attention's layout"):
        module.check_cache(BlockSparseKVCache(NAMED["strided"]))
    module.check_cache(module.new_cache(100))
