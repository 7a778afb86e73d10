"""Pages of the documentation may link elsewhere, and fetch nothing from there."""

import pytest
from tools.fetched import outside_requests


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt='a' src=//host.example/a.png>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
        "@import 'https://fonts.example/css';",
        "body { background: url( http://host.example/a.png) }",
    ],
)
def test_what_a_browser_would_fetch_elsewhere_is_found(page: str) -> None:
    assert outside_requests(page)


def test_links_and_own_files_are_fine() -> None:
    page = '<a href="https://arxiv.org">paper</a><img src="a.png"><link href="a.css">'
    assert not outside_requests(page + '<link rel="canonical" href="https://x.example/">')
