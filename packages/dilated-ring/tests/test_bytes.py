"""The bytes on the wire are those of the formulas, and nothing else moves."""

import pytest

from dilated_core import DilatedPattern
from dilated_testing import Problem
from process_ranks import GetRanks, World, worlds
from ring_programs import Members, RingProblem, count_rows

SHARD, BATCH, HEADS, HEAD_DIM, ITEM = 16, 2, 8, 5, 8
STRATEGIES = ["gather", "ring"]


def counted(
    ranks: GetRanks,
    world: World,
    pattern: DilatedPattern,
    strategy: str,
    *,
    is_causal: bool,
    mesh: tuple[int, ...] = (),
) -> list[dict[str, int]]:
    """Bytes received by each rank; in a mesh, from other nodes."""
    length = SHARD * world.size
    whole = Problem(pattern, BATCH, length, length, HEADS, HEADS, HEAD_DIM, is_causal, 0.0, 0.0, 3)
    problem = RingProblem(whole, Members(mesh=mesh), {"strategy": strategy})
    return ranks(world).run(count_rows, problem)


def rows_of_one_rank(rate: int) -> int:
    """S: bytes of one rank's dilated keys and values in a branch."""
    return 2 * BATCH * (SHARD // rate) * HEADS * HEAD_DIM * ITEM


@pytest.mark.parametrize("strategy", [*STRATEGIES, "heads"])
@pytest.mark.parametrize("world", worlds(2, 4, 8))
def test_branches_inside_a_shard_never_communicate(
    ranks: GetRanks, world: World, strategy: str
) -> None:
    for found in counted(
        ranks, world, DilatedPattern([4, 8, 16], [1, 2, 4]), strategy, is_causal=False
    ):
        assert found == {"forward": 0, "backward": 0}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("world", worlds(2, 4, 8))
def test_rows_of_wide_branches_are_received_once(
    ranks: GetRanks, world: World, is_causal: bool, strategy: str
) -> None:
    """(g - 1) S a branch; when causal, j S on rank j of a segment. Gradients go the other way."""
    branches = [(8, 1), (2 * SHARD, 2), (4 * SHARD, 4), (1000, 8)]
    pattern = DilatedPattern(*zip(*branches, strict=True))
    found = counted(ranks, world, pattern, strategy, is_causal=is_causal)
    for rank in range(world.size):
        forward = backward = 0
        for width, rate in branches[1:]:
            g = min(width // SHARD, world.size)
            place = rank % g
            forward += (place if is_causal else g - 1) * rows_of_one_rank(rate)
            backward += (g - 1 - place if is_causal else g - 1) * rows_of_one_rank(rate)
        if strategy == "ring":
            backward += forward  # rows are sent again rather than kept
        assert found[rank] == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("world", worlds(2, 4, 8))
def test_trading_heads_moves_each_row_once(ranks: GetRanks, world: World, is_causal: bool) -> None:
    """(2 H + 2 H_kv) (g - 1) / g rows a branch forward, and the same in gradients.

    Beside them go the logarithms of softmax denominators (one number a query), and in the backward
    two numbers a query.
    """
    branches = [(8, 1), (2 * SHARD, 2), (1000, 4)]
    pattern = DilatedPattern(*zip(*branches, strict=True))
    forward = backward = 0
    for width, rate in branches[1:]:
        g = min(width // SHARD, world.size)
        rows = BATCH * (SHARD // rate) * HEADS * (g - 1) // g
        forward += rows * (4 * HEAD_DIM + 1) * ITEM
        backward += rows * (4 * HEAD_DIM + 2) * ITEM
    for found in counted(ranks, world, pattern, "heads", is_causal=is_causal):
        assert found == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("world", worlds(4, 8))
def test_rows_cross_between_nodes_once_for_each_node(ranks: GetRanks, world: World) -> None:
    pattern = DilatedPattern([8, 1000], [1, 4])
    size = world.size // 2
    for found in counted(ranks, world, pattern, "gather", is_causal=False, mesh=(2, size)):
        assert found == {"forward": rows_of_one_rank(4), "backward": rows_of_one_rank(4)}
