"""The harness of ranks: it runs, reports errors and hangs, and starts anew."""

import pytest

import process_ranks
import ring_self_test as programs
from process_ranks import GetRanks, Ranks, World, worlds


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4, 8))
def test_all_ranks_run_and_answer_in_order(ranks: GetRanks, world: World) -> None:
    group = ranks(world)
    total = world.size * (world.size - 1) // 2
    assert group.run(programs.sum_of_ranks, 0) == [total] * world.size
    assert group.run(programs.sum_of_ranks, 10) == [total + 10 * world.size] * world.size


@pytest.mark.distributed
@pytest.mark.xdist_group("world-2-cpu")
def test_an_error_or_a_hang_names_the_rank_and_the_next_run_is_sound() -> None:
    with Ranks(2) as group:
        with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 0: fine.*rank 1: .*says no"):
            group.run(programs.fail_on, 1)
        with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 0: not done.*in sleep_on"):
            group.run(programs.sleep_on, 0, timeout=1.0)
        assert group.run(programs.sum_of_ranks, 0) == [1, 1]


@pytest.mark.distributed
@pytest.mark.xdist_group("world-2-cpu")
def test_a_rank_that_does_not_leave_is_killed_and_it_is_told_where_it_stood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(process_ranks.LEAVE_WITHIN, "cpu", 2.0)
    with Ranks(2) as group:
        group.run(programs.stay_on, 1)
        assert group.close() == [0, -9]
    assert list(group.hung) == [1]
    assert "in stay" in group.hung[1]
