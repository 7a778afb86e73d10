"""From a layout to tiles: runs of query rows that attend to the same few runs of key rows.

Neighbouring block rows that see nearly the same blocks share a tile, since large products are fast;
the blocks that only some of them see are holes for the others.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from dilated_core.extending import remembered
from dilated_sparse._blocks import Layout
from dilated_sparse._grid import EMPTY, FULL

# Rows of one tile where blocks are smaller, and scores of one head in it. More rows would fill
# products better, but neighbouring rows rarely see the same blocks.
_MAX_ROWS = 128
MAX_SCORES = 1 << 19
# A tile may compute this much more than is visible, counted in whole blocks.
_SLACK = 1.125


class Hole(NamedTuple):
    """A part of a tile's scores that is hidden, wholly or by a mask.

    Attributes:
        rows, columns: where it is in the tile.
        mask: its mask in the schedule's table, or -2 where nothing in it is visible.
    """

    rows: slice
    columns: slice
    mask: int


class Tile(NamedTuple):
    """Some query rows, all of whose attention to some key rows is computed at once.

    Attributes:
        queries: the rows (start, stop).
        runs: (start, stop) of runs of key rows, rising; the tile's columns are these rows in turn.
        holes: what is hidden.
        alone: no other tile has these query rows.
    """

    queries: tuple[int, int]
    runs: tuple[tuple[int, int], ...]
    holes: tuple[Hole, ...]
    alone: bool

    @property
    def columns(self) -> int:
        """How many key rows the tile has."""
        return sum(stop - start for start, stop in self.runs)


class Schedule(NamedTuple):
    """How a layout is computed.

    Attributes:
        tiles: for each head of the layout, its tiles.
        table: the packed masks of the tiles' holes.
    """

    tiles: tuple[tuple[Tile, ...], ...]
    table: Tensor


@remembered(64)
def schedule(layout: Layout, is_causal: bool) -> Schedule:
    """The tiles of each head of a layout; O(nnz)."""
    layout = layout.to("cpu")
    if is_causal:
        layout = layout.causal()
    rows = _rows(layout)
    count = layout.grid.rows
    tiles = tuple(
        tuple(
            tile
            for start, group in _groups(rows[head * count : (head + 1) * count], layout.block_size)
            for tile in _tiles(layout, start, group)
        )
        for head in range(layout.heads)
    )
    return Schedule(tiles, layout.table)


Row = dict[int, int]


def _rows(layout: Layout) -> list[Row]:
    """For each block row of each head: column -> mask."""
    offsets, columns, masks = (
        x.tolist() for x in (layout.row_offsets, layout.columns, layout.masks)
    )
    return [dict(zip(columns[a:b], masks[a:b], strict=True)) for a, b in pairwise(offsets)]


def _groups(rows: Sequence[Row], block_size: int) -> Iterator[tuple[int, list[Row]]]:
    """Neighbouring rows that waste little when they are computed together."""
    start, group, union, visible = 0, list[Row](), set[int](), 0
    most = max(1, _MAX_ROWS // block_size)
    for i, row in enumerate(rows):
        grown = union | row.keys() if len(group) < most else set[int]()
        if group and len(group) < most and row:
            wide = (len(group) + 1) * len(grown)
            if union and wide <= _SLACK * (visible + len(row)):
                group.append(row)
                union, visible = grown, visible + len(row)
                continue
        if union:
            yield start, group
        start, group, union, visible = i, [row], set(row), len(row)
    if union:
        yield start, group


def _tiles(layout: Layout, start: int, group: list[Row]) -> Iterator[Tile]:
    """The tiles of a group of rows: more than one where its scores would be too many."""
    b = layout.block_size
    queries = start * b, min(layout.length, (start + len(group)) * b)
    columns = sorted(set().union(*group))
    size = max(1, MAX_SCORES // (b * (queries[1] - queries[0])))
    for first in range(0, len(columns), size):
        part = columns[first : first + size]
        runs, holes = list[tuple[int, int]](), list[Hole]()
        place = 0
        for column in part:
            begin, end = column * b, min(layout.key_length, (column + 1) * b)
            if runs and runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((begin, end))
            here = slice(place, place + end - begin)
            place = here.stop
            for i, row in enumerate(group):
                if (mask := row.get(column, EMPTY)) != FULL:
                    rows = slice(i * b, min((i + 1) * b, queries[1] - queries[0]))
                    holes.append(Hole(rows, here, mask))
        yield Tile(queries, tuple(runs), tuple(holes), len(columns) <= size)
