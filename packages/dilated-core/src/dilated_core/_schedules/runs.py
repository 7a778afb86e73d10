"""Strided runs of rows and heads, and tasks over them: what every schedule is made of.

Everything attended to is a strided run (start, step, count). A task repeats one pair of runs,
queries and keys, over groups of equal shape (the segments of a branch) and a stride of heads; the
math that carries a task out does not know which pattern it serves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any


@dataclass(frozen=True, slots=True)
class RowRuns:
    """`groups` strided runs of rows: row i of run g is start + g * group_step + i * step."""

    start: int
    step: int
    count: int
    groups: int = 1
    group_step: int = 0


@dataclass(frozen=True, slots=True)
class HeadStride:
    """A stride of query heads and the key heads they read, one to one.

    The query heads of a group begin `group_step` after those of the group before.
    """

    start: int
    step: int
    count: int
    kv_start: int
    kv_step: int
    group_step: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Dense attention of each query run to the key run of its group.

    Attributes:
        queries: the query rows.
        keys: the key rows.
        heads: the heads of both.
        is_causal: key i of a run is hidden from the query rows before row i.
        zero_keys: further keys of score 0 and value 0.
        multiplicity: how often each key counts.
        first_queries: no earlier task of the schedule has these query rows.
        first_keys: no earlier task of the schedule has these key rows.
    """

    queries: RowRuns
    keys: RowRuns
    heads: HeadStride
    is_causal: bool
    zero_keys: int = 0
    multiplicity: int = 1
    first_queries: bool = False
    first_keys: bool = False


class TaskList(tuple[Task, ...]):
    """The tasks of a schedule, and what is found out about them for one call, for the next."""

    @cached_property
    def memory(self) -> dict[Any, Any]:
        """For whoever carries the tasks out."""
        return {}

    @cached_property
    def first_queries(self) -> int:
        """Query rows of all heads that have a task which comes first."""
        tasks = (task for task in self if task.first_queries)
        return sum(t.queries.groups * t.queries.count * t.heads.count for t in tasks)

    @cached_property
    def first_keys(self) -> int:
        """Key rows of all key heads that have a task which comes first."""
        tasks = (task for task in self if task.first_keys)
        return sum(t.keys.groups * t.keys.count * t.heads.count for t in tasks)


def head_strides(members: Sequence[int], group: int) -> Iterator[HeadStride]:
    """Split evenly spaced query heads into strides whose key heads are distinct and evenly spaced.

    Query head h reads key head h // group.
    """
    if not members:
        return
    step = members[1] - members[0] if len(members) > 1 else 1
    period = lcm(step, group)
    for first in range(members[0], min(members[0] + period, members[-1] + 1), step):
        count = (members[-1] - first) // period + 1
        yield HeadStride(first, period, count, first // group, period // group)
