"""The ranks together compute what one process computes, and so do their gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_testing import Problem, relative_error
from process_ranks import GetRanks, World, worlds
from ring_programs import (
    Members,
    RingProblem,
    attend,
    document_problems,
    joined,
    ring_problems,
    twice,
    varlen,
)

ALL = worlds(1, 2, 3, 4, 8)
# One example is one call on all ranks, and the ranks of the larger worlds share few cores.
DRAWN = settings(
    max_examples=max(1, settings.default.max_examples // 4),
    suppress_health_check=[*HealthCheck],
)


def worst_error(
    ranks: GetRanks, world: World, problem: RingProblem, dtype: torch.dtype = torch.float64
) -> float:
    """The largest relative error of out, lse and gradients over the groups of the ranks."""
    # On the ranks' device: another would draw another dropout mask from the same seed.
    whole = problem.whole.tensors(device=world.device)
    rounded = [x.detach().to(dtype).double().requires_grad_() for x in whole]
    how: dict[str, Any] = {}
    if problem.ends is not None:
        how = {"attention": partial(varlen, ends=problem.ends)}
    expected = problem.whole.run("reference", tuple(rounded), **how)
    parts = ranks(world).run(attend, problem, dtype)
    worst = 0.0
    for group in problem.members.groups or (tuple(range(world.size)),):
        actual = joined([parts[rank] for rank in group])
        worst = max(worst, *(relative_error(actual[name], x.cpu()) for name, x in expected.items()))
    return worst


def fixed(world: World, pattern: DilatedPattern, shard: int, **options) -> Problem:
    """A problem of fixed sizes, different primes where they may be."""
    length = shard * world.size
    sizes = {"batch": 2, "heads": 6, "kv_heads": 3, "head_dim": 5, "is_causal": True}
    extra = {"padding": 0.0, "dropout_p": 0.0, "seed": 3}
    return Problem(pattern, length=length, key_length=length, **sizes | extra | options)


@pytest.mark.parametrize("world", ALL)
@given(data=st.data())
@DRAWN
def test_ranks_compute_what_one_process_does(ranks: GetRanks, world: World, data) -> None:
    problem = data.draw(ring_problems(world.size))
    assert worst_error(ranks, world, problem) < 1e-10


@pytest.mark.parametrize("world", ALL)
@given(data=st.data())
@DRAWN
def test_every_document_gives_what_it_gives_alone(ranks: GetRanks, world: World, data) -> None:
    """Documents lie across ranks, or in one, or are empty; with gradients, masks and dropout."""
    problem = data.draw(document_problems(world.size))
    assert worst_error(ranks, world, problem) < 1e-10


@pytest.mark.parametrize("world", ALL)
@pytest.mark.parametrize("strategy", ["gather", "lend", "ring"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        DilatedPattern([4, 8, 1000], [1, 2, 3]),  # below the shard, at it, above all
        DilatedPattern([5, 13, 31], [1, 3, 7]),  # segments that cross shards, rates that do not fit
        DilatedPattern([64], [16]),  # a rate above the number of heads: some rows see nothing
        DilatedPattern([3, 29], [2, 5], count_padding=True),
        DilatedPattern([1000], [1]),  # dense
    ],
    ids=repr,
)
def test_segments_at_any_place(
    ranks: GetRanks, world: World, pattern: DilatedPattern, is_causal: bool, strategy: str
) -> None:
    whole = fixed(world, pattern, 8, is_causal=is_causal)
    problem = RingProblem(whole, options={"strategy": strategy})
    assert worst_error(ranks, world, problem) < 1e-10


@pytest.mark.parametrize("world", worlds(2, 4, 8))
@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [DilatedPattern([3, 12, 24, 1000], [1, 2, 5, 7]), DilatedPattern([1000], [11])],
    ids=repr,
)
def test_ranks_trade_heads(
    ranks: GetRanks, world: World, pattern: DilatedPattern, is_causal: bool, padding: float
) -> None:
    whole = fixed(
        world,
        pattern,
        12,
        is_causal=is_causal,
        padding=padding,
        dropout_p=0.2,
        heads=16,
        kv_heads=8,
    )
    problem = RingProblem(whole, options={"strategy": "heads"})
    assert worst_error(ranks, world, problem) < 1e-10


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize("strategy", ["gather", "heads", "lend", "ring"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("ends", [None, [0, 5, 5, 17, 20]])
def test_narrow_dtypes_are_merged_wide(
    ranks: GetRanks,
    world: World,
    dtype: torch.dtype,
    bound: float,
    strategy: str,
    ends: list[int] | None,
) -> None:
    batch = 2 if ends is None else 1
    whole = fixed(world, DilatedPattern([4, 1000], [1, 3]), 12, heads=4, kv_heads=4, batch=batch)
    if ends is not None and strategy == "heads":
        strategy = "auto"
    problem = RingProblem(whole, options={"strategy": strategy}, ends=ends)
    assert worst_error(ranks, world, problem, dtype) < bound


@pytest.mark.parametrize("world", worlds(4))
@pytest.mark.parametrize("groups", [((0, 2), (1, 3)), ((1, 2, 3), (0,)), ((0, 1, 2, 3),)])
def test_groups_inside_a_larger_world(ranks: GetRanks, world: World, groups) -> None:
    sizes = {len(group) for group in groups}
    length = 4 * 3 * 5
    assert all(length % size == 0 for size in sizes)
    whole = fixed(world, DilatedPattern([5, 17, 60], [1, 2, 3]), length // world.size)
    assert worst_error(ranks, world, RingProblem(whole, Members(groups))) < 1e-10


@pytest.mark.parametrize(("world", "mesh"), [
    pytest.param(*world.values, mesh, marks=world.marks, id=f"{world.id}-{mesh}")
    for world, mesh in [
        *((world, (2, world.values[0].size // 2)) for world in worlds(2, 4, 8)),
        *((world, (4, 2)) for world in worlds(8)),
        *((world, (3,)) for world in worlds(3)),
    ]
])  # fmt: skip
@given(data=st.data())
@DRAWN
def test_meshes_of_nodes(ranks: GetRanks, world: World, mesh: tuple[int, ...], data) -> None:
    problem = data.draw(st.one_of(ring_problems(world.size), document_problems(world.size)))
    problem.members = Members(mesh=mesh)
    assert worst_error(ranks, world, problem) < 1e-10


@pytest.mark.parametrize("world", worlds(2))
def test_second_derivatives_are_refused(world: World, ranks: GetRanks) -> None:
    for said in ranks(world).run(twice):
        assert said == "attention must be differentiated once only. Got create_graph=True."
