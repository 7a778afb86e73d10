"""`BlockLayout`: dense and back, set operations, spans, transpose, identity."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_sparse import BlockLayout, layouts
from sparse_problems import any_layouts, dense_masks

SIZES = st.integers(1, 50)


@given(dense_masks(), SIZES)
def test_dense_and_back(mask, block_size):
    layout = BlockLayout.from_dense(mask, block_size=block_size)
    assert layout.to_dense().equal(mask)
    assert BlockLayout.from_dense(layout.to_dense(), block_size=block_size) == layout
    assert layout.visible_pairs() == int(mask.sum())
    assert layout.density() == pytest.approx(mask.double().mean().nan_to_num(0.0).item())


@given(dense_masks(), SIZES)
def test_kinds_are_exact(mask, block_size):
    """Full means every pair, partial means some but not all, and nothing empty is stored."""
    layout = BlockLayout.from_dense(mask, block_size=block_size)
    blocks, grid = layout.blocks, layout.grid
    for place, column, kind in zip(blocks.row, blocks.column, blocks.mask, strict=True):
        head, row = divmod(int(place), grid.rows)
        rows, columns = (
            slice(int(x) * block_size, (int(x) + 1) * block_size) for x in (row, column)
        )
        part = mask[head, rows, columns]
        assert part.any()
        assert bool(part.all()) == (int(kind) == -1)
    table = layout.table.flatten(1)
    assert len(table.unique(dim=0)) == len(table)


@given(dense_masks(length=23, key_length=29, heads=2), dense_masks(length=23, key_length=29), SIZES)
def test_union_and_intersection(a, b, block_size):
    if len(b) == 3:
        b = b[:2]
    one, two = (BlockLayout.from_dense(x, block_size=block_size) for x in (a, b))
    for combined, expected in ((one | two, a | b), (one & two, a & b)):
        assert combined.to_dense().equal(expected)
        assert combined == BlockLayout.from_dense(expected, block_size=block_size)
    assert two | one == one | two
    assert (one & one) == one == (one | one)


@given(any_layouts(heads=2))
def test_transpose(layout):
    flipped = layout.transpose()
    assert flipped.to_dense().equal(layout.to_dense().transpose(1, 2))
    assert flipped.transpose() == layout


@given(any_layouts(heads=2, causal=True))
def test_causal_hides_the_keys_after_each_query(layout):
    n, m = layout.length, layout.key_length
    visible = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    expected = layout.to_dense() & visible
    assert layout.causal() == BlockLayout.from_dense(expected, block_size=layout.block_size)


@given(any_layouts(heads=2), st.data())
def test_restriction_to_spans(layout, data):
    spans = []
    for length in (layout.length, layout.key_length):
        blocks = length // layout.block_size
        start = data.draw(st.integers(0, blocks)) * layout.block_size
        stop = data.draw(st.integers(start // layout.block_size, blocks)) * layout.block_size
        spans.append(range(start, data.draw(st.sampled_from([stop, length]))))
    part = layout.restrict(*spans)
    expected = layout.to_dense()[:, spans[0].start : spans[0].stop, spans[1].start : spans[1].stop]
    assert part == BlockLayout.from_dense(expected, block_size=layout.block_size)


@given(any_layouts(heads=1), st.integers(1, 4))
def test_per_head_repeats_a_shared_layout(layout, heads):
    expected = layout.to_dense().expand(heads, -1, -1)
    assert layout.per_head(heads).to_dense().equal(expected)


@given(dense_masks(), SIZES)
def test_mask_mod(mask, block_size):
    heads, n, m = mask.shape

    def mask_mod(batch, head, query, key):
        return mask[head, query, key] & (batch == 0)

    layout = BlockLayout.from_mask_mod(
        mask_mod, n, key_length=m, block_size=block_size, heads=heads
    )
    assert layout == BlockLayout.from_dense(mask, block_size=block_size)


@given(any_layouts(heads=3))
def test_copies_and_pickles_are_equal(layout):
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin.to_dense().equal(layout.to_dense())


def test_different_layouts_differ():
    made = [
        layouts.sliding_window(40, 3, block_size=8),
        layouts.sliding_window(40, 4, block_size=8),
        layouts.sliding_window(41, 3, block_size=8),
        layouts.sliding_window(40, 3, block_size=4),
        layouts.sliding_window(40, 3, block_size=8).per_head(2),
    ]
    assert len(set(made)) == len(made)
    assert made[0] != "a layout"


def test_a_layout_cannot_be_changed():
    layout = layouts.sliding_window(40, 3)
    with pytest.raises(AttributeError):
        layout.length = 41


MASK = torch.ones(5, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockLayout.from_dense([[True]]), TypeError, "mask must be a Tensor. Got list"),
        (lambda: BlockLayout.from_dense(MASK.int()), TypeError, "mask must be bool"),
        (lambda: BlockLayout.from_dense(MASK[0]), ValueError, r"mask must have shape \(N, M\), "),
        (
            lambda: BlockLayout.from_dense(MASK, block_size=0),
            ValueError,
            r"block_size must be positive\. Got 0",
        ),
        (
            lambda: BlockLayout.from_dense(MASK, block_size=2.0),
            TypeError,
            r"block_size must be an int\. Got 2\.0",
        ),
        (
            lambda: BlockLayout.from_dense(MASK) | layouts.prefix(5, 2),
            ValueError,
            "layouts must have equal lengths, block sizes and devices to combine",
        ),
        (
            lambda: layouts.prefix(5, 2).per_head(2) | layouts.prefix(5, 2).per_head(3),
            ValueError,
            r"heads must be 2, which the layout has\. Got 3",
        ),
        (
            lambda: BlockLayout.from_dense(MASK.T).causal(),
            ValueError,
            "length must not exceed key_length in a causal layout. Got 7 and 5",
        ),
        (
            lambda: layouts.prefix(50, 2, block_size=8).restrict(range(4, 8), range(50)),
            ValueError,
            r"queries must start and end at multiples of 8. Got range\(4, 8\)",
        ),
        (
            lambda: layouts.prefix(50, 2).restrict(range(50), range(51)),
            ValueError,
            r"keys must lie in range\(0, 50\)",
        ),
        (
            lambda: layouts.prefix(50, 2).restrict(range(0, 50, 2), range(50)),
            ValueError,
            "queries must be a range of step 1",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_only_layouts_combine():
    with pytest.raises(TypeError):
        layouts.prefix(5, 2) | 3
