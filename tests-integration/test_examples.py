"""Every program in examples/ that takes seconds runs, and says what it shows."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
