"""Ranks with little to do attend queries of others, until all have about as much to do."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ring_planner_programs as programs
from dilated_core import DilatedPattern
from dilated_ring import plan
from dilated_ring._documents import read_documents
from dilated_ring._loans import balance, find_loans, make_ledger
from dilated_ring._routes import Problem
from dilated_testing import patterns, relative_error
from process_ranks import GetRanks, World, worlds

DENSE = DilatedPattern([2**20], [1])
WIDE = DilatedPattern([32, 2**20], [1, 2])


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 13, 64])
@pytest.mark.parametrize("pattern", [DENSE, WIDE], ids=repr)
@pytest.mark.parametrize("shard", [64, 1024])
def test_causal_work_is_even_with_loans(
    world_size: int, pattern: DilatedPattern, shard: int
) -> None:
    found = find_loans(Problem(pattern, shard, world_size, 4, 1, True))
    assert balance(found.alone) < 0.81
    assert balance(found.shared) >= 0.9


@given(patterns(), st.integers(0, 40), st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_pairs_move_from_owners_to_helpers_and_none_is_lost(
    pattern: DilatedPattern,
    shard: int,
    world_size: int,
    is_causal: bool,
    documents: bool,
    data: st.DataObject,
) -> None:
    heads = len(pattern.branches)
    length = shard * world_size
    whole: Any = pattern
    if documents:
        ends = data.draw(st.lists(st.integers(0, length), max_size=4).map(sorted))
        whole = read_documents(pattern, [0, *ends], length)
    problem = Problem(whole, shard, world_size, heads, heads, is_causal)
    found = find_loans(problem)
    each = list(whole.each) if documents else [length]
    total = sum(pattern.flops(n, heads, 1, is_causal=is_causal) for n in each) // 4
    assert sum(found.alone) == sum(found.shared) == total
    assert max(found.shared) <= max(found.alone)
    shared = list(found.alone)
    for owner, helper, queries in found.loans:
        rows = torch.tensor([queries.start, queries.stop])
        keys = torch.tensor([helper * shard, helper * shard + shard])
        pairs = int(whole.spans.pair_counts(rows, keys, heads, is_causal=is_causal))
        assert pairs > 0
        assert queries.stop == problem.span(owner).stop
        shared[owner] -= pairs
        shared[helper] += pairs
    assert tuple(shared) == found.shared
    ledgers = [make_ledger(problem, rank) for rank in range(world_size)]
    for one, mine in enumerate(ledgers):
        for other, theirs in enumerate(ledgers):
            assert mine.sent[other] == theirs.received[one]
    assert sum(x.route.rows_sent for x in ledgers) == sum(x.route.rows_received for x in ledgers)


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
@pytest.mark.parametrize("ends", [None, [0, 9, 9, 25]], ids=str)
def test_its_bytes_are_those_of_a_run(
    ranks: GetRanks, world: World, ends: list[int] | None
) -> None:
    """Also what is kept for the backward, and work that adds up to that of the pattern."""
    shape, length = (1 if ends else 2, 12, 6, 8), 12 * world.size
    for is_causal in (False, True):
        how: dict[str, Any] = {"strategy": "lend", "is_causal": is_causal}
        if ends:
            how["cu_seqlens"] = torch.tensor([min(end, length) for end in ends])
        found = ranks(world).run(programs.count, DENSE, shape, 3, torch.float32, how)
        flops = 0
        for rank, counts in enumerate(found):
            planned = plan(
                DENSE, length=length, world_size=world.size, heads=6, kv_heads=3, head_dim=8,
                batch=shape[0], dtype=torch.float32, rank=rank, **how,
            )  # fmt: skip
            flops += planned.flops or 0
            assert counts.received == [planned.traffic.forward, planned.traffic.backward]
            if world.size > 1:
                memory = planned.memory
                assert counts.leased == [memory.forward_messages, memory.backward_messages]
                own = shape[0] * 12 * 6 * (8 * 4 + 4)
                assert counts.saved == own + memory.kept
        if not ends:
            assert flops == shape[0] * DENSE.flops(length, 6, 8, is_causal=is_causal)


def test_lent_queries_and_their_results_are_what_travels() -> None:
    """On 2 ranks half of the second's queries: q and out with lse, then out, its gradient, dq."""
    job: dict[str, Any] = {"length": 2048, "world_size": 2, "heads": 4, "kv_heads": 1}
    job |= {"head_dim": 32, "is_causal": True, "dtype": torch.float32, "strategy": "lend"}
    first, second = (plan(DENSE, **job, rank=rank) for rank in (0, 1))
    rows, keys = 512 * 4, 2 * 1024 * 32 * 4
    assert first.traffic.forward == rows * 32 * 4
    assert first.traffic.backward == rows * 2 * (32 + 1) * 4 + keys
    assert second.traffic.forward == rows * (32 + 1) * 4 + keys
    assert second.traffic.backward == rows * 32 * 4
    assert first.flops is not None
    assert second.flops is not None
    assert first.flops == pytest.approx(second.flops, rel=2e-3)
    assert first.balance == second.balance >= 0.99
    assert first.branches == ()


@pytest.mark.parametrize("world", worlds(2, 3, 4))
def test_one_rank_alone_may_use_log_sum_exps(ranks: GetRanks, world: World) -> None:
    found, expected = (
        ranks(world).run(programs.grads_where_one_rank_uses_lse, WIDE, strategy)
        for strategy in ("lend", "gather")
    )
    for mine, wanted in zip(found, expected, strict=True):
        for x, y in zip(mine, wanted, strict=True):
            assert relative_error(x, y) < 1e-10


@pytest.mark.parametrize("world", worlds(4))
def test_ranks_are_busy_alike(ranks: GetRanks, world: World) -> None:
    """CPU time of a forward and backward with one key head, the mean over the largest."""
    seconds = ranks(world).run(programs.busy, DENSE, (1, 1024, 4, 32), 1)
    assert balance(seconds) >= 0.9, seconds
    alone = ranks(world).run(programs.busy, DENSE, (1, 1024, 4, 32), 1, "gather")
    assert balance(alone) < 0.75, alone
