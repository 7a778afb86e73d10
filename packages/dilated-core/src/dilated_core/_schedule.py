"""Schedules: a pattern as a list of dense attention tasks over strided runs of rows.

Everything attended to is a strided run (start, step, count). A task repeats one pair of runs,
queries and keys, over groups of equal shape (the segments of a branch) and a stride of heads; the
math that carries a task out does not know which pattern it serves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from dilated_core._pattern import DilatedPattern


@dataclass(frozen=True, slots=True)
class Runs:
    """`groups` strided runs of rows: row i of run g is start + g * group_step + i * step."""

    start: int
    step: int
    count: int
    groups: int = 1
    group_step: int = 0


@dataclass(frozen=True, slots=True)
class Heads:
    """A stride of query heads and the key heads they read, one to one."""

    start: int
    step: int
    count: int
    kv_start: int
    kv_step: int


@dataclass(frozen=True, slots=True)
class Task:
    """Dense attention of each query run to the key run of its group.

    `is_causal` hides key i of a run from the query rows before row i. `zero_keys` counts further
    keys of score 0 and value 0.
    """

    queries: Runs
    keys: Runs
    heads: Heads
    is_causal: bool
    zero_keys: int = 0


@lru_cache(maxsize=256)
def schedule(
    pattern: DilatedPattern,
    query_length: int,
    key_length: int,
    heads: int,
    kv_heads: int,
    is_causal: bool,
) -> tuple[Task, ...]:
    """The tasks whose merged partials are dilated attention.

    When causal the queries are the last `query_length` of the key positions; otherwise both count
    from position 0. Row numbers in a task are local: they index the query and key tensors.
    """
    query_start = key_length - query_length if is_causal else 0
    tasks: list[Task] = []
    for (w, r), branch_heads in zip(pattern.branches, pattern.branch_heads(heads), strict=True):
        slots = -(-min(w, key_length) // r) if pattern.count_padding and not is_causal else 0
        for offset in range(min(r, w)):
            members = [h for h in branch_heads if pattern.head_offset(h, heads, r) == offset]
            strides = list(_head_strides(members, heads // kv_heads))
            if strides:
                query_span = range(query_start, query_start + query_length)
                for queries, keys, causal in _segments(
                    w, r, offset, query_span, key_length, is_causal
                ):
                    zero_keys = max(0, slots - keys.count)
                    if keys.count or zero_keys:
                        tasks += [Task(queries, keys, s, causal, zero_keys) for s in strides]
    return tuple(tasks)


def _head_strides(members: list[int], group: int) -> Iterator[Heads]:
    """Split evenly spaced query heads into strides whose key heads are distinct and evenly spaced.

    Query head h reads key head h // group.
    """
    if not members:
        return
    step = members[1] - members[0] if len(members) > 1 else 1
    period = lcm(step, group)
    for first in range(members[0], min(members[0] + period, members[-1] + 1), step):
        count = (members[-1] - first) // period + 1
        yield Heads(first, period, count, first // group, period // group)


def _segments(
    w: int, r: int, offset: int, query_span: range, key_length: int, is_causal: bool
) -> Iterator[tuple[Runs, Runs, bool]]:
    """The (query runs, key runs, is_causal) of one branch and offset, in local rows."""
    lo, hi = query_span.start, query_span.stop
    if lo == hi:
        return
    # Segments that lie wholly inside both spans are alike and go as one task.
    whole = range(-(-lo // w), min(hi, key_length) // w)
    if whole and offset < w:
        runs = Runs(whole.start * w + offset, r, -(-(w - offset) // r), len(whole), w)
        yield replace(runs, start=runs.start - lo), runs, is_causal
    for segment in range(lo // w, -(-hi // w)):
        if segment in whole:
            continue
        first = segment * w + offset
        keys = _clip(first, r, first - offset, min(first - offset + w, key_length))
        queries = _clip(first, r, max(first - offset, lo), min(first - offset + w, hi))
        if queries.count:
            local = replace(queries, start=queries.start - lo)
            yield from _align(local, keys, (queries.start - keys.start) // r, is_causal)


def _clip(first: int, step: int, lo: int, hi: int) -> Runs:
    """The run first, first + step, ... cut to lo <= row < hi."""
    start = first + max(0, -(-(lo - first) // step)) * step
    return Runs(start, step, max(0, -(-(hi - start) // step)))


def _align(
    queries: Runs, keys: Runs, earlier: int, is_causal: bool
) -> Iterator[tuple[Runs, Runs, bool]]:
    """Split a causal pair whose first query sits `earlier` keys into the run.

    All queries see the earlier keys; the rest is an ordinary causal square.
    """
    if not is_causal:
        yield queries, keys, False
    elif queries.count == 1:
        yield queries, replace(keys, count=earlier + 1), False
    else:
        if earlier:
            yield queries, replace(keys, count=earlier), False
        rest = replace(keys, start=keys.start + earlier * keys.step, count=queries.count)
        yield queries, rest, True
