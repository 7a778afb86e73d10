"""The rows of one span of keys that another span of queries sees, packed one after the other.

A packed row is one position of one key head. The rows of a branch and offset are contiguous, head
by head, so that a task over packed rows has keys of step 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core._pattern import DilatedPattern
from dilated_core._runs import Heads, Runs, Task, head_strides
from dilated_core._schedule import clip


class Block(NamedTuple):
    """Packed rows of one branch and offset: those of each key head in turn.

    Attributes:
        branch: the branch.
        rows: their rows in the span of keys.
        kv_heads: the key heads.
    """

    branch: int
    rows: Runs
    kv_heads: tuple[int, ...]


class PackedTask(NamedTuple):
    """A task whose keys are packed rows, all of them visible to all of its queries.

    Attributes:
        task: queries and heads as ever; the keys of the first head are packed rows of step 1, and
            those of the next begin `heads.kv_step` packed rows later.
        positions: the global positions of the keys.
    """

    task: Task
    positions: Runs

    def after(self, rows: int) -> "PackedTask":
        """The same task where `rows` other packed rows come first."""
        keys = replace(self.task.keys, start=self.task.keys.start + rows)
        return PackedTask(replace(self.task, keys=keys), self.positions)


@dataclass(frozen=True)
class DilatedRows:
    """What a span of queries sees of another span of keys (a `PackedRows`)."""

    blocks: tuple[Block, ...]
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
    pattern: DilatedPattern,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
    is_causal: bool,
) -> DilatedRows:
    """The rows of a span of keys that a span of queries sees; the two do not overlap."""
    blocks: list[Block] = []
    tasks: list[PackedTask] = []
    if queries and keys and not (is_causal and keys.start >= queries.stop):
        packed = 0
        for branch in range(len(pattern.branches)):
            for block, new in _blocks(pattern, branch, queries, keys, heads, kv_heads):
                blocks.append(block)
                tasks += (task.after(packed) for task in new)
                packed += block.rows.count * len(block.kv_heads)
    return DilatedRows(tuple(blocks), tuple(tasks))


def _blocks(
    pattern: DilatedPattern,
    branch: int,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
) -> Iterator[tuple[Block, list[PackedTask]]]:
    """The packed rows of a branch, offset by offset, with tasks that count them from 0."""
    w, r = pattern.branches[branch]
    # Only the segment that holds both the end of the earlier span and the start of the later one
    # can meet both.
    last, first = min(queries.stop, keys.stop) - 1, max(queries.start, keys.start)
    if last // w != first // w:
        return
    segment = range(first // w * w, first // w * w + w)
    members: dict[int, list[int]] = {}
    for head in pattern.branch_heads(heads)[branch]:
        members.setdefault(pattern.head_offset(head, heads, r), []).append(head)
    for offset, kept in members.items():
        q = clip(segment.start + offset, r, segment, queries)
        k = clip(segment.start + offset, r, segment, keys)
        if not q.count or not k.count:
            continue
        group = heads // kv_heads
        read = tuple(dict.fromkeys(head // group for head in kept))
        block = Block(branch, replace(k, start=k.start - keys.start), read)
        q = replace(q, start=q.start - queries.start)
        yield block, [_task(q, k, stride, read) for stride in head_strides(kept, group)]


def _task(queries: Runs, keys: Runs, heads: Heads, read: tuple[int, ...]) -> PackedTask:
    """The task of a stride of heads, whose key heads are evenly spaced in `read`."""
    places = [read.index(heads.kv_start + i * heads.kv_step) for i in range(min(2, heads.count))]
    step = (places[-1] - places[0]) * keys.count
    packed = Runs(places[0] * keys.count, 1, keys.count)
    return PackedTask(Task(queries, packed, replace(heads, kv_start=0, kv_step=step), False), keys)
