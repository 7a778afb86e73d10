"""Which strategy is picked, and the reason that is given."""

import pytest

from dilated_core import DilatedPattern
from dilated_ring._routes import Problem, received_rows
from dilated_ring._strategy import STRATEGIES, choose_strategy
from dilated_ring._trade import Trade

WIDE = DilatedPattern([8, 10_000], [1, 8])
DENSE = DilatedPattern([10_000], [1])
SHARED = DilatedPattern([8, 10_000], [1, 4], head_offsets="blocked")
LOCAL = DilatedPattern([8, 16], [1, 2])


@pytest.mark.parametrize(
    ("pattern", "ranks", "heads", "kv_heads", "expected"),
    [
        (LOCAL, 8, 8, 8, "gather"),  # nothing travels
        (WIDE, 2, 8, 8, "gather"),  # trading heads would not move less
        (WIDE, 4, 8, 8, "heads"),  # it moves half
        (WIDE, 4, 6, 6, "gather"),  # 4 ranks cannot share 6 heads
        (SHARED, 4, 16, 4, "gather"),  # queries are four times as many as keys
        (DENSE, 8, 6, 6, "ring"),  # seven shards of keys do not fit
        (DENSE, 2, 6, 6, "gather"),
        (DilatedPattern([8, 10_000], [1, 8], head_groups="split"), 8, 8, 8, "gather"),
    ],
)
def test_what_is_picked(
    pattern: DilatedPattern, ranks: int, heads: int, kv_heads: int, expected: str
) -> None:
    problem = Problem(pattern, 16, ranks, heads, kv_heads, False)
    choice = choose_strategy(problem)
    assert choice.strategy == expected
    assert choice.reason
    assert {choice.strategy, *dict(choice.rejected)} == set(STRATEGIES)
    assert all(dict(choice.rejected).values())


def test_trading_heads_moves_two_gths_of_what_gather_does() -> None:
    for ranks in (2, 4, 8):
        problem = Problem(WIDE, 16, ranks, 8, 8, False)
        gathered = 2 * received_rows(problem, 0)
        assert Trade(problem, 0).vectors * ranks == 2 * gathered


def test_in_a_mesh_of_nodes_rows_cross_once_for_each_node() -> None:
    choice = choose_strategy(Problem(DENSE, 16, 8, 8, 8, False), in_nodes=True)
    assert choice.strategy == "gather"
    assert choice.reason == "a row crosses between nodes once for each node"
    assert {*dict(choice.rejected)} == {"heads", "ring"}


def test_a_strategy_that_is_given_is_taken_or_refused() -> None:
    problem = Problem(WIDE, 16, 4, 6, 6, False)
    assert choose_strategy(problem, "ring").reason == "it was given"
    with pytest.raises(ValueError, match="Got 'heads', but 6 key heads cannot be shared"):
        choose_strategy(problem, "heads")
