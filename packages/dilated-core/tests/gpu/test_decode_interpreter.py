"""The kernels of one new row on CPU, through Triton's interpreter, against the float64 oracle."""

from pathlib import Path

import pytest

from triton_interpreter import case_names, interpret

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("decode_interpreter")
SCRIPT = Path(__file__).with_name("interpreted_decode.py")
NAMES = case_names(SCRIPT)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_interpreted_step_agrees_with_the_oracle(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < (2e-3 if name == "half" else 2e-6)


def test_every_case_is_listed(errors: dict[str, float]) -> None:
    assert sorted(errors) == sorted(NAMES)
