"""Several processes train like one, and read each other's checkpoints."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import factory_programs as programs
from dilated_factory import InputError, LongNetConfig, TrainConfig
from dilated_factory.training.loop import Trainer
from dilated_factory.training.parallel import Parallel, join
from dilated_factory.training.run_folder import RunFolder
from process_ranks import Ranks, World

from .conftest import TINY_OPTIONS, losses, start

pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("factory_distributed")]

STEPS = 8


@pytest.fixture(scope="module")
def config(tiny_model: LongNetConfig, corpus_folder: Path) -> TrainConfig:
    model = tiny_model.model_copy(update={"embed_dim": 32, "num_heads": 2})
    return TrainConfig(model=model, paths=(str(corpus_folder),), steps=STEPS, batch_size=4)


@pytest.fixture(scope="module")
def alone(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = start(config, tmp_path_factory.mktemp("alone") / "run")
    trainer.train()
    return trainer


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for rounding, which Muon amplifies: it iterates in bfloat16."""
    assert losses(found[:2]) == pytest.approx(losses(expected[:2]), rel=1e-6)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(World(4)) as group:
        yield group


@pytest.mark.parametrize("sequence_parallel", [1, 2, 4])
def test_four_processes_train_like_one(
    config: TrainConfig, alone: Trainer, four: Ranks, tmp_path: Path, sequence_parallel: int
) -> None:
    curves = four.run(programs.train, tmp_path / "run", config, sequence_parallel, timeout=120)
    run = RunFolder.open(tmp_path / "run")
    metrics = run.read_metrics()
    assert curves == [losses(metrics)] * 4
    assert_same_curve(metrics, alone.run.read_metrics())
    files = {path.name for path in run.path.rglob("*") if path.is_file()}
    assert sum(name.startswith("shard-") for name in files) >= 4
    assert {Path(name).suffix for name in files} == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("sequence_parallel", [1, 2, 4])
def test_in_float64_four_processes_are_one(
    config: TrainConfig, four: Ranks, tmp_path: Path, sequence_parallel: int
) -> None:
    with Ranks(1) as one:
        one.run(programs.train_exactly, tmp_path / "one", config, 1, timeout=120)
    four.run(programs.train_exactly, tmp_path / "four", config, sequence_parallel, timeout=120)
    one_run, four_run = (RunFolder.open(tmp_path / name) for name in ("one", "four"))
    for expected, found in zip(one_run.read_metrics(), four_run.read_metrics(), strict=True):
        # Without the norm, a wrong scale of the gradients would hide behind its clipping.
        for name in ("step", "loss", "gradient_norm", "learning_rate", "bytes_read", "progress"):
            assert found[name] == pytest.approx(expected[name], rel=1e-10)
    checkpoint, whole = four_run.load(), one_run.load()
    assert checkpoint.optimizer
    for found_tensors, tensors in (
        (checkpoint.model, whole.model),
        (checkpoint.optimizer, whole.optimizer),
    ):
        assert set(found_tensors) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found_tensors[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("first", "then"), [(4, 1), (4, 2), (1, 4)])
def test_another_number_of_processes_goes_on(
    config: TrainConfig, alone: Trainer, tmp_path: Path, first: int, then: int
) -> None:
    path = tmp_path / "run"
    for count, stop_at in ((first, 5), (then, None)):
        with Ranks(count) as group:
            group.run(programs.train, path, config, count, stop_at, timeout=120)
    metrics = RunFolder.open(path).read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert_same_curve(metrics, alone.run.read_metrics())


def test_what_cannot_be_shared_evenly_is_refused(
    config: TrainConfig, four: Ranks, tmp_path: Path
) -> None:
    odd = config.model_copy(update={"batch_size": 3})
    outcomes = four.outcomes(programs.train, tmp_path / "a", odd, 2)
    assert {str(outcome.error) for outcome in outcomes} == {
        "batch_size must be a multiple of the processes that share it (2). Got 3."
    }
    model = config.model.model_copy(update={"context": 46})
    odd = config.model_copy(update={"model": model})
    outcomes = four.outcomes(programs.train, tmp_path / "b", odd, 4)
    assert {str(outcome.error) for outcome in outcomes} == {
        "context must be a multiple of --sequence-parallel (4). Got 46."
    }
    outcomes = four.outcomes(programs.train, tmp_path / "c", config, 3)
    assert {str(outcome.error) for outcome in outcomes} == {
        "--sequence-parallel must divide the number of processes (4). Got 3."
    }
    assert not any(tmp_path.iterdir())


def test_one_process_cannot_share_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(torch.device("cpu")) == Parallel(torch.device("cpu"))
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2 -m dilated_factory train"):
        join(torch.device("cpu"), sequence_parallel=2)


def test_ranks_that_read_different_data_all_say_so(four: Ranks) -> None:
    four.run(programs.compare_digests, ["ab" * 32] * 4)
    outcomes = four.outcomes(programs.compare_digests, ["ab" * 32] * 3 + ["cd" * 32])
    assert {str(outcome.error) for outcome in outcomes} == {
        "the corpus must be the same on all ranks. It is not."
    }


# Rank 1 dies in step 6 of the first attempt, rank 0 runs out of memory in step 7 of the second.
FAULTY = """
import os, signal, sys
import torch
from dilated_factory.cli import main
from dilated_factory.training.loop import Trainer

take_step = Trainer._take_step

def faulty_step(trainer):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (attempt, os.environ["RANK"], trainer.step) == (0, "1", 5):
        os.kill(os.getpid(), signal.SIGKILL)
    if (attempt, os.environ["RANK"], trainer.step) == (1, "0", 6):
        raise torch.OutOfMemoryError("tried to allocate 7 PiB")
    return take_step(trainer)

Trainer._take_step = faulty_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_to_the_same_losses(
    config: TrainConfig, alone: Trainer, tmp_path: Path
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [*TINY_OPTIONS, "--embed-dim", "32", "--num-heads", "2", "--batch-size", "4"]
    command = [
        *torchrun, "--nproc-per-node", "2", "--max-restarts", "2", str(script),
        "train", *config.paths, "--out", str(tmp_path / "run"), "--steps", str(STEPS), *options,
        "--sequence-parallel", "2", "--checkpoint-every", "4",
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "from step 0" in run.stdout
    assert run.stdout.count("from step 4") == 2
    assert "tried to allocate 7 PiB" in run.stderr
    metrics = RunFolder.open(tmp_path / "run").read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert_same_curve(metrics, alone.run.read_metrics())
