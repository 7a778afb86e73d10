"""Whatever happens to one rank, all others raise a RingError that names it, and can exit."""

import time
from functools import cache

import pytest

import ring_fault_programs as programs
from dilated_ring import RingError
from process_ranks import Ranks, World

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("faults")]

TIMEOUT = 8.0  # of the group; every rank must have raised by then
TIMEOUT_ON_GPU = 30.0  # on a busy machine NCCL needs seconds where nothing is wrong
LOADING = 30.0  # seconds in which a rank loads its kernels, before it waits for anything
COMPILING = 120.0  # seconds in which all kernels are compiled, into triton's cache
FORWARD = ["attend_span", "attend_packed_"]
BACKWARD = ["attend_span_backward", "attend_packed_backward"]


@cache
def compile_kernels(strategy: str, world: World) -> None:
    """Have what the ranks compute compiled, which would count as time in which one hangs."""
    with Ranks(world, group_timeout=COMPILING) as group:
        group.run(programs.attend, 1, "attend_span", "none", strategy, timeout=COMPILING)


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        *((place, fault) for place in FORWARD + BACKWARD for fault in ("exception", "killed")),
        ("attend_packed_", "stopped"),
        ("attend_packed_backward", "stopped"),
        ("attend_span", "memory"),
        *((f"lease {number}", "memory") for number in (0, 1, 2)),
    ],
)
@pytest.mark.parametrize(
    ("strategy", "world", "healthy"),
    [
        ("gather", World(2), 0),
        ("ring", World(3), 0),
        ("lend", World(2), 0),
        # On a GPU messages overlap with the attention only after the first step.
        *(
            pytest.param("gather", World(2, "cuda"), steps, marks=pytest.mark.multi_gpu)
            for steps in (0, 1)
        ),
    ],
    ids=str,
)
def test_every_survivor_names_the_rank_and_the_step(
    place: str, fault: str, strategy: str, world: World, healthy: int
) -> None:
    timeout, loading = TIMEOUT, 0.0
    if world.device == "cuda":
        timeout, loading = TIMEOUT_ON_GPU, LOADING
        compile_kernels(strategy, world)
    with Ranks(world, group_timeout=timeout) as group:
        outcomes = group.outcomes(
            programs.attend, 1, place, fault, strategy, healthy, timeout=timeout + loading + 2
        )
        started = time.monotonic()
        codes = group.close()
        assert time.monotonic() - started < timeout
    told = fault in ("exception", "memory")  # it could tell the others, who need not wait long
    assert outcomes[1].finished == told
    for rank, outcome in enumerate(outcomes):
        if rank == 1 and not told:
            continue
        assert outcome.finished, outcome.traceback
        assert codes[rank] == 0, group.hung.get(rank)
        report = outcome.value
        assert isinstance(report, programs.Report), outcome.traceback
        assert report.waited < (0.75 * timeout if told else timeout)
        assert outcome.seconds < (0.75 * timeout if told else timeout) + loading
        assert isinstance(report.error, RingError)
        assert report.error.ranks == (1,)
        assert "rank 1" in str(report.error)
        assert report.error.step in str(report.error)
        assert report.error.step.startswith(("forward: ", "backward: "))
        assert report.cause != "None"
        assert report.kept == 0
        if told:
            reason = "seven is not prime" if fault == "exception" else "7 PiB"
            assert reason in str(report.error)
            assert reason in report.cause
            assert ("backward" in place) == ("backward: " in report.error.step) or "lease" in place


def test_without_a_fault_buffers_are_lent_and_given_back() -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        for strategy in ("gather", "lend", "ring"):
            for report in group.run(programs.attend, 1, "attend_span", "none", strategy):
                assert report.error is None
                assert report.lent >= 6
                assert report.kept == 0


@pytest.mark.parametrize("strategy", ["gather", "ring", "heads", "lend"])
def test_kernels_are_not_loaded_while_a_message_is_under_way(strategy: str) -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        for first, second, other in group.run(programs.order_of_waits, strategy, True):
            for calls in (first, other):
                assert calls.index("attend") > calls.index("wait")
            assert second.index("attend") < second.index("wait")
        for calls in group.run(programs.order_of_waits, strategy, False):
            assert all(call.index("attend") < call.index("wait") for call in calls)


def test_a_slow_rank_is_waited_for() -> None:
    with Ranks(3, group_timeout=TIMEOUT) as group:
        assert group.run(programs.exchange_twice, 1, "slow") == [[0.0, 1.0, 2.0]] * 3
        assert group.run(programs.exchange_twice, 1, "none") == [[0.0, 1.0, 2.0]] * 3


def test_a_group_that_broke_is_refused_at_once() -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        group.outcomes(programs.exchange_twice, 0, "exception")
        outcomes = group.outcomes(programs.once_more)
    for outcome in outcomes:
        assert isinstance(outcome.error, RingError)
        assert "cannot be used after an earlier fault: rank 0 failed" in str(outcome.error)
        assert outcome.error.ranks == (0,)
        assert outcome.seconds < 0.5


@pytest.mark.parametrize("number", [0, 1])
def test_a_fault_in_a_trade_of_heads_is_told_too(number: int) -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        for outcome in group.outcomes(programs.attend, 1, f"lease {number}", "memory", "heads"):
            assert isinstance(outcome.value.error, RingError), outcome.traceback
            assert outcome.value.error.ranks == (1,)
            assert outcome.value.kept == 0
            assert outcome.seconds < 0.75 * TIMEOUT


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_without_a_store_there_is_still_an_error_in_time(fault: str) -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        outcome = group.outcomes(programs.lose_store_and, 1, fault, timeout=TIMEOUT + 2)[0]
    assert isinstance(outcome.error, RingError), outcome.traceback
    assert outcome.error.ranks == ()
    assert "a rank is gone, with the store" in str(outcome.error)
    assert outcome.seconds < TIMEOUT


def test_time_to_abort_is_part_of_the_timeout() -> None:
    with Ranks(2, group_timeout=TIMEOUT) as group:
        outcome = group.outcomes(programs.wait_where_aborts_hang, 4.0, timeout=TIMEOUT)[0]
    assert isinstance(outcome.error, RingError), outcome.traceback
    assert outcome.error.ranks == (1,)
    assert 2.0 < outcome.seconds < 4.0
