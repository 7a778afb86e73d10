"""What the suites count on in the tools that run them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


ALONE = """
import sys

def test_one():
    assert not any(name.startswith("dilated_") for name in sys.modules)
    sys.modules["left"] = sys

def test_two():
    assert "left" not in sys.modules

def test_three():
    assert sys.modules["left"]
"""


def test_a_test_that_needs_another_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(ALONE)
    nodes = [f"{tmp_path}/test_some.py::test_{name}" for name in ("one", "two", "three")]

    def alone(*nodes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.alone", *nodes]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    fine, failed, none = alone(*nodes[:2]), alone(*nodes), alone()
    assert (fine.returncode, fine.stdout) == (0, "2 of 2 tests pass alone\n")
    assert failed.returncode == 1
    assert failed.stdout.startswith(f"{nodes[2]} fails alone:\n")
    assert "KeyError: 'left'" in failed.stdout
    assert failed.stdout.endswith("\n2 of 3 tests pass alone\n")
    assert (none.returncode, none.stderr) == (2, "no test was found\n")
