"""The documents in files: a text file is one, and each row of JSON lines, Parquet or Arrow."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dilated_factory.corpora.contents import PIECE, BrokenFileError, Content, pieces
from dilated_factory.errors import CorpusError, missing_package

_MOST_LINE = 2**30  # bytes of a row
_ROWS = 1024  # of a table at a time


class Source(NamedTuple):
    """A file to read.

    Attributes:
        name: relative to the folder it was found under.
        path: where it is.
        content: what it holds.
        size: in bytes, when it was found.
        modified: when that was, in nanoseconds.
    """

    name: str
    path: Path
    content: Content
    size: int
    modified: int


class Passage(NamedTuple):
    """Bytes of a document, which has no more or others behind them."""

    data: bytes
    is_last: bool


def document_pieces(source: Source, text_field: str | None) -> Iterator[Passage]:
    """The documents of a file, one after the other; rows in one piece, text in pieces of lines.

    A row whose field is null or an empty string is an empty piece.

    Args:
        source: the file.
        text_field: the field of rows that is the document.

    Raises:
        BrokenFileError: the file is damaged.
        CorpusError: a row has no such field, or something else than a string in it.
        MissingPackageError: the form needs a package that is not installed.
    """
    if source.content.form == "text":
        yield from _of_text(pieces(source.path, source.name, source.content.packing))
        return
    assert text_field is not None
    rows = _json_rows if source.content.form == "JSON lines" else _table_rows
    for text in rows(source, text_field):
        yield Passage(_utf8(text), True)


def _of_text(stream: Iterable[bytes]) -> Iterator[Passage]:
    held = b""
    for piece in stream:
        held += piece
        if cut := _cut(held):
            yield Passage(held[:cut], False)
            held = held[cut:]
    yield Passage(held, True)


def _cut(text: bytes) -> int:
    """Where to cut so that no token is likely to be cut; 0 where more bytes should come first."""
    end = len(text)
    while (end := text.rfind(b"\n", 0, end)) > 0:
        if text[end + 1 : end + 2].strip():  # white space is often one token
            return end + 1
    if len(text) <= 4 * PIECE:
        return 0
    end = text.rfind(b" ")
    if end > 0:
        return end
    end = len(text) - 1
    while end > len(text) - 4 and text[end] & 0xC0 == 0x80:
        end -= 1  # not inside a character of UTF-8
    return end


def _json_rows(source: Source, field: str) -> Iterator[str]:
    lines = _lines(pieces(source.path, source.name, source.content.packing), source.name)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenFileError(
                f"line {number:,} of {source.name!r} must be JSON: {error}."
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                f"line {number:,} of {source.name!r} must be an object of JSON. Got {_shown(row)}."
            )
        if field not in row:
            raise _no_field(field, f"line {number:,} of {source.name!r}", row)
        yield _text(row[field], field, f"line {number:,} of {source.name!r}")


def _lines(stream: Iterable[bytes], name: str) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for piece in stream:
        first, *others = piece.split(b"\n")
        held.append(first)
        size += len(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held, size = [others[-1]], len(others[-1])
        if size > _MOST_LINE:
            raise CorpusError(f"a row of {name!r} must be shorter than 1 GiB. Got {size:,} bytes.")
    if size:
        yield b"".join(held)


def _table_rows(source: Source, field: str) -> Iterator[str]:
    if find_spec("pyarrow") is None:
        what = f"{source.name!r} in {source.content.form}"
        raise missing_package(what, "dilated-factory[data]")
    # These have no types.
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    with source.path.open("rb") as file:
        number = 0
        try:
            if source.content.form == "Parquet":
                opened = parquet.ParquetFile(file)
                schema, batches = opened.schema_arrow, opened.iter_batches(_ROWS, columns=[field])
            else:
                opened = _open_arrow(arrow, file)
                schema, batches = opened.schema, _arrow_batches(opened)
            if field not in schema.names:
                raise _no_field(field, repr(source.name), schema.names)
            for batch in batches:
                for value in batch.column(batch.schema.names.index(field)).to_pylist():
                    number += 1
                    yield _text(value, field, f"row {number:,} of {source.name!r}")
        except (arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BrokenFileError(
                f"{source.name!r} is broken after row {number:,}, about byte {file.tell():,} of "
                f"{source.size:,}: {source.content.form}: {reason}."
            ) from None


def _open_arrow(arrow: Any, file: Any) -> Any:
    is_stream = file.read(6) != b"ARROW1"
    file.seek(0)
    return arrow.ipc.open_stream(file) if is_stream else arrow.ipc.open_file(file)


def _arrow_batches(opened: Any) -> Iterator[Any]:
    if hasattr(opened, "num_record_batches"):
        for index in range(opened.num_record_batches):
            yield opened.get_batch(index)
    else:
        yield from opened


def _text(value: Any, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{field!r} must be a string in {where}. Got {_shown(value)}.")
    return value


def _no_field(field: str, where: str, names: Iterable[str]) -> CorpusError:
    known = ", ".join(map(repr, list(names)[:12]))
    return CorpusError(f"--text-field must be a field of {where}: {known}. Got {field!r}.")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # halves of characters, which JSON can say
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
