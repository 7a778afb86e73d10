"""What ranks run in the tests of training on several processes."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from dilated_factory.config import TrainConfig
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import Trainer
from dilated_factory.training.parallel import join
from dilated_factory.training.run_folder import RunFolder
from process_ranks import device


def train(
    path: Path, config: TrainConfig, sequence_parallel: int, stop_at: int | None = None
) -> list[float]:
    """Train on all ranks, from the newest checkpoint if there is one; return the losses."""
    trainer = _trainer(path, config, sequence_parallel)
    return _losses(trainer, stop_at)


def train_exactly(path: Path, config: TrainConfig, sequence_parallel: int) -> list[float]:
    """Train in float64 with an optimizer that does not amplify rounding; return the losses."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer = _trainer(path, config, sequence_parallel)
        trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), momentum=0.9)]
        return _losses(trainer, None)
    finally:
        torch.set_default_dtype(torch.float32)


def _trainer(path: Path, config: TrainConfig, sequence_parallel: int) -> Trainer:
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    parallel = join(device(), sequence_parallel=sequence_parallel)
    corpus = load_corpus(config.paths, validation_fraction=config.validation_fraction)
    if not (path / "config.json").exists():
        return Trainer.start(path, config, corpus, parallel=parallel)
    trainer = Trainer(RunFolder.open(path), corpus, parallel=parallel)
    trainer.restore()
    return trainer


def _losses(trainer: Trainer, stop_at: int | None) -> list[float]:
    losses: list[float] = []
    # Only the last rank asks to stop, and all do.
    last = dist.get_rank() == dist.get_world_size() - 1
    trainer.train(
        on_step=lambda metrics: losses.append(metrics.loss),
        should_stop=lambda: last and trainer.step == stop_at,
    )
    return losses


def compare_digests(digests: list[str]) -> None:
    """Compare what each rank has read."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    join(device()).require_same("corpus", digests[dist.get_rank()])
