"""A run folder is one run's at a time; what a dead process locked is free."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import factory_programs as programs
from dilated_factory import RunError, TrainConfig
from dilated_factory.cli import main
from dilated_factory.training import lock as module
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import StepMetrics, Trainer
from dilated_factory.training.run_folder import RunFolder
from process_ranks import Ranks

from .conftest import losses, start

# Trains one step of a run, says so, and waits for its end.
TRAINS = """
import sys, time
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import Trainer
from dilated_factory.training.run_folder import RunFolder
run = RunFolder.open(sys.argv[1])
trainer = Trainer(run, load_corpus(run.config.paths))
trainer.restore()
def wait(metrics):
    print("trains", flush=True)
    time.sleep(600)
trainer.train(on_step=wait)
"""


@contextmanager
def training(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in a folder."""
    command = [sys.executable, "-c", TRAINS, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def stopped(tiny_train: TrainConfig, tmp_path: Path) -> Path:
    """A run of 40 steps that was stopped after 2."""
    trainer = start(tiny_train, tmp_path / "run")
    trainer.train(should_stop=lambda: trainer.step == 2)
    return tmp_path / "run"


def test_a_second_process_is_told_who_trains_and_changes_nothing(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["train", "--resume", "--out", str(stopped)]
    with training(stopped) as process:
        before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
        assert main(resume) == 2
        said = capsys.readouterr().err
        assert f"run folder {str(stopped)!r} is in use by process {process.pid} on " in said
        assert said.count("\n") == 1
        after = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
        assert after == before
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert main(resume) == 0
    assert len(RunFolder.open(stopped).read_metrics()) == 40


@pytest.mark.distributed
@pytest.mark.xdist_group("factory_distributed")
def test_all_ranks_are_told_and_their_run_locks_once(
    stopped: Path, tiny_train: TrainConfig
) -> None:
    with Ranks(3) as ranks:
        with training(stopped) as process:
            outcomes = ranks.outcomes(programs.train, stopped, tiny_train, 1)
            for outcome in outcomes:
                assert isinstance(outcome.error, RunError)
                assert f"in use by process {process.pid} on " in str(outcome.error)
        curves = ranks.run(programs.train, stopped, tiny_train, 1, timeout=120)
    assert curves == [losses(RunFolder.open(stopped).read_metrics())[2:]] * 3


def test_a_trainer_holds_its_folder_until_it_is_done(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    run_folder, here = tmp_path / "run", f"in use by process {os.getpid()} on "
    first = start(tiny_train, run_folder)
    second = Trainer(RunFolder.open(run_folder), load_corpus(tiny_train.paths))
    for use in (second.restore, second.train):
        with pytest.raises(RunError, match=here):
            use()

    def fail(metrics: StepMetrics) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first.train(on_step=fail)
    second.restore()
    with pytest.raises(RunError, match=here):
        first.train()
    second.train()
    first.corpus = replace(first.corpus, digest="another")
    for _ in range(2):
        with pytest.raises(RunError, match="the corpus has changed"):
            first.restore()
        second.restore()
        second.train()


def test_where_a_folder_cannot_be_locked_a_warning_says_so(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    run = RunFolder.create(tmp_path / "run", tiny_train)
    monkeypatch.setattr(module, "_lock", refuse)
    number = errno.ENOLCK
    with pytest.warns(UserWarning, match=r"run' cannot be locked \(No locks available\)"):
        assert run.lock() is None
    number = errno.EROFS  # where nothing can be saved either
    with pytest.raises(OSError, match="Read-only"):
        run.lock()
