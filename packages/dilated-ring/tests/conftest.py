"""The ranks that the tests share: one process group per world, started on first use."""

from collections.abc import Iterator

import pytest

from process_ranks import GetRanks, Ranks, World


@pytest.fixture(scope="session")
def ranks() -> Iterator[GetRanks]:
    """Give the processes of a world: `ranks(world).run(function, *arguments)`."""
    started: dict[World, Ranks] = {}

    def get(world: World | int) -> Ranks:
        world = world if isinstance(world, World) else World(world)
        return started.setdefault(world, Ranks(world))

    yield get
    for group in started.values():
        group.close()
