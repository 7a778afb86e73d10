"""Steps: accumulated, recomputed, read back late, validated; each is the plain step or resumes."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dilated_factory import CorpusError, RunError, TrainConfig
from dilated_factory.training.background import Ahead, Beside
from dilated_factory.training.evaluation import evaluate_contexts
from dilated_factory.training.loop import Trainer
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.trained import evaluate_run, load_trained
from dilated_factory.training.validation import validation_starts

from .conftest import losses, resume, start

OLD = Path(__file__).parent / "data" / "run_0_1"


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def metrics(config: TrainConfig, path: Path, **options: Any) -> list[dict[str, float]]:
    """Of a run in SGD, which does not amplify rounding as Muon in bfloat16 does."""
    trainer = start(config, path, **options)
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), momentum=0.9)]
    trainer.train()
    return trainer.run.read_metrics()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"recompute": "pointwise"},
        {"recompute": "feed_forward"},
        {"recompute": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("short_context", [None, 16])
def test_other_ways_to_take_a_step_take_the_same(
    tiny_train: TrainConfig, tmp_path: Path, fields: dict[str, Any], short_context: int | None
) -> None:
    config = tiny_train.model_copy(
        update={"batch_size": 4, "steps": 5, "short_context": short_context}
    )
    plain = metrics(config, tmp_path / "plain")
    other = metrics(config.model_copy(update=fields), tmp_path / "other")
    for name in ("loss", "gradient_norm", "bytes_read", "learning_rate"):
        assert [x[name] for x in other] == pytest.approx([x[name] for x in plain], rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_short_sequences_come_first_as_many_tokens_of_them(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    context = tiny_train.model.context
    config = tiny_train.model_copy(
        update={"steps": 5, "short_context": context // 4, "short_share": 0.6}
    )
    trainer = start(config, tmp_path / "run")
    shapes = list[tuple[int, ...]]()
    trainer.model.blocks[0].register_forward_pre_hook(
        lambda block, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    trainer.train()
    assert shapes == [(12, context // 4)] * 3 + [(3, context)] * 2
    # So many tokens go through the model at once, in either.
    part = start(config.model_copy(update={"micro_batch_size": 1}), tmp_path / "part")
    assert [share.tokens.shape for share in part._draw(2).shares] == [(4, context // 4)] * 3
    assert [share.tokens.shape for share in part._draw(3).shares] == [(1, context)] * 3
    read = [record["bytes_read"] for record in trainer.run.read_metrics()]
    assert read == [3 * context * step for step in range(1, 6)]
    # What is drawn then is drawn as in a run of that context.
    shape = config.model.model_copy(update={"context": context // 4})
    short = config.model_copy(
        update={"model": shape, "batch_size": 12, "short_context": None, "short_share": 0.75}
    )
    drawn = [x._draw(2).shares[0].tokens for x in (trainer, start(short, tmp_path / "short"))]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("recompute", "calls"), [("none", 1), ("feed_forward", 2), ("all", 2)])
def test_recomputing_calls_again_what_it_says(
    tiny_train: TrainConfig, tmp_path: Path, recompute: str, calls: int
) -> None:
    config = tiny_train.model_copy(update={"recompute": recompute, "steps": 1})
    trainer = start(config, tmp_path / "run")
    counted = {"fc1": 0, "attention": 0}

    def count(name: str) -> Any:
        def hook(*arguments: Any) -> None:
            counted[name] += 1

        return hook

    block = trainer.model.blocks[0]
    block.feed_forward.fc1.register_forward_pre_hook(count("fc1"))
    block.attention.register_forward_pre_hook(count("attention"))
    trainer.train()
    assert counted == {"fc1": calls, "attention": 2 if recompute == "all" else 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_size": 1},
        {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 3},
        {"schedule": "wsd", "validate_every": 3, "recompute": "feed_forward"},
        {"short_context": 16, "short_share": 0.42, "micro_batch_size": 1},
        {"short_context": 8, "short_share": 0.6, "documents": "separate"},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    tiny_train: TrainConfig, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = tiny_train.model.model_copy(update={"dropout": 0.1})
    config = tiny_train.model_copy(update={**fields, "model": model, "steps": 12})
    whole = start(config, tmp_path / "whole")
    whole.train()
    stopped = start(config, tmp_path / "run")
    assert not stopped.train(should_stop=lambda: stopped.step == 5)
    again = resume(tmp_path / "run")
    assert again.best == stopped.best
    assert again.train()
    assert again.best == whole.best
    expected, found = whole.run.read_metrics(), again.run.read_metrics()
    for record in (*expected, *found):
        del record["elapsed_seconds"]
    assert [x.keys() for x in found] == [x.keys() for x in expected]
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-6)


def test_adamw_takes_other_steps_than_muon(tiny_train: TrainConfig, tmp_path: Path) -> None:
    config = tiny_train.model_copy(update={"optimizer": "adamw"})
    trainer = start(config, tmp_path / "run")
    trainer.train()
    curve = losses(trainer.run.read_metrics())
    assert sum(curve[-5:]) / 5 < 4
    names = {name.rsplit("/", 1)[1] for name in trainer.run.load().optimizer}
    assert names == {"exp_avg", "exp_avg_sq", "step"}


def test_losses_that_are_read_a_step_late_are_the_same(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    config = tiny_train.model_copy(update={"steps": 7, "validate_every": 3})
    curves = []
    for lag in (0, 1):
        trainer = start(config, tmp_path / str(lag), checkpoint_every=2)
        trainer._lag = lag
        seen: list[tuple[int, int]] = []
        trainer.train(on_step=lambda m, seen=seen, t=trainer: seen.append((m.step, t.step)))
        assert [step for step, _ in seen] == list(range(1, 8))
        # A step that nothing waits for is told of when the next has been taken.
        assert seen[0] == (1, 1 + lag)
        record = trainer.run.read_metrics()
        curves.append([(x["step"], x["loss"], x.get("validation_bits_per_byte")) for x in record])
    assert curves[0] == curves[1]


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_though_it_is_read_late(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    trainer = start(tiny_train, tmp_path / "run", checkpoint_every=2)
    trainer._lag = 1

    def spoil(step: Any) -> None:
        if step.step == 3:
            with torch.no_grad():
                trainer.model.norm.weight.fill_(float("nan"))

    with pytest.raises(RunError, match="the loss became nan at step 5"):
        trainer.train(on_step=spoil)
    assert trainer.run.load().state.step == 4
    assert len(trainer.run.read_metrics()) == 4


def test_validation_is_the_loss_on_held_out_bytes_and_its_best_is_kept(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    config = tiny_train.model_copy(update={"validate_every": 4, "steps": 20, "learning_rate": 0.1})
    trainer = start(config, tmp_path / "run", checkpoint_every=2)
    found = {}
    trainer.train(on_step=lambda m: found.update({m.step: m.validation_bits_per_byte}))
    validated = {step: bits for step, bits in found.items() if bits is not None}
    assert list(validated) == [4, 8, 12, 16, 20]
    best = min(validated, key=lambda step: validated[step])
    assert trainer.best == (best, validated[best])
    kept = {int(path.name.split("-")[1]) for path in trainer.run.checkpoints()}
    assert kept == {18, 20, best}
    assert load_trained(tmp_path / "run", best=True).state.step == best

    # The last look again, with torch's own loss over the same windows.
    data, context = trainer.corpus.validation.to(torch.int64), config.model.context
    starts = validation_starts(len(data), context, config.validation_bytes, 1)
    assert len(starts) == config.validation_bytes // context
    windows = torch.stack([data[at : at + context + 1] for at in starts.tolist()])
    with torch.no_grad():
        logits = trainer.model.eval()(windows[:, :-1])
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert validated[20] == pytest.approx(nats.item() / 0.6931471805599453, rel=1e-5)
    assert evaluate_contexts(trainer.model, trainer.corpus.validation, (48,))


def test_the_best_checkpoint_outlives_later_ones(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_train.model_copy(update={"validate_every": 4, "steps": 20})
    trainer = start(config, tmp_path / "run", checkpoint_every=2)
    looks = iter([3.0, 2.0, 4.0, 2.0, 5.0])
    monkeypatch.setattr(trainer, "validate", lambda: next(looks))
    trainer.train()
    assert [path.name[-2:] for path in trainer.run.checkpoints()] == ["08", "18", "20"]
    assert trainer.run.best()[1].step == 8
    assert load_trained(tmp_path / "run", best=True).state.step == 8


def test_a_run_without_validation_has_no_best(finished_run: Path) -> None:
    with pytest.raises(RunError, match="was not validated"):
        RunFolder.open(finished_run).best()


def test_too_little_to_validate_on_is_told_at_the_start(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(32, 127)) * 8)
    config = tiny_train.model_copy(update={"paths": (str(file),), "validate_every": 1})
    with pytest.raises(CorpusError, match=r"at least context \+ 1 = 49 tokens to validate"):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_written_fails_the_run(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    trainer = start(tiny_train, tmp_path / "run", checkpoint_every=20)
    monkeypatch.setattr(RunFolder, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(on_step=lambda metrics: time.sleep(0.05 if metrics.step > 20 else 0))
    assert trainer.step < 40  # it did not go on to the next checkpoint
    assert trainer.run.checkpoints() == []
    monkeypatch.undo()
    assert resume(tmp_path / "run").step == 0


def test_a_checkpoint_is_of_its_step_though_training_went_on(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, save = threading.Event(), RunFolder.save

    def late(run: RunFolder, model: Any, optimizer: Any, state: Any) -> Path:
        assert gate.wait(60)
        return save(run, model, optimizer, state)

    config = tiny_train.model_copy(update={"steps": 4})
    trainer = start(config, tmp_path / "run", checkpoint_every=2)
    monkeypatch.setattr(RunFolder, "save", late)
    weights = {}

    def watch(step: Any) -> None:
        weights[step.step] = trainer.model.embedding.weight.detach().clone()
        if step.step == 3:  # taken while that of step 2 is not yet written
            assert trainer.run.checkpoints() == []
            gate.set()

    trainer.train(on_step=watch)
    for step in (2, 4):
        folder, _ = RunFolder.open(tmp_path / "run").at(step)
        stored = load_file(folder / "model.safetensors")["embedding.weight"]
        assert torch.equal(stored, weights[step])


def test_work_ahead_is_in_order_and_begins_anew_where_it_is_asked_to() -> None:
    ahead = Ahead[int]()
    asked = [3, 4, 5, 9, 10, 2]
    assert [ahead.get(lambda n: n * n, number) for number in asked] == [n * n for n in asked]
    ahead.close()
    assert ahead.get(lambda n: -n, 3) == -3
    ahead.close()


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_no_thread_stays_beside_the_steps_of_a_cpu(tiny_train: TrainConfig, tmp_path: Path) -> None:
    """Where torch computes in one, operators wait asleep: a step took 1.2 to 1.4 times as long."""
    trainer, seen = start(tiny_train, tmp_path / "run", checkpoint_every=1), list[object]()
    trainer.train(on_step=lambda step: seen.extend(threads("batches")))
    assert not seen
    with Beside() as beside:
        beside.begin(lambda: seen.extend(threads("checkpoint")))
        beside.wait()
        (thread,) = seen
        assert isinstance(thread, threading.Thread)
        thread.join(60)
        assert not thread.is_alive()


def test_an_error_beside_does_not_hide_that_of_the_work() -> None:
    def fail() -> None:
        raise OSError("beside")

    def work() -> None:
        with Beside() as beside:
            beside.begin(fail)
            raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        work()
    with pytest.raises(OSError, match="beside"), Beside() as beside:
        beside.begin(fail)


def test_a_run_of_the_first_version_goes_on_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder was written by the trainer that had neither validation nor a default pattern."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    recorded = RunFolder.open("run").read_metrics()
    trainer: Trainer = resume(Path("run"))
    assert trainer.step == 3
    assert trainer.run.config.model.segment_lengths == (8, 32)
    assert trainer.train()
    assert losses(trainer.run.read_metrics()) == pytest.approx(losses(recorded), rel=1e-5)
    evaluation = evaluate_run(load_trained("run"), contexts=(16, 48), max_bytes=64)
    assert evaluation.baselines
    assert json.loads(Path("run/config.json").read_text())["model"]["context"] == 48
