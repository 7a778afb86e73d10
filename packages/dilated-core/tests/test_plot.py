"""Pictures of patterns."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_core.plot import _by_branch, plot_pattern
from dilated_testing import patterns


@given(patterns(), st.booleans())
def test_branches_add_up_to_the_pattern(pattern, is_causal):
    heads = max(5, len(pattern.segment_lengths))
    total = pattern.multiplicity(19, heads, is_causal=is_causal)
    assert sum(_by_branch(pattern, 19, heads, is_causal)).equal(total)


def test_a_picture_shows_a_panel_for_each_branch_and_head(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    figure = plot_pattern(DilatedPattern([8, 16], [1, 2]), 32, 3, is_causal=True)
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3 * 3
    path = tmp_path / "pattern.png"
    figure.savefig(path)
    assert path.stat().st_size > 10_000


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
    with pytest.raises(ValueError, match=r"length must be at most 2048\. Got 4096"):
        plot_pattern(pattern, 4096)
    with pytest.raises(ValueError, match=r"heads must be positive\. Got 0"):
        plot_pattern(pattern, 8, 0)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match='plot_pattern needs matplotlib: pip install "matplotlib'):
        plot_pattern(DilatedPattern([8], [1]), 32, 3)
