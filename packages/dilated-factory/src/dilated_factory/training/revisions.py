"""Code whose distant bytes are worth something: the history of sources, version by version."""

import keyword
import random
import re
from collections.abc import Sequence
from pathlib import Path

from dilated_factory.training.token_cache import hash_share

HELD_OUT = 0.1  # share of the source files
_SHORTEST, _LONGEST = 160, 640  # bytes of a version, about
_PIECE = 240  # bytes of one file at most, about
_VERSIONS = 5
_NAME = re.compile(rb"\b[A-Za-z_]{5,}\b")
_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)


def write_revisions(
    files: Sequence[tuple[str, Path]], folder: Path, *, train: int, held_out: int, seed: int
) -> None:
    """Write the texts ``train`` and ``held-out`` into a folder: so many bytes of documents.

    A document is pieces of some files that follow each other in the order of their paths, in five
    versions, one after the other: each has one piece edited, in which a name has become another and
    a line has gone. So what a version says stands some hundred bytes back. A source file is on one
    side only.

    Args:
        files: names and paths, in order, of sources.
        folder: it must be new.
        train: bytes to train on, at least.
        held_out: bytes held out, at least.
        seed: of all that is drawn.
    """
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    share = {name: hash_share(name.encode("utf-8", "surrogateescape")) for name, _ in files}
    for side, size in (("train", train), ("held-out", held_out)):
        wanted = side == "held-out"
        chosen = [x for x in files if (share[x[0]] < HELD_OUT) == wanted] or list(files)
        texts: dict[str, bytes] = {}
        with (folder / side).open("wb") as written:
            while written.tell() < size:
                written.write(_document(chosen, texts, generator))


def _document(
    files: Sequence[tuple[str, Path]], texts: dict[str, bytes], generator: random.Random
) -> bytes:
    """Versions of pieces of files in the order of their paths."""
    wanted = _SHORTEST * (_LONGEST / _SHORTEST) ** generator.random()
    index = generator.randrange(len(files))
    pieces: list[tuple[bytes, bytes]] = []
    while sum(len(piece) for _, piece in pieces) < wanted:
        name, path = files[index % len(files)]
        text = texts.setdefault(name, path.read_bytes())
        start = text.rfind(b"\n", 0, generator.randint(0, max(0, len(text) - _PIECE))) + 1
        stop = text.find(b"\n", start + generator.randint(_PIECE // 3, _PIECE)) + 1
        piece = text[start : stop or len(text)][: 2 * _PIECE].rstrip(b"\n") + b"\n"
        pieces.append((name.encode(), piece))
        index += 1
    versions = []
    for number in range(1, _VERSIONS + 1):
        versions += [b"# %b, version %d\n%b" % (name, number, piece) for name, piece in pieces]
        at = generator.randrange(len(pieces))
        name, piece = pieces[at]
        pieces[at] = name, edited(piece, generator)
    return b"".join(versions)


def edited(text: bytes, generator: random.Random) -> bytes:
    """The text with one of its names changed wherever it stands, and one of its lines left out."""
    lines = text.splitlines(keepends=True)
    if len(lines) > 3:
        del lines[generator.randrange(1, len(lines))]
    text = b"".join(lines)
    names = sorted(set(_NAME.findall(text)) - _KEYWORDS)
    if not names:
        return text
    name = generator.choice(names)
    return re.sub(rb"\b%b\b" % re.escape(name), b"new_" + name, text)
