"""Plans made from layouts show the kernels every token pair of the layout once, and no other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core.extending import SPARE_RUNS, BlockSizes, Sizes
from dilated_sparse import BlockLayout, layouts
from dilated_sparse._block_plan import build
from sparse_problems import any_layouts

CPU = torch.device("cpu")


def steps(count, size):
    return -(-count // size)


def words_of(plan, run, rows, blocks, height):
    """The bits (rows, columns) of a masked run, read in steps as the kernels do."""
    _, _, count, _, _, word, first_row, words = run
    seen = torch.zeros(len(rows), count, dtype=torch.bool)
    for offset in range(0, count, blocks.masked):
        lanes = torch.arange(blocks.masked)
        at = word + offset // 32 + (rows - first_row) * words
        # Rows that fill the tile up are read too.
        last = word + offset // 32 + (int(rows[0]) + height - 1 - first_row) * words
        assert int(at.min()) >= 0
        assert last + (blocks.masked > 32) < len(plan.bits)
        pair = torch.stack([plan.bits[at], plan.bits[at + (blocks.masked > 32)]], 1)
        word_of_lane = (lanes >= 32).long()
        shift = (offset + lanes) % 32
        bits = (pair[:, word_of_lane] >> shift) & 1 != 0
        here = slice(offset, min(offset + blocks.masked, count))
        seen[:, here] = bits[:, : here.stop - here.start]
    return seen


def shown(plan, head, size, shape, blocks, is_causal, by_key):
    """How often each pair (member, row, column) is shown, and how often each row is owned."""
    result = torch.zeros(size, *shape, dtype=torch.int64)
    owned = torch.zeros(shape[0], dtype=torch.int64)
    full, masked = plan.full.tolist(), plan.masked.tolist()
    for tile in plan.tiles[int(plan.head_class[head])].tolist():
        first, step, count, columns_left, steps_left, _, at, at_masked = tile
        assert step == 1
        assert count <= blocks.rows
        if not count:
            continue
        rows = torch.arange(first, first + count)
        owned[rows] += 1
        while columns_left > 0:
            start, step, n, weight, member = full[at]
            assert (step, weight, n % blocks.columns) == (1, 0, 0)
            result[member, rows[:, None], torch.arange(start, start + n)] += 1
            columns_left, at = columns_left - n, at + 1
        while steps_left > 0:
            run = masked[at_masked]
            start, step, n, weight, member = run[:5]
            assert (step, weight) == (1, 0)
            columns = torch.arange(start, start + n)
            seen = torch.ones(count, n, dtype=torch.bool)
            if plan.mask == 3:
                seen = words_of(plan, run, rows, blocks, blocks.rows)
            if is_causal:
                gap = columns - rows[:, None]
                seen = seen & (gap >= 0 if by_key else gap <= 0)
            result[member, rows[:, None], columns] += seen
            steps_left, at_masked = steps_left - steps(n, blocks.masked), at_masked + 1
        assert (columns_left, steps_left) == (0, 0)
    assert plan.mask > 0 or len(masked) == SPARE_RUNS
    # The runs after the last one are read, and not used.
    assert not any(full[-1])
    assert not any(masked[-1])
    return result, owned


def check(layout, heads, kv_heads, is_causal, by_key, blocks):
    length, key_length = layout.length, layout.key_length
    first = key_length - length if is_causal else 0
    sizes = Sizes(length, key_length, heads, kv_heads, first, 0, is_causal, CPU)
    plan = build(layout, sizes, by_key, blocks)
    dense = layout.to_dense().expand(heads, -1, -1)
    if is_causal:
        dense = dense & (torch.arange(key_length) <= torch.arange(length)[:, None] + first)
    dense = torch.nn.functional.pad(dense, (0, 0, first, 0)).long()
    if by_key:
        dense = dense.transpose(1, 2)
    size = heads // kv_heads if by_key else 1
    for head in range(heads // size):
        result, owned = shown(plan, head, size, dense.shape[1:], blocks, is_causal, by_key)
        assert (owned[0 if by_key else first :] == 1).all()
        assert torch.equal(result, dense[head * size : (head + 1) * size])
    return plan


@settings(max_examples=150)
@given(st.data(), st.booleans(), st.booleans(),
       st.sampled_from([(4, 1, 1), (8, 2, 1), (16, 8, 4), (16, 32, 32)]))  # fmt: skip
def test_a_plan_shows_the_pairs_of_the_layout(data, is_causal, by_key, blocks):
    kv_heads = data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 3))
    layout = data.draw(any_layouts(heads=heads, causal=is_causal))
    if layout.length and layout.key_length:
        check(layout, heads, kv_heads, is_causal, by_key, BlockSizes(*blocks))


@pytest.mark.parametrize("block_size", [33, 64, 70, 100])
@pytest.mark.parametrize(
    "blocks", [BlockSizes(16, 64, 64), BlockSizes(32, 32, 32), BlockSizes(64, 128, 16)]
)
@pytest.mark.parametrize(("is_causal", "by_key"), [(False, False), (True, False), (True, True)])
def test_blocks_of_several_words_a_row(block_size, blocks, is_causal, by_key):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 211, 239, generator=generator) < 0.5
    mask[:, 70:170, 64:200] = True
    layout = BlockLayout.from_dense(mask, block_size=block_size)
    assert check(layout, 2, 1, is_causal, by_key, blocks).mask == 3


def plan_of(layout, heads=1, kv_heads=1, is_causal=False, by_key=False, blocks=(64, 64, 32)):
    sizes = Sizes(layout.length, layout.key_length, heads, kv_heads, 0, 0, is_causal, CPU)
    return build(layout, sizes, by_key, BlockSizes(*blocks))


def test_full_blocks_side_by_side_are_one_run_without_a_mask():
    plan = plan_of(layouts.prefix(1024, 1024, block_size=64))
    assert plan.mask == 0
    assert plan.full[:-SPARE_RUNS, 2].tolist() == [1024] * 16
    assert plan.full[-SPARE_RUNS:].tolist() == [[0] * 5] * SPARE_RUNS


def test_columns_that_do_not_fill_a_step_are_masked_by_count_alone():
    seen = torch.zeros(128, 640, dtype=torch.bool)
    seen[:, 64:256] = True
    plan = plan_of(BlockLayout.from_dense(seen, block_size=64), blocks=(64, 128, 64))
    assert plan.mask == 1
    assert plan.full[:-SPARE_RUNS, :3].tolist() == [[64, 1, 128]] * 2
    assert plan.masked[:-SPARE_RUNS, :3].tolist() == [[192, 1, 64]] * 2


def test_tiles_of_a_block_row_share_its_runs_and_causal_ones_do_not():
    layout = layouts.prefix(1024, 1024, block_size=128)
    assert plan_of(layout).full.shape[0] == 8 + SPARE_RUNS
    plan = plan_of(layout, is_causal=True)
    assert plan.full.shape[0] == 15 + SPARE_RUNS
    # The first tile of a block walks fewer columns than the second.
    by_row = plan.tiles[0][plan.tiles[0, :, 0].argsort()]
    assert by_row[:, 3].tolist() == [64 * i for i in range(16)]


def test_partial_blocks_are_masked_only_where_rows_differ():
    # A row sees as many as 99 columns past its own; blocks are cut into quarters of 64 by 64.
    layout = layouts.sliding_window(256, 99, block_size=128)
    plan = plan_of(layout, blocks=(64, 64, 32))
    assert plan.tiles[0][plan.tiles[0, :, 0].argsort()][:, 3:5].tolist() == [
        [64, 2 * 2], [64, 3 * 2], [64, 3 * 2], [64, 2 * 2],
    ]  # fmt: skip
    whole = layouts.prefix(256, 256, block_size=128)
    assert plan_of(layout & whole, blocks=(64, 64, 32)).full.tolist() == plan.full.tolist()
    # A block of which one tile of rows sees nothing.
    dense = torch.zeros(128, 128, dtype=torch.bool)
    dense[70, 5] = True
    plan = plan_of(BlockLayout.from_dense(dense, block_size=128), blocks=(64, 64, 32))
    assert sorted(plan.tiles[0, :, 3:5].tolist()) == [[0, 0], [0, 2]]
    assert plan.masked[:-SPARE_RUNS, :3].tolist() == [[0, 1, 64]]


def test_members_walk_runs_of_their_own():
    dense = torch.zeros(4, 64, 64, dtype=torch.bool)
    for head in range(4):
        dense[head, 16 * head : 16 * head + 16] = True
    layout = BlockLayout.from_dense(dense, block_size=16)
    plan = plan_of(layout, 4, 2, by_key=True, blocks=(16, 16, 16))
    assert plan.head_class.tolist() == [0, 1]
    first = plan.full[plan.tiles[1, 0, 6].long()].tolist()
    assert (first[0], first[4]) == (32, 0)
    plan = plan_of(layouts.prefix(64, 64, block_size=16), 4, 2, by_key=True, blocks=(16, 16, 16))
    assert plan.head_class.tolist() == [0, 0]
    assert plan.full[:2, 4].tolist() == [0, 1]


def test_rows_with_much_more_work_come_first():
    layout = layouts.sliding_window(4096, 100, block_size=64)
    assert plan_of(layout).early == 0
    plan = plan_of(layout | layouts.global_tokens(4096, 64, block_size=64))
    assert plan.early == 1
    assert plan.tiles[0, 0, 0] == 0


def test_tables_are_as_large_as_the_layout():
    layout = layouts.sliding_window(1 << 20, 1000, block_size=128)
    plan = plan_of(layout, heads=8, kv_heads=8, blocks=(128, 128, 64))
    assert sum(table.nbytes for table in plan.tensors()) < 4 * layout.nbytes + (1 << 20)
