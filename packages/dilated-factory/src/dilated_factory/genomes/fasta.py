"""The records of a FASTA file, plain or compressed, read anywhere through pyfaidx."""

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dilated_factory.errors import CorpusError, missing_package
from dilated_factory.training.atomic import replacing

_GZIP = b"\x1f\x8b"
# pyfaidx takes these endings for compressed files, whatever is in them.
_COMPRESSED = (".gz", ".bgz", ".bz2", ".zip")


class Genome:
    r"""A FASTA file; headers and line breaks are no part of what is read.

    A plain file is read where it is. One that was compressed by gzip or bgzip is decompressed once,
    into the cache, since gzip cannot be read from its middle. The index of pyfaidx is in the cache
    too, so the file's folder is never written to, and an index that lies there is not trusted.
    A genome can be pickled and used in other processes, each of which opens the file anew.

    Args:
        path: a FASTA file.
        cache: a folder; by default ``$XDG_CACHE_HOME/dilated/genomes``, else that in ``~/.cache``.

    Attributes:
        lengths: bases by the name of the record, which is the first word of its header.

    Raises:
        CorpusError: it is no FASTA file, lines of a record have different lengths, two records have
            one name, or the compressed file is damaged.
        MissingPackageError: pyfaidx is not installed.
        OSError: it cannot be read, or the cache cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> Genome("genome.fa").read("chr1", 3, 8)
        'TNACG'
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None) -> None:
        self.path = Path(path).resolve()
        self.cache = default_cache() if cache is None else Path(cache).resolve()
        if not self.path.is_file():
            raise CorpusError(f"genome must be an existing FASTA file. Got {str(path)!r}.")
        _pyfaidx()
        told = self.path.stat()
        key = f"{self.path}\n{told.st_size}\n{told.st_mtime_ns}".encode("utf-8", "surrogateescape")
        self._key = hashlib.sha256(key).hexdigest()[:32]
        with self.path.open("rb") as file:
            head = file.read(2**16)
        if head.startswith(_GZIP):
            self._plain = self._decompressed()
            with self._plain.open("rb") as file:
                head = file.read(2**16)
        elif self.path.name.lower().endswith(_COMPRESSED):
            raise CorpusError(
                f"a genome must be plain, or compressed by gzip or bgzip. Got {str(path)!r}."
            )
        else:
            self._plain = self.path
        first = head.lstrip()[:1]
        if first not in (b">", b";"):
            raise CorpusError(
                f"a FASTA file must begin with a header, '>'. Got {first!r} in {str(path)!r}."
            )
        self._file: Any = None
        self._process = 0
        index = self._open().index
        self.lengths: Mapping[str, int] = MappingProxyType(
            {name: int(record.rlen) for name, record in index.items()}
        )

    def read(self, name: str, start: int, end: int) -> str:
        """Bases ``start`` to ``end`` of a record, counted from 0, ``end`` left out, as they stand.

        Raises:
            CorpusError: there is no such record, it does not reach so far, or the file has changed.
        """
        length = self.lengths.get(name)
        if length is None:
            raise CorpusError(f"{str(self.path)!r} has no record {name!r}.")
        if not 0 <= start <= end <= length:
            raise CorpusError(
                f"an interval must be in [0, {length}] of {name!r}. Got {start} to {end}."
            )
        sequence = str(self._open().from_file(name, start + 1, end)) if start < end else ""
        if len(sequence) != end - start or not sequence.isascii():
            raise CorpusError(f"{str(self.path)!r} has changed, or holds what is no ASCII text.")
        return sequence

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "lengths": dict(self.lengths)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lengths=MappingProxyType(state["lengths"]))

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()

    def _open(self) -> Any:
        # Processes that fork would share one place in the file.
        if self._file is None or self._process != os.getpid():
            index = self.cache / f"{self._key}.fai"
            if not index.exists():
                with self._making(index) as temporary:
                    self._index(temporary).close()
                    # pyfaidx takes an index for stale that is older than the file.
                    os.utime(temporary, ns=(self._plain.stat().st_mtime_ns,) * 2)
            self._file, self._process = self._index(index), os.getpid()
        return self._file

    def _index(self, index: Path) -> Any:
        pyfaidx = _pyfaidx()
        try:
            return pyfaidx.Faidx(str(self._plain), indexname=str(index), rebuild=False)
        except (pyfaidx.FastaIndexingError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CorpusError(f"{str(self.path)!r} is no valid FASTA file: {reason}") from None

    def _decompressed(self) -> Path:
        plain = self.cache / f"{self._key}.fa"
        if not plain.exists():
            try:
                with (
                    self._making(plain) as temporary,
                    gzip.open(self.path) as file,
                    temporary.open("wb") as out,
                ):
                    shutil.copyfileobj(file, out, 2**20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise CorpusError(f"{str(self.path)!r} is damaged: {error}") from None
        return plain

    def _making(self, path: Path) -> AbstractContextManager[Path]:
        self.cache.mkdir(parents=True, exist_ok=True)
        return replacing(path)


def default_cache() -> Path:
    """Where indices and decompressed genomes are."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dilated" / "genomes"


def _pyfaidx() -> Any:
    try:
        return import_module("pyfaidx")
    except ImportError:
        raise missing_package("reading FASTA", "pyfaidx") from None
