"""The kernels' logic on CPU, through Triton's interpreter, against the float64 oracle."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process runs all cases, for one worker.
pytestmark = pytest.mark.xdist_group("triton_interpreter")
SCRIPT = Path(__file__).with_name("interpreted.py")
NAMES = [
    line.split('"')[1] for line in SCRIPT.read_text().splitlines() if line.startswith('    "')
    and '": (' in line
]  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # The interpreter is chosen when triton is imported, so it needs a process of its own.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "'InterpreterBuilder'" in done.stderr or "numpy" in done.stderr.rpartition("\n  File")[2]:
        pytest.skip("this triton's interpreter does not run with this numpy")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_an_interpreted_kernel_agrees_with_the_oracle(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < (2e-3 if name == "half" else 2e-6)


def test_every_case_is_listed(errors: dict[str, float]) -> None:
    assert sorted(errors) == sorted(NAMES)
