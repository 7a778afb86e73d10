"""Training on a GPU: compiled, in bfloat16, resumed; nothing waits and nothing is lost."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, StepMetrics, TrainConfig, train
from dilated_factory.training.loop import Trainer
from dilated_factory.training.parallel import Parallel

from .conftest import losses, resume, start

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(corpus_folder: Path) -> TrainConfig:
    model = LongNetConfig(embed_dim=64, num_heads=2, num_layers=4, context=256)
    return TrainConfig(
        model=model, paths=(str(corpus_folder),), steps=8, batch_size=4, dtype="bfloat16"
    )


def curve(config: TrainConfig, path: Path, **options: Any) -> list[float]:
    trainer = start(config, path, parallel=Parallel(torch.device("cuda")), **options)
    assert trainer._lag == 1
    trainer.train()
    return losses(trainer.run.read_metrics())


@pytest.mark.parametrize(
    "fields",
    [{}, {"micro_batch_size": 2}, {"recompute": "all"}, {"recompute": "feed_forward"}],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_those_of_the_cpu(
    config: TrainConfig, tmp_path: Path, fields: dict[str, Any], compiled: bool
) -> None:
    exact = start(config.model_copy(update={"dtype": "float32"}), tmp_path / "cpu")
    exact.train()
    expected = losses(exact.run.read_metrics())
    found = curve(config.model_copy(update=fields), tmp_path / "gpu", compiled=compiled)
    assert len(found) == 8
    assert found[:2] == pytest.approx(expected[:2], rel=0.01)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    config: TrainConfig, tmp_path: Path, optimizer: str, compiled: bool
) -> None:
    config = config.model_copy(update={"optimizer": optimizer, "validate_every": 3})
    whole = curve(config, tmp_path / "whole", compiled=compiled)
    options = {"parallel": Parallel(torch.device("cuda")), "compiled": compiled}
    first = start(config, tmp_path / "run", checkpoint_every=2, **options)
    assert not first.train(should_stop=lambda: first.step >= 5)
    again = resume(tmp_path / "run", **options)
    assert again.step == first.step
    assert again.train()
    # Key gradients are summed in any order, and Muon amplifies rounding.
    assert losses(again.run.read_metrics()) == pytest.approx(whole, rel=0.02)


def test_the_host_is_ahead_of_the_device(config: TrainConfig, tmp_path: Path) -> None:
    """Told of a step after the next was launched, with the numbers that step had."""
    seen: list[tuple[int, int]] = []
    trainer: Trainer = start(config, tmp_path / "run", parallel=Parallel(torch.device("cuda")))
    trainer.train(on_step=lambda metrics: seen.append((metrics.step, trainer.step)))
    assert seen == [*((step, step + 1) for step in range(1, 8)), (8, 8)]


def test_a_checkpoint_on_its_way_has_the_weights_of_its_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    trainer = start(
        config, tmp_path / "run", parallel=Parallel(torch.device("cuda")), checkpoint_every=4
    )
    weights: dict[int, torch.Tensor] = {}

    def note(metrics: StepMetrics) -> None:
        torch.cuda.synchronize()
        weights[trainer.step] = trainer.model.embedding.weight.detach().cpu().clone()

    trainer.train(on_step=note)
    stored = trainer.run.load()
    assert torch.equal(stored.model["embedding.weight"], weights[8])


def test_training_in_one_call_is_compiled_and_quick(config: TrainConfig, tmp_path: Path) -> None:
    began: dict[int, float] = {}
    trained = train(
        config, tmp_path / "run", on_step=lambda m: began.update({m.step: time.perf_counter()})
    )
    assert trained.device.type == "cuda"
    assert trained.run.config.dtype == "bfloat16"
    assert began[8] - began[3] < 5  # no step after the first ones compiles
