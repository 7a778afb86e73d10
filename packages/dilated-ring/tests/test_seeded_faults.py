"""Faults that peers have, planted one by one: the comparison with one process must catch each."""

import pytest

from dilated_core import DilatedPattern
from dilated_testing import Problem, relative_error
from process_ranks import GetRanks, World, worlds
from ring_programs import RingProblem, attend, attend_with, joined

PATTERN = DilatedPattern([5, 17, 1000], [2, 3, 4])
CASES = [
    ("gradients not sent home", False),
    ("causal on local positions", True),
    ("later ranks are seen", True),
    ("merge without a guard", False),
    ("keys and values share a buffer", False),
]


def problem(world: World, *, is_causal: bool) -> RingProblem:
    length = 11 * world.size
    return RingProblem(Problem(PATTERN, 2, length, length, 6, 3, 5, is_causal, 0.0, 0.0, 3))


def error(case: RingProblem, parts: list) -> float:
    """The largest relative error; NaN and infinities count as infinite."""
    expected = case.whole.run("reference", case.whole.tensors())
    try:
        return max(relative_error(joined(parts)[name], expected[name]) for name in expected)
    except AssertionError:
        return float("inf")


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(("fault", "is_causal"), CASES)
def test_a_fault_is_caught_and_without_it_nothing_is(
    ranks: GetRanks, world: World, fault: str, is_causal: bool
) -> None:
    case = problem(world, is_causal=is_causal)
    assert error(case, ranks(world).run(attend_with, fault, case)) > 1e-3
    assert error(case, ranks(world).run(attend, case)) < 1e-10
