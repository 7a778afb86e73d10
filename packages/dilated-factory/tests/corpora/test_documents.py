"""Documents: rows and texts, whole, in order, and what is wrong in one line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_factory import CorpusError
from dilated_factory.corpora.contents import BrokenFileError, content_of
from dilated_factory.corpora.documents import Source, _cut, _lines, document_pieces

arrow = pytest.importorskip("pyarrow", reason="the extra data has it")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data has it")
ROWS = ["one", "", "two\nlines", None, "drei \u2603", "\ud83d\ude00 \U0001f600"[3:]]
READ = [b"one", b"", b"two\nlines", b"", "drei \u2603".encode(), "\U0001f600".encode()]


def source(path: Path) -> Source:
    content = content_of(path, path.name, by_field=True)
    assert not isinstance(content, str)
    return Source(path.name, path, content, path.stat().st_size, 0)


def documents(path: Path, field: str = "text") -> list[bytes]:
    found = list(document_pieces(source(path), field))
    assert all(piece.is_last for piece in found)
    return [piece.data for piece in found]


def write(folder: Path, form: str) -> Path:
    path = folder / f"rows.{form}"
    table = arrow.table({"id": list(range(len(ROWS))), "text": ROWS})
    if form == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif form == "stream.arrow":
        with arrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 2)
    elif form == "arrow":
        with arrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, 2)
    else:
        lines = "\n\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(ROWS))
        path.write_bytes(gzip.compress(lines.encode()) if form.endswith("gz") else lines.encode())
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "arrow", "stream.arrow"])
def test_each_row_is_a_document_and_null_an_empty_one(form: str, tmp_path: Path) -> None:
    assert documents(write(tmp_path, form)) == READ


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_a_field_that_is_not_there_or_no_text_is_one_line(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form)
    with pytest.raises(CorpusError, match=r"must be a field of .*rows.*: 'id', 'text'.* Got 'txt'"):
        documents(path, "txt")
    with pytest.raises(CorpusError, match=r"'id' must be a string in .* 1 of 'rows.*'. Got 0."):
        documents(path, "id")


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        (b'{"text": "a', BrokenFileError, "line 2 of 'x.jsonl' must be JSON"),
        (b"[" * 90_000, BrokenFileError, "line 2 of 'x.jsonl' must be JSON"),
        (b'{"text": "\xff"}', BrokenFileError, "line 2 of 'x.jsonl' must be JSON"),
        (b"3", CorpusError, "line 2 of 'x.jsonl' must be an object of JSON. Got 3."),
    ],
    ids=["cut", "deep", "latin", "number"],
)
def test_a_bad_line_is_told_by_its_number(
    line: bytes, error: type[Exception], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(error, match=says):
        documents(path)


def test_half_of_a_character_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}')
    assert documents(path) == ["a\ufffdb".encode(), "\U0001f600".encode()]


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream.arrow"])
def test_a_broken_table_says_where(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(BrokenFileError, match=r"'rows.*' is broken after row \d"):
        documents(path)


@given(st.lists(st.binary(max_size=9)), st.integers(1, 7))
def test_lines_do_not_depend_on_how_they_come(parts: list[bytes], size: int) -> None:
    whole = b"\n".join(parts)
    stream = [whole[i : i + size] for i in range(0, len(whole), size)]
    found = list(_lines(stream, "x"))
    assert b"\n".join(found) == whole.removesuffix(b"\n")


def test_text_is_cut_after_a_line_and_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "text"
    text = b"".join(b"line %d\n\n  indented \xc3\xa9\n" % i for i in range(150_000))
    path.write_bytes(text)
    found = list(document_pieces(source(path), None))
    assert len(found) > 2
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True]
    assert b"".join(piece.data for piece in found) == text
    for piece in found[1:]:
        assert piece.data[:1].strip()


def test_text_without_lines_is_cut_at_spaces_and_never_in_a_character() -> None:
    assert _cut(b"words " * 10) == 0
    assert _cut(b"words " * 10**6) == 6 * 10**6 - 1
    snow = "\u2603".encode() * 2**21
    for text in (snow, snow[:-1], snow[:-2]):
        cut = _cut(text)
        text[:cut].decode()
        assert len(text) - 4 < cut < len(text)
