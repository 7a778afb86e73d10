"""The `torch` backend: a schedule of strided views into torch's fused attention, merged by lse.

No branch is gathered: a task's rows are a view, and its results are merged at once into one
accumulator.
B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core import _operators
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._dropout import keep_mask
from dilated_core._partial import Partial, accumulate_dtype, add_zero_keys_, merge_, put_
from dilated_core._schedules.runs import RowRuns, Task, TaskList
from dilated_core._schedules.schedule import schedule
from dilated_core._torch import dense
from dilated_core._torch.rows import Cut, cuts, views_of


def attend_wide(
    call: DilatedCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    start: int = 0,
    whole_length: int | None = None,
    first_sequence: int = 0,
) -> Partial:
    """Dilated attention outside of any operator, so without gradients; out stays wide.

    Args:
        call: what to compute.
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        value: (B, M, H_kv, D).
        start: global position of the first key.
        whole_length: keys in the whole sequence, where there are more than these.
        first_sequence: number of the first sequence, for its dropout mask.
    """
    out = torch.empty(query.shape, dtype=accumulate_dtype(query.dtype), device=query.device)
    lse = _empty_lse(query)
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    queries, keys = [query, out, lse.transpose(1, 2)], [key, value]
    where = start, whole_length, first_sequence
    for stretch, at_queries, at_keys in _stretches(call, queries, keys, *where):
        if stretch.tasks.first_queries < at_queries[0].shape[1] * query.shape[2]:
            at_queries[1].zero_()
            at_queries[2].fill_(-math.inf)
        _attend_into(stretch, at_queries, at_keys)
    return Partial(out, lse)


def _forward(call: DilatedCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    out, lse = attend_wide(call, query, key, value)
    return Partial(out.to(query.dtype), lse)


def _backward(call: DilatedCall, upstream: Upstream) -> _operators.Gradients:
    dq, dk, dv = backward_wide(call, upstream)
    dtype = upstream.query.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def backward_wide(
    call: DilatedCall,
    upstream: Upstream,
    *,
    start: int = 0,
    whole_length: int | None = None,
    first_sequence: int = 0,
) -> _operators.Gradients:
    """The adjoint of `attend_wide`, given the partial of all keys; gradients stay wide."""
    grad_out, grad_lse, query, key, value, total = upstream
    dtype = accumulate_dtype(query.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    grad_out, query, key, value = map(unit_stride, (grad_out, query, key, value))
    lse = dense.hide_unseen(total.lse)
    queries = [query, total.out, grad_out, dq, lse.transpose(1, 2)]
    if grad_lse is not None:
        queries.append(grad_lse.transpose(1, 2).contiguous())
    keys = [key, value, dk, dv]
    where = start, whole_length, first_sequence
    for stretch, at_queries, at_keys in _stretches(call, queries, keys, *where):
        if stretch.tasks.first_queries < at_queries[0].shape[1] * query.shape[2]:
            at_queries[3].zero_()
        if stretch.tasks.first_keys < at_keys[0].shape[1] * key.shape[2]:
            at_keys[2].zero_()
            at_keys[3].zero_()
        _accumulate_gradients(stretch, at_queries, at_keys)
    return dq, dk, dv


def _attend_into(stretch: "Stretch", queries: list[Tensor], keys: list[Tensor]) -> None:
    """Merge every task's partial into out and lse, which first tasks overwrite.

    queries: query, out, lse; keys: key, value.
    """
    for task, pieces in stretch.cuts(queries, keys):
        for piece in pieces:
            q, out, lse = views_of(queries, piece.queries)
            if task.keys.count:
                rows = stretch.row_attention(task, piece)
                k, v = views_of(keys, piece.keys[:2])
                part = dense.attend(rows, q, k, v)
                if task.multiplicity > 1:
                    part = Partial(part.out, part.lse + math.log(task.multiplicity))
                (put_ if task.first_queries else merge_)(Partial(out, lse), part)
            if task.zero_keys:
                add_zero_keys_(Partial(out, lse), task.zero_keys)


def _accumulate_gradients(stretch: "Stretch", queries: list[Tensor], keys: list[Tensor]) -> None:
    """Add every task's gradients, each taken against the merged out and lse; first tasks overwrite.

    queries: query, out, grad_out, grad_query, lse and, if any, grad_lse; keys: key, value,
    grad_key, grad_value.
    """
    for task, pieces in stretch.cuts(queries, keys):
        if not task.keys.count:
            continue
        for piece in pieces:
            q, o, do, dq, lse, *dl = views_of(queries, piece.queries)
            k, v, dk, dv = views_of(keys, piece.keys[:4])
            if task.multiplicity > 1:
                # A key that counts c times weighs c exp(score - lse) = exp(score - (lse - log c)).
                lse = lse - math.log(task.multiplicity)
            rows = stretch.row_attention(task, piece)
            parts = dense.attend_backward(rows, do, dl[0] if dl else None, q, k, v, Partial(o, lse))
            is_first = task.first_queries, task.first_keys, task.first_keys
            for grad, part, first in zip((dq, dk, dv), parts, is_first, strict=True):
                if first:
                    grad.copy_(part)
                else:
                    grad += part


@dataclass(frozen=True, eq=False)
class Stretch:
    """One sequence, or a batch of equal ones, within a call, and the tasks on it.

    Attributes:
        scores: what to do with the scores; the mask is that of these keys.
        tasks: what to attend.
        query_start: position of the first query.
        key_start: position of the first key.
        batch_start: index of the first sequence.
        positions: positions of the keys of each task, where they are not a span.
    """

    scores: Scores
    tasks: TaskList
    query_start: int
    key_start: int
    batch_start: int = 0
    positions: Mapping[Task, RowRuns] | None = None

    def cuts(
        self, queries: list[Tensor], keys: list[Tensor]
    ) -> tuple[tuple[Task, tuple[Cut, ...]], ...]:
        """The tasks, each with its pieces of the tensors, and of the mask as the last key."""
        at_keys = [x.stride() for x in keys]
        if (mask := self.scores.key_padding_mask) is not None:
            at_keys.append(mask.stride())
        batch, head_dim = queries[0].shape[0], queries[0].shape[3]
        return cuts(
            self.tasks, batch, head_dim, tuple([x.stride() for x in queries]), tuple(at_keys)
        )

    def row_attention(self, task: Task, piece: Cut) -> dense.RowAttention:
        """How the rows of a piece attend."""
        scores, mask, keep = self.scores, None, None
        if scores.key_padding_mask is not None:
            (mask,) = views_of([scores.key_padding_mask], piece.keys[-1:])
        if scores.dropout_p > 0:
            keep = _Keep(self, task, piece.places)
        return dense.RowAttention(scores.scale, task.is_causal, mask, keep, scores.dropout_p)

    def query_positions(self, task: Task) -> RowRuns:
        """The global positions of a task's queries."""
        return replace(task.queries, start=self.query_start + task.queries.start)

    def key_positions(self, task: Task) -> RowRuns:
        """The global positions of a task's keys."""
        if self.positions is not None:
            return self.positions[task]
        return replace(task.keys, start=self.key_start + task.keys.start)


class _Keep:
    """The dropout mask of one piece of a task, for a range of its query rows."""

    def __init__(self, stretch: Stretch, task: Task, places: range) -> None:
        assert stretch.scores.seed is not None
        self._seed, self._dropout_p = int(stretch.scores.seed), stretch.scores.dropout_p
        device = stretch.scores.seed.device
        place = torch.arange(places.start, places.stop, places.step, device=device)
        self._stretch, self._task = stretch, task
        self._batch = place // task.queries.groups + stretch.batch_start
        self._group = place % task.queries.groups

    def __call__(self, rows: range) -> Tensor:
        task, device = self._task, self._batch.device
        heads = task.heads
        head = heads.start + heads.step * torch.arange(heads.count, device=device)
        head = head + heads.group_step * self._group[:, None]
        row = torch.arange(rows.start, rows.stop, device=device)
        column = torch.arange(task.keys.count, device=device)
        return keep_mask(
            self._seed,
            self._dropout_p,
            self._batch[:, None, None, None],
            head[:, :, None, None],
            self._positions(self._stretch.query_positions(task), row)[:, None, :, None],
            self._positions(self._stretch.key_positions(task), column)[:, None, None, :],
        )

    def _positions(self, runs: RowRuns, row: Tensor) -> Tensor:
        return runs.start + self._group[:, None] * runs.group_step + row * runs.step


def _stretches(
    call: DilatedCall,
    queries: list[Tensor],
    keys: list[Tensor],
    start: int,
    whole_length: int | None,
    first_sequence: int,
) -> Iterator[tuple[Stretch, list[Tensor], list[Tensor]]]:
    """The sequences of a call, each with its rows of the tensors (B, N, H, ...)."""
    pattern, scores, cu_seqlens = call
    heads, kv_heads = queries[0].shape[2], keys[0].shape[2]

    def stretch(scores: Scores, length: int, key_length: int, batch_start: int) -> Stretch:
        # When causal, the queries end where the keys end.
        first = start + key_length - length if scores.is_causal else start
        at_queries, at_keys = range(first, first + length), range(start, start + key_length)
        whole = at_keys.stop if whole_length is None else whole_length
        tasks = schedule(pattern, at_queries, at_keys, heads, kv_heads, scores.is_causal, whole)
        return Stretch(scores, tasks, first, start, batch_start)

    if cu_seqlens is None:
        sizes = queries[0].shape[1], keys[0].shape[1], first_sequence
        yield stretch(scores, *sizes), queries, keys
        return
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows = slice(begin, end)
        yield (
            stretch(scores.at_keys(rows), end - begin, end - begin, i),
            [x[:, rows] for x in queries],
            [x[:, rows] for x in keys],
        )


def _empty_lse(query: Tensor) -> Tensor:
    """(B, H, N), laid out like rows (B, N, H) so that batch and segments can share a stride."""
    batch, length, heads, _ = query.shape
    dtype = accumulate_dtype(query.dtype)
    return torch.empty((batch, length, heads), dtype=dtype, device=query.device).transpose(1, 2)


def unit_stride(x: Tensor) -> Tensor:
    """Fused attention reads rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


OPERATORS = _operators.define(
    "dilated_core::torch", _operators.DILATED, _forward, _backward, _empty_lse
)
