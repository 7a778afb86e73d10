"""Layouts of any length: cut, gone on, and what modules make of them."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_sparse import (
    BlockLayout,
    BlockSparseAttention,
    BlockSparseDilatedAttention,
    block_sparse_attention,
    layouts,
)
from sparse_problems import any_layouts

# Each for any length; what is drawn at random goes on in another way.
NAMED = {
    "sliding_window": lambda n: layouts.sliding_window(n, 5, block_size=4),
    "dilated_window": lambda n: layouts.dilated_window(n, 3, 2, block_size=4),
    "strided": lambda n: layouts.strided(n, 7, block_size=4),
    "fixed": lambda n: layouts.fixed(n, 7, 2, block_size=4),
    "global_positions": lambda n: layouts.global_positions(n, [7, 2, 8], block_size=4),
    "global_tokens": lambda n: layouts.global_tokens(n, 3, block_size=4),
    "longformer": lambda n: layouts.longformer(n, 3, 2, block_size=4),
    "prefix": lambda n: layouts.prefix(length=n, count=5, block_size=4),
    "hierarchical": lambda n: layouts.hierarchical(n, 2, 3, block_size=4),
    "document": lambda n: layouts.document([3, 0, 6, n - 9], block_size=4),
    "union": lambda n: layouts.sliding_window(n, 3, block_size=4) | layouts.strided(
        n, 5, block_size=4
    ),
    "intersection": lambda n: layouts.prefix(n, 7, block_size=4) & layouts.fixed(
        n, 5, 1, block_size=4
    ),
    "causal": lambda n: layouts.sliding_window(n, 5, block_size=4).causal(),
    "per head": lambda n: layouts.sliding_window(n, 5, block_size=4).per_head(3),
}  # fmt: skip
DRAWN = {
    "random_blocks": lambda n: layouts.random_blocks(n, 2, heads=2, block_size=4),
    "bigbird": lambda n: layouts.bigbird(n, block_size=4),
}


@given(data=st.data())
def test_a_cut_is_the_last_queries_over_the_first_keys(data) -> None:
    layout = data.draw(any_layouts(heads=3).filter(lambda x: x.length == x.key_length))
    key_length = data.draw(st.integers(0, layout.length))
    length = data.draw(st.integers(0, key_length))
    dense = layout.to_dense()[:, key_length - length : key_length, :key_length]
    cut = layout.at(length, key_length)
    assert (cut.length, cut.key_length, cut.heads) == (length, key_length, layout.heads)
    assert torch.equal(cut.to_dense(), dense)
    assert cut == BlockLayout.from_dense(dense, block_size=layout.block_size)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("start", [11, 12, 30])
def test_a_named_layout_is_the_same_rule_at_any_length(name: str, start: int) -> None:
    make = NAMED[name]
    layout = make(start)
    for length in (10, 12, 13, 29, 41):
        assert layout.at(length) == make(length)
        assert layout.at(length).at(start) == layout
        dense = make(length).to_dense()[:, -1:]
        assert torch.equal(layout.at(1, length).to_dense(), dense)
    assert pickle.loads(pickle.dumps(layout)).at(41) == make(41)  # our own


@pytest.mark.parametrize("name", DRAWN)
def test_random_blocks_are_cut_as_they_are_and_go_on_as_others(name: str) -> None:
    layout = DRAWN[name](30)
    assert torch.equal(layout.at(17).to_dense(), layout.to_dense()[:, :17, :17])
    assert layout.at(41) == DRAWN[name](41)


def test_a_layout_in_an_order_of_its_own_is_made_anew() -> None:
    pattern = DilatedPattern([8, 16], [1, 2])
    layout = layouts.longnet(32, pattern, heads=2, block_size=4)
    for length in (16, 24, 48):
        assert layout.at(length) == layouts.longnet(length, pattern, heads=2, block_size=4)
    with pytest.raises(ValueError, match=r"length must be key_length .* Got 1 and 32"):
        layout.at(1, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.at(13), r"key_length must be at most 12 for a layout .* from a mask. Got 13"),
        (lambda x: x.at(3, 2), r"key_length must be at least length=3. Got 2"),
        (lambda x: x.at(-1), r"length must be .* Got -1"),
        (lambda x: x.restrict(range(8), range(12)).at(4), r"as many queries as keys .* 8 and 12"),
        (lambda x: (x | NAMED["strided"](12)).at(13), "key_length must be at most 12"),
    ],
)
def test_what_cannot_be_had_says_why(call, message: str) -> None:
    layout = BlockLayout.from_dense(torch.ones(12, 12, dtype=torch.bool), block_size=4)
    with pytest.raises(ValueError, match=message):
        call(layout)


def test_a_length_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"length must be an int. Got 3.0"):
        NAMED["strided"](12).at(3.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 12, 19])
def test_modules_take_sequences_of_any_length(length: int, is_causal: bool) -> None:
    layout, pattern = layouts.longformer(12, 2, 1, block_size=4), DilatedPattern([4], [1])
    x = torch.randn(2, length, 3, 5, dtype=torch.float64)
    found = BlockSparseAttention(layout)(x, x, x, is_causal=is_causal)
    there = layouts.longformer(length, 2, 1, block_size=4)
    torch.testing.assert_close(found, block_sparse_attention(x, x, x, there, is_causal=is_causal))
    both = BlockSparseDilatedAttention(pattern, layout)(x, x, x, is_causal=is_causal)
    expected = BlockSparseDilatedAttention(pattern, there)(x, x, x, is_causal=is_causal)
    torch.testing.assert_close(both, expected)


def test_a_step_of_decoding_is_the_last_row() -> None:
    module = BlockSparseAttention(layouts.sliding_window(12, 3, block_size=4))
    x = torch.randn(2, 17, 3, 5, dtype=torch.float64)
    whole = module(x, x, x, is_causal=True)
    for length in (1, 5, 12, 13, 17):
        here = x[:, :length]
        torch.testing.assert_close(
            module(here[:, -1:], here, here, is_causal=True), whole[:, length - 1 : length]
        )
    with pytest.raises(ValueError, match="layout must have the query and key lengths"):
        module(x[:, :3], x, x)  # of another sequence


def test_a_layout_from_a_mask_serves_what_it_holds() -> None:
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    module = BlockSparseAttention(BlockLayout.from_dense(mask, block_size=4))
    x = torch.randn(1, 13, 2, 5)
    assert module(x[:, :7], x[:, :7], x[:, :7]).shape == (1, 7, 2, 5)
    with pytest.raises(ValueError, match="key_length must be at most 12"):
        module(x, x, x)
