"""`dilated tokenize`: a tokenizer from a corpus."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_factory import InputError, load_corpus
from dilated_factory.cli import main
from dilated_factory.cli.app import load_command
from dilated_factory.configs.models import READING
from dilated_factory.corpora.tokens import FileTokenizer
from dilated_factory.training.learning_tokens import learn_tokenizer


@pytest.fixture(scope="module")
def learned(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    file = tmp_path_factory.mktemp("learned") / "mine.json"
    assert main(["tokenize", str(corpus_folder), "--vocab-size", "290", "--out", str(file)]) == 0
    return FileTokenizer(file)


@given(text=st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode)))
def test_every_byte_string_comes_back(learned: FileTokenizer, text: bytes) -> None:
    (ids,) = learned.encode([text])
    assert learned.decode(ids) == text
    assert int(learned.sizes[ids].sum()) == len(text)


def test_it_has_the_size_asked_for_an_end_of_documents_and_shorter_texts(
    learned: FileTokenizer, corpus_folder: Path
) -> None:
    assert learned.vocab_size == 290
    assert learned.end_of_document == 0
    text = (corpus_folder / "file00.txt").read_bytes()
    assert len(learned.encode([text])[0]) < 0.5 * len(text)


def test_the_same_files_give_the_same_tokenizer_and_held_out_ones_teach_nothing(
    learned: FileTokenizer, corpus_folder: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, float]] = []
    again = learn_tokenizer([corpus_folder], 290, on_progress=lambda *now: told.append(now))
    assert again.text.encode() == learned.read["mine.json"]
    assert told[0] == ("reading", 0.0)
    assert told[-1] == ("learning what to merge", 1.0)
    corpus = load_corpus([corpus_folder])
    assert again.bytes_read == len(corpus.train)
    for name in corpus.train_files:
        (tmp_path / name).write_bytes((corpus_folder / name).read_bytes())
    for name in corpus.validation_files:
        (tmp_path / name).write_bytes(b"qqqqqq zzzzzz " * 99)
    assert learn_tokenizer([tmp_path], 290).text == again.text


def test_a_tokenizer_is_learned_from_what_a_run_of_the_same_options_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = load_command("tokenize").params
    assert set(READING) <= {option.name for option in options}
    folder = tmp_path / "rows"
    folder.mkdir()
    for shard in range(3):
        rows = [json.dumps({"text": f"row {row} of {shard} " * 5}) for row in range(40)]
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    whole = (folder / "1.jsonl.gz").read_bytes()
    (folder / "1.jsonl.gz").write_bytes(whole[:-20])
    line = ["tokenize", str(folder), "--vocab-size", "270", "--out", str(tmp_path / "mine.json")]
    line += ["--text-field", "text", "--cache", str(tmp_path / "cache")]
    assert main(line) == 2
    assert "'1.jsonl.gz' is broken at byte" in capsys.readouterr().err
    assert main([*line, "--raw"]) == 2
    assert "text_field must be none with raw" in capsys.readouterr().err
    assert main([*line, "--broken", "skip", "--validation", str(folder / "2.jsonl.gz")]) == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "1 skipped: broken" in said
    size = sum(len(f"row {row} of 0 " * 5) for row in range(40))
    assert f"270 tokens from {size / 1000:.1f} kB" in said


def test_sizes_that_cannot_be_are_refused(
    corpus_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "tokenizer.json"
    for size, complaint in (
        ("256", "'--vocab-size'"),
        ("16777217", "'--vocab-size'"),
        ("90000", "for this corpus, which holds no more pairs to merge. Got 90000."),
    ):
        assert main(["tokenize", str(corpus_folder), "--vocab-size", size, "--out", str(out)]) == 2
        assert complaint in capsys.readouterr().err
    with pytest.raises(InputError, match=r"vocab_size must be from 257 to 16777216\. Got 256"):
        learn_tokenizer([corpus_folder], 256)
    assert main(["tokenize", str(tmp_path / "gone"), "--vocab-size", "300"]) == 2
    assert "path must be an existing file or folder" in capsys.readouterr().err
    assert main(["tokenize", str(corpus_folder), "--vocab-size", "300", "--out", "no/x.json"]) == 2
    assert "in a folder that exists" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["tokenize", str(corpus_folder), "--vocab-size", "300", "--out", str(out)]) == 2
    assert "needs tokenizers, which is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_bytes_that_are_no_text_teach_nothing_but_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_bytes(b"\xff\xfe\x00" * 99 + b"hello hello hello " * 9)
    made = tmp_path / "tokenizer.json"
    made.write_text(learn_tokenizer([tmp_path / "corpus"], 260, raw=True).text)
    tokenizer = FileTokenizer(made)
    assert tokenizer.decode(tokenizer.encode([b"\xff\xfehello"])[0]) == b"\xff\xfehello"
