"""Layouts whose batch rows differ: each row is what it is alone."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dilated_sparse import (
    BlockLayout,
    BlockSparseAttention,
    block_sparse_attention,
    layouts,
    select,
)

BATCH, LENGTH, HEADS, KV_HEADS, DIM, BLOCK = 3, 29, 4, 2, 5, 8


def rows(length=LENGTH):
    """One that all heads share, one by head, and packed documents."""
    heads = layouts.random_blocks(length, 2, seed=7, heads=HEADS, block_size=BLOCK)
    documents = layouts.document([length // 3, length - length // 3], block_size=BLOCK)
    return [layouts.sliding_window(length, 5, block_size=BLOCK), heads, documents]


def tensors(batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, LENGTH, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [
        torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes
    ]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_each_row_gives_what_its_layout_gives_it_alone_and_gradients_too(backend, is_causal):
    inputs, own = tensors(), rows()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, :6] = True
    options = {"is_causal": is_causal, "enable_gqa": True, "return_lse": True}
    out, lse = block_sparse_attention(
        *inputs, BlockLayout.stack(own), key_padding_mask=padding, backend=backend, **options
    )
    finite = lse.masked_fill(lse == -torch.inf, 0)
    found = torch.autograd.grad((out.sin().sum() + finite.cos().sum()), inputs)
    outs, sums = [], []
    for i, layout in enumerate(own):
        row = [x[i : i + 1] for x in inputs]
        a, b = block_sparse_attention(
            *row, layout, key_padding_mask=padding[i : i + 1], backend="reference", **options
        )
        outs.append(a)
        sums.append(b)
    alone, alone_lse = torch.cat(outs), torch.cat(sums)
    same(out, alone)
    same(lse, alone_lse)
    finite = alone_lse.masked_fill(alone_lse == -torch.inf, 0)
    wanted = torch.autograd.grad((alone.sin().sum() + finite.cos().sum()), inputs)
    for x, y in zip(found, wanted, strict=True):
        same(x, y)


def test_a_dense_mask_of_each_row_is_the_layout_and_comes_back():
    mask = (
        torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.3
    )
    layout = BlockLayout.from_dense(mask, block_size=BLOCK)
    assert layout.batch == BATCH
    assert torch.equal(layout.to_dense(), mask)
    for row, own in zip(layout.rows, mask, strict=True):
        assert row == BlockLayout.from_dense(own, block_size=BLOCK)
    assert BlockLayout.stack(layout.rows) == layout
    assert BlockLayout.from_dense(mask[:1], block_size=BLOCK) == layout.rows[0]


def test_a_block_mask_of_more_than_one_row_goes_there_and_back():
    def near(b, h, i, j):
        return (i >= j) & (i - j <= b + 2 * h)

    block_mask = create_block_mask(near, 2, 3, 160, 160, device="cpu")
    layout = BlockLayout.from_block_mask(block_mask)
    made = BlockLayout.from_mask_mod(near, 160, heads=3, batch=2)
    i, j = torch.arange(160)[:, None], torch.arange(160)
    dense = torch.stack([torch.stack([near(b, h, i, j) for h in range(3)]) for b in range(2)])
    assert torch.equal(layout.to_dense(), dense)
    assert made == layout
    assert BlockLayout.from_block_mask(layout.to_block_mask()) == layout


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.causal(),
        lambda x: x.at(17),
        lambda x: x.at(3, 21),
        lambda x: x.transpose(),
        lambda x: x.per_head(HEADS),
        lambda x: x.restrict(range(8, 24), range(16)),
        lambda x: x | layouts.global_tokens(LENGTH, 3, block_size=BLOCK),
        lambda x: layouts.strided(LENGTH, 4, block_size=BLOCK) & x,
        lambda x: x | x.causal(),
    ],
)  # fmt: skip
def test_what_changes_a_layout_changes_that_of_each_row(change):
    own = rows()
    changed = change(BlockLayout.stack(own))
    assert changed.batch == BATCH
    assert changed == BlockLayout.stack([change(x) for x in own])


def test_rows_go_on_where_the_layout_of_each_does():
    own = [layouts.sliding_window(LENGTH, w, block_size=BLOCK) for w in (2, 7)]
    assert BlockLayout.stack(own).at(53) == BlockLayout.stack([x.at(53) for x in own])
    dense = BlockLayout.from_dense(own[0].to_dense(), block_size=BLOCK)
    with pytest.raises(ValueError, match=r"key_length must be at most 29"):
        BlockLayout.stack([own[0], dense]).at(53)


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_are_chosen_for_each_sequence_of_a_batch(is_causal):
    query, key, _ = (x.detach() for x in tensors())
    options = {"is_causal": is_causal, "block_size": BLOCK}
    top = select.top_k_blocks(query, key, 2, **options)
    layout, dropped = select.threshold_blocks(query, key, 0.6, **options)
    assert dropped.shape == (BATCH, HEADS, LENGTH)
    for i in range(BATCH):
        row = query[i : i + 1], key[i : i + 1]
        assert top.rows[i] == select.top_k_blocks(*row, 2, **options)
        alone = select.threshold_blocks(*row, 0.6, **options)
        assert layout.rows[i] == alone.layout
        same(dropped[i], alone.dropped_mass)


def test_dropout_drops_anew_in_each_row_and_all_backends_drop_alike():
    same_rows = [layouts.sliding_window(LENGTH, LENGTH, block_size=BLOCK)] * 2
    query, key, value = (x.detach()[:1].expand(2, -1, -1, -1) for x in tensors())
    outs = []
    for backend in ("torch", "reference"):
        torch.manual_seed(5)
        outs.append(
            block_sparse_attention(
                query, key, value, BlockLayout.stack(same_rows), dropout_p=0.5, enable_gqa=True,
                backend=backend,
            )
        )  # fmt: skip
    same(outs[0], outs[1])
    assert not torch.allclose(outs[0][0], outs[0][1])


def test_a_module_takes_them_and_compiles_whole():
    inputs = tensors(2)
    layout = BlockLayout.stack(
        [layouts.sliding_window(LENGTH, w, block_size=BLOCK) for w in (2, 7)]
    )
    module = BlockSparseAttention(layout)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    wanted = block_sparse_attention(*inputs, layout, is_causal=True, enable_gqa=True)
    same(module(*inputs, is_causal=True), wanted)
    same(compiled(*inputs, is_causal=True), wanted)
    shorter = [x[:, :11] for x in inputs]
    wanted = block_sparse_attention(*shorter, layout.at(11), enable_gqa=True)
    same(module(*shorter), wanted)


def test_what_does_not_fit_is_told():
    window = layouts.sliding_window(LENGTH, 2, block_size=BLOCK)
    two = BlockLayout.stack([window, window])
    with pytest.raises(ValueError, match=r"layout must have 1 batch row or query's 3. Got 2"):
        block_sparse_attention(*tensors(), two, enable_gqa=True)
    with pytest.raises(ValueError, match=r"as many batch rows, or one, to combine. Got 2 and 3"):
        two | BlockLayout.stack([window] * 3)
    with pytest.raises(ValueError, match=r"layouts must be one or more"):
        BlockLayout.stack([])
    with pytest.raises(ValueError, match=r"of one batch row each"):
        BlockLayout.stack([two, window])
    with pytest.raises(ValueError, match=r"equal lengths"):
        BlockLayout.stack([window, window.at(11)])
    with pytest.raises(TypeError, match=r"layouts\[1\] must be a BlockLayout. Got int"):
        BlockLayout.stack([window, 3])
    with pytest.raises(ValueError, match=r"layout for all rows. Got batch=2"):
        two.spans.check(LENGTH, BLOCK, HEADS)
    with pytest.raises(ValueError, match=r"batch of at least 1. Got 0"):
        select.top_k_blocks(*(x[:0] for x in tensors()[:2]), 2)
