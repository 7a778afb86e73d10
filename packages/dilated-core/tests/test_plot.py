"""Pictures of patterns."""

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_core.plot import block_counts, block_edges, plot_pattern
from dilated_testing import patterns

edges = st.sets(st.integers(0, 37), min_size=2).map(sorted)


@given(patterns(), st.booleans(), edges, edges)
def test_blocks_hold_the_pairs_of_the_definition(pattern, is_causal, rows, columns):
    heads = max(5, len(pattern.segment_lengths))
    dense = pattern.multiplicity(37, heads, is_causal=is_causal)
    counts = block_counts(pattern, heads, rows, columns, is_causal=is_causal)
    assert counts.shape == (len(pattern.branches), heads, len(rows) - 1, len(columns) - 1)
    for i, (top, bottom) in enumerate(pairwise(rows)):
        for j, (left, right) in enumerate(pairwise(columns)):
            block = dense[:, top:bottom, left:right].sum((1, 2))
            assert counts[:, :, i, j].sum(0).equal(block)
    for branch, used in enumerate(pattern.branch_heads(heads)):
        assert not counts[branch, [head not in used for head in range(heads)]].any()


def test_blocks_of_a_long_pattern_hold_all_its_pairs():
    pattern = DilatedPattern([2048, 2**18, 2**29], [1, 16, 512])
    for is_causal in (False, True):
        counts = block_counts(pattern, 7, *[block_edges(0, 2**29 + 5, 64)] * 2, is_causal=is_causal)
        pairs = pattern.flops(2**29 + 5, 7, 1, is_causal=is_causal) // 4
        assert int(counts.sum()) == pairs


def test_blocks_are_alike_but_for_the_last():
    assert block_edges(3, 13, 4) == [3, 6, 9, 12, 13]
    assert block_edges(3, 7, 9) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("edges", [[], [3], [3, 3], [5, 3], [-1, 4], [0, 2**30 + 1]])
def test_edges_that_are_none_are_refused(edges):
    with pytest.raises(ValueError, match="query_edges must be"):
        block_counts(DilatedPattern([8], [1]), 2, edges, [0, 4])
    with pytest.raises(ValueError, match="key_edges must be"):
        block_counts(DilatedPattern([8], [1]), 2, [0, 4], edges)


def test_a_picture_shows_a_panel_for_each_branch_and_head(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    figure = plot_pattern(DilatedPattern([8, 16], [1, 2]), 32, 3, is_causal=True)
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3 * 3
    path = tmp_path / "pattern.png"
    figure.savefig(path)
    assert path.stat().st_size > 10_000


def test_a_million_positions_are_a_picture_of_blocks():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    pattern = DilatedPattern([4096, 2**20], [1, 64])
    figure = plot_pattern(pattern, 10**6, 2, first=10**5, last=9 * 10**5)
    panels = [axis for axis in figure.axes if axis.images]
    assert {axis.images[0].get_array().shape for axis in panels} == {(512, 512)}
    (bar,) = [axis for axis in figure.axes if not axis.images and axis.get_ylabel()]
    assert bar.get_ylabel() == "pairs in a block of 1,563 x 1,563"
    low, high = panels[-1].get_xlim()
    assert low == 10**5 - 0.5
    assert 9 * 10**5 <= high < 9 * 10**5 + 1563
    assert panels[-1].get_xlabel() == "key position"


@pytest.mark.parametrize("highest", [1, 2, 3])
def test_the_bar_of_counts_has_whole_numbers_only(highest):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    figure = plot_pattern(DilatedPattern([8] * highest, [1] * highest), 16, 1)
    figure.draw_without_rendering()
    (bar,) = [axis for axis in figure.axes if not axis.images and axis.get_ylabel()]
    ticks = [tick for tick in bar.get_yticks() if 0 <= tick <= highest]
    assert ticks == list(range(highest + 1))


def test_bad_sizes_are_named():
    pattern = DilatedPattern([8], [1])
    with pytest.raises(ValueError, match=r"length must be at most 1073741824\. Got 1073741825"):
        plot_pattern(pattern, 2**30 + 1)
    for first, last in ((-1, 3), (3, 3), (0, 9)):
        with pytest.raises(ValueError, match=r"first and last must be in \[0, length=8\]"):
            plot_pattern(pattern, 8, first=first, last=last)
    with pytest.raises(ValueError, match=r"heads must be positive\. Got 0"):
        plot_pattern(pattern, 8, 0)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match='plot_pattern needs matplotlib: pip install "matplotlib'):
        plot_pattern(DilatedPattern([8], [1]), 32, 3)
