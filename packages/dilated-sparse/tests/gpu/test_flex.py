"""The flex backend on a GPU: FlexAttention over the same token pairs, gradients included.

In a process and caches of its own: in one of many runs of all GPU tests at once (torch 2.11, 15
workers of one H200) FlexAttention's compiled kernels met an illegal memory access, and with it all
later tests of that worker. It has not come again, and not under compute-sanitizer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_interpreter import case_names

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("flex")]
SCRIPT = Path(__file__).with_name("flex_cases.py")
CASES = [f"{name} {kv_heads}" for name in case_names(SCRIPT) for kv_heads in (4, 2)]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The greatest relative error of each case."""
    caches = tmp_path_factory.mktemp("caches")
    support = Path(__file__).parents[4] / "tests-support"
    path = os.pathsep.join(filter(None, [str(support), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_flex_equals_reference_with_gradients(case: str, errors: dict[str, float]) -> None:
    # TF32 products of float32.
    assert errors[case] < 3e-3
