"""What the tests share: a tiny configuration, a tiny corpus, a trained tiny run."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

try:
    from dilated_factory import LongNetConfig, TrainConfig
    from dilated_factory.training.corpus import corpus_of
    from dilated_factory.training.loop import Trainer
    from dilated_factory.training.run_folder import RunFolder
except ModuleNotFoundError as error:
    # No exception of pytest's would do: from here it shows all of them with their traceback.
    raise SystemExit(
        f"the tests of dilated-factory need {error.name}, which is not installed"
    ) from None

WORDS = b"def return import class self for while if else lambda yield pass".split()
TINY_OPTIONS = [
    *("--context", "48", "--segment-lengths", "8,32", "--dilation-rates", "1,2"),
    *("--embed-dim", "16", "--num-heads", "1", "--num-layers", "2", "--batch-size", "3"),
    *("--validation-bytes", "1024"),
]


@pytest.fixture(scope="session")
def tiny_model() -> LongNetConfig:
    return LongNetConfig(
        embed_dim=16,
        num_heads=1,
        num_layers=2,
        segment_lengths=(8, 32),
        dilation_rates=(1, 2),
        context=48,
    )


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for index in range(40):
        words = generator.choices(WORDS, k=110)
        (folder / f"file{index:02}.txt").write_bytes(b" ".join(words))
    return folder


@pytest.fixture(scope="session")
def tiny_train(tiny_model: LongNetConfig, corpus_folder: Path) -> TrainConfig:
    return TrainConfig(
        model=tiny_model,
        paths=(str(corpus_folder),),
        steps=40,
        batch_size=3,
        validation_bytes=1024,
    )


@pytest.fixture(scope="session")
def finished_run(tiny_train: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps; tests read it and leave it as it is."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    start(tiny_train, path).train()
    return path


def start(config: TrainConfig, path: Path, **options: Any) -> Trainer:
    """A trainer at step 0 in a new run folder."""
    corpus = corpus_of(config)
    return Trainer.start(path, config, corpus, **options)


def resume(path: Path, **options: Any) -> Trainer:
    """A trainer at the newest checkpoint of a run folder."""
    run = RunFolder.open(path)
    corpus = corpus_of(run.config, digest=run.corpus_digest())
    trainer = Trainer(run, corpus, **options)
    trainer.restore()
    return trainer


def losses(metrics: Sequence[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in metrics]
