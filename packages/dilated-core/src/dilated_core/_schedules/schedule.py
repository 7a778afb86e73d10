"""Schedules: the attention of a span of queries to a span of keys as a list of dense tasks."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from dilated_core._branches import Branches
from dilated_core._caches import remembered
from dilated_core._schedules.nested import nests, visit_once
from dilated_core._schedules.runs import RowRuns, Task, TaskList, head_strides


@remembered(256)
def schedule(
    pattern: Branches,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    length: int,
) -> TaskList:
    """The tasks whose merged partials are the attention of a span of queries to a span of keys.

    Spans are global positions of a sequence of `length` keys; row numbers in a task are local: they
    index the spans. The zero keys of a query are all here, also those of keys outside of the span.
    """
    is_self = queries == keys
    branches = pattern.branches
    tasks: list[Task] = []
    k = 0
    while k < len(branches):
        pair = branches[k : k + 2]
        new: Iterable[Task]
        if (
            is_self
            and not is_causal
            and len(pair) == 2
            and nests(pattern, heads, *pair)
            and keys.start % pair[1].segment_length == 0
        ):
            new = visit_once(pattern, *pair, len(keys), heads, kv_heads)
        else:
            pair = pair[:1]
            new = _branch_tasks(pattern, k, queries, keys, heads, kv_heads, is_causal, length)
            new = (replace(task, first_queries=is_self, first_keys=is_self) for task in new)
        # Among the tasks of a branch, or of a pair, rows come first where they say so.
        first = not k and branches[0].dilation_rate == 1 and pattern.head_groups == "shared"
        tasks += (
            replace(
                task,
                first_queries=first and task.first_queries,
                first_keys=first and task.first_keys and heads == kv_heads,
            )
            for task in new
        )
        k += len(pair)
    return TaskList(tasks)


def _branch_tasks(
    pattern: Branches,
    branch: int,
    queries: range,
    keys: range,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    length: int,
) -> Iterator[Task]:
    """The tasks of one branch."""
    w, r = pattern.branches[branch]
    slots = -(-min(w, length) // r) if pattern.count_padding and not is_causal else 0
    for offset, members in pattern.streams(heads)[branch]:
        strides = list(head_strides(members, heads // kv_heads))
        for q, k, causal in _segments(w, r, offset, queries, keys, is_causal):
            zero_keys = max(0, slots - _rows_in_segment(w, r, queries.start + q.start, length))
            if k.count or zero_keys:
                yield from (Task(q, k, stride, causal, zero_keys) for stride in strides)


def _rows_in_segment(w: int, r: int, row: int, length: int) -> int:
    """How many rows below `length` a branch keeps in the segment of a row that it keeps."""
    segment = range(row // w * w, row // w * w + w)
    first = segment.start + (row - segment.start) % r
    return clip(first, r, segment, range(length)).count


def _segments(
    w: int, r: int, offset: int, queries: range, keys: range, is_causal: bool
) -> Iterator[tuple[RowRuns, RowRuns, bool]]:
    """The (query runs, key runs, is_causal) of one branch and offset, in local rows."""
    if not queries:
        return
    # Segments that lie wholly inside both spans are alike and go as one task.
    start, stop = max(queries.start, keys.start), min(queries.stop, keys.stop)
    whole = range(-(-start // w), stop // w)
    if whole and offset < w:
        runs = RowRuns(whole.start * w + offset, r, -(-(w - offset) // r), len(whole), w)
        yield _local(runs, queries), _local(runs, keys), is_causal
    first, last = queries.start // w, -(-queries.stop // w)
    if not whole:
        whole = range(first, first)
    for segment in chain(range(first, whole.start), range(whole.stop, last)):
        span = range(segment * w, segment * w + w)
        q = clip(span.start + offset, r, span, queries)
        k = clip(span.start + offset, r, span, keys)
        if q.count:
            earlier = (q.start - k.start) // r
            yield from _align(_local(q, queries), _local(k, keys), earlier, is_causal)


def _local(runs: RowRuns, span: range) -> RowRuns:
    return replace(runs, start=runs.start - span.start)


def clip(first: int, step: int, segment: range, span: range) -> RowRuns:
    """The run first, first + step, ... cut to the rows of a segment that lie in a span."""
    lo, hi = max(segment.start, span.start), min(segment.stop, span.stop)
    start = first + max(0, -(-(lo - first) // step)) * step
    return RowRuns(start, step, max(0, -(-(hi - start) // step)))


def _align(
    queries: RowRuns, keys: RowRuns, earlier: int, is_causal: bool
) -> Iterator[tuple[RowRuns, RowRuns, bool]]:
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
