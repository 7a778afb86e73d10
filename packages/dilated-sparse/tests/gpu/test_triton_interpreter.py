"""The kernels driven by layouts, on CPU in Triton's interpreter, against the float64 oracle."""

from pathlib import Path

import pytest

from triton_interpreter import case_names, interpret

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("triton_interpreter")
SCRIPT = Path(__file__).with_name("interpreted_layouts.py")
NAMES = case_names(SCRIPT)


@pytest.fixture(scope="module")
def errors():
    return interpret(SCRIPT)


@pytest.mark.parametrize("name", NAMES)
def test_an_interpreted_kernel_agrees_with_the_oracle(name, errors):
    assert errors[name] < (2e-3 if name == "half" else 2e-6)


def test_every_case_is_listed(errors):
    assert sorted(errors) == sorted(NAMES)


def test_random_problems_agree_with_the_oracle():
    assert interpret(SCRIPT, "random") < 2e-6
