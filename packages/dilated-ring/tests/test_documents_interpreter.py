"""The kernels on packed documents, span by span, through Triton's interpreter."""

from pathlib import Path

import pytest

from triton_interpreter import case_names, interpret

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("triton_interpreter_documents")
SCRIPT = Path(__file__).with_name("interpreted_documents.py")


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_spans_of_documents_are_the_documents(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < 2e-6
