"""`dilated convert`: checkpoints of torchscale's recipe for fairseq as run folders."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, LongNetLM, TrainConfig
from dilated_factory.cli import main
from dilated_factory.interop.fairseq import dictionary_tokenizer, read_dictionary
from dilated_factory.interop.torchscale import their_name
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.trained import load_trained

WORDS = 252  # and four special ones
SETTINGS = {
    "activation_fn": "relu",
    "no_scale_embedding": False,
    "segment_length": "[8,16]",
    "dilated_ratio": "[1,2]",
    "decoder_attention_heads": 2,
    "tokens_per_sample": 32,
}


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The command for a checkpoint and its dictionary; tokens, and the logits that it means."""
    torch.manual_seed(0)
    shape = LongNetConfig(
        embed_dim=16, num_heads=2, num_layers=2, ffn_dim=24, vocab_size=WORDS + 4, context=32,
        segment_lengths=(8, 16), dilation_rates=(1, 2), positions="none", head_offsets="blocked",
        activation="relu",
    )  # fmt: skip
    source = LongNetLM(shape).eval()
    tokens = torch.randint(shape.vocab_size, (1, 12))
    rates = torch.exp(torch.arange(8) * -(math.log(10000) / 7))
    angles = torch.arange(2, 14)[:, None] * rates
    hidden = source.embedding(tokens) * 4 + torch.cat((angles.sin(), angles.cos()), 1)
    for block in source.blocks:
        hidden = block(hidden)
    logits = source.head(source.norm(hidden)).detach()
    state = {"decoder." + their_name(name): tensor for name, tensor in source.state_dict().items()}
    state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    content = {"model": state, "cfg": {"model": argparse.Namespace(**SETTINGS)}}
    torch.save(content, tmp_path / "best.pt")
    (tmp_path / "dict.txt").write_text("".join(f"w{i} {999 - i}\n" for i in range(WORDS)))
    command = ["convert", str(tmp_path / "best.pt"), "--to", str(tmp_path / "run")]
    return [*command, "--dictionary", str(tmp_path / "dict.txt")], tokens, logits


Made = tuple[list[str], torch.Tensor, torch.Tensor]


def test_a_checkpoint_becomes_a_run_that_computes_what_it_computed_and_is_trained_on(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, tokens, logits = made
    assert main(command) == 0
    assert "256 words, context 32, sinusoidal positions" in capsys.readouterr().out
    trained = load_trained(tmp_path / "run")
    assert trained.model.config.hidden_dim == 24
    with torch.no_grad():
        error = (trained.model(tokens) - logits).norm() / logits.norm()
    assert error < 1e-5
    # It has no corpus: nothing else, such as the default of a new run, is read in its place.
    run = str(tmp_path / "run")
    new = ["--from", run, "--steps", "1", "--out", str(tmp_path / "new")]
    for bare in (["evaluate", run], ["train", "--resume", "--out", run], ["train", *new]):
        assert main(bare) == 2
        said = capsys.readouterr()
        assert "was converted and has no corpus: give files" in said.err
        assert not said.out
    (tmp_path / "words.txt").write_text("w1 w2 w3 w4\n" * 200)
    assert trained.tokenizer.encode([b"w1 w2 x\n"]) == [[5, 6, 3, 2]]
    score = ["evaluate", str(tmp_path / "run"), str(tmp_path / "words.txt"), "--contexts", "32"]
    assert main([*score, "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"]["32"] > 2
    write = ["generate", str(tmp_path / "run"), "--prompt", "w1 w2", "--max-bytes", "40"]
    assert main([*write, "--device", "cpu", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("w1 w2")
    assert main(
        ["train", str(tmp_path / "words.txt"), "--from", str(tmp_path / "run"), "--steps", "3",
         "--out", str(tmp_path / "on"), "--device", "cpu", "--learning-rate", "1e-4"]
    ) == 0  # fmt: skip
    assert main(["train", "--out", str(tmp_path / "on"), "--resume", "--device", "cpu"]) == 0
    after = load_trained(tmp_path / "on").model
    for name, tensor in trained.model.state_dict().items():
        moved = (after.state_dict()[name] - tensor).abs().max().item()
        assert moved < 0.01, name


def test_a_dictionary_has_fairseqs_special_words_first(tmp_path: Path) -> None:
    file = tmp_path / "dict.txt"
    file.write_text("the 10\na b 3\n\u65e5 2\nmadeupword0000 0\n", encoding="utf-8")
    words = read_dictionary(file)
    assert words == ["<s>", "<pad>", "</s>", "<unk>", "the", "a b", "\u65e5", "madeupword0000"]


def test_a_dictionary_as_a_tokenizer_reads_words_and_ends_of_lines_as_fairseq_does() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = ["<s>", "<pad>", "</s>", "<unk>", "the", "cat"]
    made = tokenizers.Tokenizer.from_str(json.dumps(dictionary_tokenizer(words)))
    ids = made.encode("the  cat\tsat\n\nthe cat\n", add_special_tokens=False).ids
    assert ids == [4, 5, 3, 2, 2, 4, 5, 2]
    assert made.decode([4, 5, 2, 4, 5, 2]) == "the cat\n the cat\n"
    assert made.encode(made.decode([4, 5, 2, 4, 2])).ids == [4, 5, 2, 4, 2]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("w0\n", "line 1 must be a word and its count. Got 'w0'"),
        ("w0 x\n", "line 1 must be a word and its count"),
        ("w0 1\nw0 1\n", "line 2 must be a word that is not there yet. Got 'w0'"),
        ("<s> 1\n", "line 1 must be a word that is not there yet"),
        ("w0 1\n", "must hold the words of the checkpoint, 256 with 4 special ones. Got 5"),
    ],
)
def test_another_dictionary_is_one_line_and_no_run(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    (tmp_path / "dict.txt").write_text(content)
    assert main(made[0]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_settings_do_not_tell_is_given_in_a_file(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, tokens, logits = made
    content: dict[str, Any] = torch.load(tmp_path / "best.pt", weights_only=False)
    torch.save({"model": content["model"]}, tmp_path / "best.pt")
    assert main(command) == 2
    assert "num_heads must be given" in capsys.readouterr().err
    (tmp_path / "shape.toml").write_text(
        'kind = "longnet"\nnum_heads = 2\nembed_dim = 16\ncontext = 32\nactivation = "relu"\n'
        "scale_embedding = true\nsegment_lengths = [8, 16]\ndilation_rates = [1, 2]\n"
    )
    assert main([*command, "--config", str(tmp_path / "shape.toml")]) == 0
    with torch.no_grad():
        error = (load_trained(tmp_path / "run").model(tokens) - logits).norm() / logits.norm()
    assert error < 1e-5


def test_what_is_no_checkpoint_is_one_line(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best.pt").write_bytes(b"nothing")
    assert main(made[0]) == 2
    assert "is no checkpoint, or is damaged" in capsys.readouterr().err
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "best.pt")
    assert main(made[0]) == 2
    assert "must have one embed_tokens.weight. Got 0 among 1" in capsys.readouterr().err
    RunFolder.create(tmp_path / "run", TrainConfig(steps=1))
    assert main(made[0]) == 2
    assert "already exists" in capsys.readouterr().err
