"""The `torch` backend: a schedule of strided views into torch's fused attention, merged by lse.

No branch is gathered: a task's rows are a view, and its results are merged at once into one
accumulator.
B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core import _dense
from dilated_core._dropout import keep_mask
from dilated_core._inputs import Options
from dilated_core._operators import define
from dilated_core._partial import Partial, accumulate_dtype, add_zero_keys_, merge_, put_
from dilated_core._rows import calls, mask_view, row_view
from dilated_core._runs import Runs, Task
from dilated_core._schedule import schedule


def attend_rows(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    start: int = 0,
    whole_length: int | None = None,
) -> Partial:
    """Dilated attention outside of any operator, so without gradients; out stays wide.

    Args:
        options: what to compute.
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        value: (B, M, H_kv, D).
        cu_seqlens: (S + 1,), where the rows are S sequences, one after the other.
        start: global position of the first key.
        whole_length: keys in the whole sequence, where there are more than these.
    """
    out = torch.empty(query.shape, dtype=accumulate_dtype(query.dtype), device=query.device)
    lse = _empty_lse(query)
    query, key, value = map(unit_stride, (query, key, value))
    for place, queries, keys in _places(
        options, cu_seqlens, [query, out, lse_rows(lse)], [key, value]
    ):
        placed = replace(place, key_start=start, whole_length=whole_length)
        if not placed.first_tasks_cover_queries():
            queries[1].zero_()
            queries[2].fill_(-math.inf)
        attend_into(placed, *queries, *keys)
    return Partial(out, lse)


def _forward(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Partial:
    out, lse = attend_rows(options, query, key, value, cu_seqlens)
    return Partial(out.to(query.dtype), lse)


def _backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = rows_backward(options, grad_out, grad_lse, query, key, value, total, cu_seqlens)
    return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


def rows_backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
    cu_seqlens: Tensor | None = None,
    *,
    start: int = 0,
    whole_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `attend_rows`, given the partial of all keys; gradients stay wide."""
    dtype = accumulate_dtype(query.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    grad_out, query, key, value = map(unit_stride, (grad_out, query, key, value))
    queries = [query, total.out, grad_out, dq, lse_rows(total.lse)]
    if grad_lse is not None:
        queries.append(lse_rows(grad_lse).contiguous())
    for place, at_queries, at_keys in _places(options, cu_seqlens, queries, [key, value, dk, dv]):
        place = replace(place, key_start=start, whole_length=whole_length)
        if not place.first_tasks_cover_queries():
            at_queries[3].zero_()
        if not place.first_tasks_cover_keys():
            at_keys[2].zero_()
            at_keys[3].zero_()
        _accumulate_gradients(place, at_queries, at_keys)
    return dq, dk, dv


def attend_into(
    place: "Place", query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor
) -> None:
    """Merge every task's partial into out and lse, which first tasks overwrite."""
    for task in place.tasks():
        q, o, row_lse = query_views(task, query, out, lse)
        if task.keys.count:
            views = q, o, row_lse, *key_views(task, key, value)
            for rows, (q_, o_, l_, k_, v_) in place.calls(task, *views):
                part = _dense.attend(rows, q_, k_, v_)
                if task.multiplicity > 1:
                    part = Partial(part.out, part.lse + math.log(task.multiplicity))
                (put_ if task.first_queries else merge_)(Partial(o_, l_.squeeze(-1)), part)
        if task.zero_keys:
            add_zero_keys_(Partial(o, row_lse.squeeze(-1)), task.zero_keys)


def _accumulate_gradients(place: "Place", queries: list[Tensor], keys: list[Tensor]) -> None:
    """Add every task's gradients, each taken against the merged out and lse; first tasks overwrite.

    queries: query, out, grad_out, grad_query, lse and, if any, grad_lse; keys: key, value,
    grad_key, grad_value.
    """
    for task in place.tasks():
        if task.keys.count:
            views = query_views(task, *queries) + key_views(task, *keys)
            for rows, pieces in place.calls(task, *views):
                q, o, do, dq, lse, *dl = pieces[: len(queries)]
                k, v, dk, dv = pieces[len(queries) :]
                # A key that counts c times weighs c exp(score - lse) = exp(score - (lse - log c)).
                total = Partial(o, lse.squeeze(-1) - math.log(task.multiplicity))
                grad_lse = dl[0].squeeze(-1) if dl else None
                parts = _dense.attend_backward(rows, do, grad_lse, q, k, v, total)
                is_first = task.first_queries, task.first_keys, task.first_keys
                for grad, part, first in zip((dq, dk, dv), parts, is_first, strict=True):
                    if first:
                        grad.copy_(part)
                    else:
                        grad += part


@dataclass(frozen=True, eq=False)
class Place:
    """One sequence, or a batch of equal ones, within a call: its options and sizes.

    The keys start at position `key_start` of a sequence of `whole_length` keys, which ends with
    them where that is None.
    """

    options: Options
    batch_start: int
    query_length: int
    key_length: int
    heads: int
    kv_heads: int
    key_start: int = 0
    whole_length: int | None = None

    @property
    def query_start(self) -> int:
        """Position of the first query: when causal, the queries end where the keys end."""
        earlier = self.key_length - self.query_length if self.options.is_causal else 0
        return self.key_start + earlier

    def tasks(self) -> tuple[Task, ...]:
        """The schedule of this sequence."""
        queries = range(self.query_start, self.query_start + self.query_length)
        keys = range(self.key_start, self.key_start + self.key_length)
        length = keys.stop if self.whole_length is None else self.whole_length
        return schedule(
            self.options.pattern,
            queries,
            keys,
            self.heads,
            self.kv_heads,
            self.options.is_causal,
            length,
        )

    def query_positions(self, task: Task) -> Runs:
        """The global positions of a task's queries."""
        return replace(task.queries, start=self.query_start + task.queries.start)

    def key_positions(self, task: Task) -> Runs:
        """The global positions of a task's keys."""
        return replace(task.keys, start=self.key_start + task.keys.start)

    def first_tasks_cover_queries(self) -> bool:
        """Whether each query row of each head has a task that comes first."""
        tasks = (task for task in self.tasks() if task.first_queries)
        covered = sum(t.queries.groups * t.queries.count * t.heads.count for t in tasks)
        return covered == self.query_length * self.heads

    def first_tasks_cover_keys(self) -> bool:
        """Whether each key row of each key head has a task that comes first."""
        tasks = (task for task in self.tasks() if task.first_keys)
        covered = sum(t.keys.groups * t.keys.count * t.heads.count for t in tasks)
        return covered == self.key_length * self.kv_heads

    def calls(self, task: Task, *views: Tensor) -> Iterator[tuple[_dense.Rows, list[Tensor]]]:
        """The pieces of a task's views, each with how its rows attend."""
        options, (batch, groups) = self.options, views[0].shape[:2]
        small = []
        if options.key_padding_mask is not None:
            small.append(mask_view(options.key_padding_mask, task.keys))
        if options.dropout_p > 0:
            device = views[0].device
            batch_index = torch.arange(batch, device=device) + self.batch_start
            small.append(batch_index[:, None].expand(batch, groups))
            small.append(torch.arange(groups, device=device).expand(batch, groups))
        for large, extra in calls(views, small):
            mask = extra[0] if options.key_padding_mask is not None else None
            keep = _Keep(self, task, *extra[-2:]) if options.dropout_p > 0 else None
            yield _dense.Rows(options.scale, task.is_causal, mask, keep, options.dropout_p), large


class _Keep:
    """The dropout mask of one piece of a task, for a range of its query rows."""

    def __init__(self, place: Place, task: Task, batch: Tensor, group: Tensor) -> None:
        assert place.options.seed is not None
        self._seed, self._dropout_p = int(place.options.seed), place.options.dropout_p
        self._place, self._task = place, task
        self._batch, self._group = batch, group

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
            self._positions(self._place.query_positions(task), row)[:, None, :, None],
            self._positions(self._place.key_positions(task), column)[:, None, None, :],
        )

    def _positions(self, runs: Runs, row: Tensor) -> Tensor:
        return runs.start + self._group[:, None] * runs.group_step + row * runs.step


def _places(
    options: Options, cu_seqlens: Tensor | None, queries: list[Tensor], keys: list[Tensor]
) -> Iterator[tuple[Place, list[Tensor], list[Tensor]]]:
    """The sequences of a call, each with its rows of the tensors (B, N, H, ...)."""
    heads, kv_heads = queries[0].shape[2], keys[0].shape[2]
    if cu_seqlens is None:
        lengths = queries[0].shape[1], keys[0].shape[1]
        yield Place(options, 0, *lengths, heads, kv_heads), queries, keys
        return
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        mask = options.key_padding_mask
        local = replace(options, key_padding_mask=None if mask is None else mask[:, start:stop])
        yield (
            Place(local, i, stop - start, stop - start, heads, kv_heads),
            [x[:, start:stop] for x in queries],
            [x[:, start:stop] for x in keys],
        )


def _empty_lse(query: Tensor) -> Tensor:
    """(B, H, N), laid out like rows (B, N, H) so that batch and segments can share a stride."""
    batch, length, heads, _ = query.shape
    dtype = accumulate_dtype(query.dtype)
    return torch.empty((batch, length, heads), dtype=dtype, device=query.device).transpose(1, 2)


def lse_rows(lse: Tensor) -> Tensor:
    """(B, H, N) to (B, N, H, 1), so that it is cut and viewed like rows."""
    return lse.transpose(1, 2).unsqueeze(-1)


def unit_stride(x: Tensor) -> Tensor:
    """Fused attention reads rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def query_views(task: Task, *tensors: Tensor) -> list[Tensor]:
    """The rows and heads of (B, N, H, ...) that a task's queries are."""
    runs, heads = task.queries, task.heads
    at = heads.start, heads.step, heads.count, heads.group_step
    return [row_view(x, runs, *at) for x in tensors]


def key_views(task: Task, *tensors: Tensor) -> list[Tensor]:
    """The rows and heads of (B, M, H_kv, ...) that a task's keys are."""
    runs, heads = task.keys, task.heads
    return [row_view(x, runs, heads.kv_start, heads.kv_step, heads.count) for x in tensors]


OPERATORS = define("torch", _forward, _backward, _empty_lse)
