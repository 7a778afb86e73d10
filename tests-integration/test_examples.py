"""Programs and notebooks in examples/ that take seconds run, and say what they show."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# It takes minutes; the tests of slides run it on fewer slides.
ELSEWHERE = {"relative_places"}
# What an example needs beside dilated-factory, and a line that it ends with.
NEEDS: dict[str, tuple[str, ...]] = {
    "accelerate_longnet": ("accelerate",),
    "audio_frames": (),
    "block_layouts": ("dilated_sparse",),
    "genomes": ("pyfaidx",),
    "hf_llama_and_bert": ("transformers",),
    "lightning_longnet": ("lightning",),
    "own_model": (),
    "peft_lora": ("peft", "transformers"),
    "recipe": (),
    "torch_encoder": (),
    "two_ranks": ("dilated_ring",),
    "vision_transformer": (),
}
OWN_TEST = {"accelerate_longnet", "audio_frames", "two_ranks"}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(name: str, *before: str, after: tuple[str, ...] = ()) -> str:
    for package in ("dilated_factory", *NEEDS[name]):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, *before, str(EXAMPLES / f"{name}.py"), *after]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_all_examples_are_known() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", NEEDS.keys() - OWN_TEST)
def test_an_example_runs_and_prints(name: str) -> None:
    assert len(run(name).splitlines()) > 1


def test_a_class_of_audio_is_found_by_far_frames_alone() -> None:
    told = run("audio_frames", after=("--frames", "20000")).splitlines()
    far, near = (int(line.partition("% of 8")[0].rpartition(" ")[2]) for line in told)
    assert far > 70
    assert near < far


@pytest.mark.distributed
def test_two_processes_under_accelerate_have_the_losses_of_one() -> None:
    alone, two = run("accelerate_longnet"), run("accelerate_longnet", *TWO)
    assert len(alone.splitlines()) == 2
    assert two == alone


@pytest.mark.distributed
def test_two_ranks_are_started_by_the_example_as_by_torchrun() -> None:
    alone = run("two_ranks").splitlines()
    assert alone[:2] == ["rank 0: 768 rows, from 0 on", "rank 1: 768 rows, from 768 on"]
    assert run("two_ranks", *TWO).splitlines()[:2] == alone[:2]


# Notebooks, without Jupyter

NOTEBOOKS = EXAMPLES / "notebooks"
# What a notebook needs, and how the last line that it prints begins.
NOTEBOOK_NEEDS = {
    "patterns": (("dilated_core", "matplotlib"), "262144"),
    "train_and_generate": (("dilated_factory",), "It was the "),
}
# Those of torch itself, as in pyproject.toml, are let through.
TORCHS = (
    "Failed to initialize NumPy:UserWarning",
    "`torch.jit.script_method` is deprecated:DeprecationWarning",
)
WARNINGS = ["-Werror", *(f"-Wignore:{each}" for each in TORCHS)]
RUN_CELLS = """
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
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == NOTEBOOK_NEEDS.keys()


@pytest.mark.parametrize("name", NOTEBOOK_NEEDS)
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


@pytest.mark.parametrize("name", NOTEBOOK_NEEDS)
def test_a_notebook_runs_and_prints(name: str, tmp_path: Path) -> None:
    packages, last = NOTEBOOK_NEEDS[name]
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-c", RUN_CELLS, str(NOTEBOOKS / f"{name}.ipynb")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].strip().startswith(last), done.stdout
