"""The rows of one span of keys that another span of queries sees, packed one after the other.

A packed row is one position of one key head. The rows of a branch and offset are contiguous, head
by head, so that a task over packed rows has keys of step 1, and offsets that are alike are the
groups of one task.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core._branches import Branches
from dilated_core._schedules.runs import HeadStride, RowRuns, Task, head_strides
from dilated_core._schedules.schedule import clip

_BEYOND = 2**61


class PackedBlock(NamedTuple):
    """Packed rows of one branch and offset: those of each key head in turn.

    Attributes:
        branch: the branch.
        rows: their rows in the span of keys.
        kv_heads: the key heads.
    """

    branch: int
    rows: RowRuns
    kv_heads: tuple[int, ...]


class PackedTask(NamedTuple):
    """A task whose keys are packed rows, all of them visible to all of its queries.

    Attributes:
        task: queries and heads as ever, a group for each offset that is alike; the keys of the
            first head are packed rows of step 1, and those of the next begin `heads.kv_step` packed
            rows later.
        positions: the global positions of the keys.
    """

    task: Task
    positions: RowRuns

    def after(self, rows: int) -> "PackedTask":
        """The same task where `rows` other packed rows come first."""
        keys = replace(self.task.keys, start=self.task.keys.start + rows)
        return PackedTask(replace(self.task, keys=keys), self.positions)


@dataclass(frozen=True)
class DilatedRows:
    """What a span of queries sees of another span of keys (a `PackedRows`)."""

    blocks: tuple[PackedBlock, ...]
    tasks: tuple[PackedTask, ...]

    @property
    def count(self) -> int:
        """How many packed rows there are."""
        return sum(self.parts)

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each branch: none twice in a part."""
        sizes: dict[int, int] = {}
        for block in self.blocks:
            size = block.rows.count * len(block.kv_heads)
            sizes[block.branch] = sizes.get(block.branch, 0) + size
        return tuple(sizes.values())

    def index(self) -> tuple[Tensor, Tensor]:
        """The row in the span of keys, and the key head, of each packed row: int64 (count,)."""
        if not self.blocks:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        rows, heads = [], []
        for _, runs, kv_heads in self.blocks:
            run = torch.arange(runs.count) * runs.step + runs.start
            rows.append(run.repeat(len(kv_heads)))
            heads.append(torch.tensor(kv_heads).repeat_interleave(runs.count))
        return torch.cat(rows), torch.cat(heads)


def pack(
    pattern: Branches,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
    is_causal: bool,
) -> DilatedRows:
    """The rows of a span of keys that a span of queries sees; the two do not overlap."""
    blocks: list[PackedBlock] = []
    tasks: list[PackedTask] = []
    if queries and keys and not (is_causal and keys.start >= queries.stop):
        packed = 0
        for branch in range(len(pattern.branches)):
            columns: list[list[PackedTask]] = []
            for block, new in _blocks(pattern, branch, queries, keys, heads, kv_heads):
                blocks.append(block)
                columns.append([task.after(packed) for task in new])
                packed += block.rows.count * len(block.kv_heads)
            for row in zip_longest(*columns):
                tasks += _grouped(task for task in row if task is not None)
    return DilatedRows(tuple(blocks), tuple(tasks))


def count_packed(
    pattern: Branches,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    heads: int,
    kv_heads: int,
    is_causal: bool,
) -> Tensor:
    """How many rows `pack` finds for each pair of a span of queries and one of keys.

    Args:
        pattern: which keys a query sees.
        queries: first positions and ends of spans, int64 (P,) each, or (1,).
        keys: the same; no span of them meets that of its queries.
        heads: query heads.
        kv_heads: key heads.
        is_causal: whether the keys after each query are hidden.

    Returns:
        int64 (P,).
    """
    (q0, q1), (k0, k1) = queries, keys
    first, last = torch.maximum(q0, k0), torch.minimum(q1, k1) - 1
    total = torch.zeros_like(first)
    streams = pattern.streams(heads)
    for (w, r), branch in zip(pattern.branches, streams, strict=True):
        # Beyond all positions they are alike, and sums of them stay within 64 bits.
        w, r = min(w, _BEYOND), min(r, _BEYOND)
        start = first // w * w
        meets = last // w == first // w
        if is_causal:
            meets &= k0 < q1
        if w == 1 or not meets.any():
            continue
        for offset, kept in branch:
            read = len({head // (heads // kv_heads) for head in kept})
            q, k = (
                _kept_rows(start + offset, r, torch.maximum(start, lo), (start + w).minimum(hi))
                for lo, hi in (queries, keys)
            )
            total += torch.where(meets & (q > 0), k * read, 0)
    return total


def _kept_rows(first: Tensor, step: int, lo: Tensor, hi: Tensor) -> Tensor:
    """How many of first, first + step, ... lie from lo up to hi."""
    start = first + (-((first - lo) // step)).clamp(min=0) * step
    return (-((start - hi) // step)).clamp(min=0)


def _blocks(
    pattern: Branches,
    branch: int,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
) -> Iterator[tuple[PackedBlock, list[PackedTask]]]:
    """The packed rows of a branch, offset by offset, with tasks that count them from 0."""
    w, r = pattern.branches[branch]
    # Only the segment that holds both the end of the earlier span and the start of the later one
    # can meet both.
    last, first = min(queries.stop, keys.stop) - 1, max(queries.start, keys.start)
    if last // w != first // w:
        return
    segment = range(first // w * w, first // w * w + w)
    for offset, kept in pattern.streams(heads)[branch]:
        q = clip(segment.start + offset, r, segment, queries)
        k = clip(segment.start + offset, r, segment, keys)
        if not q.count or not k.count:
            continue
        group = heads // kv_heads
        read = tuple(dict.fromkeys(head // group for head in kept))
        block = PackedBlock(branch, replace(k, start=k.start - keys.start), read)
        q = replace(q, start=q.start - queries.start)
        # Where no key head is read twice, their rows are evenly spaced here, if not where they are.
        strides = head_strides(kept, group if len(read) < len(kept) else 1)
        yield block, [_task(q, k, stride, read, group) for stride in strides]


def _task(
    queries: RowRuns, keys: RowRuns, heads: HeadStride, read: tuple[int, ...], group: int
) -> PackedTask:
    """The task of a stride of heads, whose key heads are evenly spaced in `read`."""
    places = [
        read.index((heads.start + i * heads.step) // group) for i in range(min(2, heads.count))
    ]
    step = (places[-1] - places[0]) * keys.count
    packed = RowRuns(places[0] * keys.count, 1, keys.count)
    return PackedTask(Task(queries, packed, replace(heads, kv_start=0, kv_step=step), False), keys)


def count_pairs(pattern: Branches, x: Tensor, y: Tensor, heads: int, is_causal: bool) -> Tensor:
    """How many pairs of a query before x and a key before y are attended: int64, one for each.

    A key that c branches show counts c times, as in `DilatedPattern.flops`; keys without a row,
    as `count_padding` adds them, do not count.

    Args:
        pattern: the branches.
        x: positions, int64 of any shape.
        y: positions, of a shape that fits.
        heads: query heads.
        is_causal: whether the keys after each query are hidden.
    """
    first = torch.minimum(x, y)
    if is_causal:
        y = first
    before = torch.zeros_like(first)
    beyond = max(int(x.max()), int(y.max())) + 1
    for (w, r), streams in zip(pattern.branches, pattern.streams(heads), strict=True):
        # Beyond all positions they are alike, and sums of them stay within 64 bits.
        w, r = min(w, beyond), min(r, beyond)
        segments = torch.div(first, w, rounding_mode="floor")
        inside = [(edge - segments * w).clamp(max=w) for edge in (x, y)]
        for offset, users in streams:
            a, b = (
                torch.div(rows - offset + r - 1, r, rounding_mode="floor").clamp(min=0)
                for rows in inside
            )
            kept = max(0, -(-(w - offset) // r))
            whole = kept * (kept + 1) // 2 if is_causal else kept * kept
            last = b * (b + 1) // 2 + (a - b) * b if is_causal else a * b
            before += len(users) * (segments * whole + last)
    return before


def _grouped(tasks: Iterable[PackedTask]) -> Iterator[PackedTask]:
    """Tasks of different blocks of a branch; those of a shape, evenly apart, as groups of one."""
    together: list[PackedTask] = []
    for task in tasks:
        if together and not _goes_on(together, task):
            yield _as_one(together)
            together = []
        together.append(task)
    if together:
        yield _as_one(together)


def _goes_on(together: list[PackedTask], task: PackedTask) -> bool:
    steps = _steps(together[-1], task)
    return (
        _shape(task) == _shape(together[-1])
        and min(steps) >= 0  # a view has no negative strides
        and (len(together) == 1 or steps == _steps(*together[-2:]))
    )


def _shape(packed: PackedTask) -> tuple[int, ...]:
    """What all groups of a task share, among the tasks of a branch."""
    queries, keys, heads = packed.task.queries, packed.task.keys, packed.task.heads
    return queries.count, keys.count, heads.step, heads.count, heads.kv_step


def _steps(one: PackedTask, other: PackedTask) -> tuple[int, int, int, int]:
    """How much later query rows, packed rows, key positions and query heads begin."""
    return (
        other.task.queries.start - one.task.queries.start,
        other.task.keys.start - one.task.keys.start,
        other.positions.start - one.positions.start,
        other.task.heads.start - one.task.heads.start,
    )


def _as_one(tasks: list[PackedTask]) -> PackedTask:
    if len(tasks) == 1:
        return tasks[0]
    query, key, position, head = _steps(*tasks[:2])
    task, positions = tasks[0]
    return PackedTask(
        replace(
            task,
            queries=replace(task.queries, groups=len(tasks), group_step=query),
            keys=replace(task.keys, groups=len(tasks), group_step=key),
            heads=replace(task.heads, group_step=head),
        ),
        replace(positions, groups=len(tasks), group_step=position),
    )
