"""The package imports and knows its version."""

import re

import dilated_ring


def test_the_version_is_a_release_of_the_0_1_line() -> None:
    assert re.fullmatch(r"0\.1\.\d+", dilated_ring.__version__)
