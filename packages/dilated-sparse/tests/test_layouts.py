"""Every named layout against its definition, written out here token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_sparse import BlockLayout, _longnet, layouts

LENGTH = st.integers(0, 67)
BLOCK = st.integers(1, 80)
SMALL = st.integers(1, 20)


def check(layout, length, block_size, visible):
    """The layout must be what `visible(i, j)` says for each pair of tokens."""
    i = torch.arange(length)[:, None]
    expected = torch.as_tensor(visible(i, i.T))
    assert layout.to_dense()[0].equal(expected)
    assert layout == BlockLayout.from_dense(expected, block_size=block_size)


@given(LENGTH, BLOCK, st.integers(0, 70))
def test_sliding_window(n, b, window):
    layout = layouts.sliding_window(n, window, block_size=b)
    check(layout, n, b, lambda i, j: (i <= j + window) & (j <= i + window))


@given(LENGTH, BLOCK, st.integers(0, 20), SMALL)
def test_dilated_window(n, b, window, dilation):
    layout = layouts.dilated_window(n, window, dilation, block_size=b)
    steps = [k * dilation for k in range(-window, window + 1)]
    check(layout, n, b, lambda i, j: torch.isin(j - i, torch.tensor(steps)))


@given(LENGTH, BLOCK, st.integers(1, 80))
def test_strided(n, b, stride):
    layout = layouts.strided(n, stride, block_size=b)

    def visible(i, j):
        local = (j >= (i - stride).clamp(min=0)) & (j <= i)
        return local | ((j <= i) & ((i - j) % stride == 0))

    check(layout, n, b, visible)


@given(LENGTH, BLOCK, st.integers(1, 80), st.data())
def test_fixed(n, b, stride, data):
    summary = data.draw(st.integers(1, stride))
    layout = layouts.fixed(n, stride, summary, block_size=b)

    def visible(i, j):
        own = torch.floor_divide(i, stride) == torch.floor_divide(j, stride)
        summaries = torch.isin(j % stride, torch.arange(stride - summary, stride))
        return (own | summaries) & (j <= i)

    check(layout, n, b, visible)


@given(LENGTH, BLOCK, st.integers(0, 80))
def test_global_tokens(n, b, count):
    layout = layouts.global_tokens(n, count, block_size=b)
    check(layout, n, b, lambda i, j: torch.minimum(i, j) < count)


@given(LENGTH, BLOCK, st.integers(0, 80))
def test_prefix(n, b, count):
    layout = layouts.prefix(n, count, block_size=b)
    check(layout, n, b, lambda i, j: ~((j > i) & (j >= count)))


@given(LENGTH, BLOCK, st.integers(0, 20), st.integers(0, 20))
def test_longformer(n, b, window, count):
    layout = layouts.longformer(n, window, count, block_size=b)
    check(layout, n, b, lambda i, j: ((i - j).abs() <= window) | (i < count) | (j < count))


@given(st.lists(st.integers(0, 30), max_size=9), BLOCK)
def test_document(lengths, b):
    layout = layouts.document(lengths, block_size=b)
    owner = torch.tensor([d for d, n in enumerate(lengths) for _ in range(n)])
    check(layout, sum(lengths), b, lambda i, j: owner[i] == owner[j] if len(owner) else i == j)


@given(LENGTH, BLOCK, st.integers(0, 9), st.integers(1, 4), st.integers(2, 4))
def test_hierarchical(n, b, window, levels, growth):
    layout = layouts.hierarchical(n, window, levels, growth=growth, block_size=b)

    def visible(i, j):
        seen = i < 0
        for s in (growth**level for level in range(levels)):
            cell = j // s
            seen = seen | ((cell * s == j) & (i // s - window <= cell) & (cell <= i // s + window))
        return seen

    check(layout, n, b, visible)


@given(LENGTH, BLOCK, st.integers(0, 9), st.integers(1, 3), st.integers(0, 99))
def test_random_blocks_draws_so_many_different_blocks_in_each_row(n, b, count, heads, seed):
    layout = layouts.random_blocks(n, count, seed=seed, heads=heads, block_size=b)
    rows = -(-n // b)
    assert layout.row_offsets.diff().tolist() == [min(count, rows)] * (heads * rows)
    assert (layout.masks == -1).all()
    assert layout == layouts.random_blocks(n, count, seed=seed, heads=heads, block_size=b)
    assert layout == BlockLayout.from_dense(layout.to_dense(), block_size=b)


def test_random_blocks_are_uniform_and_differ_by_seed_and_head():
    layout = layouts.random_blocks(32, 8, heads=500, block_size=1)
    share = layout.to_dense().double().mean(0)
    assert (share - 8 / 32).abs().max() < 0.09
    one, two = (layouts.random_blocks(999, 3, seed=s, block_size=8) for s in (0, 1))
    assert one != two
    heads = layouts.random_blocks(999, 3, heads=2, block_size=8).to_dense()
    assert not heads[0].equal(heads[1])


@given(
    LENGTH, BLOCK, st.sampled_from([1, 3, 5]), st.integers(0, 3), st.integers(0, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_bigbird(n, b, window, sinks, draws, heads):
    layout = layouts.bigbird(
        n, window_blocks=window, global_blocks=sinks, random_blocks=draws, seed=5, heads=heads,
        block_size=b,
    )  # fmt: skip
    drawn = layouts.random_blocks(n, draws, seed=5, heads=heads, block_size=b).to_dense()
    i = torch.arange(n)[:, None] // b
    window_or_sink = ((i - i.T).abs() <= window // 2) | (i < sinks) | (sinks > i.T)
    assert layout.to_dense().equal(window_or_sink | drawn)


@st.composite
def nested_patterns(draw):
    rates = [1]
    for factor in draw(st.lists(st.integers(2, 3), max_size=2)):
        rates.append(rates[-1] * factor)
    smallest = rates[-1] * draw(st.integers(1, 4))
    return DilatedPattern(
        [smallest * draw(st.integers(1, 4)) for _ in rates[1:]] + [smallest],
        draw(st.permutations(rates)),
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
    )


@given(LENGTH, nested_patterns(), st.integers(1, 3), st.booleans(), BLOCK)
def test_longnet(n, pattern, heads, is_causal, b):
    layout = layouts.longnet(n, pattern, heads=heads, is_causal=is_causal, block_size=b)
    order = layouts.longnet_order(n, pattern)
    assert order.sort().values.equal(torch.arange(n))
    shown = pattern.multiplicity(n, heads, is_causal=is_causal) > 0
    expected = shown[:, order][:, :, order]
    assert layout.to_dense().equal(expected)
    assert layout == BlockLayout.from_dense(expected, block_size=b)


def test_longnet_of_more_branches_than_flags_fit_a_number(monkeypatch):
    pattern = DilatedPattern([6, 12, 24], [1, 2, 6])
    expected = layouts.longnet(53, pattern, heads=3, block_size=4)
    monkeypatch.setattr(_longnet, "_BITS", 2)
    assert layouts.longnet(53, pattern, heads=3, block_size=4) == expected


def test_longnet_blocks_are_full_in_its_order():
    """What the order is for: the same pattern in the natural order has hardly a full block."""
    pattern = DilatedPattern([64, 128, 256], [1, 2, 4])
    layout = layouts.longnet(512, pattern, block_size=16)
    natural = BlockLayout.from_dense(pattern.multiplicity(512, 1) > 0, block_size=16)
    assert (layout.masks == -1).all()
    assert (natural.masks == -1).double().mean() < 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layouts.sliding_window(-1, 3), ValueError, "length must be at least 0. Got -1"),
        (lambda: layouts.sliding_window(9, -3), ValueError, "window must be at least 0. Got -3"),
        (lambda: layouts.sliding_window(9, 3, block_size=0), ValueError, "block_size must be pos"),
        (lambda: layouts.sliding_window(9, 3, block_size=-8), ValueError, "block_size must be pos"),
        (lambda: layouts.dilated_window(9, 3, 0), ValueError, "dilation must be positive. Got 0"),
        (lambda: layouts.strided(9, 0), ValueError, "stride must be positive. Got 0"),
        (lambda: layouts.fixed(9, 3, 4), ValueError, "summary must be at most stride=3. Got 4"),
        (lambda: layouts.global_tokens(9, True), TypeError, "count must be an int. Got True"),
        (lambda: layouts.bigbird(9, window_blocks=2), ValueError, "must be odd. Got 2"),
        (lambda: layouts.document(7), TypeError, "lengths must be a sequence of ints. Got 7"),
        (lambda: layouts.document([3, -1]), ValueError, r"lengths\[1\] must be at least 0. Got -1"),
        (lambda: layouts.hierarchical(9, 1, 0), ValueError, "levels must be positive. Got 0"),
        (lambda: layouts.hierarchical(9, 1, 2, growth=1), ValueError, "growth must be at least 2"),
        (lambda: layouts.longnet(9, [4]), TypeError, "pattern must be a DilatedPattern. Got list"),
        (
            lambda: layouts.longnet(9, DilatedPattern([6, 6], [2, 3])),
            ValueError,
            r"dilation_rates must divide one another in turn. Got \[2, 3\]",
        ),
        (
            lambda: layouts.longnet(9, DilatedPattern([4, 6], [1, 2])),
            ValueError,
            "segment_lengths must be multiples of 4. Got 6",
        ),
        (
            lambda: layouts.longnet(9, DilatedPattern([4, 8], [1, 8])),
            ValueError,
            r"multiple of the largest dilation rate \(8\). Got 4",
        ),
        (
            lambda: layouts.longnet(9, DilatedPattern([4], [1], count_padding=True)),
            ValueError,
            "pattern must not have count_padding",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@given(st.data())
def test_chosen_tokens_are_global_wherever_they_stand(data):
    length, block_size = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 11))
    positions = data.draw(st.lists(st.integers(0, length - 1))) if length else []
    if data.draw(st.booleans()):
        positions = torch.tensor(positions, dtype=torch.int32)
    layout = layouts.global_positions(length, positions, block_size=block_size)
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[torch.as_tensor(positions, dtype=torch.int64)] = True
    expected = chosen[:, None] | chosen
    assert layout == BlockLayout.from_dense(expected, block_size=block_size)


def test_the_first_tokens_are_chosen_ones_too():
    first = layouts.global_tokens(41, 6, block_size=4)
    assert layouts.global_positions(41, range(6), block_size=4) == first


def test_chosen_tokens_of_a_long_sequence_take_time_and_memory_as_its_length():
    length = 1 << 18
    positions = torch.arange(16) * 16411
    layout = layouts.global_positions(length, positions)
    assert layout.visible_pairs() == 2 * 16 * length - 16 * 16
    assert len(layout.run_columns) < 40 * length // 128


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([9], ValueError, r"positions must lie in range\(9\). Got 9 to 9"),
        ([3, -1], ValueError, r"positions must lie in range\(9\). Got -1 to 3"),
        ([1.5], TypeError, "positions must be ints. Got torch.float32"),
        (torch.ones(9, dtype=torch.bool), TypeError, "positions must be ints. Got torch.bool"),
    ],
)
def test_bad_positions_are_named(positions, error, message):
    with pytest.raises(error, match=message):
        layouts.global_positions(9, positions, block_size=4)
