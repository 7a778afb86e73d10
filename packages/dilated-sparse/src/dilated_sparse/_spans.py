"""Block-sparse attention span by span: what sequence-parallel attention asks of a pattern.

Between two spans a layout is a layout again; the blocks of keys that a span of queries sees are
packed, and the rest does not travel.
B batch, n rows of a span, R packed rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack, cast

import torch
from torch import Tensor

from dilated_core.extending import (
    Gradients,
    Partial,
    Scores,
    Upstream,
    accumulate_dtype,
    merge_,
    remembered,
)
from dilated_core.interfaces import AttendOptions, KeyRows, PackedRows, SpanCall
from dilated_sparse import _attend, _torch_backend
from dilated_sparse._blocks import Layout, compress
from dilated_sparse._call import BlockCall
from dilated_sparse._grid import Grid, Runs


@dataclass(frozen=True, eq=False)
class LayoutRows:
    """The blocks of a span of keys that a span of queries sees (a `PackedRows`).

    Attributes:
        layout: between the queries and the packed rows: of one head, with the packed rows of each
            key head alike, or of H heads, with all packed rows as those of one key head.
        row, head: the row in the span of keys, and the key head, of each packed row.
        start: the position of the span of keys.
    """

    layout: Layout
    row: Tensor
    head: Tensor
    start: int

    @property
    def count(self) -> int:
        """How many packed rows there are."""
        return len(self.row)

    @property
    def parts(self) -> tuple[int, ...]:
        """One part: no row is there twice."""
        return (self.count,)

    def index(self) -> tuple[Tensor, Tensor]:
        """The row in the span of keys, and the key head, of each packed row: int64 (count,)."""
        return self.row, self.head

    @property
    def positions(self) -> Tensor:
        """(M,) int64, the positions of the layout's keys."""
        return self.row[: self.layout.key_length] + self.start

    def heads(self, keys: KeyRows) -> KeyRows:
        """Packed rows (B, R, D) as the keys (B, M, heads, D) that the layout is for."""
        each = self.layout.key_length
        key, value = (x.unflatten(1, (x.shape[1] // each, each)).transpose(1, 2) for x in keys[:2])
        return KeyRows(key, value, None if keys.padding is None else keys.padding[:, :each])


@dataclass(frozen=True)
class LayoutSpans:
    """A layout's attention span by span (a `SpanAttention`)."""

    layout: Layout

    def check(self, length: int, shard: int, heads: int) -> None:
        """Raise unless it has that length, those heads, and a shard whole blocks.

        Raises:
            ValueError: as it says.
        """
        layout = self.layout
        if (layout.length, layout.key_length) != (length, length):
            raise ValueError(
                f"pattern must be a layout of the whole sequence, {length} queries and keys. "
                f"Got {layout.length} and {layout.key_length}."
            )
        if layout.batch > 1:
            raise ValueError(f"pattern must be a layout for all rows. Got batch={layout.batch}.")
        if layout.heads not in (1, heads):
            raise ValueError(
                f"pattern must be a layout of 1 head or query's {heads}. Got {layout.heads}."
            )
        if shard % layout.block_size:
            raise ValueError(
                f"query length must be a multiple of the layout's block size {layout.block_size} "
                f"on each rank. Got {shard}."
            )

    def attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[AttendOptions]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`block_sparse_attention`."""
        return _attend.attend(self.layout, query, key, value, **options)

    def visible_keys(self, queries: range, length: int, *, is_causal: bool) -> tuple[range, ...]:
        """The keys that some query of a span may see, as few spans, rising."""
        seen = _between(self.layout, queries, range(length), is_causal)
        columns, b = seen.columns.unique().tolist(), seen.block_size
        found: list[range] = []
        for column in columns:
            keys = range(column * b, min(length, (column + 1) * b))
            if found and found[-1].stop == keys.start:
                keys = range(found.pop().start, keys.stop)
            found.append(keys)
        return tuple(found)

    def packed_rows(
        self, queries: range, keys: range, heads: int, kv_heads: int, *, is_causal: bool
    ) -> LayoutRows:
        """The blocks of a span of keys that a span of queries, which it does not meet, sees."""
        return _pack(self.layout, queries, keys, kv_heads, is_causal)

    @property
    def grain(self) -> int:
        """Spans begin and end at its multiples."""
        return self.layout.block_size

    def pair_counts(self, queries: Tensor, keys: Tensor, heads: int, *, is_causal: bool) -> Tensor:
        """How many pairs are attended between neighbouring edges, by whole blocks: int64 (Q, K).

        Args:
            queries: the edges of Q spans, rising int64 (Q + 1,), multiples of `grain`.
            keys: those of K spans (K + 1,).
            heads: query heads.
            is_causal: whether the keys after each query are hidden.
        """
        layout = _causal(self.layout) if is_causal else self.layout
        b, runs = layout.block_size, layout.runs
        row, first, count = (x.cpu().long() for x in (runs.row, runs.column, runs.count))
        edges = keys // b
        stop = torch.minimum((first + count)[:, None], edges[1:])
        each = (stop - torch.maximum(first[:, None], edges[:-1])).clamp(min=0)
        span = torch.searchsorted(queries // b, row % max(1, layout.grid.rows), right=True) - 1
        found = each.new_zeros(len(queries) - 1, len(keys) - 1).index_add_(0, span, each)
        return found * (b * b * (heads // layout.heads))

    def cliques(self, length: int, shard: int, heads: int, *, is_causal: bool) -> None:
        """Blocks are no cliques."""
        return

    def attend_span(self, call: SpanCall, query: Tensor, keys: KeyRows) -> Partial:
        """Attention of a span to itself; out is wide."""
        return _attend_wide(self._inside(call, keys), query, keys)

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
        asked = self._inside(call, keys)
        return _backward_wide(asked, grad_out, grad_lse, query, keys, total)

    def attend_packed_(
        self,
        call: SpanCall,
        total: Partial,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
    ) -> None:
        """Merge attention of a span to packed rows into `total`."""
        for rows, here in _each(packed):
            part = rows.heads(_slice(keys, here))
            asked = _call(call, rows.layout, part, rows.positions)
            out, lse = _attend_wide(asked, query, part)
            by_head = Partial(total.out.transpose(1, 2), total.lse)
            merge_(by_head, Partial(out.transpose(1, 2), lse))

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
        grad_query: list[Tensor] = []
        for rows, here in _each(packed):
            part = rows.heads(_slice(keys, here))
            asked = _call(call, rows.layout, part, rows.positions)
            dq, dk, dv = _backward_wide(asked, grad_out, grad_lse, query, part, total)
            to = rows.heads(_slice(grad_keys, here))
            to.key.copy_(dk)
            to.value.copy_(dv)
            grad_query.append(dq)

        def add_to(total_grad: Tensor) -> None:
            for grad in grad_query:
                total_grad += grad

        return add_to

    def _inside(self, call: SpanCall, keys: KeyRows) -> BlockCall:
        """Attention of a span to itself."""
        layout = _between(self.layout, call.queries, call.queries, call.is_causal)
        return _call(call, layout, keys, None)


@remembered(8)
def _causal(layout: Layout) -> Layout:
    return layout.causal()


@remembered(256)
def _between(layout: Layout, queries: range, keys: range, is_causal: bool) -> Layout:
    """The layout between two spans of whole blocks, which then count from 0."""
    return (_causal(layout) if is_causal else layout).restrict(queries, keys)


@remembered(256)
def _pack(
    layout: Layout, queries: range, keys: range, kv_heads: int, is_causal: bool
) -> LayoutRows:
    """The blocks that some query sees, each key head's in turn if heads differ."""
    part = _between(layout, queries, keys, is_causal)
    grid, b = part.grid, part.block_size
    row, column, mask = part.blocks
    kv_head = torch.zeros_like(row)
    if part.heads > 1:
        kv_head = row // max(1, grid.rows) // (part.heads // kv_heads)
    seen, place = torch.unique(kv_head * grid.columns + column, return_inverse=True)
    packed = Grid(part.length, len(seen) * b, b, part.device)
    runs = Runs(row, place, torch.ones_like(place), mask, part.table)
    inside = torch.arange(b, device=part.device)
    rows = (seen % max(1, grid.columns))[:, None] * b + inside
    heads = (seen // max(1, grid.columns))[:, None].expand_as(rows)
    rows, heads = rows.flatten().cpu(), heads.flatten().cpu()
    if part.heads == 1:
        heads = torch.arange(kv_heads).repeat_interleave(len(rows))
        rows = rows.repeat(kv_heads)
    inside_span = compress(Layout, packed, runs, part.heads)
    return LayoutRows(inside_span, rows, heads, keys.start)


def _call(call: SpanCall, layout: Layout, keys: KeyRows, positions: Tensor | None) -> BlockCall:
    """Attention to keys at some positions, those of the queries when None."""
    scores = Scores(False, call.scale, keys.padding, call.dropout_p, call.seed)
    if not call.dropout_p:
        return BlockCall(layout, scores)
    device = keys.key.device
    queries = torch.arange(call.queries.start, call.queries.stop, device=device)
    at_keys = queries if positions is None else positions.to(device)
    return BlockCall(layout, scores, (queries, at_keys))


def _attend_wide(call: BlockCall, query: Tensor, keys: KeyRows) -> Partial:
    """Attention whose out is wide."""
    wide = query.to(accumulate_dtype(query.dtype))
    return _torch_backend.forward(call, wide, keys.key, keys.value)


def _backward_wide(
    call: BlockCall,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    keys: KeyRows,
    total: Partial,
) -> Gradients:
    """The adjoint of `_attend_wide`: wide gradients."""
    dtype = accumulate_dtype(query.dtype)
    query, key, value = (x.to(dtype) for x in (query, keys.key, keys.value))
    upstream = Upstream(grad_out, grad_lse, query, key, value, total)
    return _torch_backend.backward(call, upstream)


def _each(packed: Sequence[PackedRows]) -> Iterator[tuple[LayoutRows, slice]]:
    """The packed rows of each span that has any."""
    first = 0
    for rows in cast(Sequence[LayoutRows], packed):
        if rows.count:
            yield rows, slice(first, first + rows.count)
        first += rows.count


def _slice(keys: KeyRows, here: slice) -> KeyRows:
    padding = None if keys.padding is None else keys.padding[:, here]
    return KeyRows(keys.key[:, here], keys.value[:, here], padding)
