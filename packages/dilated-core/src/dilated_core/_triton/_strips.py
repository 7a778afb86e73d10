"""How a pattern cuts rows into strips of equal keeping, and which key runs a strip needs.

A row is a position whose result a program owns, a column one that it walks: queries and keys in
the forward, keys and queries in the backward to keys. Pure integer arithmetic, no tensors.

- A zone is a stretch of positions in which every branch keeps one residue modulo its rate.
- A leaf (residue, step) of a zone is an arithmetic progression of rows that every branch keeps
  either wholly or not at all, as long as the step stays below a cap.
- A slot is a recipe for one run of columns, the same for every tile of the leaf.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from dilated_core._branches import Branch, Branches
from dilated_core._caches import remembered

# One head of a member tuple: its offset in each branch, None where it does not use the branch.
Offsets = tuple[int | None, ...]
Residues = tuple[int | None, ...]

_CAPS = (1, 2, 4, 8, 16, 32, 64)
_MAX_RATIO = 4
# A pair whose row may not see it costs so many others, by measurement.
_MASKED = 2.5


class Slot(NamedTuple):
    """A run of columns of residue `residue` modulo `step`, found from a tile's position.

    The columns of the `outer` segment around the tile; with `inner` and side -1 or 1 only those
    before or after the inner segment. A key counts `weight` times. Rows see it where they are
    congruent to `row_residue` modulo `row_step`. With `zero_keys` the slot stands for the zero
    keys of its branch instead.
    """

    outer: int
    inner: int
    side: int
    residue: int
    step: int
    weight: int
    row_residue: int
    row_step: int
    member: int
    zero_keys: bool


class StepShape(NamedTuple):
    """The rows of a tile, at most, the columns of a step, and whether order hides pairs."""

    rows: int
    columns: int
    is_causal: bool


class Strip(NamedTuple):
    """The rows congruent to `residue` modulo `step` in [start, stop), and how they are tiled.

    Tiles of `block` positions start anew at every multiple of `cut`.
    """

    start: int
    stop: int
    residue: int
    step: int
    cut: int
    block: int
    slots: tuple[Slot, ...]


def sorted_branches(pattern: Branches) -> tuple[tuple[Branch, ...], tuple[int, ...]]:
    """The branches by rising segment length, and the index each has in the pattern."""
    order = sorted(range(len(pattern.segment_lengths)), key=lambda k: pattern.branches[k])
    return tuple(pattern.branches[k] for k in order), tuple(order)


def head_offsets(pattern: Branches, heads: int) -> tuple[Offsets, ...]:
    """The offset of every query head in every (sorted) branch."""
    _, order = sorted_branches(pattern)
    users = pattern.branch_heads(heads)
    return tuple(
        tuple(
            pattern.head_offset(h, heads, pattern.dilation_rates[k]) if h in users[k] else None
            for k in order
        )
        for h in range(heads)
    )


def strips(
    branches: tuple[Branch, ...],
    members: tuple[Offsets, ...],
    rows: range,
    columns: range,
    shape: StepShape,
    zero_keys: bool,
) -> Iterator[Strip]:
    """All strips of a span of row positions.

    `members` are the offsets of the query heads whose runs one program walks; `zero_keys` also
    gives the slots of `count_padding`.
    """
    cap = _best_cap(branches, members, shape)
    for start, stop in _zones(branches, rows, columns, zero_keys):
        residues = tuple(_residues(branches, offsets, start) for offsets in members)
        # A branch is of one piece here if the zone lies in one of its segments.
        whole = tuple(start // w == (stop - 1) // w for w, _ in branches)
        for residue, step, cut, block, slots in _leaves(
            branches, residues, whole, cap, shape, zero_keys
        ):
            yield Strip(start, stop, residue, step, cut, block, slots)


def work(pattern: Branches, heads: int, shape: StepShape) -> float:
    """Pairs per row that such tiles cost, about; for comparing shapes."""
    branches, _ = sorted_branches(pattern)
    total = 0.0
    for offsets in head_offsets(pattern, heads):
        members = (offsets,)
        cap = _best_cap(branches, members, shape)
        total += _cost(branches, (_residues(branches, offsets, 0),), cap, shape)
    return total / heads


def _zones(
    branches: Sequence[Branch], rows: range, columns: range, zero_keys: bool
) -> Iterator[tuple[int, int]]:
    bounds = {rows.start, rows.stop}
    for w, r in branches:
        if w % r:
            bounds.update(range(-(-rows.start // w) * w, rows.stop, w))
        if zero_keys:
            # Segments before, at and after the last column have different numbers of zero keys.
            bounds.update(
                b for b in (columns.stop // w * w, -(-columns.stop // w) * w) if b in rows
            )
    ordered = sorted(bounds)
    yield from pairwise(ordered)


def _residues(branches: Sequence[Branch], offsets: Offsets, position: int) -> Residues:
    """The residue that each branch keeps in the zone that starts at a position."""
    return tuple(
        None if s is None else (s + position // w * w) % r
        for (w, r), s in zip(branches, offsets, strict=True)
    )


@remembered(4096)
def _leaves(
    branches: tuple[Branch, ...],
    residues: tuple[Residues, ...],
    whole: tuple[bool, ...],
    cap: int,
    shape: StepShape,
    zero_keys: bool,
) -> tuple[tuple[int, int, int, int, tuple[Slot, ...]], ...]:
    leaves = []
    for residue, step in _split(branches, residues, cap):
        seen = [k for k in range(len(branches)) if any(_meets(branches, m, k, residue, step)
                                                       for m in residues)]  # fmt: skip
        cut, block = _tiling([branches[k] for k in seen], step, shape)
        slots: list[Slot] = []
        for index, member in enumerate(residues):
            slots += _slots(
                branches, member, whole, residue, step, cut, block, shape.columns, index, zero_keys
            )
        leaves.append((residue, step, cut, block, tuple(slots)))
    # Rows with the most work first.
    return tuple(sorted(leaves, key=lambda leaf: -len(leaf[-1])))


def _split(
    branches: Sequence[Branch], residues: Sequence[Residues], cap: int
) -> Iterator[tuple[int, int]]:
    """Progressions that cover all rows, each kept wholly or not at all where the cap allows."""
    pairs = sorted({(r, e) for m in residues for (_, r), e in zip(branches, m, strict=True)
                    if e is not None})  # fmt: skip
    todo = [(0, 1)]
    while todo:
        residue, step = todo.pop()
        for r, e in pairs:
            shared = math.gcd(step, r)
            if shared < r and (residue - e) % shared == 0:
                factor = _smallest_prime(r // shared)
                if step * factor <= cap:
                    todo += [(residue + i * step, step * factor) for i in range(factor)]
                    break
        else:
            yield residue, step


def _smallest_prime(n: int) -> int:
    return next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)


def _meets(branches: Sequence[Branch], member: Residues, k: int, residue: int, step: int) -> bool:
    """Whether the branch keeps any row of the leaf."""
    kept = member[k]
    return kept is not None and (residue - kept) % math.gcd(step, branches[k].dilation_rate) == 0


@remembered(1024)
def _best_cap(branches: tuple[Branch, ...], members: tuple[Offsets, ...], shape: StepShape) -> int:
    """The largest leaf step that pays, by the work it causes."""
    rates = [r for _, r in branches]
    caps = [c for c in _CAPS if c <= 2 * max(rates)]
    residues = tuple(_residues(branches, m, 0) for m in members)
    return min(caps, key=lambda cap: _cost(branches, residues, cap, shape))


def _cost(
    branches: tuple[Branch, ...], residues: tuple[Residues, ...], cap: int, shape: StepShape
) -> float:
    total = 0.0
    for residue, step in _split(branches, residues, cap):
        for member in residues:
            seen = [b for k, b in enumerate(branches) if _meets(branches, member, k, residue, step)]
            cut, block = _tiling(seen, step, shape)
            total += _work(seen, step, cut, block, shape) / step
    return total


def _tiling(branches: Sequence[Branch], step: int, shape: StepShape) -> tuple[int, int]:
    """Where tiles of a leaf start anew, and how many positions each spans."""
    span = shape.rows * step
    choices = [(span, span)]
    for w, _ in branches:
        rows = -(-w // step)
        tiles = -(-rows // shape.rows)
        if w % span and tiles <= 64:
            choices.append((w, -(-rows // tiles) * step))
    single = shape._replace(columns=1)
    return min(choices, key=lambda choice: _work(branches, step, choice[0], choice[1], single))


def _work(branches: Sequence[Branch], step: int, cut: int, block: int, shape: StepShape) -> float:
    """Padded pairs per row of the leaf, masked ones for what they cost."""
    tiles = -(-cut // block)
    padding = tiles * shape.rows * step / cut
    work, inner = 0.0, Branch(0, 1)
    for w, r in branches:
        one, two, more = _segments(w, cut, block)
        if step % r:
            one, two, more = 0.0, 0.0, one + two + more
        seen, hidden = one + two, more
        # A tile in one segment finds the keys of an inner one visited.
        is_outer = one == 1.0 and inner.segment_length > 0 and _divide(inner, Branch(w, r))
        keys = -(-(w - inner.segment_length * is_outer) // r)
        if shape.is_causal and is_outer:
            seen = 0.5
        elif shape.is_causal:
            # It sees what is before it and, masked, as many columns as it spans. Rows that two
            # segments share have bounds and need no mask, but not where order counts too.
            span = min(block, w) / w
            before = (1 - span) / 2
            seen, hidden = one * before, one * span + (two + more) * (before + span)
        work += math.ceil(keys / shape.columns) * shape.columns * (seen + _MASKED * hidden)
        if one == 1.0:
            inner = Branch(w, r)
    return padding * work


def _segments(w: int, cut: int, block: int) -> tuple[float, float, float]:
    """Segments of length w that a tile meets: in tiles that meet one, two, and more; a mean."""
    if _aligned(w, cut, block):
        return 1.0, 0.0, 0.0
    share = block / w
    if cut % w == 0 and block % w == 0:
        return (0.0, 2.0, 0.0) if share == 2 else (0.0, 0.0, share)
    return (1 - share, 2 * share, 0.0) if share <= 1 else (0.0, 0.0, 1 + share)


def _aligned(w: int, cut: int, block: int) -> bool:
    """Whether no tile crosses the end of a segment of length w."""
    return w % cut == 0 or (cut % w == 0 and w % block == 0)


def _slots(
    branches: Sequence[Branch],
    member: Residues,
    whole: Sequence[bool],
    residue: int,
    step: int,
    cut: int,
    block: int,
    unit: int,
    index: int,
    zero_keys: bool,
) -> Iterator[Slot]:
    chain: list[int] = []
    for k, (w, r) in enumerate(branches):
        kept = member[k]
        if kept is None or not _meets(branches, member, k, residue, step):
            continue
        mixed = step % r != 0
        if zero_keys:
            yield Slot(w, 0, 0, kept, r, 1, kept, r, index, True)
        one_segment = not mixed and (whole[k] or _aligned(w, cut, block))
        if one_segment and (not chain or _nests(branches, member, chain[-1], k)):
            chain.append(k)
        else:
            yield Slot(w, 0, 0, kept, r, 1, kept if mixed else 0, r if mixed else 1, index, False)
    yield from _chain_slots(branches, member, chain, unit, index)


def _nests(branches: Sequence[Branch], member: Residues, inner: int, outer: int) -> bool:
    """Whether the outer branch's keys inside an inner segment are among the inner branch's."""
    e, e_out = member[inner], member[outer]
    assert e is not None
    assert e_out is not None
    return _divide(branches[inner], branches[outer]) and (e_out - e) % branches[inner][1] == 0


def _divide(inner: Branch, outer: Branch) -> bool:
    """Whether segments and rates divide the outer branch's, whose rate is not too large."""
    (w, r), (w_out, r_out) = inner, outer
    return w_out % w == 0 and r_out % r == 0 and r_out <= _MAX_RATIO * r


def _chain_slots(
    branches: Sequence[Branch], member: Residues, chain: Sequence[int], unit: int, index: int
) -> Iterator[Slot]:
    """Runs that visit each key of nested branches once, weighted by how many branches show it.

    What segment j adds around segment j - 1 is seen by the branches from j on. Its keys of exact
    level p, kept by the branches up to p but not by the next, count p - j + 1 times.
    """
    for j, k in enumerate(chain):
        w = branches[k].segment_length
        inner = branches[chain[j - 1]].segment_length if j else 0
        once = list(_levels(branches, member, chain[j:]))
        each = [(member[p], branches[p].dilation_rate, 1) for p in chain[j:]]
        ring = w - inner
        padded = [sum(-(-ring // (s * unit)) for _, s, _ in runs) for runs in (once, each)]
        for residue, step, weight in once if padded[0] <= padded[1] else each:
            assert residue is not None
            for side in (-1, 1) if j else (0,):
                yield Slot(w, inner, side, residue, step, weight, 0, 1, index, False)


def _levels(
    branches: Sequence[Branch], member: Residues, chain: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(residue, step, weight) of the keys by exact level."""
    for depth, k in enumerate(chain):
        rate, kept = branches[k].dilation_rate, member[k]
        assert kept is not None
        if depth + 1 == len(chain):
            yield kept, rate, depth + 1
            return
        following, finer = member[chain[depth + 1]], branches[chain[depth + 1]].dilation_rate
        assert following is not None
        for i in range(1, finer // rate):
            yield (following + i * rate) % finer, finer, depth + 1
