"""The package imports and knows its version."""

import re

import dilated_sparse


def test_the_version_is_a_release_of_the_0_1_line() -> None:
    assert re.fullmatch(r"0\.1\.\d+", dilated_sparse.__version__)


def test_every_public_name_exists() -> None:
    for name in dilated_sparse.__all__:
        assert hasattr(dilated_sparse, name)
