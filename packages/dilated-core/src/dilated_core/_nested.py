"""Schedules that visit each key once, for patterns whose branches nest.

When dilation rates double and segments and offsets nest, a key that several branches show a query
is the same row in all of them. Row p of a head has level d when branches 0 ... d keep it; a query
of level d then sees a key of level m, in the segment of branch j but of no earlier one,
min(d, m) - j + 1 times. Cutting rows by exact level (x) and by level at least d (s) leaves runs
that are all of one count, and the count only shifts a log-sum-exp. With w doubling this
needs 1/4 fewer scores than one visit per branch.
"""

from collections.abc import Iterator
from itertools import pairwise

from dilated_core._pattern import Branch, DilatedPattern
from dilated_core._runs import Runs, Task, head_strides

# More siblings in a segment would mean more and smaller tasks.
_MAX_SIBLINGS = 4


def nests(pattern: DilatedPattern, heads: int) -> bool:
    """Whether `visit_once` serves this pattern."""
    branches = pattern.branches
    (first_w, _), (_, last_r) = branches[0], branches[-1]
    if pattern.head_groups != "shared" or pattern.count_padding or first_w % last_r:
        return False
    for (w, r), (w_out, r_out) in pairwise(branches):
        if r_out != 2 * r or w_out % w or not 1 < w_out // w <= _MAX_SIBLINGS:
            return False
        offsets = ((pattern.head_offset(h, heads, x) for x in (r, r_out)) for h in range(heads))
        if any((outer - inner) % r for inner, outer in offsets):
            return False
    return len(branches) > 1


def visit_once(pattern: DilatedPattern, length: int, heads: int, kv_heads: int) -> Iterator[Task]:
    """The tasks of non-causal self-attention, each key in one task of a query.

    Causal triangles of one count are so small that torch's fused attention, which computes them in
    squares of 512 keys, gains nothing.
    """
    branches = pattern.branches
    for j, (w, _) in enumerate(branches):
        for queries, keys in _sibling_spans(branches, j):
            for d, (_, rate) in enumerate(branches[j:], start=j):
                deeper = branches[min(d + 1, len(branches) - 1)].dilation_rate
                for offset in range(deeper):
                    members = [
                        h for h in range(heads) if pattern.head_offset(h, heads, deeper) == offset
                    ]
                    strides = list(head_strides(members, heads // kv_heads))
                    for q, k in _level_pairs(offset, rate, deeper) if strides else ():
                        for q_runs, k_runs in _runs(w, length, (*queries, *q), (*keys, *k)):
                            yield from (
                                Task(q_runs, k_runs, s, False, 0, d - j + 1) for s in strides
                            )


def _sibling_spans(
    branches: tuple[Branch, ...], j: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The (query span, key span) that share a segment of branch j but of no earlier branch."""
    w = branches[j].segment_length
    if j == 0:
        yield (0, w), (0, w)
        return
    inner = branches[j - 1].segment_length
    for start in range(0, w, inner):
        stop = start + inner
        if start:
            yield (start, stop), (0, start)
        if stop < w:
            yield (start, stop), (stop, w)


def _level_pairs(
    offset: int, rate: int, deeper: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The (offset, step) of query rows and key rows at one level.

    `rate` is the level's dilation rate, `deeper` the next one's, of which `offset` is; at the last
    level they are equal.
    """
    at_least = (offset % rate, rate)
    if deeper == rate:
        yield at_least, at_least
    else:
        exact = ((offset + rate) % deeper, deeper)
        yield exact, at_least
        yield (offset, deeper), exact


def _runs(
    w: int, length: int, queries: tuple[int, ...], keys: tuple[int, ...]
) -> Iterator[tuple[Runs, Runs]]:
    """The runs in whole segments as one group, and those of the last, short segment.

    Queries and keys are (start, stop, offset, step): the rows start + offset, start + offset +
    step, ... below stop of each segment.
    """
    count, tail = divmod(length, w)
    for first, groups, end in ((0, count, w), (count * w, 1 if tail else 0, tail)):
        q, k = (
            Runs(
                first + start + offset,
                step,
                max(0, -(-(min(stop, end) - start - offset) // step)),
                groups,
                w,
            )
            for start, stop, offset, step in (queries, keys)
        )
        if groups and q.count and k.count:
            yield q, k
