"""Every Python example in a README runs, each in a process of its own."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?P<skip><!-- no-test -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def examples() -> list[object]:
    """Collect the examples of all READMEs, named by package and line."""
    found: list[object] = []
    for readme in sorted(ROOT.glob("packages/*/README.md")):
        package, text = readme.parent.name, readme.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code")) + 1
            if not block["skip"]:
                found.append(pytest.param(package, block["code"], id=f"{package}:{line}"))
    return found


@pytest.mark.parametrize(("package", "code"), examples())
def test_an_example_runs_without_a_warning_and_shows_something(
    package: str, code: str, tmp_path: Path
) -> None:
    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    # torch says this where numpy, which it does not require, is absent.
    warnings = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning"]
    command = [sys.executable, *warnings, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if missing := re.search(r"MissingPackageError: (.*)", done.stderr):
        pytest.skip(missing[1])
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{code}\nprints nothing"
