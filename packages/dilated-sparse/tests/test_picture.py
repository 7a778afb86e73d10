"""Pictures of layouts."""

import sys

import pytest

from dilated_sparse import layouts


def test_the_text_shows_the_kind_of_each_block():
    layout = layouts.sliding_window(32, 8, block_size=8)
    assert layout.text() == "#+..\n+#+.\n.+#+\n..+#"


def test_a_large_picture_is_coarse():
    lines = layouts.prefix(1024, 0, block_size=8).text(size=4).splitlines()
    assert lines == ["+...", "#+..", "##+.", "###+"]


def test_a_figure_has_a_panel_for_each_head(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    layout = layouts.bigbird(512, heads=3, block_size=16)
    figure = layout.plot()
    assert len([axis for axis in figure.axes if axis.images]) == 3
    figure.savefig(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").stat().st_size > 5_000


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"head must be in \[0, 1\). Got 1"):
        layouts.prefix(8, 2).text(1)
    with pytest.raises(ValueError, match=r"size must be positive. Got 0"):
        layouts.prefix(8, 2).text(size=0)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match='plot needs matplotlib: pip install "matplotlib'):
        layouts.sliding_window(8, 2, block_size=4).plot()
