"""Schedules that visit each key once, for pairs of branches that nest.

Where a branch (w, r) is followed by (W, 2r) with w dividing W and offsets that agree modulo r, the
rows that the outer branch keeps are every other row of the inner one. Within an inner segment both
show the same keys to them, so these keys are attended once and counted twice: a weight that only
shifts the log-sum-exp. The scores of a pair then fall from 1.5 to 1.25 times the inner branch's
(W = 2w). Longer chains save more scores, but in tasks so small that torch's fused attention, which
takes rows by 256 only from 768 rows on, loses more.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dilated_core._branches import Branch, Branches
from dilated_core._schedules.runs import RowRuns, Task, head_strides

# More siblings in a segment would mean more and smaller tasks.
_MAX_SIBLINGS = 4


class _Rows(NamedTuple):
    """The rows offset, offset + step, ... from `start` below `stop`, inside a segment."""

    start: int
    stop: int
    offset: int
    step: int


def nests(pattern: Branches, heads: int, inner: Branch, outer: Branch) -> bool:
    """Whether `visit_once` serves two branches of a pattern."""
    (w, r), (w_out, r_out) = inner, outer
    return (
        pattern.head_groups == "shared"
        and not pattern.count_padding
        and r_out == 2 * r
        and w % r_out == 0
        and w_out % w == 0
        and 1 < w_out // w <= _MAX_SIBLINGS
        and all(
            (pattern.head_offset(h, heads, r_out) - pattern.head_offset(h, heads, r)) % r == 0
            for h in range(heads)
        )
    )


def visit_once(
    pattern: Branches, inner: Branch, outer: Branch, length: int, heads: int, kv_heads: int
) -> Iterator[Task]:
    """The tasks of non-causal self-attention over `length` positions by two branches that nest.

    Causal attention gains nothing: torch's fused attention computes triangles in squares of 512
    keys, and four small triangles hold more of these than a large one.
    """
    rate = outer.dilation_rate
    for offset in range(rate):
        members = [h for h in range(heads) if pattern.head_offset(h, heads, rate) == offset]
        for stride in head_strides(members, heads // kv_heads):
            for w, queries, keys, count, *first in _pairs(inner, outer, offset):
                for q, k in _runs(w, length, queries, keys):
                    yield Task(q, k, stride, False, 0, count, *first)


def _pairs(
    inner: Branch, outer: Branch, offset: int
) -> Iterator[tuple[int, _Rows, _Rows, int, bool, bool]]:
    """The tasks of one offset of the outer branch.

    Each is (segment length, query rows, key rows, times each key counts, whether the pair's earlier
    tasks lack these query rows, and these key rows).
    """
    (w, r), (w_out, rate) = inner, outer
    both, inner_only = _Rows(0, w, offset, rate), _Rows(0, w, (offset + r) % rate, rate)
    yield w, both, inner_only, 1, True, True
    yield w, both, both, 2, False, True
    yield w, inner_only, _Rows(0, w, offset % r, r), 1, True, False
    # What only the outer branch shows: the other inner segments of the outer one.
    for start in range(0, w_out, w):
        for first, last in ((0, start), (start + w, w_out)):
            if first < last:
                queries = _Rows(start, start + w, offset, rate)
                yield w_out, queries, _Rows(first, last, offset, rate), 1, False, False


def _runs(w: int, length: int, queries: _Rows, keys: _Rows) -> Iterator[tuple[RowRuns, RowRuns]]:
    """The runs in whole segments as one group, and those of the last, short segment."""
    count, tail = divmod(length, w)
    for first, groups, end in ((0, count, w), (count * w, 1 if tail else 0, tail)):
        if groups:
            q, k = (
                RowRuns(
                    first + rows.start + rows.offset,
                    rows.step,
                    max(0, -(-(min(rows.stop, end) - rows.start - rows.offset) // rows.step)),
                    groups,
                    w,
                )
                for rows in (queries, keys)
            )
            if q.count and k.count:
                yield q, k
