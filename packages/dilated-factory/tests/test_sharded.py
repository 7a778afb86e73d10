"""Weights in parts: what a rank does with its part is what one process does with the whole."""

from collections.abc import Iterator

import pytest

import factory_programs as programs
from process_ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("factory_distributed")]


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (2, 5)])
def test_muon_in_parts_is_muon_to_the_bit(
    three: Ranks, shape: tuple[int, int], nesterov: bool
) -> None:
    assert three.run(programs.muon_is_the_same, shape, nesterov) == [True] * 3
