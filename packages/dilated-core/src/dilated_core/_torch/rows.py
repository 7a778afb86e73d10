"""How tasks cut the tensors of a call into strided views; nothing large is copied."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from dilated_core._schedules.runs import RowRuns, Task, TaskList

# Bounds the temporaries of one piece, so that they stay in cache until they are merged.
_PIECE_ELEMENTS = 1 << 20
# Cuts of small calls are kept with their schedule: to make them takes as long as to attend.
_KEPT_CUTS, _KEPT_CALLS = 256, 8

Strides = tuple[int, ...]
# Size, strides, and how many elements it begins after its tensor.
View = tuple[tuple[int, ...], Strides, int]


class Cut(NamedTuple):
    """One piece of a task: a view of each tensor, with batch and groups as one dimension.

    Attributes:
        places: b * groups + g of what is along that dimension.
        queries: views of tensors (B, N, H, D), (B, N, H) as (pieces, heads, rows, D) and so on;
            of (B, N) as (pieces, rows).
        keys: the same of keys.
    """

    places: range
    queries: tuple[View, ...]
    keys: tuple[View, ...]


class _Grouped(NamedTuple):
    """A view of a task before batch and groups become one dimension."""

    size: tuple[int, ...]
    strides: Strides
    batch: int
    group: int
    start: int


def views_of(tensors: Iterable[Tensor], views: Iterable[View]) -> list[Tensor]:
    """The views of some tensors."""
    return [
        x.as_strided(size, strides, x.storage_offset() + start)
        for x, (size, strides, start) in zip(tensors, views, strict=True)
    ]


def cuts(
    tasks: TaskList, batch: int, head_dim: int, queries: tuple[Strides, ...],
    keys: tuple[Strides, ...],
) -> tuple[tuple[Task, tuple[Cut, ...]], ...]:  # fmt: skip
    """The cuts of each task, for tensors of these strides."""
    known = batch, head_dim, queries, keys
    found: tuple[tuple[Task, tuple[Cut, ...]], ...] | None = tasks.memory.get(known)
    if found is None:
        found = tuple((task, tuple(_cuts(task, *known))) for task in tasks)
        if sum(len(pieces) for _, pieces in found) <= _KEPT_CUTS:
            if len(tasks.memory) >= _KEPT_CALLS:
                tasks.memory.clear()
            tasks.memory[known] = found
    return found


def _cuts(
    task: Task, batch: int, head_dim: int, queries: tuple[Strides, ...], keys: tuple[Strides, ...]
) -> Iterator[Cut]:
    """Few pieces of bounded size.

    Batch and groups become one dimension where strides allow it; otherwise the shorter is looped.
    """
    heads, groups, each = task.heads, task.queries.groups, len(queries)
    at_queries = heads.start, heads.step, heads.group_step
    at_keys = heads.kv_start, heads.kv_step, 0
    views = [grouped(x, task.queries, heads.count, *at_queries, head_dim) for x in queries]
    views += [grouped(x, task.keys, heads.count, *at_keys, head_dim) for x in keys]
    if batch == 1 or (groups > 1 and all(x.batch == groups * x.group for x in views)):
        lines = [range(batch * groups)]
    elif groups <= batch:
        lines = [range(g, batch * groups, groups) for g in range(groups)]
    else:
        lines = [range(b * groups, (b + 1) * groups) for b in range(batch)]
    most = max(1, _PIECE_ELEMENTS // max(1, heads.count * task.queries.count * head_dim))
    for line in lines:
        for first in range(0, len(line), most):
            places = line[first : first + most]
            b, g = divmod(places.start, groups)
            pieces = tuple(
                (
                    (len(places), *x.size),
                    (x.batch if places.step == groups > 1 or groups == 1 else x.group, *x.strides),
                    x.start + b * x.batch + g * x.group,
                )
                for x in views
            )
            yield Cut(places, pieces[:each], pieces[each:])


def grouped(
    strides: Strides, runs: RowRuns, heads: int, head_start: int, head_step: int,
    head_group_step: int, head_dim: int,
) -> _Grouped:  # fmt: skip
    """The view of (B, N, H, D), (B, N, H) or (B, N) that a task's runs and heads are."""
    batch, row = strides[:2]
    size: tuple[int, ...] = (runs.count,)
    inner: Strides = (runs.step * row,)
    head = 0
    if len(strides) > 2:
        head = strides[2]
        size, inner = (heads, *size), (head_step * head, *inner)
    if len(strides) > 3:
        size, inner = (*size, head_dim), (*inner, strides[3])
    group = runs.group_step * row + head_group_step * head
    return _Grouped(size, inner, batch, group, runs.start * row + head_start * head)
