"""Dilated attention span by span: what sequence-parallel attention asks of a pattern.

B batch, n rows of a span, R packed rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Unpack, cast

import torch
from torch import Tensor

from dilated_core import _attend, _row_attention, _triton
from dilated_core._branches import Branches
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._partial import Partial, accumulate_dtype, merge_
from dilated_core._schedules.packed import DilatedRows, count_packed, count_pairs, pack
from dilated_core._schedules.runs import HeadStride, RowRuns, Task, TaskList
from dilated_core._torch.engine import Stretch, attend_wide, backward_wide, unit_stride
from dilated_core._torch.rows import grouped, views_of
from dilated_core.interfaces import AttendOptions, Clique, KeyRows, PackedRows, SpanCall


@dataclass(frozen=True)
class DilatedSpans:
    """A dilated pattern's attention span by span (a `SpanAttention`)."""

    pattern: Branches

    def check(self, length: int, shard: int, heads: int) -> None:
        """Any lengths will do; the heads must be enough for the pattern."""
        self.pattern.branch_heads(heads)

    def attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[AttendOptions]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`dilated_attention`."""
        return _attend.attend(self.pattern, query, key, value, **options)

    def visible_keys(self, queries: range, length: int, *, is_causal: bool) -> tuple[range, ...]:
        """The keys that some query of a span may see, as few spans, rising."""
        if not queries:
            return ()
        start = min(queries.start // w * w for w in self.pattern.segment_lengths)
        stop = max(-(-queries.stop // w) * w for w in self.pattern.segment_lengths)
        return (range(start, queries.stop if is_causal else min(stop, length)),)

    def packed_rows(
        self, queries: range, keys: range, heads: int, kv_heads: int, *, is_causal: bool
    ) -> DilatedRows:
        """The rows of a span of keys that a span of queries, which it does not meet, sees."""
        return pack(self.pattern, queries, keys, heads, kv_heads, is_causal)

    def packed_counts(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
        *,
        is_causal: bool,
    ) -> Tensor:
        """How many rows `packed_rows` has, of many pairs of spans at once: int64 (P,).

        Args:
            queries: where spans begin and end, int64 (P,) each, or (1,).
            keys: the same.
            heads: query heads.
            kv_heads: key heads.
            is_causal: whether the keys after each query are hidden.
        """
        return count_packed(self.pattern, queries, keys, heads, kv_heads, is_causal)

    def pair_counts(self, queries: Tensor, keys: Tensor, heads: int, *, is_causal: bool) -> Tensor:
        """How many pairs of a query and a key are attended, between neighbouring edges: (Q, K).

        Args:
            queries: the edges of Q spans, rising int64 (Q + 1,).
            keys: those of K spans (K + 1,).
            heads: query heads.
            is_causal: whether the keys after each query are hidden.
        """
        before = self.pairs_before(queries[:, None], keys[None], heads, is_causal=is_causal)
        return before.diff(dim=0).diff(dim=1)

    def pairs_before(self, queries: Tensor, keys: Tensor, heads: int, *, is_causal: bool) -> Tensor:
        """How many pairs of a query and a key before two positions are attended: int64, for each.

        Args:
            queries: positions, int64 of any shape, not empty.
            keys: the same, of a shape that broadcasts with it.
            heads: query heads.
            is_causal: whether the keys after each query are hidden.
        """
        return count_pairs(self.pattern, queries, keys, heads, is_causal)

    def cliques(
        self, length: int, shard: int, heads: int, *, is_causal: bool
    ) -> "tuple[DilatedSpans | None, tuple[Clique, ...]] | None":
        """The branches that fit in a span as a pattern, and the wider ones as cliques."""
        pattern = self.pattern
        zero_keys = pattern.count_padding and not is_causal
        if not shard or pattern.head_groups == "split" or zero_keys:
            return None
        local = [branch for branch in pattern.branches if shard % branch.segment_length == 0]
        wide = []
        for w, r in pattern.branches:
            if shard % w:
                segment = min(w, length)
                if segment % shard or length % segment:
                    return None
                offsets = (pattern.head_offset(head, heads, r) for head in range(heads))
                wide.append(Clique(segment, r, tuple(s if s < w else None for s in offsets)))
        if not local:
            return None, tuple(wide)
        inside = Branches(*zip(*local, strict=True), head_offsets=pattern.head_offsets)
        return DilatedSpans(inside), tuple(wide)

    def attend_span(self, call: SpanCall, query: Tensor, keys: KeyRows) -> Partial:
        """Attention of a span to itself; out is wide, or in query's dtype from a kernel."""
        asked, (key, value, _) = self._call(call, keys), keys
        if self._has_kernel(call, query, keys):
            return _triton.attend_span(asked, query, key, value, call.queries.start)
        return attend_wide(asked, query, key, value, **_where(call))

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
        asked = self._call(call, keys)
        upstream = Upstream(grad_out, grad_lse, query, keys.key, keys.value, total)
        if self._has_kernel(call, query, keys):
            # The kernels write the gradient to a query, and its terms, where its out and lse are.
            whole = Partial(total.out.contiguous(), total.lse.contiguous())
            upstream = upstream._replace(total=whole)
            return _triton.attend_span_backward(asked, upstream, call.queries.start)
        return backward_wide(asked, upstream, **_where(call))

    def attend_packed_(
        self,
        call: SpanCall,
        total: Partial,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
    ) -> None:
        """Merge attention of a span to packed rows into `total`."""
        stretch = self._stretch(call, keys, packed)
        queries = [unit_stride(query), total.out, total.lse.transpose(1, 2)]
        at_keys = [_by_head(keys.key), _by_head(keys.value)]
        for task, pieces in stretch.cuts(queries, at_keys):
            for piece in pieces:
                q, out, lse = views_of(queries, piece.queries)
                k, v = views_of(at_keys, piece.keys[:2])
                rows = stretch.row_attention(task, piece)
                merge_(Partial(out, lse), _row_attention.attend(rows, q, k, v))

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
        stretch = self._stretch(call, keys, packed)
        queries = [unit_stride(query), total.out, unit_stride(grad_out), total.lse.transpose(1, 2)]
        if grad_lse is not None:
            queries.append(grad_lse.transpose(1, 2).contiguous())
        grad_keys.key.zero_()
        grad_keys.value.zero_()
        at_keys = [_by_head(x) for x in (keys.key, keys.value, grad_keys.key, grad_keys.value)]
        grads: dict[tuple[RowRuns, HeadStride], Tensor] = {}
        for task, pieces in stretch.cuts(queries, at_keys):
            grad_query = _grad_rows(grads, task, query)
            for piece in pieces:
                q, o, do, lse, *dl = views_of(queries, piece.queries)
                k, v, dk, dv = views_of(at_keys, piece.keys[:4])
                rows = stretch.row_attention(task, piece)
                parts = _row_attention.attend_backward(
                    rows, do, dl[0] if dl else None, q, k, v, Partial(o, lse)
                )
                dq = grad_query[piece.places.start : piece.places.stop : piece.places.step]
                for grad, part in zip((dq, dk, dv), parts, strict=True):
                    grad += part

        def add_to(grad_query: Tensor) -> None:
            for (runs, heads), grad in grads.items():
                at = heads.start, heads.step, heads.group_step
                x = grouped(grad_query.stride(), runs, heads.count, *at, query.shape[3])
                size = query.shape[0], runs.groups, *x.size
                view = grad_query.as_strided(
                    size, (x.batch, x.group, *x.strides), grad_query.storage_offset() + x.start
                )
                view += grad.view(size)

        return add_to

    def _has_kernel(self, call: SpanCall, query: Tensor, keys: KeyRows) -> bool:
        """Whether a kernel attends the rows of a span, where most of the work is."""
        if self.pattern.count_padding or (call.sequence and call.dropout_p):
            return False
        return _triton.unsupported(query, keys.key) is None

    def _call(self, call: SpanCall, keys: KeyRows) -> DilatedCall:
        scores = Scores(call.is_causal, call.scale, keys.padding, call.dropout_p, call.seed)
        return DilatedCall(self.pattern, scores)

    def _stretch(self, call: SpanCall, keys: KeyRows, packed: Sequence[PackedRows]) -> Stretch:
        """A span of queries whose keys are packed rows."""
        rows = cast(Sequence[DilatedRows], packed)
        before = accumulate((spans.count for spans in rows), initial=0)
        positions = dict(
            task.after(first)
            for first, spans in zip(before, rows, strict=False)
            for task in spans.tasks
        )
        return Stretch(
            self._call(call, keys).scores, TaskList(positions), call.queries.start, 0,
            call.sequence, positions,
        )  # fmt: skip


def _where(call: SpanCall) -> dict[str, int]:
    """Where a span lies in its sequence, and which one that is."""
    start, length = call.queries.start, call.length
    return {"start": start, "whole_length": length, "first_sequence": call.sequence}


def _by_head(packed: Tensor) -> Tensor:
    """Packed rows (B, R, D) as (B, R, heads, D) where head j starts j rows later."""
    batch, rows, width = packed.shape
    each, row, unit = packed.stride()
    return packed.as_strided((batch, rows, 1, width), (each, row, row, unit))


def _grad_rows(
    grads: dict[tuple[RowRuns, HeadStride], Tensor], task: Task, query: Tensor
) -> Tensor:
    """The gradient to a task's queries (B * groups, heads, rows, D), for all tasks of the same."""
    # Packed rows of other spans differ in their spacing of key heads alone.
    runs, heads = task.queries, replace(task.heads, kv_start=0, kv_step=0)
    if (runs, heads) not in grads:
        shape = query.shape[0] * runs.groups, heads.count, runs.count, query.shape[3]
        grads[runs, heads] = torch.zeros(
            shape, dtype=accumulate_dtype(query.dtype), device=query.device
        )
    return grads[runs, heads]
