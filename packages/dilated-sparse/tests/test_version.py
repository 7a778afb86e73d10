"""The package imports and knows its version."""

import re
from pathlib import Path

import dilated_sparse
from dilated_sparse import layouts


def test_the_version_is_a_release_of_the_0_1_line() -> None:
    assert re.fullmatch(r"0\.1\.\d+", dilated_sparse.__version__)


def test_every_public_name_exists() -> None:
    for name in dilated_sparse.__all__:
        assert hasattr(dilated_sparse, name)


def test_the_readme_names_every_layout() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in layouts.__all__ if f"`{name}`" not in text] == []
