"""The kernels in attention by spans on CPU, through Triton's interpreter, against the oracle."""

from pathlib import Path

import pytest

from triton_interpreter import case_names, interpret

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("triton_interpreter_spans")
SCRIPT = Path(__file__).with_name("interpreted_spans.py")
FAULTS = ("its own partial", "heads of the first group", "no gradient of lse")
NAMES = [name for name in case_names(SCRIPT) if name not in FAULTS]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_spans_together_are_the_whole(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < (2e-3 if name == "half" else 2e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, errors: dict[str, float]) -> None:
    assert errors[fault] > 1e-2


def test_every_case_is_listed(errors: dict[str, float]) -> None:
    assert sorted(errors) == sorted([*NAMES, *FAULTS])
