"""Rows counted in closed form are the rows that would be made; a plan of many ranks is quick."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_ring import plan
from dilated_ring._routes import Problem, hops, received_rows, row_counts
from dilated_testing import patterns


@given(
    pattern=patterns(),
    shard=st.integers(1, 13),
    world_size=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_counted_rows_are_those_that_are_made(
    pattern: DilatedPattern,
    shard: int,
    world_size: int,
    kv_heads: int,
    group: int,
    is_causal: bool,
    data: st.DataObject,
) -> None:
    heads = kv_heads * group
    if pattern.head_groups == "split" and heads < len(pattern.branches):
        heads = kv_heads = len(pattern.branches)
    problem = Problem(pattern, shard, world_size, heads, kv_heads, is_causal)
    rank = data.draw(st.integers(0, world_size - 1))
    ranks = range(world_size)
    made = tuple(
        [
            problem.rows(problem.span(to), source).count if to != source else 0
            for to, source in pairs
        ]
        for pairs in ([(rank, x) for x in ranks], [(x, rank) for x in ranks])
    )
    assert row_counts(problem, rank) == made
    assert received_rows(problem, rank) == sum(made[0])
    assert hops(problem) == sorted(
        {(to - source) % world_size for to in ranks for source in problem.sources(to)}
    )


def test_rows_of_segments_and_rates_beyond_all_positions_are_counted() -> None:
    pattern = DilatedPattern([2**62, 8], [2**62, 3])
    problem = Problem(pattern, 4, 5, 3, 3, False)
    received, sent = row_counts(problem, 2) or ([], [])
    assert received == [problem.rows(problem.span(2), x).count if x != 2 else 0 for x in range(5)]
    assert sent == [problem.rows(problem.span(x), 2).count if x != 2 else 0 for x in range(5)]


@pytest.mark.parametrize("ranks", [1024, 16384])
def test_a_billion_tokens_on_many_ranks_are_planned_in_seconds(ranks: int) -> None:
    began = time.process_time()
    made = plan(
        DilatedPattern.longnet(2**30), length=2**30, world_size=ranks, heads=12, head_dim=64
    )
    assert made.traffic.total > 0
    assert time.process_time() - began < 30  # it was minutes
