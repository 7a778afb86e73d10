"""The kernels' logic on CPU, through Triton's interpreter, against the float64 oracle."""

from pathlib import Path

import pytest

from triton_interpreter import case_names, interpret

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("triton_interpreter")
SCRIPT = Path(__file__).with_name("interpreted.py")
NAMES = case_names(SCRIPT)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_interpreted_kernel_agrees_with_the_oracle(name: str, errors: dict[str, float]) -> None:
    # Scores of hundreds are themselves rounded by as much as 1e-5.
    bound = 2e-3 if "half" in name or "halves" in name else 2e-5 if " far " in name else 2e-6
    assert errors[name] < bound


def test_every_case_is_listed(errors: dict[str, float]) -> None:
    assert sorted(errors) == sorted(NAMES)
