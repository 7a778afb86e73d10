"""Training with a tokenizer: bits per byte, the run's own copy, vocabularies that do not fit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_factory import (
    InputError,
    LongNetConfig,
    LongNetLM,
    RunError,
    TrainConfig,
    evaluate_run,
    load_corpus,
    train,
)
from dilated_factory.cli import main
from dilated_factory.corpora.tokens import load_tokenizer
from dilated_factory.models import head_loss
from dilated_factory.training.corpus import Corpus
from dilated_factory.training.evaluation import evaluate_contexts, scored_sections
from dilated_factory.training.loop import Trainer
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.sources import changed, values_in
from dilated_factory.training.trained import load_trained

from .conftest import TINY_OPTIONS
from .tokenizer_files import byte_level, saved, single_bytes

SHORT = {"steps": 4, "validate_every": 2, "validation_bytes": 400, "validation_fraction": 0.2}


def corpus_of(config: TrainConfig) -> Corpus:
    return load_corpus(
        config.paths,
        validation_fraction=config.validation_fraction,
        tokenizer=load_tokenizer(config.tokenizer),
    )


def with_tokenizer(config: TrainConfig, folder: Path, **values: Any) -> TrainConfig:
    size = values.pop("vocab_size", 320)
    model = config.model.model_copy(update={"vocab_size": size})
    return TrainConfig.model_validate(
        {**dict(config), **SHORT, "tokenizer": str(folder), "model": dict(model), **values}
    )


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_tokenizer_of_single_bytes_trains_and_scores_as_bytes_do(
    tiny_train: TrainConfig, tmp_path: Path, documents: str
) -> None:
    folder = saved(single_bytes(), tmp_path / "tokenizer")
    config = TrainConfig.model_validate({**dict(tiny_train), **SHORT, "documents": documents})
    plain = train(config, tmp_path / "plain")
    tokens = train(with_tokenizer(config, folder, vocab_size=256), tmp_path / "tokens")
    expected = plain.run.read_metrics()
    for line, other in zip(expected, tokens.run.read_metrics(), strict=True):
        assert other.pop("tokens_read") == line["bytes_read"]
        for times in (line, other):
            del times["elapsed_seconds"]
        assert other == line
    assert {"bits_per_byte", "validation_bits_per_byte"} <= expected[-1].keys()
    first, second = (
        evaluate_run(each, contexts=(16, 32), max_bytes=99) for each in (plain, tokens)
    )
    assert first.scores == second.scores
    assert first.baselines == pytest.approx(second.baselines, rel=1e-6)


def test_bits_per_byte_are_the_nats_of_all_targets_over_their_bytes(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    config = with_tokenizer(tiny_train, folder)
    corpus = corpus_of(config)
    trainer = Trainer.start(tmp_path / "run", config, corpus)
    seen: list[Any] = []
    windows = []
    for step in range(4):
        shares, *_ = trainer._draw(step)
        windows.append(torch.cat([share.targets for share in shares]))
    trainer.train(on_step=seen.append)
    read = 0
    for metrics, targets in zip(seen, windows, strict=True):
        text = b"".join(corpus.tokenizer.tokens[id] for id in targets.flatten().tolist())
        bits = metrics.loss / math.log(2) * targets.numel() / len(text)
        assert metrics.bits_per_byte == pytest.approx(bits, rel=1e-12)
        read += len(text)
        assert metrics.bytes_read == read
        assert metrics.tokens_read == metrics.step * targets.numel()
    assert read > 1.2 * seen[-1].tokens_read


def test_each_file_ends_with_the_token_for_that(tiny_train: TrainConfig, tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    corpus, plain = corpus_of(with_tokenizer(tiny_train, folder)), load_corpus(tiny_train.paths)
    tokens = torch.cat([corpus.train, corpus.validation])
    end = corpus.tokenizer.end_of_document
    assert tokens.dtype == torch.uint16
    assert ((tokens == end).nonzero().flatten() + 1).tolist() == corpus.ends.tolist()
    assert corpus.bytes_in(tokens) == len(plain.train) + len(plain.validation)
    text = b"".join(corpus.tokenizer.tokens[id] for id in corpus.train.tolist())
    kept = load_corpus(tiny_train.paths, validation_fraction=0.2)
    assert text == kept.train.numpy().tobytes()
    assert corpus.digest != kept.digest


def test_a_resumed_run_counts_on_and_needs_its_own_copy_only(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    config = with_tokenizer(tiny_train, folder)
    whole = train(config, tmp_path / "whole").run.read_metrics()
    step = iter(range(9))
    train(config, tmp_path / "run", should_stop=lambda: next(step) >= 2)
    shutil.rmtree(folder)
    trained = train(config, tmp_path / "run", resume=True)
    again = trained.run.read_metrics()
    for line in (*whole, *again):
        del line["elapsed_seconds"]
    assert again == whole
    assert len(evaluate_run(trained, contexts=(16,), max_bytes=99).baselines) == 2
    values = RunFolder.open(tmp_path / "run").config
    child = values.model_copy(update={"tokenizer": str(tmp_path / "run")})
    assert train(child, tmp_path / "child").tokenizer.digest == trained.tokenizer.digest


def test_the_score_is_over_the_bytes_of_the_scored_tokens_and_the_baselines_have_the_same(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    trained = train(with_tokenizer(tiny_train, folder), tmp_path / "run")
    data = corpus_of(trained.run.config).validation
    evaluation = evaluate_run(trained, contexts=(16,), max_bytes=10**6)
    (score,) = evaluation.scores
    nats, text = 0.0, b""
    for section in scored_sections(len(data), 16, 10**6):
        window = data[section.stop - 17 : section.stop].to(torch.int64)
        text += b"".join(trained.tokenizer.tokens[id] for id in window[9:].tolist())
        with torch.no_grad():
            logits = trained.model(window[None, :-1])[0, 8:]
        nats += F.cross_entropy(logits, window[9:], reduction="sum").item()
    assert score.scored_bytes == len(text)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    # Text of a few words: what follows two letters is told by them more often than not.
    assert evaluation.baselines["Markov order 2"] < evaluation.baselines["Markov order 1"] < 4


def test_bytes_are_those_of_the_files_where_a_tokenizer_changes_them(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    made = byte_level(normalizer=normalizers.Replace("class", "c"))
    folder = saved(made, tmp_path / "tokenizer")
    config = with_tokenizer(tiny_train, folder)
    corpus, plain = corpus_of(config), load_corpus(config.paths, validation_fraction=0.2)
    tokens = torch.cat([corpus.train, corpus.validation])
    assert corpus.bytes_in(tokens) == pytest.approx(len(plain.train) + len(plain.validation))
    assert int(corpus.tokenizer.sizes[tokens.long()].sum()) < 0.98 * corpus.bytes_in(tokens)


def test_a_tokenizer_that_changes_texts_is_warned_of(
    tiny_train: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(byte_level(normalizer=normalizers.Lowercase()), tmp_path / "tokenizer")
    config = with_tokenizer(tiny_train, folder, steps=1, validate_every=None)
    with pytest.warns(UserWarning, match="the tokenizer changes texts"):
        train(config, tmp_path / "run")
    arguments = ["train", *config.paths, "--tokenizer", str(folder), "--steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "other"), *TINY_OPTIONS]) == 0
    assert "warning: the tokenizer changes texts" in capsys.readouterr().out


def test_the_command_line_goes_from_training_to_comparison_without_the_original(
    corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    run, child = str(tmp_path / "run"), str(tmp_path / "child")
    arguments = ["train", str(corpus_folder), "--tokenizer", str(folder), "--steps", "3"]
    assert main([*arguments, "--out", run, "--validate-every", "2", *TINY_OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "tokenizer: 300 tokens, of " in out
    assert "context 48 tokens" in out
    config = json.loads(Path(run, "config.json").read_text())
    assert config["model"]["vocab_size"] == 320
    moved = folder.rename(tmp_path / "moved")
    assert main(["train", "--resume", "--out", run, "--tokenizer", str(moved)]) == 0
    assert main(["train", "--from", run, "--out", child, "--steps", "2"]) == 0
    assert main(["evaluate", child, "--contexts", "16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < record["bits_per_byte"]["16"] < 12
    assert record["baselines"]
    assert main(["compare", run, child, "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)
    assert first["tokens_per_second"] < first["bytes_per_second"]
    assert (tmp_path / "run" / "tokenizer.json.sha256").exists()


def test_a_tokenizer_that_does_not_fit_is_one_line(
    tiny_train: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    other = saved(byte_level(299), tmp_path / "other")
    config = with_tokenizer(tiny_train, folder, vocab_size=299)
    with pytest.raises(InputError, match=r"vocab_size must be at least .* \(300\). Got 299"):
        train(config, tmp_path / "run")
    config = with_tokenizer(tiny_train, folder, steps=1, validate_every=None)
    with pytest.raises(InputError, match="corpus must be made with the tokenizer of the config"):
        train(config, tmp_path / "run", corpus=load_corpus(config.paths))
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run")
    options = ["--tokenizer", str(other), "--out"]
    assert main(["train", "--resume", *options, str(tmp_path / "run")]) == 2
    assert "the run folder is from another tokenizer than" in capsys.readouterr().err
    assert main(["train", "--from", str(tmp_path / "run"), *options, str(tmp_path / "next")]) == 2
    assert "do not fit: they are of another tokenizer." in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_a_damaged_copy_is_noticed(tiny_train: TrainConfig, tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    train(with_tokenizer(tiny_train, folder, steps=1, validate_every=None), tmp_path / "run")
    file = tmp_path / "run" / "tokenizer.json"
    content = file.read_text()
    file.write_text(content.replace('"dropout"', ' "dropout"', 1))
    with pytest.raises(RunError, match="is damaged or was changed"):
        load_trained(tmp_path / "run").tokenizer  # noqa: B018  # it is read when asked for
    file.write_text("{")
    with pytest.raises(RunError, match="is no tokenizer"):
        RunFolder.open(tmp_path / "run").tokenizer()
    file.unlink()
    with pytest.raises(RunError, match=r"must be a tokenizer.json or the folder of one"):
        RunFolder.open(tmp_path / "run").tokenizer()


def test_a_run_folder_whose_making_was_killed_is_made_anew_and_nobody_elses_is(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    config, tokenizer = with_tokenizer(tiny_train, folder), load_tokenizer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "model_dump_json", lambda self, indent: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            RunFolder.create(tmp_path / "run", config, tokenizer)
    assert (tmp_path / "run" / "tokenizer.json").exists()
    assert RunFolder.create(tmp_path / "run", config, tokenizer).tokenizer().digest
    with pytest.raises(RunError, match="already exists"):
        RunFolder.create(folder, config, tokenizer)


def test_a_tokenizer_in_a_file_counts_from_its_folder_and_gives_the_vocabulary(
    tmp_path: Path,
) -> None:
    folder = saved(byte_level(), tmp_path / "tokenizer")
    (tmp_path / "run.toml").write_text('tokenizer = "tokenizer"\npaths = ["text"]\nsteps = 1\n')
    values = changed(values_in(tmp_path / "run.toml"), {}, {})
    assert values["tokenizer"] == str(folder.resolve())
    assert values["model"]["vocab_size"] == 320
    given = changed(values_in(tmp_path / "run.toml"), {}, {"vocab_size": 301})
    assert given["model"]["vocab_size"] == 301


def test_a_large_vocabulary_trains_and_is_scored_without_logits_of_the_whole_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel() * each.element_size())
            return result

    vocab, context = 50_257, 512
    model = LongNetLM(
        LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=context, vocab_size=vocab)
    )
    monkeypatch.setattr(head_loss, "LOSS_BYTES", 2**22)
    tokens = torch.randint(vocab, (1, context + 1), generator=torch.Generator().manual_seed(0))
    with Counting():
        model.loss(tokens).backward()
        evaluate_contexts(model, tokens[0].to(torch.int32), [context], max_tokens=99)
    assert largest < 4 * context * vocab / 16
    assert largest >= 4 * vocab * 8  # it counts: the gradient of the embedding is as large
