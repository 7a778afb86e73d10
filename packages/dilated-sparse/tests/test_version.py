"""The package imports and knows its version."""

import re

import dilated_sparse


def test_the_version_is_a_release_of_the_0_1_line() -> None:
    assert re.fullmatch(r"0\.1\.\d+", dilated_sparse.__version__)


def test_nothing_else_is_promised_yet() -> None:
    assert dilated_sparse.__all__ == ["__version__"]
