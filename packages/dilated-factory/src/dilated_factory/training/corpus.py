"""A corpus from files and folders: which are read, and what is trained on and held out of them."""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dilated_factory.configs.models import READING, TrainConfig
from dilated_factory.corpora.contents import BrokenFileError, Content, content_of
from dilated_factory.corpora.documents import Source
from dilated_factory.corpora.tokens import BYTES, Bytes, Tokenizer
from dilated_factory.errors import CorpusError
from dilated_factory.training.finding import find_files, matches, standard_library
from dilated_factory.training.token_cache import (
    Order,
    Side,
    cached_tokens,
    drop_pages,
    hash_share,
)

Progress = Callable[[str, float], None]


class Reading(NamedTuple):
    """What became of some files, for a table: read as what, or why not."""

    what: str
    files: int
    example: str
    was_read: bool


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out; bytes, unless a tokenizer was given.

    ``train`` and ``validation`` are one-dimensional tensors, uint8, uint16 or int32: whole
    documents one after the other, in the order of their files' names, with nothing in between but
    what the tokenizer ends a document with; both are parts of one mapped file. ``bytes_share`` is
    how many bytes the files hold for each byte of the tokens: 1, unless the tokenizer changes
    texts. ``digest`` is a
    SHA-256 over both and where documents end, so that a resumed run notices when its corpus has
    changed. ``ends`` is where documents end, counted from the beginning of ``train``: int64,
    rising. ``skipped`` files were not read; ``readings`` says which and why. ``drop_pages`` lets go
    of the memory of what was looked at: the system has the file.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> corpus = load_corpus(["text"], validation_fraction=0.1)
        >>> len(corpus.train) + len(corpus.validation), corpus.train.dtype
        (1900, torch.uint8)
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    skipped: int
    digest: str
    ends: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    readings: tuple[Reading, ...] = ()
    drop_pages: Callable[[], None] = lambda: None
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


@dataclass(frozen=True, kw_only=True)
class _How:
    """The options of `load_corpus`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    text_field: str | None = None
    raw: bool = False
    broken: Literal["error", "skip"] = "error"
    split: Literal["file", "document"] = "file"
    tokenizer: Tokenizer = BYTES
    cache: Path | None = None
    on_progress: Progress = lambda what, share: None

    def takes(self, name: str) -> bool:
        """Whether the globs let a file through."""
        return (not self.include or matches(name, self.include)) and not matches(name, self.exclude)


def load_corpus(
    paths: Sequence[str | Path] = (),
    *,
    validation_fraction: float = 0.05,
    validation: Sequence[str | Path] = (),
    digest: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_field: str | None = None,
    raw: bool = False,
    broken: Literal["error", "skip"] = "error",
    split: Literal["file", "document"] = "file",
    tokenizer: Tokenizer = BYTES,
    cache: str | Path | None = None,
    on_progress: Progress = lambda what, share: None,
) -> Corpus:
    """Read files and folders into a :class:`Corpus`; no paths means :func:`standard_library`.

    A file belongs to validation if the hash of its path, relative to the folder it was found
    under, falls in the lowest ``validation_fraction``; so a file keeps its side when others come
    or go. If that leaves one side empty, the file with the nearest hash changes sides; a corpus
    of a single file is cut instead, and its end is held out, unless it has rows: then it is split
    by document.

    Text in gzip, bzip2, xz and zstd is decompressed, whatever the file is called. Files that hold
    no text, or cannot be read, are skipped and counted; hidden files, ``__pycache__``, empty files
    and run folders inside a given folder are passed over. Bytes of plain text are copied into a
    nameless file, all else into the cache, which is made once; both are mapped.

    Args:
        paths: files and folders.
        validation_fraction: share that is held out.
        validation: files and folders that are held out instead; then ``paths`` has no other.
        digest: that of an earlier reading. Before, files were read as bytes whatever they held, run
            folders too, and the digest said nothing of documents; if it is of such a reading, the
            corpus is that.
        include: globs of names of files to read, all without any. ``*`` spans folders too, and a
            glob may also match the last part of a name.
        exclude: globs of names that are not read.
        text_field: documents are this field of the rows of JSON lines, Parquet and Arrow, which a
            file is by its content, or JSON lines by its name. Other text is text.
        raw: read every file as the bytes that it is.
        broken: whether a damaged file is an error or skipped.
        split: "document" holds out rows by a hash of each.
        tokenizer: what makes tokens.
        cache: the folder of the cache; by default that of the user (``$XDG_CACHE_HOME/dilated``).
        on_progress: is told what is done, and which share of it, while a cache is made.

    Raises:
        CorpusError: a path does not exist, there is nothing to read, a file is damaged, or a row
            has no such field or no string in it.
        MissingPackageError: a file needs a package that is not installed.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> corpus = load_corpus(["text"])
        >>> bytes(corpus.train[:9].tolist())
        b'Any bytes'
    """
    how = _How(
        include=include, exclude=exclude, text_field=text_field, raw=raw, broken=broken,
        split=split, tokenizer=tokenizer, cache=None if cache is None else Path(cache),
        on_progress=on_progress,
    )  # fmt: skip
    is_plain = how == replace(_How(), cache=how.cache, on_progress=on_progress)
    if digest is None or validation or not is_plain:
        return _load(paths, validation, validation_fraction, how)[0]
    return _load_again(paths, validation_fraction, how, digest)


_EARLIER = _How(raw=True)


def _load_again(paths: Sequence[str | Path], fraction: float, how: _How, digest: str) -> Corpus:
    """The corpus of a run, as it was read then, if it is still there."""
    corpus: Corpus | CorpusError
    try:
        corpus, before = _load(paths, (), fraction, how)
    except CorpusError as error:
        corpus = error
    else:
        if digest in (corpus.digest, before):
            return replace(corpus, digest=digest)
    for with_runs in (False, True):
        earlier, before = _load(paths, (), fraction, _EARLIER, with_runs=with_runs)
        if before == digest:
            return replace(earlier, digest=before)
    if isinstance(corpus, CorpusError):
        raise corpus
    return corpus


def corpus_of(
    config: TrainConfig,
    *,
    digest: str | None = None,
    tokenizer: Tokenizer = BYTES,
    cache: str | Path | None = None,
    on_progress: Progress = lambda what, share: None,
) -> Corpus:
    """The corpus of a configuration; the rest is as in `load_corpus`."""
    reading: dict[str, Any] = {name: getattr(config, name) for name in READING}
    return load_corpus(
        config.paths, digest=digest, tokenizer=tokenizer, cache=cache, on_progress=on_progress,
        **reading,
    )  # fmt: skip


def load_held_out(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer = BYTES,
    *,
    cache: str | Path | None = None,
    **reading: Any,
) -> Corpus:
    """All of the given files and folders, in the order of their names, and nothing to train on.

    The options are those of `load_corpus` by which files are read: `FILES`.

    Raises:
        CorpusError: a path does not exist, or there is nothing to read.
    """
    how = _How(tokenizer=tokenizer, cache=None if cache is None else Path(cache), **reading)
    sources, readings = _sources(paths, how)
    return _corpus(sources, [1] * len(sources), how, 0.0, readings)[0]


def _sources(
    paths: Sequence[str | Path], how: _How, *, with_runs: bool = False
) -> tuple[list[Source], list[Reading]]:
    """The files to read, and what became of all that were found."""
    found = find_files(paths, with_runs=with_runs) if paths else standard_library()
    tables = [path for _, path in found if how.text_field and path.suffix == ".arrow"]
    saved = {folder for path in tables for folder in (path.parent, path.parent.parent)}
    sources: list[Source] = []
    became: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name, path in found:
        if not how.takes(name):
            source: Source | str = "left out by --include and --exclude"
        elif path.parent in saved and matches(name, _RECORDS):
            source = "what datasets keeps beside its tables"
        else:
            source = _source(name, path, how, raw=how.raw or not paths)
        if isinstance(source, Source):
            sources.append(source)
            became[_label(source, how), True].append(name)
        else:
            became[source, False].append(name)
    readings = [
        Reading(what, len(names), names[0], was_read)
        for (what, was_read), names in sorted(became.items(), key=lambda item: not item[0][1])
    ]
    if not sources:
        places = ", ".join(map(str, paths)) or "the standard library"
        why = "".join(f"; {each.files} skipped: {each.what}" for each in readings)
        hint = " (--raw reads their bytes)" if "binary" in why else ""
        raise CorpusError(f"the corpus is empty: no file with content in {places}{why}{hint}.")
    return sources, readings


_RECORDS = ("state.json", "dataset_info.json", "dataset_dict.json", "cache-*.arrow")


def _source(name: str, path: Path, how: _How, *, raw: bool) -> Source | str:
    """A file, or why it is not read."""
    try:
        with path.open("rb") as file:
            now = os.fstat(file.fileno())
        if not now.st_size:
            return "empty"
        if raw:
            content: Content | str = Content("text")
        else:
            content = content_of(path, name, by_field=how.text_field is not None)
    except OSError:
        return "cannot be read"
    except BrokenFileError:
        if how.broken == "error":
            raise
        return "broken"
    if isinstance(content, str):
        return content
    return Source(name, path, content, now.st_size, now.st_mtime_ns)


def _label(source: Source, how: _How) -> str:
    is_rows = how.text_field is None and source.name.endswith((".jsonl", ".ndjson"))
    return f"{source.content}{' with its JSON; --text-field takes one field' * is_rows}"


def _has_rows(source: Source) -> bool:
    return source.content.form != "text"


def _load(
    paths: Sequence[str | Path],
    validation: Sequence[str | Path],
    fraction: float,
    how: _How,
    *,
    with_runs: bool = False,
) -> tuple[Corpus, str]:
    """A corpus, and the digest that it had before digests said where documents end."""
    sources, readings = _sources(paths, how, with_runs=with_runs)
    if how.text_field is not None and not any(map(_has_rows, sources)):
        raise CorpusError(
            f"--text-field needs a file of JSON lines, Parquet or Arrow. Got {how.text_field!r} "
            f"and {len(sources)} of text."
        )
    names = dict.fromkeys(source.name for source in sources)
    sides: list[Side]
    if validation:
        held, more = _sources(validation, replace(how, include=(), exclude=()))
        given = {source.path.resolve() for source in held}
        sources = [source for source in sources if source.path.resolve() not in given]
        if not sources:
            raise CorpusError("nothing is left to train on: all files are held out.")
        sides = [_drawn(False)] * len(sources) + [_drawn(True)] * len(held)
        return _corpus(sources + held, sides, how, 0.0, readings + more)
    if how.split == "document" or (len(names) == 1 and _has_rows(sources[0])):
        sides = [
            None if _has_rows(each) else _drawn(_name_share(each.name) < fraction)
            for each in sources
        ]
    elif len(names) == 1:
        sides = [_drawn(False)] * len(sources)
    else:
        held_out = _held_out(names, fraction)
        sides = [_drawn(source.name in held_out) for source in sources]
    order = sorted(range(len(sources)), key=lambda index: sides[index] == 1)
    return _corpus([sources[i] for i in order], [sides[i] for i in order], how, fraction, readings)


def _drawn(is_held_out: bool) -> Side:
    return 1 if is_held_out else 0


def _name_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return hash_share(name.encode("utf-8", "surrogateescape"))


def _held_out(names: Iterable[str], fraction: float) -> set[str]:
    by_hash = sorted(names, key=lambda name: (_name_share(name), name))
    count = sum(_name_share(name) < fraction for name in by_hash)
    return set(by_hash[: min(max(count, 1), len(by_hash) - 1)])


def _corpus(
    sources: Sequence[Source],
    sides: Sequence[Side],
    how: _How,
    fraction: float,
    readings: list[Reading],
) -> tuple[Corpus, str]:
    """The corpus of files on their sides, training first, and its digest as it once was.

    Of files that are all on the first side, the end is held out if a fraction is to be.
    """
    plain = isinstance(how.tokenizer, Bytes) and None not in sides
    if plain and all(source.content == ("text", "") for source in sources):
        held = _spooled([source.path for source in sources], sides.count(0))
    else:
        held = _from_cache(sources, sides, how, fraction)
    names = [
        tuple(
            dict.fromkeys(s.name for s, x in zip(sources, sides, strict=True) if x in (side, None))
        )
        for side in (0, 1)
    ]
    cut, total = held.cut, len(held.tokens)
    if not total:
        raise CorpusError("the corpus is empty: no document of its files has content.")
    if fraction:
        if set(sides) == {0}:
            cut, names[1] = total - max(1, round(total * fraction)), names[0]
            if cut < 1:
                raise CorpusError(
                    f"a corpus of one file needs at least 2 bytes. {names[0][0]!r} has {total}."
                )
        elif not 0 < cut < total:
            raise CorpusError(
                "validation_fraction must leave documents on both sides. Got "
                f"{fraction} of {len(held.ends)}; equal ones are on one side."
            )
    before = hashlib.sha256(cut.to_bytes(8, "big"))
    held.hash_into(before)
    digest = hashlib.sha256(before.digest() + held.ends.numpy().tobytes())
    readings = readings + held.readings
    return Corpus(
        held.tokens[:cut],
        held.tokens[cut:],
        names[0],
        names[1],
        sum(each.files for each in readings if not each.was_read and each.files),
        digest.hexdigest(),
        held.ends,
        tuple(readings),
        held.drop_pages,
        how.tokenizer,
        held.bytes_share,
    ), before.hexdigest()


class _Mapped(NamedTuple):
    """Tokens in a mapped file, those to train on first."""

    tokens: Tensor
    ends: Tensor
    cut: int  # where the first side ends
    hash_into: Callable[["hashlib._Hash"], None]
    drop_pages: Callable[[], None]
    readings: list[Reading]
    bytes_share: float = 1.0


def _spooled(paths: Sequence[Path], first: int) -> _Mapped:
    """All files one after the other, the first so many to train on.

    They are a nameless file that is mapped into memory: a copy, so that nobody changes it
    while a run reads it, which the system keeps in memory as far as there is room.
    """
    ends = []
    with tempfile.TemporaryFile() as spool:
        for path in paths:
            with path.open("rb") as file:
                shutil.copyfileobj(file, spool, 2**20)
            ends.append(spool.tell())
        spool.flush()
        if not ends[-1]:
            raise CorpusError("the corpus is empty: its files were emptied while they were read.")
        # Not read-only, because torch warns about tensors over memory that it must not write.
        mapped = mmap.mmap(spool.fileno(), ends[-1])

    def hash_into(digest: "hashlib._Hash") -> None:
        for start in range(0, len(mapped), 2**24):
            digest.update(mapped[start : start + 2**24])
            drop_pages(mapped)

    return _Mapped(
        torch.frombuffer(mapped, dtype=torch.uint8),
        torch.tensor(ends),
        ends[first - 1] if first else 0,
        hash_into,
        lambda: drop_pages(mapped),
        [],
    )


def _from_cache(
    sources: Sequence[Source], sides: Sequence[Side], how: _How, fraction: float
) -> _Mapped:
    skip = how.broken == "skip"
    order = Order(tuple(sources), tuple(sides), fraction, how.text_field, skip, how.tokenizer)
    made = cached_tokens(order, how.cache, on_progress=how.on_progress)
    readings = [Reading(f"broken: {why}", 1, name, False) for name, why in made.broken.items()]
    if made.empty:
        readings.append(Reading(f"{made.empty:,} documents without content", 0, "", False))
    return _Mapped(
        made.tokens,
        made.ends,
        made.counts["tokens"][0],
        lambda digest: digest.update(made.digest.encode()),
        made.drop_pages,
        readings,
        sum(made.counts["bytes"]) / max(1, sum(made.counts["decoded"])),
    )
