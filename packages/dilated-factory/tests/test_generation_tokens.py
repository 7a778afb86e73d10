"""Text by a tokenizer: whole characters, stops, limits, prompts that it does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import InputError, LongNetConfig, LongNetLM, TrainConfig, train
from dilated_factory.cli import main
from dilated_factory.cli.generate import Continuation
from dilated_factory.corpora.tokens import FileTokenizer
from dilated_factory.models.generation import Draw, generate, stream_texts

from .tokenizer_files import byte_fallback, byte_level, saved, word_piece


def make(
    tmp_path: Path, tiny_model: LongNetConfig, kind: Callable[[], Any] = byte_level
) -> tuple[LongNetLM, FileTokenizer]:
    tokenizer = FileTokenizer(saved(kind(), tmp_path / "tokenizer"))
    torch.manual_seed(0)
    return LongNetLM(tiny_model.model_copy(update={"vocab_size": 640})).eval(), tokenizer


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_prompt_is_continued_to_the_limit_by_tokens_that_stand_for_something(
    tmp_path: Path, tiny_model: LongNetConfig, kind: Callable[[], Any], temperature: float
) -> None:
    model, tokenizer = make(tmp_path, tiny_model, kind)
    prompts = [b"def ", "日本 hello world".encode() + b"\xff", b"x"]
    texts = [b"", b"", b""]
    for step in stream_texts(
        model, prompts, max_bytes=37, tokenizer=tokenizer, temperature=temperature
    ):
        for index, added in enumerate(step):
            assert added != b""
            texts[index] += added or b""
    assert all(len(text) <= 37 for text in texts)
    alone = generate(model, prompts[0], max_bytes=37, tokenizer=tokenizer, temperature=0)
    if temperature == 0:
        assert texts[0] == alone


def test_a_text_is_over_where_the_model_ends_the_document(
    tmp_path: Path, tiny_model: LongNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make(tmp_path, tiny_model)
    end = tokenizer.end_of_document
    assert end is not None
    drawn = iter([[70, 71], [end, 72], [end, 73], [74, end]])
    monkeypatch.setattr(Draw, "__call__", lambda self, logits, chances: torch.tensor(next(drawn)))
    steps = list(stream_texts(model, [b"a", b"bc"], max_bytes=99, tokenizer=tokenizer))
    known = tokenizer.tokens
    assert steps == [
        [known[70], known[71]], [None, known[72]], [None, known[73]], [None, None],
    ]  # fmt: skip


def test_the_last_token_is_cut_to_the_limit(
    tmp_path: Path, tiny_model: LongNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make(tmp_path, tiny_model)
    longest = int(tokenizer.sizes.argmax())
    size = len(tokenizer.tokens[longest])
    assert size > 3
    monkeypatch.setattr(Draw, "__call__", lambda self, logits, chances: torch.tensor([longest]))
    text = generate(model, b"a", max_bytes=2 * size + 2, tokenizer=tokenizer)
    assert text == 2 * tokenizer.tokens[longest] + tokenizer.tokens[longest][:2]
    assert generate(model, b"a", max_bytes=0, tokenizer=tokenizer) == b""


def test_a_model_and_a_tokenizer_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_model: LongNetConfig
) -> None:
    model, tokenizer = make(tmp_path, tiny_model)
    small = LongNetLM(tiny_model.model_copy(update={"vocab_size": 299}))
    with pytest.raises(InputError, match=r"vocabulary of the tokenizer \(300\)\. Got 299"):
        generate(small, b"a", max_bytes=1, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"vocabulary of 256 bytes\. Got 640"):
        generate(model, b"a", max_bytes=1)
    words = FileTokenizer(saved(word_piece(), tmp_path / "words"))
    with pytest.raises(InputError, match=r"prompt must hold a token of the tokenizer. Got b'  '"):
        generate(model, b"  ", max_bytes=1, tokenizer=words)


def test_characters_come_whole_and_stops_are_found_across_tokens() -> None:
    text = Continuation(b"p", [b"stop"])
    seen = []
    for piece in (b"a\xc3", b"\xa9", b"\xe6\x97", b"\xa5s", b"to", b"y", b"xst", b"op!", b"more"):
        text.add(piece)
        seen.append(text.ready)
        text.ready = ""
    assert seen == ["pa", "é", "", "日", "", "stoy", "x", "\n", ""]
    assert text.over
    half = Continuation(b"", [])
    half.add(b"x\xe6\x97")
    half.add(None)
    assert half.ready == "x\n"


def test_the_command_line_continues_text_by_the_copy_of_the_run(
    tiny_train: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(word_piece(), tmp_path / "tokenizer")
    model = tiny_train.model.model_copy(update={"vocab_size": 128})
    config = tiny_train.model_copy(update={"tokenizer": str(folder), "model": model, "steps": 1})
    with pytest.warns(UserWarning, match="changes texts"):
        train(config, tmp_path / "run")
    (folder / "tokenizer.json").unlink()
    arguments = ["generate", str(tmp_path / "run"), "--max-bytes", "40", "--prompt"]
    assert main([*arguments, "Hello self"]) == 0
    out, told = capsys.readouterr()
    assert out.startswith("Hello self")
    assert len(out.encode()) <= len("Hello self") + 40 + 1
    assert "warning: the tokenizer makes of a prompt 'hello self'\n" in told
    assert "tokens/s" in told
    assert main([*arguments, " "]) == 2
    assert "prompt must hold a token of the tokenizer. Got b' '" in capsys.readouterr().err


def test_tokens_that_are_not_allowed_are_never_drawn() -> None:
    chances = torch.zeros(1, dtype=torch.float64)
    allowed = torch.tensor([False, True, True])
    assert Draw(0.0, allowed=allowed)(torch.tensor([[9.0, 1.0, 2.0]]), chances).tolist() == [2]
    likely = Draw(1.0, top_k=1, allowed=allowed)
    assert likely(torch.tensor([[9.0, 3.0, 2.0]]), chances).tolist() == [1]
