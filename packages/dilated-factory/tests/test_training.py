"""Training: it learns, and a resumed run is the run that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, RunError, TrainConfig
from dilated_factory.cli.signals import SIGNALS, StopRequest
from dilated_factory.configs.models import Parent
from dilated_factory.training.loop import StepMetrics, Trainer, select_device
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.schedule import learning_rate_factor
from dilated_factory.training.weights import initial_model

from .conftest import TINY_OPTIONS, losses, resume, start

# Trains until step 30, then dies as by `kill -9`: no handler runs, nothing is flushed.
KILLED_AT_30 = """
import os, signal, sys, time
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import Trainer
from dilated_factory import TrainConfig
config = TrainConfig.model_validate_json(sys.argv[2])
trainer = Trainer.start(sys.argv[1], config, load_corpus(config.paths), checkpoint_every=20)
def die(metrics):
    if metrics.step == 30:
        while not trainer.run.checkpoints():  # it is written beside the training
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
trainer.train(on_step=die)
"""


def test_the_loss_falls(finished_run: Path) -> None:
    curve = losses(RunFolder.open(finished_run).read_metrics())
    assert len(curve) == 40
    assert curve[0] > 5.0
    assert sum(curve[-5:]) / 5 < 3.2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_and_resumed_run_equals_one_that_was_not(
    tiny_train: TrainConfig, tmp_path: Path, dropout: float
) -> None:
    model = tiny_train.model.model_copy(update={"dropout": dropout})
    config = tiny_train.model_copy(update={"model": model})
    whole = start(config, tmp_path / "whole")
    assert whole.train()
    command = [sys.executable, "-c", KILLED_AT_30, tmp_path / "killed", config.model_dump_json()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    killed = RunFolder.open(tmp_path / "killed")
    assert killed.load().state.step == 20
    before = losses(killed.read_metrics())
    assert len(before) == 30

    resumed = resume(tmp_path / "killed")
    assert resumed.step == 20
    assert resumed.train()
    metrics = killed.read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, 41))
    expected = losses(whole.run.read_metrics())
    assert losses(metrics) == pytest.approx(expected, rel=1e-6)
    assert before == pytest.approx(expected[:30], rel=1e-6)
    for name, tensor in whole.run.load().model.items():
        torch.testing.assert_close(killed.load().model[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_run_that_failed_before_its_first_checkpoint_goes_back_to_the_start(
    tiny_train: TrainConfig, finished_run: Path, tmp_path: Path
) -> None:
    def fail(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise ZeroDivisionError

    trainer = start(tiny_train, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        trainer.train(on_step=fail)
    trainer.restore()
    trainer.train(should_stop=lambda: trainer.step == 5)
    expected = losses(RunFolder.open(finished_run).read_metrics())[:5]
    assert losses(trainer.run.read_metrics()) == expected


def test_a_run_that_ended_before_it_had_saved_what_it_inherits_inherits_it_again(
    tiny_train: TrainConfig, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainer: Trainer) -> None:
        raise OSError("no space left")

    parent = Parent(run=str(finished_run), step=40)
    heir = tiny_train.model_copy(update={"parent": parent, "steps": 3})
    start(heir, tmp_path / "whole").train()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", full)
        with pytest.raises(OSError, match="no space left"):
            start(heir, tmp_path / "run")
    resume(tmp_path / "run").train()
    whole, run = (RunFolder.open(tmp_path / name) for name in ("whole", "run"))
    assert losses(run.read_metrics()) == losses(whole.read_metrics())


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    # Without a reference the trainer is gone at once, and its lock with it.
    start(tiny_train, tmp_path / "run").run.append_metrics(
        {"step": 1, "loss": 9.0, "bits_per_byte": 13.0, "bytes_read": 144}
    )
    again = resume(tmp_path / "run")
    assert again.step == 0
    assert again.run.read_metrics() == []


# Trains with all signals that stop it at a given disposition: who runs the tests may ignore some.
TRAIN_WITH_SIGNALS = """
import os, signal, sys
from dilated_factory.cli.signals import SIGNALS
for number in SIGNALS:
    signal.signal(number, signal.Handlers[sys.argv[1]])
os.execv(sys.executable, [sys.executable, "-m", "dilated_factory", "train", *sys.argv[2:]])
"""


def train_in_a_process(
    corpus: Path, out: Path, handlers: str = "SIG_DFL", **options: Any
) -> subprocess.Popen[str]:
    """A process that trains for five minutes and has taken at least three steps."""
    command = [
        *(sys.executable, "-c", TRAIN_WITH_SIGNALS, handlers, corpus, "--out", out),
        *("--minutes", "5", *TINY_OPTIONS),
    ]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **streams | options)
    wait_for_steps(process, out, 3)
    return process


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def require_saved(out: Path) -> None:
    """The newest checkpoint is that of the last step."""
    run = RunFolder.open(out)
    steps = [record["step"] for record in run.read_metrics()]
    assert steps == list(range(1, run.load().state.step + 1))
    assert run.curves_path.exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_exits_cleanly(
    corpus_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = train_in_a_process(corpus_folder, out)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == ""
    assert "saved" in stdout
    require_saved(out)


def test_a_terminal_that_closes_does_not_keep_training_from_saving(
    corpus_folder: Path, tmp_path: Path
) -> None:
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals")
    out = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = train_in_a_process(corpus_folder, out, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)  # from here on, what the process prints is an error
    for _ in range(2):  # a terminal hangs up twice: the shell and the kernel do
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    require_saved(out)


def test_a_signal_that_is_ignored_stays_ignored(corpus_folder: Path, tmp_path: Path) -> None:
    # nohup ignores SIGHUP, and a shell's script ignores Ctrl-C for its background jobs.
    out = tmp_path / "run"
    process = train_in_a_process(corpus_folder, out, "SIG_IGN")
    for number in SIGNALS:
        process.send_signal(number)
    steps = (out / "metrics.jsonl").read_bytes().count(b"\n")
    wait_for_steps(process, out, steps + 3)
    process.kill()
    process.communicate(timeout=60)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C means something, even in a background job of a shell's script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_only_a_hangup_leaves_the_next_signal_noted() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # at once: the same request
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if hasattr(signal, "SIGHUP"):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        assert stop.exit_code == 128 + signal.SIGTERM


def test_a_clock_goes_on_where_it_stopped(tiny_train: TrainConfig, tmp_path: Path) -> None:
    config = tiny_train.model_copy(update={"steps": None, "minutes": 5.0})
    first = start(config, tmp_path / "run")
    assert not first.train(should_stop=lambda: first.step == 5)
    assert 0 < first.progress < 1
    again = resume(tmp_path / "run")
    assert (again.step, again.progress) == (5, first.progress)


def test_a_changed_corpus_is_told(tiny_model: LongNetConfig, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(32, 127)) * 5)
    config = TrainConfig(model=tiny_model, paths=(str(file),), steps=2)
    start(config, tmp_path / "run").train()
    file.write_bytes(bytes(range(32, 126)) * 5)
    with pytest.raises(RunError, match="the corpus has changed"):
        resume(tmp_path / "run")


def test_training_leaves_the_random_state_alone(tiny_train: TrainConfig, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    start(tiny_train.model_copy(update={"steps": 2}), tmp_path / "run").train()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_seed_decides_weights_and_losses(tiny_train: TrainConfig, tmp_path: Path) -> None:
    curves = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny_train.model_copy(update={"seed": seed, "steps": 3})
        trainer = start(config, tmp_path / name)
        trainer.train()
        curves[name] = losses(trainer.run.read_metrics())
    assert curves["a"] == curves["b"] != curves["c"]


def test_a_diverged_run_keeps_its_last_checkpoint(tiny_train: TrainConfig, tmp_path: Path) -> None:
    trainer = start(tiny_train, tmp_path / "run", checkpoint_every=2)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="the loss became nan at step 1"):
        trainer.train()
    assert trainer.run.checkpoints() == []


def test_bfloat16_trains_with_weights_in_float32(tiny_train: TrainConfig, tmp_path: Path) -> None:
    config = tiny_train.model_copy(update={"dtype": "bfloat16", "steps": 3})
    trainer = start(config, tmp_path / "run")
    trainer.train()
    curve = losses(trainer.run.read_metrics())
    exact = initial_model(config)
    assert exact.embedding.weight.dtype == torch.float32
    assert trainer.model.embedding.weight.dtype == torch.float32
    single = start(config.model_copy(update={"dtype": "float32"}), tmp_path / "single")
    single.train()
    expected = losses(single.run.read_metrics())
    assert curve != expected
    assert curve == pytest.approx(expected, rel=0.05)


def test_a_checkpoint_holds_nothing_pickled_and_each_tensor_once(finished_run: Path) -> None:
    files = [path for path in finished_run.rglob("*") if path.is_file() and path.name != "lock"]
    plain = {".json", ".jsonl", ".safetensors", ".png", ".sha256"}
    assert {path.suffix for path in files} <= plain
    checkpoint = RunFolder.open(finished_run).load()
    assert "head.weight" not in checkpoint.model
    assert {name.rsplit("/", 1)[1] for name in checkpoint.optimizer} == {
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
    }


def test_metrics_are_json_lines_with_the_stated_fields(finished_run: Path) -> None:
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 40
    assert last["progress"] == 1.0
    assert last["bytes_read"] == 40 * 3 * 48
    assert last["bits_per_byte"] == pytest.approx(last["loss"] * 1.4426950408889634)


def factors(**fields: Any) -> list[float]:
    """The share of the peak that each of 100 steps has, and the one past the last."""
    config = TrainConfig(steps=100, **fields)
    return [learning_rate_factor(config, step, step / 100) for step in range(101)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [{"warmup": 0.2}, {"warmup_steps": 20}])
def test_the_learning_rate_warms_up_and_decays_to_nothing(
    schedule: str, warmup: dict[str, float]
) -> None:
    found = factors(schedule=schedule, **warmup)
    assert found[0] > 0
    assert found[:21] == sorted(found[:21])
    assert found[20] == max(found) == 1.0
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[10] == pytest.approx(0.5)
    assert found[60] == pytest.approx(1.0 if schedule == "wsd" else 0.5)
    assert found[100] == pytest.approx(0.0, abs=1e-12)
    assert factors(schedule=schedule, warmup=0)[0] == 1.0


def test_schedules_have_their_shapes() -> None:
    assert factors(warmup=0, schedule="cosine")[25] == pytest.approx((1 + 0.5**0.5) / 2)
    stable = factors(warmup=0, schedule="wsd", decay=0.4)
    assert stable[60] == 1.0
    assert stable[80] == pytest.approx(0.5)


def test_a_run_by_the_clock_warms_up_by_steps_too() -> None:
    config = TrainConfig(minutes=1, warmup_steps=10)
    assert learning_rate_factor(config, 5, 0.0) == pytest.approx(0.5)
    assert learning_rate_factor(config, 50, 0.5) == pytest.approx(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_an_absent_device_is_told() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not available"):
        select_device("cuda")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_of_signals_at_once_the_lowest_number_counts() -> None:
    both = {signal.SIGHUP, signal.SIGTERM}
    with StopRequest() as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        # To this thread: another, where they are not blocked, would take them one by one.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert stop.exit_code == 129
