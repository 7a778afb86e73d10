"""Code whose distant bytes are worth something: pages of files, version after version."""

import keyword
import random
import re
from collections.abc import Sequence
from pathlib import Path

from dilated_factory.errors import CorpusError
from dilated_factory.training.token_cache import hash_share

HELD_OUT = 0.1  # share of the source files
PAGE = 1024  # bytes
VERSIONS = 6
_NAME = re.compile(rb"\b[A-Za-z_]{5,}\b")
_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)


def write_revisions(
    files: Sequence[tuple[str, Path]], folder: Path, *, train: int, held_out: int, seed: int
) -> None:
    """Write the texts ``train`` and ``held-out`` into a folder: so many bytes of documents.

    A document is a page of a file, 1024 bytes of it, in six versions one after the other, each with
    a newline at its end, as a store of versions keeps them. A version is edited in place: what it
    says next stands 1024 bytes before the byte that it follows. A source file is on one side only.

    Args:
        files: names and paths, in order, of sources; some of them longer than a page.
        folder: it must be new.
        train: bytes to train on, at least.
        held_out: bytes held out, at least.
        seed: of all that is drawn.

    Raises:
        CorpusError: on one side there is no file that is longer than a page.
    """
    sides: dict[str, list[Path]] = {"train": [], "held-out": []}
    for name, path in files:
        if path.stat().st_size > PAGE:
            share = hash_share(name.encode("utf-8", "surrogateescape"))
            sides["held-out" if share < HELD_OUT else "train"].append(path)
    if not all(sides.values()):
        raise CorpusError(
            f"files must be sources of more than {PAGE} bytes, some to train on and some to hold "
            f"out. Got {len(sides['train'])} and {len(sides['held-out'])}."
        )
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for side, size in (("train", train), ("held-out", held_out)):
        texts: dict[Path, bytes] = {}
        with (folder / side).open("wb") as written:
            while written.tell() < size:
                path = generator.choice(sides[side])
                text = texts.setdefault(path, path.read_bytes())
                start = text.rfind(b"\n", 0, generator.randint(0, len(text) - PAGE)) + 1
                version = text[start : start + PAGE]
                for _ in range(VERSIONS):
                    written.write(version + b"\n")
                    version = edited(version, generator)


def edited(text: bytes, generator: random.Random) -> bytes:
    """The text with one of its names, wherever it stands, in the other case."""
    names = sorted(set(_NAME.findall(text)) - _KEYWORDS)
    if not names:
        return text
    name = generator.choice(names)
    return re.sub(rb"\b%b\b" % name, name.swapcase(), text)
