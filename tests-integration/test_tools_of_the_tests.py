"""What the suites count on in the tools that run them."""

import os
import subprocess
import sys
from pathlib import Path

SUITE = """
import os, pytest

@pytest.mark.xdist_group("alone")
@pytest.mark.parametrize("number", range(12))
def test_in_the_group(number):
    with open(os.environ["WORKERS"], "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_the_tests_of_a_group_run_on_one_worker(tmp_path: Path) -> None:
    # pytest 9.2.0 with pytest-xdist 3.8.0 spreads a group over the workers and says nothing.
    (tmp_path / "test_group.py").write_text(SUITE)
    workers = tmp_path / "workers"
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {**os.environ, "WORKERS": str(workers)}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=200)
    seen = workers.read_text().split()
    assert len(seen) == 12
    assert len(set(seen)) == 1
