"""The notebooks run from above to below, without a warning, and are kept without outputs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
# What a notebook needs, and how the last line that it prints begins.
NEEDS = {
    "patterns": (("dilated_core", "matplotlib"), "262144"),
    "train_and_generate": (("dilated_factory",), "It was the "),
}
# Those of torch itself, as in pyproject.toml, are let through.
TORCHS = (
    "Failed to initialize NumPy:UserWarning",
    "`torch.jit.script_method` is deprecated:DeprecationWarning",
)
WARNINGS = ["-Werror", *(f"-Wignore:{each}" for each in TORCHS)]
RUN = """
import json, sys
from pathlib import Path
space = {"__name__": "__main__"}
for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
"""


def read(name: str) -> dict[str, Any]:
    book: dict[str, Any] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return book


def test_all_notebooks_are_known() -> None:
    assert {path.stem for path in NOTEBOOKS.iterdir()} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_is_of_format_4_5_and_keeps_no_outputs(name: str) -> None:
    book = read(name)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        kinds = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            kinds |= {"outputs", "execution_count"}
        assert cell.keys() == kinds
    if find_spec("nbformat") is not None:
        from nbformat import validate

        validate(book)


@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_runs_and_prints(name: str, tmp_path: Path) -> None:
    packages, last = NEEDS[name]
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-c", RUN, str(NOTEBOOKS / f"{name}.ipynb")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].strip().startswith(last), done.stdout
