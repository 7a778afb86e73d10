"""Training, evaluation and comparison of runs, from Python and from the command line."""

import json
from pathlib import Path

import pytest
import torch

import dilated_factory
from dilated_factory import Corpus, RunError, StepMetrics, TrainConfig, evaluate_run, load_corpus
from dilated_factory.cli import main

from .conftest import losses, start
from .test_cli import Captured, complaint, run


def test_training_in_one_call_is_that_of_the_trainer(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    config = tiny_train.model_copy(update={"steps": 8})
    seen: list[StepMetrics] = []
    stop = dilated_factory.train(
        config, tmp_path / "run", device="cpu", on_step=seen.append,
        should_stop=lambda: len(seen) == 3,
    )  # fmt: skip
    assert stop.state.step == 3
    corpus = load_corpus(config.paths)
    trained = dilated_factory.train(
        config, tmp_path / "run", corpus=corpus, device="cpu", resume=True, on_step=seen.append
    )
    whole = start(config, tmp_path / "whole")
    whole.train()
    assert [metrics.loss for metrics in seen] == losses(whole.run.read_metrics())
    assert torch.equal(trained.model.embedding.weight, whole.model.embedding.weight)
    assert not trained.model.training
    assert evaluate_run(trained, contexts=(16,), max_bytes=64).baselines
    with pytest.raises(RunError, match="already exists"):
        dilated_factory.train(config, tmp_path / "run", device="cpu")
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(RunError, match="seed is 0 there and 5 here"):
        dilated_factory.train(other, tmp_path / "run", device="cpu", resume=True)


def test_a_corpus_of_ones_own_needs_no_files(tiny_train: TrainConfig, tmp_path: Path) -> None:
    data = torch.arange(500).to(torch.uint8)
    corpus = Corpus(data[:400], data[400:], ("mine",), ("mine",), 0, "0" * 64)
    config = tiny_train.model_copy(update={"steps": 2, "validate_every": 1})
    trained = dilated_factory.train(config, tmp_path / "run", corpus=corpus, device="cpu")
    assert trained.state.corpus_digest == "0" * 64
    assert trained.state.best_step is not None


def test_runs_are_compared_in_a_table_and_in_curves(
    capsys: Captured, tiny_train: TrainConfig, finished_run: Path, tmp_path: Path
) -> None:
    config = tiny_train.model_copy(update={"steps": 6, "validate_every": 2})
    start(config, tmp_path / "short").train()
    picture = tmp_path / "compare.png"
    command = ["compare", finished_run, tmp_path / "short", "--png", picture]
    code, said, _ = run(capsys, *command, "--json")
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    long, short = json.loads(said)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert long["bits_per_byte"] == pytest.approx(
        sum(line["bits_per_byte"] for line in lines[-2:]) / 2
    )
    assert (long["run"], long["step"], long["best_step"]) == (str(finished_run), 40, None)
    assert short["bytes_read"] == 6 * 3 * 48
    assert short["best_validation_bits_per_byte"] > 0
    assert main([str(part) for part in command]) == 0
    shown = capsys.readouterr().out
    for part in ("least", "tokens/s", str(picture), "40"):
        assert part in shown


def test_a_run_that_cannot_be_compared_is_one_line(
    capsys: Captured, tiny_train: TrainConfig, tmp_path: Path
) -> None:
    assert "is not a run folder" in complaint(capsys, "compare", tmp_path)
    _ = start(tiny_train, tmp_path / "new")
    assert "has taken no step yet" in complaint(capsys, "compare", tmp_path / "new")
