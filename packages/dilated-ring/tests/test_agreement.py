"""Ranks compare their arguments, and all raise the same error if these do not fit."""

import pytest
import torch

import ring_fault_programs as programs
from dilated_ring import RankMismatchError, RingError
from process_ranks import GetRanks, Outcome, Ranks, World, worlds

SECONDS = 5.0  # within which every rank must know


def alike(outcomes: list[Outcome]) -> BaseException:
    """The error that all ranks raised alike, in time."""
    errors = [outcome.error for outcome in outcomes]
    assert len({(type(error), str(error)) for error in errors}) == 1, errors
    assert max(outcome.seconds for outcome in outcomes) < SECONDS
    error = errors[0]
    assert error is not None
    return error


@pytest.mark.parametrize("world", worlds(2, 3, 4, 8))
def test_ranks_that_differ_are_named_with_their_values(ranks: GetRanks, world: World) -> None:
    group = ranks(world)
    facts = [{"batch": 3, "dtype": "float32", "shape": (3, 7)} for _ in range(world.size)]
    facts[-1] = {"batch": 3, "dtype": "float64", "shape": (3, 5)}
    errors = [None] * world.size
    error = alike(group.outcomes(programs.compare, facts, errors, "always"))
    assert isinstance(error, RankMismatchError)
    assert isinstance(error, ValueError)
    assert error.ranks == (world.size - 1,)
    last, others = world.size - 1, ", ".join(map(str, range(world.size - 1)))
    s = "s" * (world.size > 2)
    assert str(error) == (
        "all ranks must be called alike. "
        f"Got dtype: float32 on rank{s} {others}, float64 on rank {last}; "
        f"shape: (3, 7) on rank{s} {others}, (3, 5) on rank {last}."
    )
    # Nothing was exchanged, and the group serves on.
    group.run(programs.compare, [facts[0]] * world.size, errors, "always")
    assert group.run(programs.once_more) == [list(map(float, range(world.size)))] * world.size


@pytest.mark.parametrize("world", worlds(2, 3))
def test_an_error_on_one_rank_is_raised_on_all(ranks: GetRanks, world: World) -> None:
    errors: list[Exception | None] = [None] * world.size
    errors[1] = ValueError("w must be > 0. Got 0.")
    outcomes = ranks(world).outcomes(programs.compare, [{}] * world.size, errors, "always")
    error = alike(outcomes)
    assert isinstance(error, RankMismatchError)
    assert error.ranks == (1,)
    assert "rank 1: ValueError: w must be > 0. Got 0." in str(error)
    assert "The above exception was the direct cause" in outcomes[1].traceback


@pytest.mark.parametrize("validate", ["always", "off"])
@pytest.mark.parametrize("world", worlds(2))
def test_an_error_on_all_ranks_is_raised_as_it_is(
    ranks: GetRanks, world: World, validate: str
) -> None:
    errors = [ValueError("w must be > 0. Got 0.")] * 2
    group = ranks(world)
    error = alike(group.outcomes(programs.compare, [{}] * 2, errors, validate))
    assert type(error) is ValueError
    assert group.run(programs.once_more) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("world", worlds(2))
def test_first_compares_what_moves_no_rows_once_in_the_life_of_a_group(
    ranks: GetRanks, world: World
) -> None:
    with Ranks(world) as group:
        different, same, fine = [{"batch": rank} for rank in range(2)], [{}] * 2, [None] * 2
        for facts, rest in ((same, different), (different, same)):
            error = alike(group.outcomes(programs.compare, facts, fine, "first", rest))
            assert isinstance(error, RankMismatchError)
        group.run(programs.compare, same, fine, "first", same)
        group.run(programs.compare, same, fine, "first", different)
        for facts, rest, validate in ((different, same, "first"), (same, different, "always")):
            error = alike(group.outcomes(programs.compare, facts, fine, validate, rest))
            assert "batch: 0 on rank 0, 1 on rank 1" in str(error)


@pytest.mark.parametrize("world", worlds(2, 3, 4))
def test_lengths_that_divide_in_one_step_and_not_in_the_next_are_refused(
    ranks: GetRanks, world: World
) -> None:
    size = world.size
    group = ranks(world)
    fine = group.run(programs.steps_of_lengths, [8 * size, 7 * size])
    assert max(off for rank in fine for off in rank) < 1e-12
    error = alike(group.outcomes(programs.steps_of_lengths, [8 * size, 8 * size - 1]))
    assert isinstance(error, RankMismatchError)
    assert error.ranks == (size - 1,)
    for shape, named in ((8, range(size - 1)), (7, [size - 1])):
        s = "s" * (len(named) > 1)
        assert f"(1, {shape}, 4, 8) on rank{s} {', '.join(map(str, named))}" in str(error)
    assert group.run(programs.once_more) == [list(map(float, range(size)))] * size


@pytest.mark.parametrize("world", worlds(2, 3, 4))
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("no backward", "call: backward on rank{s} {others}, forward on rank {last}"),
        ("another backward", "of forward: 4 on rank{s} {others}, 3 on rank {last}"),
        ("another call", "call: backward on rank{s} {others}, unshard_sequence on rank {last}"),
        (
            "uneven rows",
            "shape of x: (8, 1, 4, 8) on rank{s} {others}, (7, 1, 4, 8) on rank {last}",
        ),
    ],
)
def test_ranks_that_part_ways_are_told_before_anything_is_mixed(
    world: World, what: str, named: str
) -> None:
    with Ranks(world) as group:
        error = alike(group.outcomes(programs.part_ways, what))
    assert isinstance(error, RankMismatchError)
    others = ", ".join(map(str, range(world.size - 1)))
    words = {"{s}": "s" * (world.size > 2), "{others}": others, "{last}": str(world.size - 1)}
    for word, value in words.items():
        named = named.replace(word, value)
    assert named in str(error)


@pytest.mark.distributed
@pytest.mark.xdist_group("faults")
def test_an_error_on_one_rank_reaches_the_others_even_if_nothing_is_compared() -> None:
    with Ranks(3) as group:
        outcomes = group.outcomes(programs.exchange_unless_refused, 2)
    assert type(outcomes[2].error) is ValueError
    error = alike(outcomes[:2])
    assert isinstance(error, RingError)
    assert error.ranks == (2,)
    assert "rank 2 failed: ValueError: w must be > 0. Got 0." in str(error)


@pytest.mark.distributed
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_skips_the_comparison_is_noticed(size: int) -> None:
    with Ranks(size, group_timeout=60) as group:
        outcomes = group.outcomes(programs.compare_but, 1, timeout=20)
    for outcome in outcomes:
        assert isinstance(outcome.error, RingError)
        assert "rank 1 at forward: exchange" in str(outcome.error)
        assert "rank 0 at forward: comparison of arguments" in str(outcome.error)
        assert outcome.seconds < 2 * SECONDS


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("cut", "ValueError: key_padding_mask must have shape (1, 8). Got (1, 7)."),
        ("put together", "ValueError: length must be between 0 and"),
        ("loss", "ValueError: loss must have shape (). Got (3,)."),
        ("weight", "TypeError: weight must be a number or a Tensor of one. Got 'x'."),
    ],
)
@pytest.mark.parametrize("world", worlds(2, 3, 4))
def test_a_call_around_attention_that_is_wrong_on_one_rank_is_an_error_on_all(
    ranks: GetRanks, world: World, what: str, named: str
) -> None:
    """None waits for the rank that never came: a loss of one rank is made on that one alone."""
    group = ranks(world)
    error = alike(group.outcomes(programs.err_around, what))
    assert isinstance(error, RankMismatchError)
    assert error.ranks == (world.size - 1,)
    assert f"Got rank {world.size - 1}: {named}" in str(error)
    assert group.run(programs.once_more) == [list(map(float, range(world.size)))] * world.size


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("length", "shape of query: (2, 7, 4, 8) on rank{s} {others}, (2, 6, 4, 8) on rank {last}"),
        (
            "dtype",
            "dtype of value: torch.float32 on rank{s} {others}, torch.float64 on rank {last}",
        ),
        ("documents", "cu_seqlens: [0, 7] on rank{s} {others}, [0, 5] on rank {last}"),
        ("causal", "is_causal: False on rank{s} {others}, True on rank {last}"),
        ("autocast", "autocast: off on rank{s} {others}, torch.bfloat16 on rank {last}"),
        ("gradient", "gradient of value: False on rank{s} {others}, True on rank {last}"),
        ("mask", "key_padding_mask: none on rank{s} {others}, given on rank {last}"),
        ("strategy", "strategy: auto on rank{s} {others}, ring on rank {last}"),
        ("pattern", '"segment_lengths": [5, 1000]'),
        ("invalid", "rank {last}: ValueError: query must have shape"),
    ],
)
@pytest.mark.parametrize("world", worlds(2, 3))
def test_ring_attention_moves_nothing_where_ranks_differ(
    ranks: GetRanks, world: World, what: str, named: str
) -> None:
    group = ranks(world)
    error = alike(group.outcomes(programs.attend_differently, what))
    assert isinstance(error, RankMismatchError)
    last = world.size - 1
    assert error.ranks == (last,)
    others = ", ".join(map(str, range(last)))
    words = {"{s}": "s" * (world.size > 2), "{others}": others, "{last}": str(last)}
    for word, value in words.items():
        named = named.replace(word, value)
    assert named in str(error)
    assert group.run(programs.attend_differently, "nothing") == [torch.float32] * world.size
