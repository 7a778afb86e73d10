"""Tokenizers: bytes come back, what a token stands for, files that are none."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from dilated_factory import InputError
from dilated_factory.corpora import tokens
from dilated_factory.corpora.tokens import BYTES, FileTokenizer, load_tokenizer

from .tokenizer_files import (
    END,
    byte_fallback,
    byte_level,
    changed,
    saved,
    single_bytes,
    word_piece,
)

KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level, "byte fallback": byte_fallback, "single bytes": single_bytes,
}  # fmt: skip
TEXTS = st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: FileTokenizer(saved(make(), folder / name)) for name, make in KINDS.items()}


@given(text=TEXTS)
@pytest.mark.parametrize("name", KINDS)
def test_every_byte_string_comes_back_and_is_what_its_tokens_stand_for(
    loaded: dict[str, FileTokenizer], name: str, text: bytes
) -> None:
    tokenizer = loaded[name]
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.sizes[ids].sum()) == len(text)
    assert tokenizer.is_exact


def test_a_tokenizer_of_single_bytes_gives_bytes(loaded: dict[str, FileTokenizer]) -> None:
    text = bytes(range(256)) + "é\U0001f600".encode()
    assert loaded["single bytes"].encode([text, b""]) == BYTES.encode([text, b""])
    assert loaded["single bytes"].vocab_size == BYTES.vocab_size
    assert loaded["single bytes"].end_of_document is None
    assert BYTES.decode(BYTES.encode([text])[0]) == text


def test_text_is_never_read_as_a_special_token(loaded: dict[str, FileTokenizer]) -> None:
    tokenizer = loaded["byte level"]
    text = f"a{END}b".encode()
    (ids,) = tokenizer.encode([text])
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.end_of_document or 0, *ids]) == 2 * text


def test_nothing_is_added_cut_off_or_drawn_by_chance(tmp_path: Path) -> None:
    made = byte_level()
    text = b"hello world, hello self " * 9
    expected = FileTokenizer(saved(made, tmp_path)).encode([text])
    made.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )
    made.enable_truncation(5)
    made.enable_padding(length=700)
    made = changed(made, model=lambda model: model | {"dropout": 0.5})
    assert FileTokenizer(saved(made, tmp_path)).encode([text]) == expected


@pytest.mark.parametrize(
    "made",
    [
        lambda: byte_level(normalizer=normalizers.NFC()),
        lambda: byte_level(normalizer=normalizers.Lowercase()),
        word_piece,
    ],
)
def test_a_tokenizer_that_changes_texts_is_told_apart(
    made: Callable[[], Any], tmp_path: Path
) -> None:
    assert not FileTokenizer(saved(made(), tmp_path)).is_exact


def test_tokens_without_bytes_add_what_the_library_writes(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(saved(word_piece(), tmp_path))
    (ids,) = tokenizer.encode([b"Hello  self \xff zzz"])
    assert tokenizer.decode(ids) == b"hello self"
    assert tokenizer.end_of_document is not None
    assert tokenizer.tokens[tokenizer.end_of_document] == b""
    assert b"".join(tokenizer.tokens[id] for id in ids) == b" hello self"


def test_long_documents_are_cut_between_lines_which_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = FileTokenizer(saved(byte_level(), tmp_path))
    text = "def hello(world):\n\n    return self.hello\n\nÉté ".encode() * 20 + b"x" * 99
    whole = tokenizer.encode([text])
    monkeypatch.setattr(tokens, "MOST_TEXT", 67)
    pieces = list(tokens.cut(text.decode()))
    assert max(map(len, pieces)) <= 67
    assert len(pieces) > 9
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    # But for the long word without a line's end.
    assert ids[: len(whole[0]) - 99] == whole[0][: len(whole[0]) - 99]


def test_the_end_of_a_document_is_what_the_folder_says_or_a_usual_name(tmp_path: Path) -> None:
    made = byte_level(special=("<pad>", "</s>", "<stop>"))
    folder = saved(made, tmp_path)
    assert load_tokenizer(folder).end_of_document == 1
    settings = folder / "tokenizer_config.json"
    first = load_tokenizer(folder / "tokenizer.json")
    for said in ("<stop>", {"content": "<stop>"}):
        settings.write_text(json.dumps({"eos_token": said}))
        there = load_tokenizer(folder)
        assert there.end_of_document == 2
        assert there.digest != first.digest
    for wrong in ("<gone>", ["<stop>"], 7, {"content": {}}):
        settings.write_text(json.dumps({"eos_token": wrong}))
        with pytest.raises(InputError, match=r"eos_token in .* must be in the vocabulary .* Got"):
            load_tokenizer(folder)
    settings.write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json' is no tokenizer"):
        load_tokenizer(folder)


def test_a_copy_is_the_same_tokenizer_under_any_name(tmp_path: Path) -> None:
    folder = saved(byte_level(special=("<stop>",)), tmp_path / "given")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    (folder / "tokenizer.json").rename(folder / "mine.json")
    tokenizer = FileTokenizer(folder / "mine.json")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files().items():
        (copy / name).write_bytes(content)
    assert load_tokenizer(copy).digest == tokenizer.digest


def test_ids_may_have_holes_which_stand_for_nothing(tmp_path: Path) -> None:
    made = byte_level()
    made.add_tokens([AddedToken("hello", normalized=False)])
    values = json.loads(made.to_str())
    values["added_tokens"][-1]["id"] = 777
    values["model"]["vocab"]["Ā" * 3] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size in (601, 778)
    assert tokenizer.tokens[500] == b""
    assert tokenizer.tokens[600] == b"\0\0\0"
    assert tokenizer.decode(tokenizer.encode([b"hello \0\0\0"])[0]) == b"hello \0\0\0"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is no tokenizer: Expecting value"),
        ("[]", "is no tokenizer"),
        ("{}", "is no tokenizer: Model missing"),
        ("\xff", "is no tokenizer"),
        ("[" * 99999, "is no tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "must not be empty"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 4000000000}, "merges": []}}',
            "ids of a tokenizer must be below 16,777,216. Got 4,000,000,000 in",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "c"]]}}',
            "is no tokenizer: Token `c` out of vocabulary",
        ),
        ('{"kind": "train"}', "is no tokenizer"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_one_line(
    content: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as raised:
        load_tokenizer(tmp_path)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_without_a_token_for_the_unknown_serves_what_it_knows(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"hello": 0, "world": 1}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = FileTokenizer(saved(made, tmp_path))
    assert not tokenizer.is_exact
    assert tokenizer.encode([b"hello world  hello"]) == [[0, 1, 0]]
    with pytest.raises(InputError, match=r"has no tokens for a document: .*\[UNK\]") as raised:
        tokenizer.encode([b"hello you"])
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "gone.json", tmp_path / "gone" / "tokenizer.json"):
        with pytest.raises(InputError, match=r"must be a tokenizer.json or the folder of one. Got"):
            load_tokenizer(path)
    folder = saved(byte_level(), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs tokenizers, which is not installed: pip install"):
        load_tokenizer(folder)
