"""The corpus: deterministic, split by file, safe with any bytes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_factory import CorpusError
from dilated_factory.training import corpus as corpus_module
from dilated_factory.training.corpus import (
    find_files,
    load_corpus,
    load_held_out,
    standard_library,
)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def joined(*contents: bytes) -> torch.Tensor:
    return torch.tensor(list(b"".join(contents)), dtype=torch.uint8)


def test_sides_are_whole_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {f"{index % 3}/n{index}": bytes([index + 40]) * (index + 1) for index in range(60)}
    corpus = load_corpus([write(tmp_path, files)], validation_fraction=0.3)
    assert set(corpus.train_files).isdisjoint(corpus.validation_files)
    assert sorted([*corpus.train_files, *corpus.validation_files]) == sorted(files)
    assert 5 < len(corpus.validation_files) < 30
    for side, names in (
        (corpus.train, corpus.train_files),
        (corpus.validation, corpus.validation_files),
    ):
        assert list(names) == sorted(names)
        assert torch.equal(side, joined(*(files[name] for name in names)))


names = st.text("abcxyz0", min_size=1, max_size=12)


@given(st.sets(names, min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_both_sides_get_a_file_and_the_share_is_kept(files: set[str], fraction: float) -> None:
    held_out = corpus_module._held_out(sorted(files), fraction)
    assert 1 <= len(held_out) <= len(files) - 1
    by_hash = {name for name in files if corpus_module._name_share(name) < fraction}
    if 1 <= len(by_hash) <= len(files) - 1:
        assert held_out == by_hash


@given(st.sets(names, min_size=20, max_size=60), names)
def test_a_file_keeps_its_side_when_another_comes(files: set[str], added: str) -> None:
    before = corpus_module._held_out(sorted(files), 0.5)
    after = corpus_module._held_out(sorted(files | {added}), 0.5)
    by_hash = [corpus_module._name_share(name) < 0.5 for name in files]
    if any(by_hash) and not all(by_hash):
        assert before - {added} == after - {added}


def test_any_bytes_are_kept_and_hidden_empty_and_cached_files_are_not(tmp_path: Path) -> None:
    everything = bytes(range(256)) * 3
    files = {
        "a.bin": everything,
        "b": b"\r\n\x00",
        "empty": b"",
        ".hidden": b"no",
        ".git/config": b"no",
        "__pycache__/a.pyc": b"no",
    }
    data = load_held_out([write(tmp_path, files)], raw=True).validation
    assert torch.equal(data, joined(everything, b"\r\n\x00"))


def test_a_pipe_does_not_block_and_a_link_loop_ends(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"12", "b/c": b"34"})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert [name for name, _ in find_files([tmp_path])] in (["a", "b/c"], ["again", "b/c"])


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"12", "b/c": b"34"})
    assert torch.equal(
        load_held_out([tmp_path, tmp_path / "a", tmp_path / "b"]).validation, joined(b"1234")
    )


def test_unreadable_files_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a": b"12", "b": b"34", "secret": b"56"})
    open_path = Path.open

    def refuse(path: Path, *arguments: Any) -> Any:
        if path.name == "secret":
            raise PermissionError
        return open_path(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    corpus = load_corpus([tmp_path])
    assert corpus.skipped == 1
    assert sorted([*corpus.train_files, *corpus.validation_files]) == ["a", "b"]


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    content = bytes(range(32, 127)) * 2 + b"the end..."
    corpus = load_corpus([write(tmp_path, {"only": content}) / "only"], validation_fraction=0.1)
    assert torch.equal(corpus.train, joined(content[:180]))
    assert torch.equal(corpus.validation, joined(content[180:]))


def test_the_digest_notices_every_change(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"12", "b": b"34"})
    before = load_corpus([tmp_path]).digest
    assert load_corpus([tmp_path]).digest == before
    write(tmp_path, {"b": b"35"})
    assert load_corpus([tmp_path]).digest != before


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"existing file or folder.*nowhere"):
        load_corpus([tmp_path / "nowhere"])


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load_corpus([write(tmp_path, {"a": b"", ".b": b"1"})])


def test_the_standard_library_is_python_source_without_what_was_installed() -> None:
    found = dict(standard_library())
    assert "os.py" in found
    assert all(name.endswith(".py") for name in found)
    assert not any("site-packages" in name.split("/") for name in found)
    assert list(found) == sorted(found)


def test_a_corpus_is_held_once_and_stays_as_it_was_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"12", "b": b"34", "c": b"56"})
    corpus = load_corpus([tmp_path])
    one, two = corpus.train, corpus.validation
    assert two.data_ptr() == one.data_ptr() + len(one)
    assert two.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
    before = bytes(one.tolist())
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert bytes(one.tolist()) == before
