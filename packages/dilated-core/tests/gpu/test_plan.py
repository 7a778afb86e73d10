"""The plans that drive the kernels show every key as often as the definition says."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_core._triton import _pattern_plans, _plan, _tables
from dilated_core._triton._plan import BlockSizes, TilePlan
from dilated_core._triton._tables import Request

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def plans_are_made_in_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tables, "_TILES_AT_ONCE", 7)
        yield


@st.composite
def patterns(draw: st.DrawFn) -> DilatedPattern:
    count = draw(st.integers(1, 4))
    if draw(st.booleans()):
        base, rate = draw(st.integers(1, 24)), draw(st.sampled_from([2, 3]))
        lengths, rates = [base * rate**k for k in range(count)], [rate**k for k in range(count)]
    else:
        lengths = draw(st.lists(st.integers(1, 90), min_size=count, max_size=count))
        rates = draw(st.lists(st.integers(1, 13), min_size=count, max_size=count))
    return DilatedPattern(
        lengths,
        rates,
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
        head_groups=draw(st.sampled_from(["shared", "shared", "split"])),
        count_padding=draw(st.booleans()),
    )


def seen(
    plan: TilePlan,
    row_head: int,
    size: int,
    shape: tuple[int, int],
    is_causal: bool,
    by_key: bool,
    blocks: BlockSizes,
    sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplicity (size, rows, columns), zero keys (rows,) and times each row is owned."""
    result = torch.zeros(size, *shape, dtype=torch.float64)
    zero = torch.zeros(shape[0], dtype=torch.float64)
    owned = torch.zeros(shape[0], dtype=torch.int64)
    index = int(plan.head_class[row_head])
    weights = [t[..., 3].contiguous().view(torch.float32).exp2() for t in (plan.full, plan.masked)]
    full, masked, unit = plan.full.tolist(), plan.masked.tolist(), blocks.masked
    for first, step, count, columns_left, steps, owner, at, at_masked in plan.tiles[index].tolist():
        if owner != sequence or not count:
            continue
        rows = first + step * torch.arange(count)
        owned[rows] += 1
        while columns_left > 0:
            start, stride, n, _, member, *bounds = full[at]
            assert bool(bounds) == (plan.mask == 2)
            some = rows[(rows >= bounds[0]) & (rows < bounds[1])] if bounds else rows
            result[member, some[:, None], start + stride * torch.arange(n)] += weights[0][at]
            columns_left, at = columns_left - n, at + 1
        assert columns_left == 0
        while steps > 0:
            start, stride, n, _, member, segment, residue, row_step = masked[at_masked]
            sees = (rows - residue) % row_step == 0
            columns = start + stride * torch.arange(n)
            sees = sees[:, None] & (rows[:, None] // segment == columns // segment)
            if is_causal:
                gap = columns - rows[:, None]
                sees = sees & (gap >= 0 if by_key else gap <= 0)
            if stride:
                result[member, rows[:, None], columns] += weights[1][at_masked] * sees
            else:
                zero[rows] += weights[1][at_masked] * sees[:, 0]
            assert plan.mask == 2 or (segment == _plan.ANY_SEGMENT and row_step == 1 and stride)
            steps, at_masked = steps - -(-n // unit), at_masked + 1
        assert steps == 0
    return result, zero, owned


@settings(max_examples=150)
@given(
    patterns(),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(4, 1, 1), (8, 2, 1), (16, 8, 4)]),
)
def test_a_plan_shows_every_key_as_often_as_the_definition(
    pattern: DilatedPattern, length: int, key_length: int, heads: tuple[int, int],
    is_causal: bool, by_key: bool, blocks: tuple[int, int, int],
) -> None:  # fmt: skip
    if pattern.head_groups == "split" and heads[0] < len(pattern.segment_lengths):
        return
    if is_causal:
        length = min(length, key_length)
    start = key_length - length if is_causal else 0
    queries, keys = (start, start + length), (0, key_length)
    rows, columns = (keys, queries) if by_key else (queries, keys)
    plan = _pattern_plans.plan(
        Request(pattern, *heads, by_key, rows, columns, is_causal, BlockSizes(*blocks)), CPU
    )
    expected = pattern.multiplicity(
        length, heads[0], is_causal=is_causal, key_length=key_length
    ).to(torch.float64)
    zeros = pattern.zero_keys(length, heads[0], key_length=key_length)
    size = heads[0] // heads[1] if by_key else 1
    for row_head in range(heads[1] if by_key else heads[0]):
        shape = (rows[1], columns[1])
        count, zero, owned = seen(
            plan, row_head, size, shape, is_causal, by_key, BlockSizes(*blocks)
        )
        count = count[:, rows[0] :, columns[0] :]
        assert (owned[rows[0] :] == 1).all()
        if by_key:
            wanted = expected[row_head * size : (row_head + 1) * size].transpose(1, 2)
        else:
            wanted = expected[row_head : row_head + 1]
            if pattern.count_padding and not is_causal:
                torch.testing.assert_close(zero, zeros[row_head].double(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(count, wanted, rtol=1e-5, atol=1e-7)


@settings(max_examples=100)
@given(
    patterns(),
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(8, 1, 1), (32, 8, 8)]),
)
def test_a_packed_plan_shows_every_sequence_its_own_keys(
    pattern: DilatedPattern, lengths: list[int], is_causal: bool, by_key: bool,
    blocks: tuple[int, int, int],
) -> None:  # fmt: skip
    heads = (6, 2)
    total = sum(lengths)
    if not total:
        return
    ends = torch.tensor([0, *lengths]).cumsum(0)
    span = (0, total)
    plan = _pattern_plans.packed_plan(
        Request(pattern, *heads, by_key, span, span, is_causal, BlockSizes(*blocks)), ends
    )
    size = heads[0] // heads[1] if by_key else 1
    for i, n in enumerate(lengths):
        expected = pattern.multiplicity(n, heads[0], is_causal=is_causal).to(torch.float64)
        zeros = pattern.zero_keys(n, heads[0])
        for row_head in range(heads[1] if by_key else heads[0]):
            count, zero, owned = seen(
                plan, row_head, size, (n, n), is_causal, by_key, BlockSizes(*blocks), i
            )
            assert (owned == 1).all()
            if by_key:
                wanted = expected[row_head * size : (row_head + 1) * size].transpose(1, 2)
            else:
                wanted = expected[row_head : row_head + 1]
                if pattern.count_padding and not is_causal:
                    torch.testing.assert_close(zero, zeros[row_head].double(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(count, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rates", [(1, 2, 4, 8, 16), (1, 2, 4, 6, 12)])
def test_a_nested_pattern_visits_each_key_once(rates: tuple[int, ...]) -> None:
    pattern = DilatedPattern([64 * 2**k for k in range(5)], rates)
    # Rows of 2 in segments of 64, like 64 in 2048; taller tiles also pay for two segments.
    request = Request(pattern, 1, 1, False, (0, 1024), (0, 1024), False, BlockSizes(2, 4, 4))
    plan = _pattern_plans.plan(request, CPU)
    full, masked = (2 * int(runs[..., 2].sum()) for runs in (plan.full, plan.masked))
    pairs = pattern.flops(1024, 1, 1) / 4
    assert full < 0.85 * pairs
    assert full + masked < 0.87 * pairs


LONGNET = DilatedPattern.longnet(1 << 20)
TRIPLING = DilatedPattern([3000, 9000, 27000], [1, 3, 9])


@pytest.mark.parametrize(
    ("pattern", "rows", "is_causal", "bound"),
    [
        (LONGNET, 64, False, 0.80),
        (DilatedPattern.longnet(131072), 128, False, 0.85),
        (LONGNET, 64, True, 1.21),
        (TRIPLING, 64, False, 1.06),
        (TRIPLING, 64, True, 1.40),
    ],
)
def test_tiles_are_those_that_cost_little(
    pattern: DilatedPattern, rows: int, is_causal: bool, bound: float
) -> None:
    """Of the pairs by the definition; a masked pair costs as much as 2.5 others."""
    length, narrow = 131072, 32
    request = Request(
        pattern, 1, 1, False, (0, length), (0, length), is_causal, BlockSizes(rows, 64, narrow)
    )
    plan = _pattern_plans.plan(request, CPU)
    full, masked = (rows * int(plan.tiles[..., field].sum()) for field in (3, 4))
    pairs = pattern.flops(length, 1, 1, is_causal=is_causal) / 4
    assert full + 2.5 * narrow * masked < bound * pairs


DOUBLING = [2048 * 2**k for k in range(5)]
USED = {
    "doubling": DilatedPattern(DOUBLING, [2**k for k in range(5)]),
    "paper": DilatedPattern(DOUBLING, [1, 2, 4, 6, 12]),
    "gigapath": DilatedPattern(
        [1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16], head_offsets="blocked"
    ),
}


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize(("is_causal", "by_key"), [(False, False), (True, False), (True, True)])
def test_a_plan_of_real_size_shows_sampled_rows_their_keys(
    name: str, is_causal: bool, by_key: bool
) -> None:
    pattern, length, heads = USED[name], 50021, 3
    span, blocks = (0, length), BlockSizes(128, 128, 64)
    plan = _pattern_plans.plan(
        Request(pattern, heads, heads, by_key, span, span, is_causal, blocks), CPU
    )
    positions = torch.arange(length)
    for head in range(heads):
        tiles = plan.tiles[int(plan.head_class[head])].tolist()
        owned = torch.zeros(length, dtype=torch.int64)
        for first, step, count, *_ in tiles:
            owned[first : first + count * step : step] += 1
        assert (owned == 1).all()
        for first, step, count, *_ in tiles[head :: len(tiles) // 7]:
            row = first + step * (count // 3)
            expected = torch.zeros(length, dtype=torch.float64)
            for w, r in pattern.branches:
                offset = pattern.head_offset(head, heads, r)
                if row % w % r == offset:
                    shown = (positions // w == row // w) & (positions % w % r == offset)
                    expected += shown.double()
            if is_causal:
                expected *= positions >= row if by_key else positions <= row
            torch.testing.assert_close(
                shown_to(plan, tiles, row, is_causal, by_key, blocks, length), expected
            )


def shown_to(
    plan: TilePlan,
    tiles: list[list[int]],
    row: int,
    is_causal: bool,
    by_key: bool,
    blocks: BlockSizes,
    length: int,
) -> Tensor:
    """How often the plan shows each column to one row, (length,)."""
    columns_left, steps, _, at, at_masked = next(
        t[3:]
        for t in tiles
        if t[2] and (row - t[0]) % t[1] == 0 and 0 <= (row - t[0]) // t[1] < t[2]
    )
    weights = [t[:, 3].contiguous().view(torch.float32).exp2() for t in (plan.full, plan.masked)]
    result = torch.zeros(length, dtype=torch.float64)
    while columns_left > 0:
        start, stride, n, _, _, *bounds = plan.full[at].tolist()
        if not bounds or bounds[0] <= row < bounds[1]:
            result[start : start + n * stride : stride] += weights[0][at].round()
        columns_left, at = columns_left - n, at + 1
    while steps > 0:
        start, stride, n, _, _, segment, residue, row_step = plan.masked[at_masked].tolist()
        columns = start + stride * torch.arange(n)
        sees = (columns // segment == row // segment) & ((row - residue) % row_step == 0)
        if is_causal:
            sees = sees & (columns >= row if by_key else columns <= row)
        result[columns] += weights[1][at_masked].round() * sees
        steps, at_masked = steps - -(-n // blocks.masked), at_masked + 1
    return result
