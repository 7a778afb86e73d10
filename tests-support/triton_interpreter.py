"""Running a script under Triton's interpreter, which executes kernels on CPU tensors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def interpret(script: Path, *arguments: str) -> Any:
    """The JSON that a script prints. Skips the test where the interpreter cannot run.

    The interpreter is chosen when triton is imported, so it needs a process of its own.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join([str(Path(__file__).parent), *inherited])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "'InterpreterBuilder'" in done.stderr or "numpy" in done.stderr.rpartition("\n  File")[2]:
        pytest.skip("this triton's interpreter does not run with this numpy")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def case_names(script: Path) -> list[str]:
    """The names in the script's table CASES, one a line, read without importing it."""
    return [
        line.split('"')[1]
        for line in script.read_text().splitlines()
        if line.startswith('    "') and '": (' in line
    ]
