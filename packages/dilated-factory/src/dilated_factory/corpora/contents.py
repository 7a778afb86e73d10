"""What a file holds, told by its content, and its bytes as a stream, decompressed."""

import bz2
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from dilated_factory.errors import CorpusError, missing_package

Form = Literal["text", "JSON lines", "Parquet", "Arrow"]
Packing = Literal["", "gzip", "bzip2", "xz", "zstd"]

HEAD = 2**16  # bytes that tell what a file is
PIECE = 2**20  # bytes of a stream at a time, about
# A few compressed bytes can stand for a thousand times as many, all of which come at once.
_PACKED_PIECE = 2**13
_MOST_MEMORY = 2**29  # of a decompressor
_MAGIC: tuple[tuple[Packing, bytes], ...] = (
    ("gzip", b"\x1f\x8b\x08"),
    ("bzip2", b"BZh"),
    ("xz", b"\xfd7zXZ\x00"),
    ("zstd", b"\x28\xb5\x2f\xfd"),
    *(("zstd", bytes([0x50 + low]) + b"\x2a\x4d\x18") for low in range(16)),  # skippable frames
)
_AFTER_BZH = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
_PACKED_SUFFIXES = {".gz", ".bgz", ".bz2", ".xz", ".zst", ".zstd"}
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
# White space, escape and all that is printed in ASCII, Latin alphabets and UTF-8.
_OF_TEXT = bytes(sorted({*b"\t\n\v\f\r\b\x1b", *range(32, 256)} - {127}))


class Content(NamedTuple):
    """What a file holds: in which form, and how that is compressed ("" is not at all)."""

    form: Form
    packing: Packing = ""

    def __str__(self) -> str:
        return f"{self.form}, {self.packing}" if self.packing else self.form


class BrokenFileError(CorpusError):
    """A file cannot be read to its end; the message names it and where."""


def content_of(path: Path, name: str, *, by_field: bool) -> Content | str:
    """What a file with content holds, or why it is not to be read.

    Text is what has no NUL byte in its first 64 KiB and, of other control characters, fewer than
    one in twenty bytes there; after decompression, where it is compressed.

    Args:
        path: the file.
        name: its name, for errors.
        by_field: whether documents are a field of rows: then JSON lines are rows, and Parquet and
            Arrow can be read.

    Raises:
        BrokenFileError: it is compressed, and what is wrong is at its beginning.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    packing = _packing(head)
    if packing:
        head = next(pieces(path, name, packing, HEAD), b"")[:HEAD]
        if not head:
            return "empty"
    elif table := _table(head, name):
        return Content(table) if by_field else f"{table}: needs --text-field"
    if (reason := _why_no_text(head)) is not None:
        return f"{reason}, in {packing}" if packing else reason
    return Content("JSON lines" if by_field and _has_rows(head, name) else "text", packing)


def pieces(path: Path, name: str, packing: Packing, size: int = PIECE) -> Iterator[bytes]:
    """The bytes of a file, decompressed, about so many at a time.

    Raises:
        BrokenFileError: they cannot be decompressed, or end too early.
        MissingPackageError: zstandard is not installed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not packing:
            while piece := file.read(size):
                yield piece
            return
        begin = _beginner(packing, name)
        try:
            yield from _gathered(_unpacked(file, packing, begin), size)
        except _decompression_errors() as error:
            reason = " ".join(str(error).split())
            size = path.stat().st_size
            raise BrokenFileError(
                f"{name!r} is broken at byte {file.tell():,} of {size:,}, or shortly before: "
                f"{packing}: {reason}."
            ) from None


def _packing(head: bytes) -> Packing:
    for packing, magic in _MAGIC:
        if head.startswith(magic) and (packing != "bzip2" or head[4:10] in _AFTER_BZH):
            return packing
    return ""


def _table(head: bytes, name: str) -> Literal["Parquet", "Arrow"] | None:
    if head.startswith(b"PAR1"):
        return "Parquet"
    # A stream of Arrow begins with what other files may begin with too.
    is_stream = head.startswith(b"\xff\xff\xff\xff") and name.endswith(".arrow")
    return "Arrow" if is_stream or head.startswith(b"ARROW1") else None


def _why_no_text(head: bytes) -> str | None:
    if b"\0" in head:
        return "binary: NUL bytes"
    if len(head.translate(None, _OF_TEXT)) * 20 > len(head):
        return "binary: control characters"
    return None


def _has_rows(head: bytes, name: str) -> bool:
    """By its name, or since its first line is an object of JSON."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    while suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    if suffixes and suffixes[-1] in _JSON_SUFFIXES:
        return True
    line, _, _ = head.lstrip().partition(b"\n")
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unpacked(
    file: io.BufferedReader, packing: Packing, begin: Callable[[], Any]
) -> Iterator[bytes]:
    machine: Any = None
    while chunk := file.read(_PACKED_PIECE):
        while chunk:
            if machine is None:
                # Zeros between and behind members are padding.
                chunk = chunk.lstrip(b"\0") if packing in ("gzip", "xz") else chunk
                if not chunk:
                    break
                machine = begin()
            yield machine.decompress(chunk)
            chunk = machine.unused_data
            machine = None if machine.eof else machine
    if machine is not None:
        raise EOFError("the file ends in the middle")


def _gathered(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    held: list[bytes] = []
    length = 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length >= size:
            yield b"".join(held)
            held, length = [], 0
    if length:
        yield b"".join(held)


def _beginner(packing: Packing, name: str) -> Callable[[], Any]:
    """What makes a decompressor."""
    if packing == "gzip":
        return lambda: zlib.decompressobj(31)
    if packing == "bzip2":
        return bz2.BZ2Decompressor
    if packing == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    try:
        import zstandard
    except ImportError:
        raise missing_package(f"{name!r} in zstd", "dilated-factory[data]") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY).decompressobj()


def _decompression_errors() -> tuple[type[Exception], ...]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return zlib.error, lzma.LZMAError, EOFError, OSError, ValueError
    return zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, ZstdError
