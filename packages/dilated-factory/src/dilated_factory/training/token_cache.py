"""The tokens of a corpus in one mapped file on disk: made once, complete or absent.

Files are read in groups, and what is done of a group is kept when the process dies. Processes that
want the same tokens at the same time share the groups among them by locks: the ranks of a training,
of any number, and other trainings. What they write does not depend on who wrote it.

    CACHE/<key>/tokens, ends, about.json    a corpus: training first, then what is held out
    CACHE/<key>.parts/00000/...             the same of a group of files, until the corpus is done
"""

import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from dilated_factory.corpora.contents import BrokenFileError
from dilated_factory.corpora.documents import Passage, Source, document_pieces
from dilated_factory.corpora.tokens import Bytes, Tokenizer
from dilated_factory.errors import CorpusError
from dilated_factory.training.atomic import sync, write_text
from dilated_factory.training.lock import FolderLock

Side = Literal[0, 1] | None  # training, held out, or as each document's hash says
_FORMAT = 1
_GROUP = 2**24  # bytes of small files that are read as one group
_BATCH = 2**20  # bytes that a tokenizer gets at once, about
_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int32))
_FILES = ("tokens", "ends")
_PART_FILES = ("0.tokens", "0.lengths", "1.tokens", "1.lengths")
_COUNTS = ("tokens", "documents", "bytes", "decoded")


@dataclass(frozen=True)
class Order:
    """What is to be made tokens of, and how.

    Attributes:
        sources: the files, in the order in which their documents follow each other.
        sides: of each, what its documents are for.
        fraction: which share of the documents is held out where their hashes decide.
        text_field: of rows.
        skip_broken: whether a damaged file is left out; otherwise it is an error.
        tokenizer: what makes tokens.
    """

    sources: tuple[Source, ...]
    sides: tuple[Side, ...]
    fraction: float
    text_field: str | None
    skip_broken: bool
    tokenizer: Tokenizer

    @property
    def key(self) -> str:
        """Names all that decides the tokens; of the files, when they were changed last."""
        files = [
            (source.name, str(source.path.resolve()), *source.content, source.size, source.modified)
            for source in self.sources
        ]
        told = (
            _FORMAT, files, self.sides, self.fraction if None in self.sides else None,
            self.text_field, self.skip_broken, self.tokenizer.digest,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest that holds the vocabulary."""
        most = self.tokenizer.vocab_size - 1
        return next(dtype for dtype in _DTYPES if most <= np.iinfo(dtype).max)

    def groups(self) -> list[range]:
        """Which files are read together: small ones of plain text, up to some size."""
        groups: list[range] = []
        size = _GROUP
        for index, source in enumerate(self.sources):
            alone = source.content != ("text", "")
            size += source.size
            if alone or size > _GROUP:
                groups.append(range(index, index))
                size = _GROUP if alone else source.size
            groups[-1] = range(groups[-1].start, index + 1)
        return groups


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of an `Order`.

    Attributes:
        tokens: (n,) uint8, uint16 or int32, mapped: training first.
        ends: (documents,) int64, mapped: where documents end in tokens.
        counts: of each side, "tokens", "documents", "bytes" of these and, "decoded", of the tokens.
        empty: documents without content, which are left out.
        broken: the damaged files that were left out, and why.
        digest: SHA-256 over tokens and ends.
        drop_pages: lets go of the memory of the map, whose file the system has.
    """

    tokens: Tensor
    ends: Tensor
    counts: dict[str, list[int]]
    empty: int
    broken: dict[str, str]
    digest: str
    drop_pages: Callable[[], None]


def default_cache() -> Path:
    """The folder of this user for what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "dilated"


def cached_tokens(
    order: Order,
    folder: Path | None = None,
    *,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> CachedTokens:
    """The tokens of a corpus, from the cache, or made and put there.

    Args:
        order: what to make tokens of.
        folder: the cache; by default `default_cache`.
        on_progress: is told what is done, and which share of the files.

    Raises:
        CorpusError: a file cannot be read, or changes meanwhile.
        OSError: the cache cannot be written.
    """
    home = folder or default_cache()
    place, parts = home / order.key, home / f"{order.key}.parts"
    while True:
        if place.exists():
            if (found := _opened(place, order.dtype)) is not None:
                return found
            _remove_damaged(place, parts, order.dtype)
        try:
            _make_parts(order, place, parts, on_progress)
            _join_parts(order, place, parts)
        except FileNotFoundError:
            if not place.exists():  # another has made it, and removed the parts
                raise


def _make_parts(
    order: Order, place: Path, parts: Path, on_progress: Callable[[str, float], None]
) -> None:
    """Until all groups are done, by this process or another."""
    groups = order.groups()
    missing = list(range(len(groups)))
    while missing:
        left = []
        for number in missing:
            if place.exists():
                shutil.rmtree(parts, ignore_errors=True)
                return
            part = parts / f"{number:05}"
            if (part / "about.json").exists():
                continue
            part.mkdir(parents=True, exist_ok=True)
            on_progress("reading the corpus", 1 - len(missing) / len(groups))
            with ExitStack() as stack:
                if not _locked(part, stack):
                    left.append(number)
                elif not (part / "about.json").exists() and not place.exists():
                    _write_part(order, groups[number], part)
        if len(left) == len(missing):
            time.sleep(0.05)  # all that is missing is being made by others
        missing = left


def _locked(folder: Path, stack: ExitStack) -> bool:
    """Whether the folder is ours until the stack is left; without locks, two may make the same."""
    try:
        stack.callback(FolderLock(folder).release)
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        pass
    return True


def _write_part(order: Order, group: range, part: Path) -> None:
    broken: dict[str, str] = {}
    temporary = [part / f"{side}.{uuid.uuid4().hex}.tmp" for side in range(2)]
    lengths = array("q"), array("q")
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in temporary]
        writer = _Writer(order.tokenizer, order.dtype, files, lengths)
        for index in group:
            source = order.sources[index]
            before = writer.mark()
            try:
                for piece in _unchanged(source, order.text_field):
                    writer.add(piece, order.sides[index], order.fraction)
                writer.flush()
            except BrokenFileError as error:
                if not order.skip_broken:
                    raise
                writer.back_to(before)
                broken[source.name] = str(error)
    about = {
        "tokens": writer.tokens,
        "documents": [len(each) for each in lengths],
        "bytes": writer.bytes,
        "decoded": writer.decoded,
        "empty": writer.empty,
        "broken": broken,
    }
    for side, path in enumerate(temporary):
        path.replace(part / f"{side}.tokens")
        (part / f"{side}.lengths").write_bytes(lengths[side].tobytes())
    # Not forced to the disk, which takes long: digests tell what a power cut took.
    digests = {name: _digest_of(part / name) for name in _PART_FILES}
    (part / "about.tmp").write_text(_sealed({"digests": digests, **about}))
    (part / "about.tmp").replace(part / "about.json")


def _unchanged(source: Source, text_field: str | None) -> Iterator[Passage]:
    """The pieces of a file, if it is still the one that was found."""
    try:
        yield from document_pieces(source, text_field)
        now = source.path.stat()
    except FileNotFoundError:
        raise CorpusError(f"{source.name!r} was removed while the corpus was read.") from None
    except OSError as error:
        raise BrokenFileError(f"{source.name!r} cannot be read: {error}.") from None
    if (now.st_size, now.st_mtime_ns) != (source.size, source.modified):
        raise CorpusError(f"{source.name!r} was changed while the corpus was read.")


class _Writer:
    """Writes the tokens of documents to the file of their side."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: np.dtype[Any],
        files: Sequence[BinaryIO],
        lengths: Sequence["array[int]"],
    ) -> None:
        self._tokenizer, self._dtype, self._files = tokenizer, dtype, files
        self._lengths = lengths
        self.tokens, self.bytes, self.decoded, self.empty = [0, 0], [0, 0], [0, 0], 0
        self._sizes = tokenizer.sizes.numpy()
        self._held: list[tuple[int, Passage]] = []
        self._size = 0
        self._open = [0, 0]  # tokens of the document that has not ended

    def add(self, piece: Passage, side: Side, fraction: float) -> None:
        if side is None:
            side = 1 if hash_share(piece.data) < fraction else 0
        self._held.append((side, piece))
        self._size += len(piece.data)
        if self._size >= _BATCH:
            self.flush()

    def flush(self) -> None:
        encoded = _encoded(self._tokenizer, [piece.data for _, piece in self._held], self._dtype)
        end = self._tokenizer.end_of_document
        for (side, piece), ids in zip(self._held, encoded, strict=True):
            self._files[side].write(ids.tobytes())
            self.bytes[side] += len(piece.data)
            self.decoded[side] += self._decoded(ids)
            self._open[side] += len(ids)
            if not piece.is_last:
                continue
            if not self._open[side]:
                self.empty += 1
                continue
            if end is not None:
                self._files[side].write(np.array([end], self._dtype).tobytes())
                self._open[side] += 1
            self._lengths[side].append(self._open[side])
            self.tokens[side] += self._open[side]
            self._open[side] = 0
        self._held.clear()
        self._size = 0

    def _decoded(self, ids: "np.ndarray[Any, Any]") -> int:
        is_bytes = isinstance(self._tokenizer, Bytes)
        return len(ids) if is_bytes else int(self._sizes[ids].sum())

    def mark(self) -> tuple[Any, ...]:
        documents = [len(each) for each in self._lengths]
        return [*self.tokens], [*self.bytes], [*self.decoded], self.empty, documents

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """Forget what was added since."""
        self._held.clear()
        self._size, self._open = 0, [0, 0]
        tokens, self.bytes, self.decoded, self.empty, documents = mark
        self.tokens = [*tokens]
        for side, file in enumerate(self._files):
            file.seek(tokens[side] * self._dtype.itemsize)
            file.truncate()
            del self._lengths[side][documents[side] :]


def _encoded(
    tokenizer: Tokenizer, texts: list[bytes], dtype: np.dtype[Any]
) -> list["np.ndarray[Any, Any]"]:
    if isinstance(tokenizer, Bytes):
        return [np.frombuffer(text, np.uint8) for text in texts]
    return [np.asarray(ids, dtype) for ids in tokenizer.encode(texts)]


def hash_share(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def _join_parts(order: Order, place: Path, parts: Path) -> None:
    """Make one corpus of all parts, by one process."""
    with ExitStack() as stack:
        if place.exists() or not _locked(parts, stack):
            time.sleep(0.05)
            return
        if place.exists():
            shutil.rmtree(parts, ignore_errors=True)
            return
        folders = [parts / f"{number:05}" for number in range(len(order.groups()))]
        abouts = [_about_part(folder) for folder in folders]
        if None in abouts:
            return
        temporary = parts / uuid.uuid4().hex
        temporary.mkdir()
        _write_joined(temporary, folders, abouts)
        temporary.rename(place)
        sync(place.parent)
        shutil.rmtree(parts, ignore_errors=True)


def _write_joined(folder: Path, parts: Sequence[Path], abouts: Sequence[Any]) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / "ends").open("wb") as ends:
        last = 0
        for side in range(2):
            for part in parts:
                with (part / f"{side}.tokens").open("rb") as file:
                    shutil.copyfileobj(file, tokens, 2**20)
                here = last + np.fromfile(part / f"{side}.lengths", np.int64).cumsum()
                ends.write(here.tobytes())
                last = int(here[-1]) if len(here) else last
    for name in _FILES:
        sync(folder / name)
    counts = {
        name: [sum(about[name][side] for about in abouts) for side in range(2)] for name in _COUNTS
    }
    told = {
        "digests": {name: _digest_of(folder / name) for name in _FILES},
        **counts,
        "empty": sum(about["empty"] for about in abouts),
        "broken": {name: why for about in abouts for name, why in about["broken"].items()},
    }
    write_text(folder / "about.json", _sealed(told))


def _about_part(folder: Path) -> Any:
    """What is told of a part; of a damaged one nothing, and it is no longer done."""
    try:
        about = _unsealed(folder / "about.json")
        if all(_digest_of(folder / name) == digest for name, digest in about["digests"].items()):
            return about
    except (OSError, ValueError, TypeError):
        pass
    (folder / "about.json").unlink(missing_ok=True)
    return None


def _sealed(values: dict[str, Any]) -> str:
    text = json.dumps(values)
    return json.dumps([values, hashlib.sha256(text.encode()).hexdigest()])


def _unsealed(path: Path) -> dict[str, Any]:
    """Values that `_sealed` wrote; raises ValueError where they are others."""
    values: dict[str, Any]
    values, seal = json.loads(path.read_text())
    if seal != hashlib.sha256(json.dumps(values).encode()).hexdigest():
        raise ValueError("damaged")
    return values


def _opened(place: Path, dtype: np.dtype[Any]) -> CachedTokens | None:
    """What is there, or None if it is damaged."""
    try:
        about = _unsealed(place / "about.json")
        if any(_digest_of(place / name) != about["digests"][name] for name in _FILES):
            return None
        maps = [_map(place / name) for name in _FILES]
        tokens, ends = (
            torch.from_numpy(np.frombuffer(each, kind) if each else np.empty(0, kind))
            for each, kind in zip(maps, (dtype, np.dtype(np.int64)), strict=True)
        )
        counts = {name: about[name] for name in _COUNTS}
        digest = hashlib.sha256(json.dumps([about["digests"], counts]).encode()).hexdigest()
        empty, broken = about["empty"], about["broken"]
    except (OSError, ValueError, TypeError):
        return None

    def drop() -> None:
        for each in maps:
            drop_pages(each)

    return CachedTokens(tokens, ends, counts, empty, broken, digest, drop)


def _map(path: Path) -> mmap.mmap | bytearray:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Of this process alone, since torch warns about tensors over memory that is read only.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray()


def drop_pages(mapped: object) -> None:
    """Let go of the memory of a map of a file; the system has the file."""
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_damaged(place: Path, parts: Path, dtype: np.dtype[Any]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if not _locked(parts, stack):
            time.sleep(0.05)
        elif place.exists() and _opened(place, dtype) is None:
            place.rename(parts / uuid.uuid4().hex)  # removed with the parts
