"""Which strategy is picked, and the reason that is given."""

from typing import Any

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


@pytest.mark.parametrize(
    ("shard", "ranks", "heads", "kv_heads", "expected"),
    [
        (1024, 4, 4, 1, "lend"),
        (256, 4, 4, 1, "lend"),
        (255, 4, 4, 1, "gather"),  # a query that travels would see too few keys
        (1024, 4, 8, 4, "lend"),  # heads would not halve the bytes
        (1024, 4, 4, 4, "heads"),  # even too, and it moves less
        (1024, 2, 3, 1, "lend"),
        (1024, 8, 4, 1, "ring"),  # the queries that would arrive do not fit
    ],
)
def test_queries_are_lent_where_causal_work_is_uneven(
    shard: int, ranks: int, heads: int, kv_heads: int, expected: str
) -> None:
    choice = choose_strategy(Problem(DENSE, shard, ranks, heads, kv_heads, True))
    assert choice.strategy == expected
    assert choose_strategy(Problem(DENSE, shard, ranks, 5, 1, False)).strategy != "lend"


def test_queries_are_not_lent_where_pairs_cannot_be_counted() -> None:
    class Uncounted:
        """A pattern that knows no pairs."""

        code, spans = "dense", FewerSpans(DENSE.spans)

    problem = Problem(Uncounted(), 1024, 4, 4, 1, True)
    assert choose_strategy(problem).strategy == "gather"
    with pytest.raises(ValueError, match="cannot count what its queries see"):
        choose_strategy(problem, "lend")
    with pytest.raises(ValueError, match="at most 64 ranks"):
        choose_strategy(Problem(DENSE, 1024, 65, 4, 1, True), "lend")
    with pytest.raises(ValueError, match="too many pairs"):
        choose_strategy(Problem(DENSE, 2**27, 4, 4, 1, True), "lend")


class FewerSpans:
    """The attention of a pattern, without what is not in the protocol."""

    def __init__(self, spans: Any) -> None:
        self._spans = spans

    def __getattr__(self, name: str) -> Any:
        if name in ("pair_counts", "packed_counts"):
            raise AttributeError(name)
        return getattr(self._spans, name)


def test_trading_heads_moves_two_gths_of_what_gather_does() -> None:
    for ranks in (2, 4, 8):
        problem = Problem(WIDE, 16, ranks, 8, 8, False)
        gathered = 2 * received_rows(problem, 0)
        assert Trade(problem, 0).vectors * ranks == 2 * gathered


def test_in_a_mesh_of_nodes_rows_cross_once_for_each_node() -> None:
    choice = choose_strategy(Problem(DENSE, 16, 8, 8, 8, False), in_nodes=True)
    assert choice.strategy == "gather"
    assert choice.reason == "a row crosses between nodes once for each node"
    assert {*dict(choice.rejected)} == {"heads", "lend", "ring"}


def test_a_strategy_that_is_given_is_taken_or_refused() -> None:
    problem = Problem(WIDE, 16, 4, 6, 6, False)
    assert choose_strategy(problem, "ring").reason == "it was given"
    with pytest.raises(ValueError, match="Got 'heads', but 6 key heads cannot be shared"):
        choose_strategy(problem, "heads")
