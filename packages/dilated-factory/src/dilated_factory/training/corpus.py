"""A corpus of bytes from files and folders, split by file into training and validation."""

import hashlib
import mmap
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dilated_factory.corpora.tokens import BYTES, Bytes, Tokenizer
from dilated_factory.errors import CorpusError
from dilated_factory.training.run_folder import is_run_folder


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, or tokens of them.

    ``train`` and ``validation`` are one-dimensional uint8 tensors: whole files one after the
    other, in the order of their names, nothing in between; both are parts of one mapped file. With
    another ``tokenizer`` they are int32, and each file ends with its token for that, if it has one;
    ``bytes_share`` is 1, or how many bytes the files hold for each byte of the tokens, where the
    tokenizer changes texts.
    ``digest`` is a SHA-256 over both, so
    that a resumed run notices when its corpus has changed. ``ends`` are where documents, which are
    files, end, counted from the beginning of ``train``.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> corpus = load_corpus(["text"])
        >>> len(corpus.train), len(corpus.validation)
        (1805, 95)
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    skipped: int
    digest: str
    ends: tuple[int, ...] = ()
    tokenizer: Tokenizer = BYTES
    bytes_share: float = 1.0

    def bytes_in(self, tokens: Tensor) -> float:
        """How many bytes of the files tokens stand for, whole numbers of any shape."""
        if isinstance(self.tokenizer, Bytes):
            return tokens.numel()
        return self.bytes_share * self.tokenizer.sizes[tokens.to(torch.int64)].sum().item()

    @property
    def bytes_per_token(self) -> float:
        """About how many bytes a token stands for, by the first that are held out."""
        some = self.validation[:65536]
        return max(self.bytes_in(some), 1.0) / max(len(some), 1)


def load_corpus(
    paths: Sequence[str | Path] = (),
    *,
    validation_fraction: float = 0.05,
    digest: str | None = None,
    tokenizer: Tokenizer = BYTES,
) -> Corpus:
    """Read files and folders into a :class:`Corpus`; no paths means :func:`standard_library`.

    A file belongs to validation if the hash of its path, relative to the folder it was found
    under, falls in the lowest ``validation_fraction``; so a file keeps its side when others come
    or go. If that leaves one side empty, the file with the nearest hash changes sides; a corpus
    of a single file is cut instead, and its end is held out. Files that cannot be read are
    skipped and counted; hidden files, ``__pycache__``, empty files and run folders inside a given
    folder are passed over. Run folders were not always: if the corpus has the ``digest`` of an
    earlier reading only with them, they are read.

    Raises:
        CorpusError: a path does not exist, or there is nothing to read.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> load_corpus(["text"], validation_fraction=0.1).train_files
        ('text',)
    """
    corpus = _tokenized(_split(*_readable(paths), validation_fraction), tokenizer)
    if digest not in (None, corpus.digest) and isinstance(tokenizer, Bytes):
        earlier = _split(*_readable(paths, with_runs=True), validation_fraction)
        if earlier.digest == digest:
            return earlier
    return corpus


def _split(files: dict[str, list[Path]], skipped: int, validation_fraction: float) -> Corpus:
    if len(files) == 1:
        ((name, places),) = files.items()
        content, _, ends = _spool([places])
        cut = len(content) - max(1, round(len(content) * validation_fraction))
        if cut < 1:
            raise CorpusError(f"a corpus of one file needs at least 2 bytes. {name!r} has 1.")
        return _corpus(content, cut, (name,), (name,), skipped, ends)
    held_out = _held_out(files, validation_fraction)
    train = tuple(name for name in files if name not in held_out)
    validation = tuple(name for name in files if name in held_out)
    content, groups, ends = _spool([files[name] for name in (*train, *validation)])
    return _corpus(content, groups[len(train) - 1], train, validation, skipped, ends)


def load_held_out(paths: Sequence[str | Path], tokenizer: Tokenizer = BYTES) -> Corpus:
    """All bytes of the given files and folders, in the order of their names, none to train on.

    Raises:
        CorpusError: a path does not exist, or there is nothing to read.
    """
    files, skipped = _readable(paths)
    content, _, ends = _spool(list(files.values()))
    return _tokenized(_corpus(content, 0, (), tuple(files), skipped, ends), tokenizer)


def _tokenized(corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """A corpus of bytes as tokens."""
    if isinstance(tokenizer, Bytes):
        return corpus
    cut, end, ends = len(corpus.train), tokenizer.end_of_document, []
    sides: list[list[Tensor]] = [[], []]
    length = counted = 0
    for start, stop in pairwise(sorted({0, cut, *corpus.ends})):
        side = (
            corpus.train[start:stop] if stop <= cut else corpus.validation[start - cut : stop - cut]
        )
        (ids,) = tokenizer.encode([bytes(side.numpy())])
        if stop in corpus.ends:
            ids += [] if end is None else [end]
            ends.append(length + len(ids))
        length += len(ids)
        sides[stop > cut].append(torch.tensor(ids, dtype=torch.int32))
        counted += int(tokenizer.sizes[ids].sum())
    train, validation = (
        torch.cat(side) if side else torch.empty(0, dtype=torch.int32) for side in sides
    )
    digest = hashlib.sha256((corpus.digest + tokenizer.digest).encode()).hexdigest()
    return replace(
        corpus, train=train, validation=validation, ends=tuple(ends), digest=digest,
        tokenizer=tokenizer, bytes_share=(cut + len(corpus.validation)) / max(counted, 1),
    )  # fmt: skip


def find_files(paths: Iterable[str | Path], *, with_runs: bool = False) -> list[tuple[str, Path]]:
    """Regular files under the given paths as sorted (name, path), each file once.

    The name is the path relative to the given folder, with forward slashes. Run folders inside it
    are passed over unless ``with_runs``: a run that is part of its corpus would change it.

    Raises:
        CorpusError: a path does not exist.
    """
    found: dict[Path, str] = {}
    for given in map(Path, paths):
        if given.is_dir():
            for path in _walk(given, with_runs=with_runs):
                found.setdefault(path.resolve(), path.relative_to(given).as_posix())
        elif given.is_file():
            found.setdefault(given.resolve(), given.name)
        else:
            raise CorpusError(f"path must be an existing file or folder. Got {str(given)!r}.")
    return sorted((name, path) for path, name in found.items())


def standard_library() -> list[tuple[str, Path]]:
    """The Python sources of the running interpreter's standard library, its tests included."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return sorted(
        (path.relative_to(root).as_posix(), path)
        for path in _walk(root)
        if path.suffix == ".py" and installed.isdisjoint(path.relative_to(root).parts)
    )


def _readable(
    paths: Sequence[str | Path], *, with_runs: bool = False
) -> tuple[dict[str, list[Path]], int]:
    """The files of each name that have content, and how many files could not be read."""
    found: dict[str, list[Path]] = {}
    skipped = 0
    for name, path in find_files(paths, with_runs=with_runs) if paths else standard_library():
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError:
            skipped += 1
            continue
        if size:
            found.setdefault(name, []).append(path)
    if not found:
        places = ", ".join(str(path) for path in paths) or "the standard library"
        unreadable = f"; {skipped} could not be read" if skipped else ""
        raise CorpusError(f"the corpus is empty: no file with content in {places}{unreadable}.")
    return found, skipped


def _spool(groups: Sequence[Sequence[Path]]) -> tuple[mmap.mmap, list[int], list[int]]:
    """All files one after the other, and where each group and each file ends.

    They are a nameless file that is mapped into memory: a copy, so that nobody changes it
    while a run reads it, which the system keeps in memory as far as there is room.
    """
    groups_end, ends = [], []
    with tempfile.TemporaryFile() as spool:
        for group in groups:
            for path in group:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, spool)
                ends.append(spool.tell())
            groups_end.append(ends[-1])
        spool.flush()
        if not ends[-1]:
            raise CorpusError("the corpus is empty: its files were emptied while they were read.")
        # Not read-only, because torch warns about tensors over memory that it must not write.
        return mmap.mmap(spool.fileno(), ends[-1]), groups_end, ends


def _walk(root: Path, *, with_runs: bool = True) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not _passed_over(name) and (with_runs or not is_run_folder(Path(folder, name)))
        ]
        for name in files:
            path = Path(folder, name)
            # Only regular files: reading a named pipe would wait for a writer forever.
            if not _passed_over(name) and path.is_file():
                yield path


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _held_out(names: Iterable[str], fraction: float) -> set[str]:
    by_hash = sorted(names, key=lambda name: (_hash_share(name), name))
    count = sum(_hash_share(name) < fraction for name in by_hash)
    return set(by_hash[: min(max(count, 1), len(by_hash) - 1)])


def _corpus(
    content: mmap.mmap,
    cut: int,
    train_files: tuple[str, ...],
    validation_files: tuple[str, ...],
    skipped: int,
    ends: Sequence[int],
) -> Corpus:
    digest = hashlib.sha256(cut.to_bytes(8, "big"))
    digest.update(content)
    data = torch.frombuffer(content, dtype=torch.uint8)
    return Corpus(
        data[:cut],
        data[cut:],
        train_files,
        validation_files,
        skipped,
        digest.hexdigest(),
        tuple(ends),
    )
