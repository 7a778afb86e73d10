"""The page that shows a pattern: complete in itself, right, and usable by mouse, keys and ear."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dilated_core import DilatedPattern
from dilated_core.plot import block_counts
from dilated_factory.tools.pattern_page import pattern_page

from .browser import CHROMIUM, Page, open_browser

PATTERNS = {
    "plain": (DilatedPattern([4, 12], [1, 3]), 5),
    "blocked": (DilatedPattern([5, 12, 30], [1, 3, 4], head_offsets="blocked"), 5),
    "split": (DilatedPattern([4, 12, 7], [1, 3, 2], head_groups="split"), 7),
}


def test_the_page_loads_nothing() -> None:
    page = pattern_page(*PATTERNS["plain"], 5, is_causal=False)
    assert re.findall(r"https?:|\bsrc=|\bhref=|@import|\burl\(", page) == []
    assert "{{" not in page


def test_every_control_has_a_label() -> None:
    page = pattern_page(*PATTERNS["plain"], 5, is_causal=False)
    controls = re.findall(r'<(?:input|select) id="(\w+)"', page)
    assert set(controls) == {"head", "query", "length", "causal", "segments", "rates"}
    for control in controls:
        assert f'<label for="{control}">' in page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed")
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(page: Page, folder: Path, name: str = "plain", *, is_causal: bool = False) -> Page:
    path = folder / "page.html"
    pattern, heads = PATTERNS[name]
    path.write_text(pattern_page(pattern, 30, heads, is_causal=is_causal), encoding="utf-8")
    page.open(path)
    return page


def text(page: Page, element: str) -> str:
    return str(page.evaluate(f"document.getElementById('{element}').textContent"))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_page_computes_the_definition(
    page: Page, tmp_path: Path, name: str, is_causal: bool
) -> None:
    opened(page, tmp_path, name, is_causal=is_causal)
    pattern, heads = PATTERNS[name]
    expected = pattern.multiplicity(30, heads, is_causal=is_causal)
    for head in range(heads):
        got = page.evaluate(f"head.value = {head}; table()")
        assert got == expected[head].tolist()
    assert page.problems == []


def test_mouse_and_keys_choose_what_is_shown(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path)
    grid = "document.getElementById('grid')"
    assert text(page, "summary").startswith("Query 15 of head 0 sees 6 of 30 keys.")
    page.click(grid, down=3.5 / 30)
    assert text(page, "summary").startswith("Query 3 of head 0 sees ")
    page.press("ArrowDown")
    assert text(page, "summary").startswith("Query 4 of head 0 ")
    page.press("ArrowUp")
    page.press("ArrowUp")
    assert text(page, "summary").startswith("Query 2 of head 0 sees 4 of 30 keys.")
    assert text(page, "keys") == "Keys: 0, 1, 2, 3"

    page.click("document.getElementById('branch-0')")
    assert "No branch keeps this position" in text(page, "keys")
    page.click("document.getElementById('branch-0')")
    page.click("document.getElementById('causal')")
    assert text(page, "keys") == "Keys: 0, 1, 2"

    page.evaluate("head.focus()")
    page.press("ArrowDown")
    assert page.evaluate("head.value") == "1"
    page.evaluate("query.focus()")
    page.press("ArrowRight")
    assert text(page, "summary").startswith("Query 3 of head 1 ")
    page.write("document.getElementById('length')", "1")
    assert text(page, "summary").startswith("Query 0 of head 1 sees 1 of 1 keys.")
    assert page.problems == []


LONG = DilatedPattern([512, 8192, 70_000], [1, 8, 64])


def long_page(page: Page, folder: Path, length: int = 65_536) -> Page:
    path = folder / "page.html"
    path.write_text(pattern_page(LONG, length, 5, is_causal=True), encoding="utf-8")
    page.open(path)
    return page


def shown(page: Page) -> tuple[list[int], list[int], list[list[int]]]:
    rows, columns = page.evaluate("[edges(view.query), edges(view.key)]")
    return rows, columns, page.evaluate("table()")


def test_cells_of_a_long_pattern_are_the_pairs_of_blocks(page: Page, tmp_path: Path) -> None:
    long_page(page, tmp_path)
    for action in ("head.value = 3; draw()", "zoom(0.5, 0.9, 0.1)", "zoom(0.01, 0.5, 0.5)"):
        page.evaluate(action)
        rows, columns, counts = shown(page)
        expected = block_counts(LONG, 5, rows, columns, is_causal=True)[:, 3].sum(0)
        assert counts == expected.tolist()
    assert page.problems == []


def test_wheel_buttons_and_keys_zoom(page: Page, tmp_path: Path) -> None:
    long_page(page, tmp_path)
    span = "view.span"
    assert page.evaluate(span) == 65_536
    page.turn_wheel("grid", -120, across=0.9, down=0.25)
    while page.evaluate(span) == 65_536:  # wheels arrive when they like
        pass
    assert page.evaluate(span) == round(0.8 * 65_536)
    assert page.evaluate("view.key") == pytest.approx(0.18 * 65_536, abs=300)
    assert page.evaluate("view.query") == pytest.approx(0.05 * 65_536, abs=300)
    page.click("document.getElementById('whole')")
    page.click("document.getElementById('in')")
    assert page.evaluate(span) == 32_768
    assert text(page, "key-ticks").startswith("16,384")
    page.click("document.getElementById('out')")
    assert page.evaluate(span) == 65_536
    page.evaluate("grid.focus()")
    page.press("+")
    page.press("+")
    assert page.evaluate(span) == 16_384
    page.press("-")
    assert page.evaluate(span) == 32_768
    page.press("0")
    assert page.evaluate("[view.query, view.key, view.span]") == [0, 0, 65_536]
    assert "A cell is 171 queries by 171 keys" in text(page, "cell")
    assert page.problems == []


def test_segments_and_rates_can_be_edited_and_are_checked_as_in_python(
    page: Page, tmp_path: Path
) -> None:
    opened(page, tmp_path)
    segments, rates = (f"document.getElementById('{name}')" for name in ("segments", "rates"))
    before = page.evaluate("table()")
    page.write(segments, "8, 30, 9")
    with pytest.raises(ValueError, match="same number") as refused:
        DilatedPattern([8, 30, 9], [1, 3])
    assert text(page, "problem") == str(refused.value)
    assert page.evaluate(f"{segments}.getAttribute('aria-invalid')") == "true"
    assert page.evaluate("table()") == before
    page.write(rates, "1, 0, 2")
    with pytest.raises(ValueError, match="positive") as refused:
        DilatedPattern([8, 30, 9], [1, 0, 2])
    assert text(page, "problem") == str(refused.value)
    for wrong in ("", "1, x, 2", "1.5, 1, 1"):
        page.write(rates, wrong)
        assert text(page, "problem").startswith("dilation_rates")
    page.write(rates, "1,4,2")
    assert text(page, "problem") == ""
    pattern = DilatedPattern([8, 30, 9], [1, 4, 2])
    assert text(page, "title") == repr(pattern)
    assert page.evaluate("table()") == pattern.multiplicity(30, 5)[0].tolist()
    for wrong in ("0", "1.5", "", "99999999999"):
        page.write("document.getElementById('length')", wrong)
        assert text(page, "problem").startswith("length must be in [1, 33554432].")
    assert page.problems == []


def test_a_million_positions_are_drawn_at_once_and_fit_a_phone(page: Page, tmp_path: Path) -> None:
    page.call("Emulation.setDeviceMetricsOverride",
              width=360, height=740, deviceScaleFactor=1, mobile=True)  # fmt: skip
    try:
        long_page(page, tmp_path, 1_000_000)
        assert page.evaluate("(() => { const t = performance.now(); draw(); "
                             "return performance.now() - t; })()") < 5000  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for title in ("key position (tokens)", "query position (tokens)"):
            assert title in text(page, "axes")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
    assert page.problems == []


def test_the_picture_is_drawn_and_described(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path)
    dark = (
        "[...grid.getContext('2d').getImageData(0, 0, grid.width, grid.height).data]"
        ".filter((x, i) => i % 4 === 3 && x > 0).length"
    )
    seen = (PATTERNS["plain"][0].multiplicity(30, 5)[0] > 0).double().mean().item()
    area = page.evaluate("grid.width * grid.height")
    assert page.evaluate(dark) / area == pytest.approx(seen, abs=0.1)
    assert "query 15 is marked" in page.evaluate("grid.getAttribute('aria-label')")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if "role" in n}
    for role, name in (
        ("combobox", "Head"),
        ("slider", "Query position"),
        ("spinbutton", "Positions of the sequence"),
        ("textbox", "Segment lengths (positions)"),
        ("button", "Zoom in"),
        ("checkbox", "Causal: hide the keys after each query"),
        ("checkbox", "segments of 12, every 3 positions"),
    ):
        assert (role, name) in found, [pair for pair in found if pair[0] == role]
