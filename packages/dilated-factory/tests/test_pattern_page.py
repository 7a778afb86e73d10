"""The page that shows a pattern: complete in itself, right, and usable by mouse, keys and ear."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dilated_core import DilatedPattern
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
    assert set(controls) == {"head", "query", "length", "causal"}
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
    page.evaluate("length.focus()")
    page.press("Home")
    assert text(page, "summary").startswith("Query 0 of head 1 sees 1 of 1 keys.")
    assert text(page, "length-value") == "1"
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
        ("slider", "Positions"),
        ("checkbox", "Causal: hide the keys after each query"),
        ("checkbox", "segments of 12, every 3 positions"),
    ):
        assert (role, name) in found, [pair for pair in found if pair[0] == role]
