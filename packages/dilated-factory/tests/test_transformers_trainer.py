"""`LongNetForCausalLM` under transformers' Trainer: what our own trainer makes of the same data."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dilated_factory import LongNetConfig, LongNetLM, TrainConfig
from dilated_factory.training.batches import batch_offsets, gather_windows
from dilated_factory.training.optimizer import build_optimizers
from dilated_testing import relative_error

from .conftest import start

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")

STEPS, BATCH = 40, 4
Rows = list[dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _exact() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def config(tiny_train: TrainConfig) -> TrainConfig:
    """AdamW at one rate throughout."""
    return tiny_train.model_copy(
        update={"steps": STEPS, "batch_size": BATCH, "optimizer": "adamw", "warmup": 0.0}
        | {"schedule": "wsd", "decay": 1e-9}
    )


def wrapped(config: LongNetConfig, weights: dict[str, Tensor], **options: Any) -> Any:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    model = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump(), **options))
    model.longnet.load_state_dict(weights)
    return model


def trainer_of(model: Any, config: TrainConfig, rows: Rows, folder: Path, **options: Any) -> Any:
    """A Trainer that takes rows in their order, with our optimizer."""

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined] # skipped without it
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    groups = [g for o in build_optimizers(model.longnet, config) for g in o.param_groups]
    optimizer = AdamW(groups)
    values: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "max_grad_norm": config.gradient_clip, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(values | options))
    return InOrder(
        model, arguments, train_dataset=rows, optimizers=(optimizer, LambdaLR(optimizer, one))
    )


def one(_: int) -> float:
    return 1.0


def rows_of(config: TrainConfig, data: Tensor, steps: int = STEPS) -> Rows:
    """What our trainer reads: windows of one token more than it sees."""
    size = config.model.context
    shape = {"context": size, "batch_size": config.batch_size, "seed": config.seed}
    windows = [
        gather_windows(data, batch_offsets(len(data), **shape, step=step), size + 1)
        for step in range(steps)
    ]
    return [{"input_ids": row, "labels": row.clone()} for row in torch.cat(windows)]


def leave_out(rows: Rows, *, unequally: bool) -> None:
    for index, row in enumerate(rows):
        if unequally:
            row["labels"][7 * (index % BATCH) :] = -100
        # Trainer of 5.6 counts the first label, which nothing predicts.
        if "_loss_shifts_labels" not in inspect.getsource(transformers.Trainer.__init__):
            row["labels"][0] = -100


@pytest.mark.parametrize("accumulated", [1, BATCH])
def test_trainer_takes_the_steps_of_our_trainer(
    accumulated: int, config: TrainConfig, tmp_path: Path
) -> None:
    ours = start(
        config.model_copy(update={"micro_batch_size": BATCH // accumulated}), tmp_path / "run"
    )
    weights = {name: x.clone() for name, x in ours.model.state_dict().items()}
    model = wrapped(config.model, weights)
    rows = rows_of(config, ours.corpus.train)
    leave_out(rows, unequally=False)
    trainer_of(
        model, config, rows, tmp_path, gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=BATCH // accumulated,
    ).train()  # fmt: skip
    ours.train()
    assert relative_error(model.longnet.embedding.weight, weights["embedding.weight"]) > 0.05
    for name, expected in ours.model.state_dict().items():
        assert (model.longnet.state_dict()[name] - expected).abs().max() < 1e-5, name


@pytest.mark.parametrize("accumulated", [1, BATCH])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_left_out_and_smoothed_count_as_in_our_loss(
    accumulated: int, smoothing: float, config: TrainConfig, tmp_path: Path
) -> None:
    smoother = transformers.trainer_pt_utils.LabelSmoother.__call__
    if smoothing and accumulated > 1 and "num_items" not in str(inspect.signature(smoother)):
        pytest.skip("this Trainer accumulates what it smooths without dividing by the parts")
    plain = LongNetLM(config.model)
    model = wrapped(config.model, plain.state_dict())
    data = torch.randint(256, (9000,), generator=torch.Generator().manual_seed(0))
    rows = rows_of(config, data)
    leave_out(rows, unequally=True)
    trainer_of(
        model, config, rows, tmp_path, gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=BATCH // accumulated, label_smoothing_factor=smoothing,
    ).train()  # fmt: skip
    (optimizer,) = [AdamW([g for o in build_optimizers(plain, config) for g in o.param_groups])]
    for first in range(0, len(rows), BATCH):
        tokens, labels = (
            torch.stack([row[name] for row in rows[first : first + BATCH]])
            for name in ("input_ids", "labels")
        )
        plain.loss(tokens[:, :-1], labels[:, 1:], label_smoothing=smoothing).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in plain.state_dict().items():
        assert (model.longnet.state_dict()[name] - expected).abs().max() < 1e-5, name


def test_smoothed_labels_are_those_of_the_next_token_in_classes_of_ones_own(
    config: TrainConfig, tmp_path: Path
) -> None:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    class Mine(LongNetForCausalLM):
        pass

    model: Any = Mine(LongNetPreTrainedConfig(config.model.model_dump()))
    batch = torch.randint(256, (2, 31))
    trainer = trainer_of(model, config, [], tmp_path, label_smoothing_factor=0.3)
    found = trainer.compute_loss(model, {"input_ids": batch, "labels": batch})
    logits = model(batch[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=0.3)
    torch.testing.assert_close(found, expected)


def test_a_loss_in_chunks_is_the_same_and_needs_no_logits(tiny_model: LongNetConfig) -> None:
    weights = LongNetLM(tiny_model).state_dict()
    whole, chunks = (wrapped(tiny_model, weights, loss_in_chunks=x) for x in (False, True))
    batch = torch.randint(256, (2, 31))
    mask = (torch.arange(31) >= torch.tensor([[5], [0]])).long()
    given = {"attention_mask": mask, "labels": batch.masked_fill(mask == 0, -100)}
    found = []
    for model in (whole, chunks):
        out = model.train()(batch, **given)
        assert (out.logits is None) == (model is chunks)
        found.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    torch.testing.assert_close(found[1], found[0])
    assert chunks.eval()(batch, **given).logits is not None
    last = whole(batch, logits_to_keep=1, **given)
    assert last.logits.shape[1] == 1
    torch.testing.assert_close(last.loss, found[0][0])
    nothing = whole(batch, labels=torch.full_like(batch, -100)).loss
    assert nothing.item() == 0


def test_a_run_of_trainer_is_resumed_and_evaluated(config: TrainConfig, tmp_path: Path) -> None:
    weights = LongNetLM(config.model).state_dict()
    data = torch.randint(256, (9000,), generator=torch.Generator().manual_seed(0))
    rows = rows_of(config, data, steps=4)
    leave_out(rows, unequally=False)
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = wrapped(config.model, weights)
    trainer_of(whole, config, rows, tmp_path, **options).train()
    again = wrapped(config.model, weights)
    trainer = trainer_of(again, config, rows, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, expected in whole.state_dict().items():
        assert (again.state_dict()[name] - expected).abs().max() < 1e-12, name
    scores = trainer.evaluate(rows[:6])
    windows = torch.stack([row["input_ids"] for row in rows[:6]])
    assert scores["eval_loss"] == pytest.approx(again.longnet.loss(windows).item(), rel=1e-6)
