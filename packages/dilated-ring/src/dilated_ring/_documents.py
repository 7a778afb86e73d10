"""Documents that are packed into one sequence: a pattern begins anew in each of them.

To ring they are a pattern like any other: each span of positions is cut at the documents, and what
lies in one is the pattern's attention of a sequence of its own.
B = 1 sequence, n rows of a span, R packed rows, H query heads, H_kv key heads, D head_dim.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import groupby, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dilated_core import DilatedPattern, Partial, dilated_attention_varlen
from dilated_core.extending import accumulate_dtype
from dilated_core.interfaces import AttentionPattern, KeyRows, PackedRows, SpanAttention, SpanCall


class Piece(NamedTuple):
    """Where a span of positions lies in a document.

    Attributes:
        number: of the document.
        length: its positions.
        inside: the positions of the span in the document.
        rows: their rows in the span.
    """

    number: int
    length: int
    inside: range
    rows: slice


@dataclass(frozen=True, eq=False)
class Documents:
    """A dilated pattern in each of several documents, one after the other (an `AttentionPattern`).

    Attributes:
        pattern: of each document.
        ends: 0, and the end of each document; those of a sequence that they fill.
    """

    pattern: DilatedPattern
    ends: tuple[int, ...]

    @cached_property
    def code(self) -> str:
        """The pattern's, with a digest of the ends."""
        return f"{self.pattern.code} in documents {_digest(self.ends)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and self.code == other.code

    def __hash__(self) -> int:
        return hash(self.code)

    @property
    def spans(self) -> "DocumentSpans":
        """The attention span by span."""
        return DocumentSpans(self.pattern.spans, self)

    @property
    def each(self) -> Iterator[int]:
        """The positions of each document."""
        return (end - start for start, end in pairwise(self.ends))

    def pieces(self, span: range) -> Iterator[Piece]:
        """The parts of a span, document by document."""
        first = bisect_right(self.ends, span.start) - 1
        for number in range(first, bisect_left(self.ends, span.stop)):
            piece = self.piece(span, number)
            if piece is not None:
                yield piece

    def piece(self, span: range, number: int) -> Piece | None:
        """The part of a span in a document."""
        begin, end = self.ends[number : number + 2]
        start, stop = max(begin, span.start), min(end, span.stop)
        if start >= stop:
            return None
        rows = slice(start - span.start, stop - span.start)
        return Piece(number, end - begin, range(start - begin, stop - begin), rows)


def whole_pattern(
    pattern: AttentionPattern, query: Tensor, cu_seqlens: Tensor | None, length: int
) -> AttentionPattern:
    """The pattern of a sequence: itself, or in each document.

    Raises:
        TypeError, ValueError: the documents do not fit it, or the query holds several sequences.
    """
    if cu_seqlens is None:
        return pattern
    if query.shape[0] != 1:
        raise ValueError(
            "query must have shape (1, length, heads, head_dim) with cu_seqlens. "
            f"Got {tuple(query.shape)}."
        )
    return read_documents(pattern, cu_seqlens, length)


def read_documents(pattern: object, cu_seqlens: Tensor | Sequence[int], length: int) -> Documents:
    """The documents of a sequence; rows behind the last one are padding, a document of their own.

    Args:
        pattern: of each document.
        cu_seqlens: (S + 1,) int32 or int64: 0, then the end of each of S documents.
        length: rows of the sequence.

    Raises:
        TypeError: cu_seqlens is no int32 or int64 tensor.
        ValueError: it does not rise from 0 to at most `length`, or the pattern is another one.
    """
    if not isinstance(pattern, DilatedPattern):
        raise ValueError(
            "cu_seqlens must be None unless pattern is a DilatedPattern; a block layout of "
            f"documents is layouts.document. Got {type(pattern).__name__}."
        )
    ends = read_ends(cu_seqlens, length)
    return Documents(pattern, tuple(ends + [length] * (ends[-1] < length)))


def read_ends(cu_seqlens: Tensor | Sequence[int], length: int) -> list[int]:
    """The numbers of `read_documents`, with its errors."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64. Got {cu_seqlens.dtype}.")
        if cu_seqlens.ndim != 1:
            raise ValueError(
                f"cu_seqlens must have shape (documents + 1,). Got {tuple(cu_seqlens.shape)}."
            )
        cu_seqlens = cu_seqlens.tolist()
    elif not isinstance(cu_seqlens, Sequence) or not all(type(end) is int for end in cu_seqlens):
        raise TypeError(
            f"cu_seqlens must be a Tensor or a sequence of ints. Got {type(cu_seqlens).__name__}."
        )
    ends = list(cu_seqlens)
    if not ends or ends[0] != 0 or ends[-1] > length or ends != sorted(ends):
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most the rows of all ranks ({length}). "
            f"Got {_shown(ends)}."
        )
    return ends


def summary(cu_seqlens: object) -> str:
    """What tells documents from others, in a line."""
    if not isinstance(cu_seqlens, Tensor):
        return str(cu_seqlens)
    ends = cu_seqlens.tolist()
    if cu_seqlens.numel() <= 12:
        return str(ends)
    return f"{cu_seqlens.numel()} numbers with digest {_digest(ends)[:16]}"


def _digest(ends: object) -> str:
    return hashlib.sha256(str(ends).encode()).hexdigest()


def _shown(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 12 else f"{len(ends)} numbers from {ends[0]} to {ends[-1]}"


@dataclass(frozen=True)
class DocumentRows:
    """The rows of a span of keys that a span of queries sees: of one document (a `PackedRows`).

    Attributes:
        rows: those of the pattern, or None where no document meets both spans.
        number: of the document.
        first: the row of the span of keys where the document's part begins.
    """

    rows: PackedRows | None
    number: int = 0
    first: int = 0

    @property
    def count(self) -> int:
        """How many packed rows there are."""
        return 0 if self.rows is None else self.rows.count

    @property
    def parts(self) -> tuple[int, ...]:
        """Sizes of consecutive parts of the packed rows; no part has a row twice."""
        return () if self.rows is None else self.rows.parts

    def index(self) -> tuple[Tensor, Tensor]:
        """The row in the span of keys, and the key head, of each packed row: int64 (count,)."""
        if self.rows is None:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        row, head = self.rows.index()
        return row + self.first, head


class _Part(NamedTuple):
    """Packed rows of one document, and the piece of the queries that sees them.

    Attributes:
        piece: of the span of queries.
        packed: the pattern's packed rows.
        keys: where they are among all packed rows.
    """

    piece: Piece
    packed: list[PackedRows]
    keys: slice


@dataclass(frozen=True)
class DocumentSpans:
    """The attention of documents span by span (a `SpanAttention`)."""

    inner: SpanAttention
    documents: Documents

    def check(self, length: int, shard: int, heads: int) -> None:
        """Raise a ValueError unless the heads will do."""
        assert self.documents.ends[-1] == length
        self.inner.check(length, shard, heads)

    def attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`dilated_attention_varlen`, with a batch of one."""
        ends = torch.tensor(self.documents.ends, device=query.device)
        mask = options.pop("key_padding_mask", None)
        found = dilated_attention_varlen(
            query[0], key[0], value[0], ends, self.documents.pattern,
            key_padding_mask=None if mask is None else mask[0], **options,
        )  # fmt: skip
        if isinstance(found, Tensor):
            return found.unsqueeze(0)
        return found[0].unsqueeze(0), found[1].unsqueeze(0)

    def visible_keys(self, queries: range, length: int, *, is_causal: bool) -> tuple[range, ...]:
        """The keys that some query of a span may see, as few spans, rising."""
        found: list[range] = []
        for piece in self.documents.pieces(queries):
            begin = self.documents.ends[piece.number]
            for keys in self.inner.visible_keys(piece.inside, piece.length, is_causal=is_causal):
                start = begin + keys.start
                if found and found[-1].stop >= start:
                    start = found.pop().start
                found.append(range(start, begin + keys.stop))
        return tuple(found)

    def packed_rows(
        self, queries: range, keys: range, heads: int, kv_heads: int, *, is_causal: bool
    ) -> DocumentRows:
        """The rows of a span of keys that a span of queries, which it does not meet, sees."""
        if not queries or not keys:
            return DocumentRows(None)
        # Only the document that holds both ends which face each other can meet both.
        facing = min(queries.stop, keys.stop) - 1
        number = bisect_right(self.documents.ends, facing) - 1
        seen, sees = (self.documents.piece(span, number) for span in (keys, queries))
        if seen is None or sees is None:
            return DocumentRows(None)
        rows = self.inner.packed_rows(
            sees.inside, seen.inside, heads, kv_heads, is_causal=is_causal
        )
        return DocumentRows(rows if rows.count else None, number, seen.rows.start)

    def pair_counts(self, queries: Tensor, keys: Tensor, heads: int, *, is_causal: bool) -> Tensor:
        """How many pairs are attended between neighbouring edges: those of each document."""
        spans, ends = self.documents.pattern.spans, torch.tensor(self.documents.ends)
        lengths = ends.diff()
        each = spans.pairs_before(lengths, lengths, heads, is_causal=is_causal)
        total = torch.cat([each.new_zeros(1), each.cumsum(0)])
        x, y = queries[:, None], keys[None]
        # Documents before this one count whole, and those after it not at all.
        number = torch.searchsorted(ends, torch.minimum(x, y), right=True) - 1
        number = number.clamp(max=len(lengths) - 1)
        x, y = ((edge - ends[number]).minimum(lengths[number]) for edge in (x, y))
        before = total[number] + spans.pairs_before(x, y, heads, is_causal=is_causal)
        return before.diff(dim=0).diff(dim=1)

    def cliques(self, length: int, shard: int, heads: int, *, is_causal: bool) -> None:
        """Segments of documents begin anywhere, so they are no cliques of whole shards."""
        return

    def attend_span(self, call: SpanCall, query: Tensor, keys: KeyRows) -> Partial:
        """Attention of a span to itself, document by document."""
        pieces = list(self.documents.pieces(call.queries))
        parts = [
            self.inner.attend_span(
                _inside(call, piece), query[:, piece.rows], _rows(keys, piece.rows)
            )
            for piece in pieces
        ]
        if len(parts) == 1:
            return parts[0]
        batch, length, heads, _ = query.shape
        widest = reduce(torch.promote_types, (part.out.dtype for part in parts), query.dtype)
        out = query.new_empty(query.shape, dtype=widest)
        dtype = accumulate_dtype(query.dtype)
        lse = query.new_empty((batch, length, heads), dtype=dtype).transpose(1, 2)
        for piece, part in zip(pieces, parts, strict=True):
            out[:, piece.rows], lse[:, :, piece.rows] = part
        return Partial(out, lse)

    def attend_span_backward(
        self,
        call: SpanCall,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        keys: KeyRows,
        total: Partial,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoint of `attend_span`."""
        dtype = accumulate_dtype(query.dtype)
        grads = tuple(torch.empty_like(x, dtype=dtype) for x in (query, keys.key, keys.value))
        for piece in self.documents.pieces(call.queries):
            part = self.inner.attend_span_backward(
                _inside(call, piece), *_upstream(piece, grad_out, grad_lse, query),
                _rows(keys, piece.rows), _total(total, piece),
            )  # fmt: skip
            for grad, rows in zip(grads, part, strict=True):
                grad[:, piece.rows] = rows
        return cast(tuple[Tensor, Tensor, Tensor], grads)

    def attend_packed_(
        self,
        call: SpanCall,
        total: Partial,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
    ) -> None:
        """Merge attention of a span to packed rows into `total`."""
        for piece, rows, here in self._parts(call, packed):
            self.inner.attend_packed_(
                _inside(call, piece), _total(total, piece), query[:, piece.rows],
                _rows(keys, here), rows,
            )  # fmt: skip

    def attend_packed_backward(
        self,
        call: SpanCall,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
        total: Partial,
        grad_keys: KeyRows,
    ) -> Callable[[Tensor], None]:
        """The adjoint of `attend_packed_`."""
        adds = [
            (piece.rows, self.inner.attend_packed_backward(
                _inside(call, piece), *_upstream(piece, grad_out, grad_lse, query),
                _rows(keys, here), rows, _total(total, piece), _rows(grad_keys, here),
            ))
            for piece, rows, here in self._parts(call, packed)
        ]  # fmt: skip

        def add_to(grad_query: Tensor) -> None:
            for rows, add in adds:
                add(grad_query[:, rows])

        return add_to

    def _parts(self, call: SpanCall, packed: Sequence[PackedRows]) -> Iterator[_Part]:
        """Packed rows of one document after the other."""
        pieces = {piece.number: piece for piece in self.documents.pieces(call.queries)}
        rows = [rows for rows in cast(Sequence[DocumentRows], packed) if rows.rows is not None]
        first = 0
        for number, group in groupby(rows, lambda rows: rows.number):
            inner = [cast(PackedRows, rows.rows) for rows in group]
            count = sum(rows.count for rows in inner)
            yield _Part(pieces[number], inner, slice(first, first + count))
            first += count


def _inside(call: SpanCall, piece: Piece) -> SpanCall:
    return replace(call, queries=piece.inside, length=piece.length, sequence=piece.number)


def _rows(keys: KeyRows, rows: slice) -> KeyRows:
    padding = None if keys.padding is None else keys.padding[:, rows]
    return KeyRows(keys.key[:, rows], keys.value[:, rows], padding)


def _total(total: Partial, piece: Piece) -> Partial:
    return Partial(total.out[:, piece.rows], total.lse[:, :, piece.rows])


def _upstream(
    piece: Piece, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    at_lse = None if grad_lse is None else grad_lse[:, :, piece.rows]
    return grad_out[:, piece.rows], at_lse, query[:, piece.rows]
