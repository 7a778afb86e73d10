"""Dilated attention span by span: what sequence-parallel attention asks of a pattern.

B batch, n rows of a span, R packed rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from dilated_core import _fused, triton_kernels
from dilated_core._functional import dilated_attention
from dilated_core._inputs import Options
from dilated_core._packed import DilatedRows, PackedTask, pack
from dilated_core._partial import Partial, accumulate_dtype, merge_
from dilated_core._pattern import DilatedPattern
from dilated_core._runs import Heads, Runs, Task
from dilated_core._torch_backend import (
    Place,
    attend_rows,
    key_views,
    lse_rows,
    query_views,
    rows_backward,
    unit_stride,
)
from dilated_core.interfaces import Clique, KeyRows, PackedRows, SpanCall


@dataclass(frozen=True)
class DilatedSpans:
    """A dilated pattern's attention span by span (a `SpanAttention`)."""

    pattern: DilatedPattern

    def check(self, length: int, shard: int, heads: int) -> None:
        """Any lengths will do; the heads must be enough for the pattern."""
        self.pattern.branch_heads(heads)

    def attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`dilated_attention`."""
        return dilated_attention(query, key, value, self.pattern, **options)

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
        inside = DilatedPattern(*zip(*local, strict=True), head_offsets=pattern.head_offsets)
        return DilatedSpans(inside), tuple(wide)

    def attend_span(self, call: SpanCall, query: Tensor, keys: KeyRows) -> Partial:
        """Attention of a span to itself; out is wide, or in query's dtype from a kernel."""
        if self._has_kernel(query, keys):
            return triton_kernels.attend_span(
                self._options(call, keys), query, keys.key, keys.value, call.queries.start
            )
        return attend_rows(
            self._options(call, keys), query, keys.key, keys.value,
            start=call.queries.start, whole_length=call.length,
        )  # fmt: skip

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
        if self._has_kernel(query, keys):
            return triton_kernels.attend_span_backward(
                self._options(call, keys), grad_out, grad_lse, query, keys.key, keys.value, total,
                call.queries.start,
            )  # fmt: skip
        return rows_backward(
            self._options(call, keys), grad_out, grad_lse, query, keys.key, keys.value, total,
            start=call.queries.start, whole_length=call.length,
        )  # fmt: skip

    def attend_packed_(
        self,
        call: SpanCall,
        total: Partial,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
    ) -> None:
        """Merge attention of a span to packed rows into `total`."""
        place = self._place(call, query, keys, packed)
        queries = unit_stride(query), total.out, lse_rows(total.lse)
        at_keys = _by_head(keys.key), _by_head(keys.value)
        for task in place.tasks():
            views = query_views(task, *queries) + key_views(task, *at_keys)
            for rows, (q, out, lse, k, v) in place.calls(task, *views):
                merge_(Partial(out, lse.squeeze(-1)), _fused.attend(rows, q, k, v))

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
        place = self._place(call, query, keys, packed)
        queries = [unit_stride(query), total.out, unit_stride(grad_out), lse_rows(total.lse)]
        if grad_lse is not None:
            queries.append(lse_rows(grad_lse).contiguous())
        grad_keys.key.zero_()
        grad_keys.value.zero_()
        at_keys = [_by_head(x) for x in (keys.key, keys.value, grad_keys.key, grad_keys.value)]
        grads: dict[tuple[Runs, Heads], Tensor] = {}
        for task in place.tasks():
            dq = _grad_rows(grads, task, query)
            views = [*query_views(task, *queries), dq, *key_views(task, *at_keys)]
            for rows, pieces in place.calls(task, *views):
                q, o, do, lse, *dl = pieces[: len(queries)]
                *grad_views, k, v, dk, dv = pieces[len(queries) :]
                parts = _fused.attend_backward(
                    rows, do, dl[0].squeeze(-1) if dl else None, q, k, v,
                    Partial(o, lse.squeeze(-1)),
                )  # fmt: skip
                for grad, part in zip((*grad_views, dk, dv), parts, strict=True):
                    grad += part

        def add_to(grad_query: Tensor) -> None:
            for (runs, heads), grad in grads.items():
                (view,) = query_views(Task(runs, runs, heads, False), grad_query)
                view += grad

        return add_to

    def _has_kernel(self, query: Tensor, keys: KeyRows) -> bool:
        """Whether a kernel attends the rows of a span, where most of the work is."""
        if self.pattern.count_padding:
            return False
        return triton_kernels.unsupported(query, keys.key) is None

    def _options(self, call: SpanCall, keys: KeyRows) -> Options:
        return Options(
            self.pattern, call.is_causal, call.scale, keys.padding, call.dropout_p, call.seed
        )

    def _place(
        self, call: SpanCall, query: Tensor, keys: KeyRows, packed: Sequence[PackedRows]
    ) -> "_PackedPlace":
        rows = cast(Sequence[DilatedRows], packed)
        before = accumulate((spans.count for spans in rows), initial=0)
        tasks = [
            task.after(first)
            for first, spans in zip(before, rows, strict=False)
            for task in spans.tasks
        ]
        return _PackedPlace(
            self._options(call, keys), 0, query.shape[1], keys.key.shape[1], query.shape[2],
            query.shape[2], call.queries.start, call.length, tasks,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _PackedPlace(Place):
    """A span of queries whose keys are packed rows."""

    packed: Sequence[PackedTask] = ()
    _positions: dict[Task, Runs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._positions.update(self.packed)

    @property
    def query_start(self) -> int:
        """Position of the first query."""
        return self.key_start

    def tasks(self) -> tuple[Task, ...]:
        """The tasks over the packed rows."""
        return tuple(self._positions)

    def key_positions(self, task: Task) -> Runs:
        """The global positions of a task's keys."""
        return self._positions[task]


def _by_head(packed: Tensor) -> Tensor:
    """Packed rows (B, R, D) as (B, R, heads, D) where head j starts j rows later."""
    batch, rows, width = packed.shape
    each, row, unit = packed.stride()
    return packed.as_strided((batch, rows, 1, width), (each, row, row, unit))


def _grad_rows(grads: dict[tuple[Runs, Heads], Tensor], task: Task, query: Tensor) -> Tensor:
    """The gradient to a task's queries (B, groups, heads, rows, D), for all tasks of the same."""
    # Packed rows of other spans differ in their spacing of key heads alone.
    runs, heads = task.queries, replace(task.heads, kv_start=0, kv_step=0)
    if (runs, heads) not in grads:
        shape = query.shape[0], runs.groups, heads.count, runs.count, query.shape[3]
        grads[runs, heads] = torch.zeros(
            shape, dtype=accumulate_dtype(query.dtype), device=query.device
        )
    return grads[runs, heads]
