"""Training on separate documents: none sees another, however they are packed, cut and shared."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, LongNetLM, TrainConfig, load_corpus
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.training.batches import document_starts
from dilated_factory.training.loop import Trainer
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.run_folder import RunFolder

from .conftest import losses, start


@pytest.fixture(scope="module")
def short_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    for index in range(60):
        (folder / f"{index:02}.txt").write_bytes(
            bytes(range(60 + index, 61 + index + index * 7 % 37))
        )
    return folder


@pytest.fixture(scope="module")
def separate(tiny_model: LongNetConfig, short_files: Path) -> TrainConfig:
    return TrainConfig(
        model=tiny_model,
        paths=(str(short_files),),
        steps=6,
        batch_size=4,
        documents="separate",
        validation_fraction=0.3,
        validation_bytes=1024,
    )


def test_a_corpus_knows_where_its_files_end(short_files: Path, tmp_path: Path) -> None:
    corpus = load_corpus([short_files])
    names = [*corpus.train_files, *corpus.validation_files]
    sizes = [(short_files / name).stat().st_size for name in names]
    assert corpus.ends.tolist() == torch.tensor(sizes).cumsum(0).tolist()
    assert len(corpus.train) in corpus.ends
    alone = tmp_path / "alone"
    alone.write_bytes(b"x" * 100)
    assert load_corpus([alone]).ends.tolist() == [100]


def test_documents_begin_inside_a_window_where_another_ends() -> None:
    ends = torch.tensor([3, 3, 7, 20, 25])
    found = document_starts(ends, torch.tensor([0, 3, 5, 7, 15]), 10)
    assert [x.tolist() for x in found] == [[3, 7], [4], [2], [], [5]]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_loss_of_a_batch_is_that_of_each_document_alone(
    tiny_model: LongNetConfig, rows: int
) -> None:
    model = LongNetLM(tiny_model).double()
    windows = torch.randint(256, (4, 49), generator=torch.Generator().manual_seed(3))
    starts = [torch.tensor(x) for x in ([5, 48], [], [1, 2, 30], [47])]
    shares = Parallel(torch.device("cpu")).shares(windows, rows, [x.long() for x in starts])
    assert len(shares) == 4 // rows
    total = torch.zeros((), dtype=torch.float64)
    for share in shares:
        tokens, targets, positions, ends = share.to(torch.device("cpu"))
        assert tokens is not None
        total += model.loss(tokens, targets, positions=positions, cu_seqlens=ends) / share.divisor
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for window, begins in zip(windows, starts, strict=True):
        for document in window.tensor_split(begins.long()):
            if len(document) > 1:
                nats += model.loss(document[None]) * (len(document) - 1)
                count += len(document) - 1
    torch.testing.assert_close(total, nats / count, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    for x, y in zip(
        torch.autograd.grad(total, parameters),
        torch.autograd.grad(nats / count, parameters),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    masked = sum(int((share.targets == IGNORED).sum()) for share in shares)
    assert masked == sum(map(len, starts))


def test_a_run_keeps_it_and_goes_on_as_if_never_stopped(
    separate: TrainConfig, tmp_path: Path
) -> None:
    config = separate.model_copy(update={"micro_batch_size": 2, "validate_every": 3})
    whole = start(config, tmp_path / "whole")
    whole.train()
    first = start(config, tmp_path / "run")
    first.train(should_stop=lambda: first.step >= 3)
    run = RunFolder.open(tmp_path / "run")
    assert run.config.documents == "separate"
    again = Trainer(run, load_corpus(config.paths, validation_fraction=0.3))
    again.restore()
    again.train()
    assert losses(run.read_metrics()) == losses(whole.run.read_metrics())
    looks = [
        [line.get("validation_bits_per_byte") for line in x.read_metrics()]
        for x in (run, whole.run)
    ]
    assert looks[0] == looks[1]
    assert looks[0][5] is not None


def test_joined_is_what_is_done_by_default_and_something_else(
    separate: TrainConfig, tmp_path: Path
) -> None:
    joined = separate.model_copy(update={"documents": "joined"})
    assert TrainConfig(steps=1).documents == "joined"
    curves = []
    for config in (joined, separate):
        trainer = start(config, tmp_path / config.documents)
        trainer.train()
        curves.append(losses(trainer.run.read_metrics()))
    assert curves[0][0] != curves[1][0]


def test_compiled_blocks_take_them_in_any_number(
    separate: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = start(separate, tmp_path / "eager")
    eager.train()
    whole = torch.compile

    def traced(function: Any, **_: Any) -> Any:
        return whole(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    compiled = start(separate, tmp_path / "compiled", compiled=True)
    compiled.train()
    found, expected = (losses(x.run.read_metrics()) for x in (compiled, eager))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3)
