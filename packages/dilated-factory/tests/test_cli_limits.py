"""Sizes that cannot be, names of files and devices that are none: one line, exit 2, at once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dilated_factory import InputError
from dilated_factory.cli import _is_too_large, main
from dilated_factory.training.atomic import write_text
from dilated_factory.training.loop import select_device

from .conftest import TINY_OPTIONS

Captured = pytest.CaptureFixture[str]
FAR, BEYOND = str(10**9), str(10**30)


def complaint(capsys: Captured, *arguments: str) -> str:
    began = time.monotonic()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("dilated: error: ")
    assert said.count("\n") == 1
    assert time.monotonic() - began < 20  # it was refused, not tried
    return said


@pytest.mark.parametrize("path", ["", "/", ".", "missing/x.png"])
@pytest.mark.parametrize(
    "command", [["show", "--png"], ["show", "--html"], ["bench", "--length", "64", "--png"]]
)
def test_a_path_that_names_no_file_is_told(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "must have a name, in a folder that exists" in complaint(capsys, *command, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "/", "."])
def test_the_demo_and_an_evaluation_need_a_name(
    capsys: Captured, finished_run: Path, path: str
) -> None:
    assert "with a name" in complaint(capsys, "demo", "--out", path)
    said = complaint(capsys, "evaluate", str(finished_run), "--contexts", "16", "--out", path)
    assert "must have a name" in said


def test_nothing_is_written_without_a_name() -> None:
    for path in (Path(), Path("/")):
        with pytest.raises(InputError, match="must have a name"):
            write_text(path, "text")


@pytest.mark.parametrize("size", [FAR, BEYOND])
@pytest.mark.parametrize(
    "command",
    [
        *(f"show --{name}" for name in ("heads", "length", "head")),
        *(f"bench --rounds 1 --{name}" for name in ("heads", "length", "head-dim", "batch")),
        *(f"plan 1000000 --tflops 1 --{name}" for name in ("heads", "devices", "head-dim")),
        "generate nowhere --max-bytes",
    ],
)
def test_a_size_that_cannot_be_is_refused(capsys: Captured, command: str, size: str) -> None:
    said = complaint(capsys, *command.split(), size)
    assert command.rsplit(maxsplit=1)[-1] in said


@pytest.mark.parametrize(
    "command",
    [
        "show --segment-lengths SIZE --dilation-rates 1",
        "plan 1000 --segment-lengths 8 --dilation-rates SIZE",
        "plan SIZE --tflops 1",
        "show --heads 5000 --png x.png",
        "show --heads 60 --length 512 --png x.png",
        "show --length 100000000",
        "show --length 64 --from SIZE",
        "plan 1000000 --heads 65536 --head-dim 1048576",
    ],
)
def test_what_would_not_end_is_refused(capsys: Captured, command: str) -> None:
    complaint(capsys, *command.replace("SIZE", BEYOND).split())


@pytest.mark.parametrize("size", [FAR, BEYOND])
@pytest.mark.parametrize(
    "name",
    ["embed-dim", "num-heads", "num-layers", "context", "batch-size", "segment-lengths"],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, name: str, size: str
) -> None:
    out = tmp_path / "run"
    train = ["train", str(corpus_folder), "--out", str(out), *TINY_OPTIONS, "--steps", "1"]
    complaint(capsys, *train, f"--{name}", size)
    assert not out.exists()


DEVICES = """
hpu xla mtia privateuseone meta mkldnn ideep fpga vulkan ort ipu maia lazy ve xpu mps hip opengl
opencl cuda:99999999999 cuda:-1 cpu:-1 CPU cuda:0:1 abacus
"""


@pytest.mark.parametrize("name", DEVICES.split())
def test_a_device_with_a_name_of_torchs_that_is_not_here_is_one_line(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(InputError, match="device") as caught:
        select_device(name)
    assert "\n" not in str(caught.value)


def test_what_an_allocator_says_is_told_and_other_faults_are_not_hidden() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert _is_too_large(caught.value)
    assert _is_too_large(OverflowError())
    assert not _is_too_large(RuntimeError("shapes do not match"))


def test_the_tests_say_what_they_need() -> None:
    """Alone, without what the package requires, they name it and show no traceback."""
    program = "import sys, pytest; sys.modules['pydantic'] = None; pytest.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "-p", "no:cacheprovider", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "the tests of dilated-factory need pydantic" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
