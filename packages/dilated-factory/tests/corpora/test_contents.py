"""What files hold: text by its content, compressed or not, and what is neither."""

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_factory.corpora.contents import (
    BrokenFileError,
    Content,
    content_of,
    pieces,
)

zstandard = pytest.importorskip("zstandard", reason="the extra data has it")
WORDS = b" ".join(random.Random(0).choices([b"segment", b"rate", b"head", b"key"], k=60_000))
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def look(folder: Path, content: bytes, name: str = "file", *, by_field: bool = False) -> object:
    (folder / name).write_bytes(content)
    return content_of(folder / name, name, by_field=by_field)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["text", "text.png"])
def test_compressed_text_is_told_by_its_content_and_read_whole(
    packing: str, name: str, tmp_path: Path
) -> None:
    packed = PACK[packing](WORDS[:5000]) + PACK[packing](WORDS[5000:])  # members, as pigz writes
    assert look(tmp_path, packed, name) == Content("text", packing)
    assert b"".join(pieces(tmp_path / name, name, packing)) == WORDS  # type: ignore[arg-type]  # one of PACK


@pytest.mark.parametrize("packing", PACK)
def test_a_file_cut_or_changed_in_the_middle_is_broken_at_a_byte(
    packing: str, tmp_path: Path
) -> None:
    packed = PACK[packing](WORDS)
    middle = len(packed) // 2
    changed = bytearray(packed)
    changed[middle : middle + 40] = bytes(40)
    for content in (packed[:middle], bytes(changed)):
        path = tmp_path / "shard"
        path.write_bytes(content)
        with pytest.raises(
            BrokenFileError, match=rf"'shard' is broken at byte [\d,]+ of .*{packing}"
        ):
            list(pieces(path, "shard", packing))  # type: ignore[arg-type]  # one of PACK


def test_padding_between_members_is_no_content(tmp_path: Path) -> None:
    packed = gzip.compress(b"one\n") + bytes(512) + gzip.compress(b"two\n") + bytes(9000)
    assert look(tmp_path, packed) == Content("text", "gzip")
    assert b"".join(pieces(tmp_path / "file", "file", "gzip")) == b"one\ntwo\n"


@pytest.mark.parametrize("packing", PACK)
def test_what_expands_a_thousand_times_is_read_whole(packing: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(PACK[packing](b"a" * 2**25))
    assert sum(map(len, pieces(path, "bomb", packing))) == 2**25  # type: ignore[arg-type]  # one of PACK


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary: NUL bytes"),
        ("text".encode("utf-16"), "binary: NUL bytes"),
        (bytes(range(1, 32)) * 9, "binary: control characters"),
        (gzip.compress(b"\0tar"), "binary: NUL bytes, in gzip"),
        (gzip.compress(b""), "empty"),
        (b"PAR1....", "Parquet: needs --text-field"),
        (b"ARROW1\0\0", "Arrow: needs --text-field"),
    ],
    ids=["png", "utf-16", "controls", "tar", "empty", "parquet", "arrow"],
)
def test_what_is_no_text_says_why(content: bytes, why: str, tmp_path: Path) -> None:
    assert look(tmp_path, content) == why


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_text_is_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert look(folder, text.encode()) == Content("text")
    assert look(folder, text.encode("latin-1", "ignore") + b"\r\n\t\x1b") == Content("text")


@pytest.mark.parametrize(
    ("content", "name", "form"),
    [
        (b'{"text": "a"}\n', "shard", "JSON lines"),
        (b'\n {"text": "a"}', "shard", "JSON lines"),
        (b"{\n", "a.jsonl", "JSON lines"),
        (gzip.compress(b"[]"), "b.JSON.gz", "JSON lines"),
        (b"{not json}\n", "notes", "text"),
        (b"[1]\n", "notes", "text"),
        (b"{" * 60_000, "deep", "text"),
        (b"PAR1", "x", "Parquet"),
        (b"ARROW1", "x", "Arrow"),
        (b"\xff\xff\xff\xff", "x.arrow", "Arrow"),
    ],
    ids=[
        "row",
        "after_a_line",
        "name",
        "packed",
        "braces",
        "list",
        "deep",
        "parquet",
        "file",
        "stream",
    ],
)
def test_rows_are_told_by_content_or_name(
    content: bytes, name: str, form: str, tmp_path: Path
) -> None:
    found = look(tmp_path, content, name, by_field=True)
    assert isinstance(found, Content)
    assert found.form == form
    if form == "JSON lines":
        without = look(tmp_path, content, name)
        assert isinstance(without, Content)
        assert without.form == "text"
