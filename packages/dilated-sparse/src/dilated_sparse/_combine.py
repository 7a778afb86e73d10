"""Set operations on runs of blocks: union, intersection, hiding later keys, transposition.

Blocks of a grid are numbered row by row, so a run is an interval of numbers, and what two sets
make of each other is constant between the ends of their runs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dilated_sparse import _masks
from dilated_sparse._grid import (
    EMPTY,
    FULL,
    Grid,
    Runs,
    from_looks,
    from_prototypes,
    group,
    split_cut,
    spread,
    where,
)

Operation = Callable[[Tensor, Tensor], Tensor]


def combine(grid: Grid, a: Runs, b: Runs, operation: Operation) -> Runs:
    """Blocks of two sets, token by token; `operation` works on bytes of bits."""
    sets = [_Intervals(x.row * grid.columns + x.column, x.count, x.mask) for x in (a, b)]
    start, count = _pieces(sets[0], sets[1])
    masks = [x.at(start) for x in sets]
    some = (masks[0] != EMPTY) | (masks[1] != EMPTY)
    start, count, *masks = where(some, start, count, *masks)
    row = torch.div(start, max(1, grid.columns), rounding_mode="floor")
    index, column, count = split_cut(grid, start - row * grid.columns, count)
    return _combine_masks(
        grid, row[index], column, count, [mask[index] for mask in masks],
        [a.table, b.table], operation,
    )  # fmt: skip


def later_keys_hidden(grid: Grid, heads: int) -> Runs:
    """All keys but those after each query; the queries are the last of the key positions."""
    b, row = grid.block_size, grid.arange(grid.rows)
    # The queries of a row of blocks are at `first` to `first + b - 1`.
    first = grid.key_length - grid.length + row * b
    whole = (torch.div(first + 1, b, rounding_mode="floor")).clamp(max=grid.columns)
    stop = (torch.div(first + b - 1, b, rounding_mode="floor") + 1).clamp(max=grid.columns)
    # At most two blocks in a row hold later keys and earlier ones, by how far the queries are in.
    index, step = spread(1 + stop - whole)
    is_whole = step == 0
    column = torch.where(is_whole, 0, whole[index] + step - 1)
    count = torch.where(is_whole, whole[index], 1)
    row = index
    row, column, count, is_whole = where(count > 0, row, column, count, is_whole)
    shift = torch.where(is_whole, b, first[row] - column * b)
    kinds, look, _ = group(shift + b)
    inner = grid.arange(b)
    visible = inner <= inner[:, None] + (kinds - b)[:, None, None]
    one = from_looks(grid, row, column, count, look, _masks.pack(visible))
    return take(grid, one, [0] * heads)


def take(grid: Grid, runs: Runs, heads: Sequence[int]) -> Runs:
    """The runs of some heads, in that order; a head may be taken more than once."""
    head = torch.tensor(heads, dtype=torch.int64, device=grid.device)
    first, stop = (torch.searchsorted(runs.row, x * grid.rows) for x in (head, head + 1))
    which, step = spread(stop - first)
    index = first[which] + step
    row = runs.row[index] + (which - head[which]) * grid.rows
    return Runs(row, runs.column[index], runs.count[index], runs.mask[index], runs.table)


def stack(grid: Grid, parts: Sequence[Runs], heads: int) -> Runs:
    """The runs of sets of so many heads each, one after the other."""
    b = grid.block_size
    whole = _masks.pack(torch.ones((1, b, b), dtype=torch.bool, device=grid.device))
    looks = torch.cat([*(x.table for x in parts), whole])
    rows, masks, start = [], [], 0
    for i, part in enumerate(parts):
        rows.append(part.row + i * heads * grid.rows)
        masks.append(torch.where(part.mask == FULL, len(looks) - 1, part.mask + start))
        start += len(part.table)
    column, count = (torch.cat(x) for x in zip(*((p.column, p.count) for p in parts), strict=True))
    return from_looks(grid, torch.cat(rows), column, count, torch.cat(masks), looks)


def transpose(grid: Grid, runs: Runs, heads: int) -> Runs:
    """Rows and columns exchanged; O(runs of both) time."""
    if not len(runs.row):
        return runs
    # With an empty row after each head, a block's neighbour in the next row is `columns` further.
    columns, height = grid.columns, grid.rows + 1
    head = torch.div(runs.row, grid.rows, rounding_mode="floor")
    intervals = _Intervals((runs.row + head) * columns + runs.column, runs.count, runs.mask)
    masks, ends = [], []
    for step in (-columns, columns):
        # A run of the transpose starts at, or ends in, a block whose neighbour has another mask.
        start, count = _pieces(intervals, intervals.moved(-step))
        mask = intervals.at(start)
        differs = (mask != EMPTY) & (mask != intervals.at(start + step))
        start, count, mask = where(differs, start, count, mask)
        index, inner = spread(count)
        place = start[index] + inner
        row = torch.div(place, columns, rounding_mode="floor")
        head = torch.div(row, height, rounding_mode="floor")
        key = (head * columns + place - row * columns) * height + row - head * height
        key, order = key.sort()
        ends.append(key)
        masks.append(mask[index[order]])
    row = torch.div(ends[0], height, rounding_mode="floor")
    table, index = _masks.unique(_masks.pack(_masks.unpack(runs.table).transpose(1, 2)))
    index = torch.nn.functional.pad(index, (0, 1), value=FULL)
    return Runs(row, ends[0] - row * height, ends[1] - ends[0] + 1, index[masks[0]], table)


class _Intervals:
    """Disjoint intervals of numbers, rising, each with a mask."""

    def __init__(self, start: Tensor, count: Tensor, mask: Tensor) -> None:
        self.start, self.stop, self._mask = start, start + count, mask

    def moved(self, step: int) -> "_Intervals":
        """Each interval that much further."""
        return _Intervals(self.start + step, self.stop - self.start, self._mask)

    def at(self, place: Tensor) -> Tensor:
        """The mask at each place, EMPTY where no interval is."""
        if not len(self.start):
            return torch.full_like(place, EMPTY)
        index = (torch.searchsorted(self.start, place, right=True) - 1).clamp(min=0)
        inside = (self.start[index] <= place) & (place < self.stop[index])
        return torch.where(inside, self._mask[index], EMPTY)


def _pieces(a: _Intervals, b: _Intervals) -> tuple[Tensor, Tensor]:
    """Start and count of the pieces between all ends of all intervals."""
    one, two = (torch.stack([x.start, x.stop], 1).flatten() for x in (a, b))
    # Merging two sorted lists by search is much faster than sorting them.
    ends = torch.empty(len(one) + len(two), dtype=one.dtype, device=one.device)
    ends[torch.arange(len(one), device=one.device) + torch.searchsorted(two, one)] = one
    place = torch.searchsorted(one, two, right=True)
    ends[torch.arange(len(two), device=two.device) + place] = two
    ends = torch.unique_consecutive(ends)
    return ends[:-1], ends.diff()


def _combine_masks(
    grid: Grid,
    row: Tensor,
    column: Tensor,
    count: Tensor,
    masks: list[Tensor],
    tables: list[Tensor],
    operation: Operation,
) -> Runs:
    """Apply the operation once to each different (mask, mask, edge)."""
    width = len(tables[1]) + 2
    edge = grid.edge(row % max(1, grid.rows), column)
    code = ((masks[0] - EMPTY) * width + (masks[1] - EMPTY)) * 4 + edge
    codes, index, _ = group(code)
    edges, pair = codes % 4, torch.div(codes, 4, rounding_mode="floor")
    first = torch.div(pair, width, rounding_mode="floor") + EMPTY
    inside = _masks.pack(grid.inside(grid.arange(4)))[edges]
    one, other = (
        _bits(mask, table, inside)
        for mask, table in zip((first, pair % width + EMPTY), tables, strict=True)
    )
    prototypes = operation(one, other) & inside
    return from_prototypes(grid, row, column, count, index, prototypes, edges)


def _bits(mask: Tensor, table: Tensor, inside: Tensor) -> Tensor:
    bits = torch.where((mask == FULL)[:, None, None], inside, torch.zeros_like(inside))
    partial = mask >= 0
    bits[partial] = table[mask[partial]]
    return bits
