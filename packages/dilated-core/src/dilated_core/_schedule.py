"""Schedules: a pattern as a list of dense attention tasks over strided runs of rows.

Everything attended to is a strided run (start, step, count). A task repeats one pair of runs,
queries and keys, over groups of equal shape (the segments of a branch) and a stride of heads; the
math that carries a task out does not know which pattern it serves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
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
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
    is_causal: bool,
) -> tuple[Task, ...]:
    """The tasks whose merged partials are the attention of a span of queries to a span of keys.

    Spans are global positions; row numbers in a task are local: they index the spans.
    """
    tasks: list[Task] = []
    for (w, r), branch_heads in zip(pattern.branches, pattern.branch_heads(heads), strict=True):
        slots = -(-min(w, keys.stop) // r) if pattern.count_padding and not is_causal else 0
        for offset in range(min(r, w)):
            members = [h for h in branch_heads if pattern.head_offset(h, heads, r) == offset]
            strides = list(head_strides(members, heads // kv_heads))
            if strides:
                for q, k, causal in _segments(w, r, offset, queries, keys, is_causal):
                    zero_keys = max(0, slots - k.count)
                    if k.count or zero_keys:
                        tasks += [Task(q, k, stride, causal, zero_keys) for stride in strides]
    return tuple(tasks)


def head_strides(members: list[int], group: int) -> Iterator[Heads]:
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
    w: int, r: int, offset: int, queries: range, keys: range, is_causal: bool
) -> Iterator[tuple[Runs, Runs, bool]]:
    """The (query runs, key runs, is_causal) of one branch and offset, in local rows."""
    if not queries:
        return
    # Segments that lie wholly inside both spans are alike and go as one task.
    start, stop = max(queries.start, keys.start), min(queries.stop, keys.stop)
    whole = range(-(-start // w), stop // w)
    if whole and offset < w:
        runs = Runs(whole.start * w + offset, r, -(-(w - offset) // r), len(whole), w)
        yield _local(runs, queries), _local(runs, keys), is_causal
    first, last = queries.start // w, -(-queries.stop // w)
    if not whole:
        whole = range(first, first)
    for segment in chain(range(first, whole.start), range(whole.stop, last)):
        span = range(segment * w, segment * w + w)
        q = _clip(span.start + offset, r, span, queries)
        k = _clip(span.start + offset, r, span, keys)
        if q.count:
            earlier = (q.start - k.start) // r
            yield from _align(_local(q, queries), _local(k, keys), earlier, is_causal)


def _local(runs: Runs, span: range) -> Runs:
    return replace(runs, start=runs.start - span.start)


def _clip(first: int, step: int, segment: range, span: range) -> Runs:
    """The run first, first + step, ... cut to the rows of a segment that lie in a span."""
    lo, hi = max(segment.start, span.start), min(segment.stop, span.stop)
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
