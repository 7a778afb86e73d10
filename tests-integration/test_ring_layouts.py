"""Ring attention over block layouts computes what one process does."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from process_ranks import GetRanks, Ranks, World, worlds

core_interfaces = pytest.importorskip(
    "dilated_core.interfaces", reason="dilated-core is not installed"
)
sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
ring = pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
programs = pytest.importorskip("ring_layout_programs")
planner = pytest.importorskip("ring_planner_programs")
layouts = sparse.layouts

DRAWN = settings(
    max_examples=max(1, settings.default.max_examples // 4),
    suppress_health_check=[*HealthCheck],
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[GetRanks]:
    started: dict[World, Ranks] = {}

    def get(world: World | int) -> Ranks:
        world = world if isinstance(world, World) else World(world)
        return started.setdefault(world, Ranks(world))

    yield get
    for group in started.values():
        group.close()


def worst_error(group: Ranks, problem: Any, options: dict) -> float:
    # On the ranks' device: another would draw another dropout mask from the same seed.
    expected = problem.run("reference", problem.tensors(device=group.world.device))
    actual = programs.joined(group.run(programs.attend_layout, problem, options))
    return max(programs.relative_error(actual[name], x.cpu()) for name, x in expected.items())


@st.composite
def layout_problems(draw: st.DrawFn, world_size: int) -> Any:
    """Any small layout whose blocks divide the shards: per head or shared, with empty rows."""
    block_size = draw(st.integers(1, 5))
    length = block_size * world_size * draw(st.integers(0, 3))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    mask = draw(programs.dense_masks(draw(st.sampled_from([1, heads])), length, length))
    return programs.Problem(
        sparse.BlockLayout.from_dense(mask, block_size=block_size),
        batch=draw(st.integers(0, 2)),
        heads=heads,
        kv_heads=kv_heads,
        is_causal=draw(st.booleans()),
        padding=draw(st.sampled_from([0.0, 0.3])),
        dropout_p=draw(st.sampled_from([0.0, 0.4])),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from(programs.SCALES)),
    )


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
@given(data=st.data())
@DRAWN
def test_any_layout(ranks: GetRanks, world: World, data: st.DataObject) -> None:
    problem = data.draw(layout_problems(world.size))
    options = {"strategy": data.draw(st.sampled_from(["gather", "lend", "ring"]))}
    assert worst_error(ranks(world), problem, options) < 1e-10


@pytest.mark.parametrize("world", worlds(4))
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "lend", "ring"])
@pytest.mark.parametrize("name", ["window", "bigbird", "strided", "nothing"])
def test_named_layouts(
    ranks: GetRanks, world: World, name: str, strategy: str, is_causal: bool
) -> None:
    length, b = 32 * world.size, 8
    made = {
        "window": lambda: layouts.sliding_window(length, 13, block_size=b),
        "bigbird": lambda: layouts.bigbird(length, seed=3, block_size=b),
        "strided": lambda: layouts.strided(length, 5, block_size=b),
        "nothing": lambda: sparse.BlockLayout.from_dense(
            torch.zeros(length, length, dtype=torch.bool), block_size=b
        ),
    }
    problem = programs.Problem(
        made[name](), heads=6, kv_heads=3, is_causal=is_causal, dropout_p=0.2
    )
    assert worst_error(ranks(world), problem, {"strategy": strategy}) < 1e-10


def test_a_layout_is_an_attention_pattern() -> None:
    assert isinstance(layouts.sliding_window(16, 3, block_size=4), core_interfaces.AttentionPattern)


@pytest.mark.parametrize(
    ("length", "shard", "heads", "message"),
    [
        (32, 8, 3, "must be a layout of the whole sequence, 32 queries and keys"),
        (24, 6, 3, "must be a multiple of the layout's block size 4 on each rank. Got 6"),
        (24, 8, 2, "must be a layout of 1 head or query's 2. Got 3"),
    ],
)
def test_what_does_not_fit_is_named(length: int, shard: int, heads: int, message: str) -> None:
    layout = layouts.sliding_window(24, 3, block_size=4).per_head(3)
    with pytest.raises(ValueError, match=message):
        layout.spans.check(length, shard, heads)


@pytest.mark.parametrize("world", worlds(2, 4))
@pytest.mark.parametrize("strategy", ["gather", "lend", "ring"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_plan_of_a_layout_counts_the_bytes_of_a_run(
    ranks: GetRanks, world: World, strategy: str, is_causal: bool
) -> None:
    n = 12
    layout = layouts.sliding_window(n * world.size, window=9, block_size=4)
    options = {"strategy": strategy, "is_causal": is_causal}
    found = ranks(world).run(planner.count, layout, (2, n, 4, 8), 2, torch.float32, options)
    for rank, counts in enumerate(found):
        planned = ring.plan(
            layout, length=n * world.size, world_size=world.size, heads=4, kv_heads=2, head_dim=8,
            batch=2, dtype=torch.float32, rank=rank, **options,
        )  # fmt: skip
        assert counts.received == [planned.traffic.forward, planned.traffic.backward]
        memory = planned.memory
        assert counts.leased == [memory.forward_messages, memory.backward_messages]
        assert sum(counts.received) > 0
    with pytest.raises(ValueError, match="must be a multiple of the layout's block size 4"):
        ring.plan(layout, length=n * world.size, world_size=6 * world.size, heads=4, head_dim=8)


@pytest.mark.parametrize("is_causal", [False, True])
@given(data=st.data())
def test_pairs_are_counted_by_whole_blocks(is_causal: bool, data: st.DataObject) -> None:
    block, rows, heads = (data.draw(st.integers(1, most)) for most in (5, 9, 3))
    length = block * rows
    mask = data.draw(programs.dense_masks(data.draw(st.sampled_from([1, heads])), length, length))
    layout = sparse.BlockLayout.from_dense(mask, block_size=block)
    seen = (mask.tril() if is_causal else mask).expand(heads, -1, -1)
    blocks = seen.unflatten(2, (rows, block)).unflatten(1, (rows, block)).any(4).any(2).sum(0)
    assert layout.spans.grain == block
    edges = torch.arange(rows + 1) * block
    found = layout.spans.pair_counts(edges, edges, heads, is_causal=is_causal)
    assert found.equal(blocks * block**2)
    halves = torch.tensor([0, rows // 2 * block, length])
    if rows > 1:
        found = layout.spans.pair_counts(halves, edges, heads, is_causal=is_causal)
        parts = blocks.split([rows // 2, rows - rows // 2])
        assert found.equal(torch.stack([part.sum(0) for part in parts]) * block**2)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_plan_tells_that_a_layout_is_evened_out(kv_heads: int) -> None:
    job = {"length": 4096, "world_size": 4, "heads": 4, "kv_heads": kv_heads, "head_dim": 32}
    made = ring.plan(layouts.document([4096]), **job, is_causal=True)
    assert made.strategy == "lend"
    assert made.balance >= 0.9
    gathered = ring.plan(layouts.document([4096]), **job, is_causal=True, strategy="gather")
    assert gathered.balance < 0.6
