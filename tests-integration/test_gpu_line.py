"""README's line for GPU tests: torch, pytest and hypothesis are all that they need."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = ("xdist", "timeout", "randomly")
ABSENT = ("matplotlib", "pydantic", "rich", "safetensors", "transformers", "typer")
LINE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))  # None: as if not installed
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_gpu_tests_are_collected_without_plugins_and_other_libraries() -> None:
    blocked = [f"-pno:{plugin}" for plugin in PLUGINS]
    # As on a machine where none of the packages is installed: from the sources.
    sources = os.pathsep.join(map(str, ROOT.glob("packages/*/src")))
    done = subprocess.run(
        [sys.executable, "-c", LINE, *blocked, "-q", "--collect-only", "-m", "gpu", "packages"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": sources},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "packages/dilated-core/tests/gpu/test_triton.py::" in done.stdout
    assert "LEFT OUT packages/dilated-factory/tests: not installed: matplotlib, " in done.stdout
