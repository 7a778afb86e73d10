"""Intervals of a genome in BED files, and the windows that are cut out around or inside them."""

import gzip
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload

from dilated_factory.configs.files import open_regular
from dilated_factory.configs.genomes import Placement
from dilated_factory.errors import CorpusError, InputError

_MOST = 2**62  # of a coordinate


class Interval(NamedTuple):
    """Bases ``start`` to ``end`` of a record, counted from 0, ``end`` left out.

    Attributes:
        record: name in the FASTA file.
        start, end: in bases.
        split: the fourth column, where there is one.
        line: of the BED file, counted from 1; 0 for what is of none.
    """

    record: str
    start: int
    end: int
    split: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.record}:{self.start}-{self.end}"


def read_bed(path: str | Path, split: str | None = None) -> list[Interval]:
    r"""The intervals of a BED file, plain or by gzip, in its order.

    Columns are separated by tabs: record, start, end, and with ``split`` the split; further ones
    are left alone. Empty lines, comments and the lines "track" and "browser" are passed over.

    Args:
        path: the file.
        split: take the rows with this fourth column only.

    Raises:
        CorpusError: a line is no interval, or no row is left.
        OSError: there is no such file.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("rows.bed").write_text("chr1\t0\t12\ttrain\nchr1\t100\t116\tvalid\n")
        >>> [str(row) for row in read_bed("rows.bed", "valid")]
        ['chr1:100-116']
    """
    path = Path(path)
    rows: list[Interval] = []
    found: set[str] = set()
    is_plain = path.suffix != ".gz"
    try:
        with (
            open_regular(path) as plain,
            nullcontext(plain) if is_plain else gzip.open(plain) as file,
        ):
            for number, line in enumerate(file, start=1):
                row = _parse(line, f"{str(path)!r}, line {number}", number, split is not None)
                if row is None:
                    continue
                found.add(row.split)
                if split in (None, row.split):
                    rows.append(row)
    except (EOFError, gzip.BadGzipFile) as error:
        raise CorpusError(f"{str(path)!r} is damaged: {error}") from None
    if not rows:
        others = f" of split {split!r}; it has {', '.join(sorted(found))}" if found else ""
        raise CorpusError(f"{str(path)!r} holds no interval{others}.")
    return rows


def _parse(line: bytes, where: str, number: int, with_split: bool) -> Interval | None:
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    if not text.strip() or text.startswith("#") or text.split()[0] in ("track", "browser"):
        return None
    columns = text.split("\t")
    needed = 4 if with_split else 3
    if len(columns) < needed:
        names = "record, start, end" + (", split" if with_split else "")
        raise CorpusError(
            f"{where} must have {needed} columns between tabs: {names}. Got {text[:80]!r}."
        )
    record, first, last = columns[:3]
    digits = all(x.isascii() and x.isdigit() and len(x) < 20 for x in (first, last))
    if not digits or not int(first) < int(last) < _MOST:
        raise CorpusError(
            f"{where} must have 0 <= start < end, in whole numbers. Got start {first[:40]!r} and "
            f"end {last[:40]!r}."
        )
    return Interval(record, int(first), int(last), "".join(columns[3:4]), number)


def require_inside(rows: Sequence[Interval], lengths: Mapping[str, int], source: str) -> None:
    """Raise a `CorpusError` where a row is of no record, or reaches past its end."""
    for row in rows:
        length = lengths.get(row.record)
        if length is None:
            some = ", ".join(list(lengths)[:5])
            raise CorpusError(
                f"{source!r}, line {row.line} must name a record of the genome, such as {some}. "
                f"Got {row.record!r}."
            )
        if row.end > length:
            raise CorpusError(
                f"{source!r}, line {row.line} must end in {row.record!r}, which has {length} "
                f"bases. Got {row.end}."
            )


class GenomeWindows(Sequence[Interval]):
    r"""Windows of ``max_length`` bases at most, one after the other for each row.

    - "hyenadna": one for each row, grown on both sides (on the right by one more where the room is
      odd) and then cut at the ends of the record; of a longer row, its beginning.
    - "caduceus": ``window`` bases from the row's start, wherever it ends, cut into
      ``window / max_length`` parts, of which each is moved into the record where it leaves it.
    - "tiled": the row cut into parts from its start, of which the last may be shorter.

    A record shorter than ``max_length`` gives all of it.

    Args:
        rows: intervals.
        max_length: in bases.
        lengths: bases of each record.
        placement: which of these.
        window: of "caduceus".
        source: what a wrong row is reported as a line of.

    Raises:
        CorpusError: a row is of no record, or reaches past its end.
        InputError: max_length is below 2, or does not divide the window.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> _ = Path("rows.bed").write_text("chr1\t100\t110\n")
        >>> lengths = Genome("genome.fa").lengths
        >>> print(GenomeWindows(read_bed("rows.bed"), 16, lengths, "hyenadna")[0])
        chr1:97-113
    """

    def __init__(
        self,
        rows: Sequence[Interval],
        max_length: int,
        lengths: Mapping[str, int],
        placement: Placement = "hyenadna",
        *,
        window: int = 2**20,
        source: str = "intervals",
    ) -> None:
        if max_length < 2:
            raise InputError(f"max_length must be at least 2. Got {max_length}.")
        if placement == "caduceus" and (max_length > window or window % max_length):
            raise InputError(f"max_length must divide the window of {window}. Got {max_length}.")
        require_inside(rows, lengths, source)
        self.rows, self.max_length, self.placement = rows, max_length, placement
        self.lengths = dict(lengths)
        parts = {"hyenadna": 1, "caduceus": window // max_length}.get(placement)
        self._ends = list(
            accumulate(parts or -(-(row.end - row.start) // max_length) for row in rows)
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Interval: ...
    @overload
    def __getitem__(self, index: slice) -> list[Interval]: ...
    def __getitem__(self, index: int | slice) -> Interval | list[Interval]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}). Got {index}.")
        index %= len(self)
        number = bisect_right(self._ends, index)
        row = self.rows[number]
        part = index - (self._ends[number - 1] if number else 0)
        start, end = self._place(row, part, self.lengths[row.record])
        return row._replace(start=start, end=end)

    def _place(self, row: Interval, part: int, length: int) -> tuple[int, int]:
        size = self.max_length
        if self.placement == "tiled":
            start = row.start + part * size
            return start, min(start + size, row.end)
        if self.placement == "caduceus":
            start = max(0, min(row.start + part * size, length - size))
            return start, min(start + size, length)
        room = size - (row.end - row.start)
        if room <= 0:
            return row.start, row.start + size
        return max(0, row.start - room // 2), min(length, row.end + room - room // 2)
