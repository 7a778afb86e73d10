"""What the planner says is what a run moves and holds; and a run of any size, without hardware."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ring_planner_programs as programs
from dilated_core import DilatedPattern
from dilated_ring import plan
from dilated_testing import patterns
from process_ranks import GetRanks, World, worlds

PATTERN = DilatedPattern([5, 23, 1000], [1, 2, 3])


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("world", worlds(2, 3, 4))
def test_its_bytes_are_those_of_a_run(ranks: GetRanks, world: World, strategy: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for is_causal in (False, True):
            pattern = PATTERN
            shape = (2, 11, 6, 8)
            options: dict[str, Any] = {"strategy": strategy, "is_causal": is_causal}
            found = ranks(world).run(programs.count, pattern, shape, 3, dtype, options)
            for rank, counts in enumerate(found):
                planned = plan(
                    pattern, length=11 * world.size, world_size=world.size, heads=6, kv_heads=3,
                    head_dim=8, batch=2, dtype=dtype, rank=rank, **options,
                )  # fmt: skip
                assert planned.strategy == strategy
                assert counts.received == [planned.traffic.forward, planned.traffic.backward]
                memory = planned.memory
                assert counts.leased == [memory.forward_messages, memory.backward_messages]
                # The graph also holds output and log-sum-exp beside the arguments.
                own = 2 * 11 * 6 * (8 * dtype.itemsize + (8 if dtype == torch.float64 else 4))
                assert counts.saved == own + memory.kept


@pytest.mark.parametrize("strategy", ["gather", "ring", "auto"])
@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
def test_its_bytes_are_those_of_a_run_of_documents(
    ranks: GetRanks, world: World, strategy: str
) -> None:
    length = 11 * world.size
    for ends in ([0, length], [0, 5, 5, 7, length // 2 + 3], [0, length - 1, length]):
        for is_causal in (False, True):
            job: dict[str, Any] = {
                "strategy": strategy, "is_causal": is_causal, "cu_seqlens": torch.tensor(ends)
            }  # fmt: skip
            found = ranks(world).run(programs.count, PATTERN, (1, 11, 6, 8), 3, torch.float32, job)
            flops = 0
            for rank, counts in enumerate(found):
                planned = plan(
                    PATTERN, length=length, world_size=world.size, heads=6, kv_heads=3, head_dim=8,
                    dtype=torch.float32, rank=rank, **job,
                )  # fmt: skip
                traffic = planned.traffic
                assert counts.received == [traffic.forward, traffic.backward]
                assert sum(each.total for _, each in planned.branches) == traffic.total
                if world.size > 1:
                    memory = planned.memory
                    assert counts.leased == [memory.forward_messages, memory.backward_messages]
                assert planned.flops is not None
                flops += planned.flops
            filled = [*ends, length]
            each = [stop - start for start, stop in pairwise(filled)]
            whole = sum(PATTERN.flops(n, 6, 8, is_causal=is_causal) for n in each)
            assert whole - world.size < flops <= whole


@pytest.mark.parametrize("world", worlds(2, 4))
def test_its_bytes_are_those_of_a_run_that_trades_heads(ranks: GetRanks, world: World) -> None:
    for is_causal in (False, True):
        pattern = DilatedPattern([4, 32, 1000], [1, 2, 4])
        options: dict[str, Any] = {"strategy": "heads", "is_causal": is_causal}
        found = ranks(world).run(programs.count, pattern, (2, 16, 8, 8), 4, torch.float32, options)
        for rank, counts in enumerate(found):
            planned = plan(
                pattern, length=16 * world.size, world_size=world.size, heads=8, kv_heads=4,
                head_dim=8, batch=2, dtype=torch.float32, rank=rank, **options,
            )  # fmt: skip
            assert counts.received == [planned.traffic.forward, planned.traffic.backward]


MESHES = [((2, 2), "gather"), ((2, 2), "ring"), ((2, 2), "heads"), ((1, 4), "gather"),
          ((4, 1), "gather")]  # fmt: skip


@pytest.mark.parametrize(("mesh", "strategy"), MESHES)
@pytest.mark.parametrize("world", worlds(4))
def test_its_bytes_are_those_of_a_run_in_a_mesh_of_nodes(
    ranks: GetRanks, world: World, mesh: tuple[int, int], strategy: str
) -> None:
    traded = strategy == "heads"
    pattern = DilatedPattern([4, 32, 1000], [1, 2, 4]) if traded else PATTERN
    n, kv_heads = (16, 4) if traded else (11, 2)
    for is_causal in (False, True):
        options: dict[str, Any] = {"strategy": strategy, "is_causal": is_causal}
        found = ranks(world).run(
            programs.count, pattern, (2, n, 8, 8), kv_heads, torch.float32, options, mesh
        )
        for rank, counts in enumerate(found):
            planned = plan(
                pattern, length=4 * n, world_size=4, heads=8, kv_heads=kv_heads, head_dim=8,
                batch=2, dtype=torch.float32, rank=rank, ranks_per_node=mesh[1],
                bytes_per_second_across=1e9, **options,
            )  # fmt: skip
            assert counts.received == [planned.traffic.forward, planned.traffic.backward]
            assert counts.across == [planned.across.forward, planned.across.backward]
            if traded:
                continue
            memory = planned.memory
            assert sum(traffic.total for _, traffic in planned.branches) == planned.traffic.total
            # What is passed on inside a node is a copy beside the leases.
            forward, backward = counts.leased
            assert [forward + counts.passed, backward] == [
                memory.forward_messages, memory.backward_messages
            ]  # fmt: skip
            own = 2 * n * 8 * (8 * 4 + 4)
            assert counts.saved == own + memory.kept


def test_between_nodes_the_slower_link_and_the_second_step_are_exposed() -> None:
    """One rank's rows S from another node, S of the neighbour and S that it passes on."""
    job: dict[str, Any] = {"length": 2**16, "world_size": 4, "heads": 2, "head_dim": 64}
    mesh = {"ranks_per_node": 2, "bytes_per_second": 8e9, "bytes_per_second_across": 1e9}
    planned = plan(DilatedPattern([2**16], [1]), **job, **mesh, flops_per_second=1e12)
    rows = 2 * 2**14 * 2 * 64 * 2
    assert planned.strategy == "gather"
    assert planned.reason == "a row crosses between nodes once for each node"
    assert (planned.traffic.forward, planned.across.forward) == (3 * rows, rows)
    assert (planned.traffic.backward, planned.across.backward) == (3 * 2 * rows, 2 * rows)
    local = plan(DilatedPattern([2**16], [1]), **job, flops_per_second=1e12).forward.compute / 4
    far, near = rows / 1e9, 2 * rows / 8e9
    assert planned.forward.communication == pytest.approx(far + near)
    assert planned.forward.exposed == pytest.approx(max(0.0, far - local) + near)
    # Gradients are twice as wide and go inside the node first.
    assert planned.backward.exposed == pytest.approx(max(0.0, 2 * near - 2.5 * local) + 2 * far)


@given(patterns(), st.sampled_from([(2, 2), (2, 3), (3, 2)]), st.integers(1, 9), st.booleans())
def test_what_all_ranks_of_a_mesh_receive_all_ranks_send(
    pattern: DilatedPattern, mesh: tuple[int, int], shard: int, is_causal: bool
) -> None:
    """Keys and their gradients travel the same ways, once in each direction."""
    nodes, size = mesh
    job: dict[str, Any] = {
        "length": shard * nodes * size, "world_size": nodes * size, "head_dim": 8,
        "heads": 2 * len(pattern.branches), "is_causal": is_causal, "dtype": torch.float32,
        "strategy": "gather",
    }  # fmt: skip
    across = {"ranks_per_node": size, "bytes_per_second_across": 1.0}
    each = [plan(pattern, **job, **across, rank=rank) for rank in range(nodes * size)]
    flat = [plan(pattern, **job, rank=rank) for rank in range(nodes * size)]
    for kind in ("traffic", "across"):
        traffic = [getattr(planned, kind) for planned in each]
        assert sum(one.forward for one in traffic) == sum(one.backward for one in traffic)
    for planned, without in zip(each, flat, strict=True):
        assert without.across.total == 0
        assert planned.memory.kept == without.memory.kept
        assert planned.traffic.forward - planned.across.forward <= without.traffic.forward


@given(patterns(), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_branches_add_up_and_local_ones_are_free(
    pattern: DilatedPattern, world_size: int, shard: int, is_causal: bool
) -> None:
    heads = 2 * len(pattern.branches)
    each = [
        plan(
            pattern, length=shard * world_size, world_size=world_size, heads=heads, head_dim=8,
            is_causal=is_causal, strategy="gather", rank=rank,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for planned in each:
        assert planned.traffic.forward == planned.memory.kept
        for (w, _), traffic in planned.branches:
            assert shard % w or not traffic.total
    total = pattern.flops(shard * world_size, heads, 8, is_causal=is_causal)
    assert abs(sum(planned.flops for planned in each) - total) < world_size
    if is_causal:
        assert each[0].traffic.forward == each[-1].traffic.backward == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_its_bytes_are_those_of_the_formula_at_a_thousand_ranks(is_causal: bool) -> None:
    """(g - 1) S a branch, or j S on rank j of a segment when causal; S of a rank's dilated rows."""
    shard, world_size, heads, width, rank = 2**20, 1024, 12, 64, 518
    pattern = DilatedPattern.longnet(shard * world_size, growth=8)
    planned = plan(
        pattern, length=shard * world_size, world_size=world_size, heads=heads, head_dim=width,
        rank=rank, is_causal=is_causal,
    )  # fmt: skip

    def rows(source: int, head: int, r: int) -> int:
        return len(range((head % r - source * shard) % r, shard, r))

    expected = []
    for w, r in pattern.branches:
        ranks = min(max(w // shard, 1), world_size)
        start = rank // ranks * ranks
        others = range(start, rank) if is_causal else {*range(start, start + ranks)} - {rank}
        # Where the step is wider than a shard, a rank may have no rows, and then needs none.
        found = sum(
            rows(source, head, r) for head in range(heads) if rows(rank, head, r)
            for source in others
        )  # fmt: skip
        expected.append(found * 2 * width * 2)
    assert [traffic.forward for _, traffic in planned.branches] == expected
    assert planned.traffic.forward == sum(expected)
    assert sum(map(bool, expected)) == 4


@pytest.mark.slow
@pytest.mark.xdist_group("dry-run")
def test_a_rank_of_a_thousand_runs_dry(tmp_path: Path) -> None:
    """A billion positions, 1,024 ranks: shapes, bytes and memory, with neither."""
    script = tmp_path / "dry.py"
    script.write_text(DRY_RUN)
    folder = Path(programs.__file__).parent
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, check=True,
        timeout=280,
    )  # fmt: skip


# A process of its own: it can have one default process group, and this one is fake.
DRY_RUN = """
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import ring_planner_programs as programs
from dilated_core import DilatedPattern
from dilated_ring import plan

RANKS, SHARD, HEADS, WIDTH, RANK = 1024, 2**20, 2, 64, 37
dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
pattern = DilatedPattern.longnet(RANKS * SHARD, growth=16)
planned = plan(
    pattern, length=RANKS * SHARD, world_size=RANKS, heads=HEADS, head_dim=WIDTH, rank=RANK,
    is_causal=True,
)
with FakeTensorMode():
    counts = programs.count(
        pattern, (1, SHARD, HEADS, WIDTH), HEADS, torch.bfloat16,
        {"is_causal": True, "validate": "off"},
    )
assert counts.shapes == [(1, SHARD, HEADS, WIDTH)] * 4
assert counts.received == [planned.traffic.forward, planned.traffic.backward]
assert all(counts.received)
memory = planned.memory
assert counts.leased == [memory.forward_messages, memory.backward_messages]
assert counts.saved == SHARD * HEADS * (2 * WIDTH + 4) + memory.kept
assert memory.tensors == SHARD * HEADS * (4 * 2 * WIDTH + 4)

dist.destroy_process_group()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
pattern = DilatedPattern([2**20], [1])
planned = plan(
    pattern, length=2**14, world_size=4, heads=4, kv_heads=1, head_dim=WIDTH, rank=0,
    is_causal=True,
)
assert planned.strategy == "lend"
with FakeTensorMode():
    counts = programs.count(
        pattern, (1, 2**12, 4, WIDTH), 1, torch.bfloat16, {"is_causal": True, "validate": "off"}
    )
assert counts.received == [planned.traffic.forward, planned.traffic.backward]
assert all(counts.received)
memory = planned.memory
assert counts.leased == [memory.forward_messages, memory.backward_messages]
assert counts.saved == 2**12 * 4 * (2 * WIDTH + 4) + memory.kept
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 13}, "length must be a multiple of world_size (4). Got 13."),
        ({"heads": 3}, "heads must be a multiple of kv_heads (2). Got 3."),
        ({"head_dim": 0}, "head_dim must be positive. Got 0."),
        (
            {"ranks_per_node": 3, "bytes_per_second_across": 1e9},
            "ranks_per_node must divide world_size (4). Got 3.",
        ),
        (
            {"ranks_per_node": 2},
            "bytes_per_second_across must be given with ranks_per_node. Got None and 2.",
        ),
        (
            {"bytes_per_second_across": 1e9},
            "bytes_per_second_across must be given with ranks_per_node. Got 1000000000.0 and None.",
        ),
        (
            {"ranks_per_node": 2, "bytes_per_second_across": 0.0},
            "bytes_per_second_across must be positive. Got 0.0.",
        ),
        ({"rank": 4}, "rank must be in [0, world_size=4). Got 4."),
        ({"strategy": "fast"}, "strategy must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"length": 16, "world_size": 4, "heads": 4, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(DilatedPattern([8], [1]), **good | change)
    with pytest.raises(TypeError, match="pattern must be an AttentionPattern"):
        plan("longnet", **good)  # type: ignore[arg-type]  # the wrong type


def test_a_strategy_that_cannot_serve_the_call_is_refused() -> None:
    """Planned before, it ended in an assertion, or in bytes of a trade that no run makes."""
    job: dict[str, Any] = {"length": 64, "world_size": 4, "head_dim": 8, "strategy": "heads"}
    for pattern, heads, why in (
        (DilatedPattern([64], [1]), 6, "6 key heads cannot be shared by 4 ranks"),
        (DilatedPattern([5, 64], [1, 2]), 8, "are not rows that see each other"),
    ):
        with pytest.raises(ValueError, match=f"strategy must be able .* Got 'heads', but .*{why}"):
            plan(pattern, **job, heads=heads)


class Disguised:
    """A dilated pattern of which no more is known than what ranks ask of any pattern."""

    def __init__(self, pattern: DilatedPattern) -> None:
        self.code, self.spans = pattern.code, pattern.spans


@pytest.mark.parametrize("strategy", ["auto", "gather", "heads", "ring"])
def test_any_pattern_has_a_plan_of_bytes(strategy: str) -> None:
    pattern = DilatedPattern([4, 32, 1000], [1, 2, 4])
    job: dict[str, Any] = {
        "length": 64, "world_size": 4, "heads": 8, "kv_heads": 4, "head_dim": 8,
        "strategy": strategy,
    }  # fmt: skip
    known, planned = (plan(given, **job) for given in (pattern, Disguised(pattern)))
    for name in ("shard", "strategy", "reason", "traffic", "across", "memory"):
        assert getattr(planned, name) == getattr(known, name)
    assert sum(traffic.total for _, traffic in known.branches) == known.traffic.total
    assert planned.branches == ()
    # Other patterns do not tell their operations.
    assert planned.flops is planned.forward is planned.backward is planned.exposed_share is None


def test_more_bandwidth_exposes_less() -> None:
    job: dict[str, Any] = {"length": 2**22, "world_size": 4, "heads": 8, "head_dim": 64}
    pattern = DilatedPattern([2**20, 2**22], [1, 1])
    slow, fast = (plan(pattern, **job, bytes_per_second=speed) for speed in (1e6, 1e15))
    assert slow.exposed_share > 0.5
    assert fast.exposed_share == 0
    assert slow.forward.compute == fast.forward.compute == slow.flops / 300e12
