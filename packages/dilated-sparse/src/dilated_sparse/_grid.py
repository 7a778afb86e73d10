"""The grid of blocks over queries and keys, and the sets of blocks that a layout chooses from it.

N queries, M keys, b block_size, R = ceil(N / b) block rows, C = ceil(M / b) block columns.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_sparse import _checks, _masks

FULL = -1
EMPTY = -2
_CHUNK_TOKENS = 1 << 22

# (query positions, key positions) -> bool; int64 tensors that broadcast.
TokenRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Sizes of a grid of blocks, and the device of the tensors about it."""

    length: int
    key_length: int
    block_size: int
    device: torch.device

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.length // self.block_size)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.key_length // self.block_size)

    def arange(self, *span: int) -> Tensor:
        """The numbers of a span."""
        return torch.arange(*span, device=self.device)

    def edge(self, row: Tensor, column: Tensor) -> Tensor:
        """Which blocks the ends of the sequences cut: 2 for the last row, plus 1 for the column."""
        edge = torch.zeros((), dtype=torch.int64, device=self.device).expand(row.shape)
        if self.length % self.block_size:
            edge = 2 * (row == self.rows - 1).to(torch.int64)
        if self.key_length % self.block_size:
            edge = edge + (column == self.columns - 1)
        return edge

    def sizes(self, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys in blocks of these edges."""
        last_row = self.length % self.block_size or self.block_size
        last_column = self.key_length % self.block_size or self.block_size
        return (
            torch.where(edge >= 2, last_row, self.block_size),
            torch.where(edge % 2 == 1, last_column, self.block_size),
        )

    def area(self, edge: Tensor) -> Tensor:
        """Token pairs in blocks of these edges."""
        rows, columns = self.sizes(edge)
        return rows * columns

    def inside(self, edge: Tensor) -> Tensor:
        """(P, b, b) bool: the part of blocks of these edges that lies in the sequences."""
        inner = self.arange(self.block_size)
        rows, columns = self.sizes(edge)
        return (inner < rows[:, None])[:, :, None] & (inner < columns[:, None])[:, None, :]

    def evaluate(self, rule: TokenRule, row: Tensor, column: Tensor) -> Tensor:
        """The packed masks that a rule gives to blocks, clipped to the sequences."""
        inner = self.arange(self.block_size)
        edge = self.edge(row, column)
        size = max(1, _CHUNK_TOKENS // self.block_size**2)
        parts = [_masks.empty(self.block_size, self.device)]
        for start in range(0, len(row), size):
            here = slice(start, start + size)
            q = row[here, None, None] * self.block_size + inner[:, None]
            k = column[here, None, None] * self.block_size + inner
            # Rules may look positions up, so they only see positions that exist.
            seen = rule(q.clamp(max=self.length - 1), k.clamp(max=self.key_length - 1))
            parts.append(_masks.pack(seen & self.inside(edge[here])))
        return torch.cat(parts)


def make_grid(
    length: int, key_length: int, block_size: int, device: torch.device | str = "cpu"
) -> Grid:
    """A checked grid."""
    return Grid(
        _checks.integer("length", length, low=0),
        _checks.integer("key_length", key_length, low=0),
        _checks.integer("block_size", block_size),
        torch.device(device),
    )


@dataclass(frozen=True, eq=False)
class Runs:
    """A set of blocks of a grid as runs of neighbours with one mask; by head, row and column.

    Attributes:
        row: (n,) int64, head * R + row.
        column: (n,) int64, the first column.
        count: (n,) int64, how many blocks, at least 1.
        mask: (n,) int64, an index into `table`, or FULL.
        table: the different masks of the partial blocks, packed.
    """

    row: Tensor
    column: Tensor
    count: Tensor
    mask: Tensor
    table: Tensor

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and mask of each block."""
        index, step = spread(self.count)
        return self.row[index], self.column[index] + step, self.mask[index]


def from_prototypes(
    grid: Grid,
    row: Tensor,
    column: Tensor,
    count: Tensor,
    index: Tensor,
    prototypes: Tensor,
    edge: Tensor,
) -> Runs:
    """Runs of blocks that each look like one of some prototypes (packed masks with edges).

    What turns out empty is dropped, what turns out full is marked so, and the table holds each
    mask in use once in an order of its own, so equal sets of token pairs have equal Runs.
    """
    seen = _masks.count(prototypes)
    full, void = seen == grid.area(edge), seen == 0
    used = torch.zeros_like(full)
    used[index] = True
    partial = used & ~(full | void)
    table, position = _masks.unique(prototypes[partial])
    kind = torch.where(void, EMPTY, FULL)
    kind[partial] = position
    return _join(row, column, count, kind[index], table)


def from_looks(
    grid: Grid, row: Tensor, column: Tensor, count: Tensor, look: Tensor, prototypes: Tensor
) -> Runs:
    """Runs of blocks that look like prototypes but where the ends of the sequences cut them."""
    index, column, count = split_cut(grid, column, count)
    row, look = row[index], look[index]
    edge = grid.edge(row % max(1, grid.rows), column)
    edges = grid.arange(4)
    inside = _masks.pack(grid.inside(edges))
    cut = (prototypes[:, None] & inside).flatten(0, 1)
    edges = edges.repeat(len(prototypes))
    return from_prototypes(grid, row, column, count, look * 4 + edge, cut, edges)


def from_rule(
    grid: Grid, row: Tensor, column: Tensor, count: Tensor, alike: Tensor, rule: TokenRule
) -> Runs:
    """Runs by a token rule, evaluated once for all blocks that look alike.

    Args:
        grid: the grid.
        row: (n,) int64 candidates, sorted by row and column, of one head.
        column: (n,) int64, the first column.
        count: (n,) int64, how many neighbours look alike; none are left out.
        alike: (n,) int64, at least 0: candidates with the same number
            have the same mask, the cut at the ends of the sequences apart.
        rule: which tokens are visible.
    """
    row, column, count, alike = where(count > 0, row, column, count, alike)
    index, column, count = split_cut(grid, column, count)
    row, alike = row[index], alike[index]
    key = alike * 4 + grid.edge(row, column)
    kinds, index, example = group(key)
    prototypes = grid.evaluate(rule, row[example], column[example])
    return from_prototypes(grid, row, column, count, index, prototypes, kinds % 4)


def split_cut(grid: Grid, column: Tensor, count: Tensor) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Runs apart from the last column where the keys' end cuts it: (index, column, count)."""
    if grid.key_length % grid.block_size == 0:
        return slice(None), column, count
    reaches = (column + count == grid.columns) & (count > 1)
    index, second = spread(1 + reaches.to(torch.int64))
    column = torch.where(second > 0, grid.columns - 1, column[index])
    count = torch.where(second > 0, 1, count[index] - reaches[index].to(torch.int64))
    return index, column, count


def group(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different keys, which of them each entry has, and an entry that has each."""
    highest = int(key.max()) if len(key) else 0
    if highest > 4 * len(key) + (1 << 20):
        kinds, index = torch.unique(key, return_inverse=True)
    else:
        # Much faster than sorting when there are millions of blocks of few kinds.
        seen = torch.zeros(highest + 1, dtype=torch.bool, device=key.device)
        seen[key] = True
        kinds = seen.nonzero().squeeze(1)
        index = (seen.cumsum(0) - 1)[key]
    example = torch.empty_like(kinds)
    example[index] = torch.arange(len(key), device=key.device)
    return kinds, index, example


def single_blocks(grid: Grid, row: Tensor, column: Tensor) -> Runs:
    """Blocks all of whose token pairs are visible, sorted by row and column."""
    return _join(
        row, column, torch.ones_like(row), torch.full_like(row, FULL),
        _masks.empty(grid.block_size, grid.device),
    )  # fmt: skip


def spread(count: Tensor) -> tuple[Tensor, Tensor]:
    """Entry i repeated count[i] times: (i, 0), (i, 1) and so on."""
    index = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return index, torch.arange(len(index), device=count.device) - first[index]


def where(kept: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """The entries of each column that are kept."""
    if bool(kept.all()):
        return columns
    index = kept.nonzero().squeeze(1)
    return tuple(column[index] for column in columns)


def interleave(rows: int, parts: Iterable[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Parts (row, ...), each sorted, merged by row; in a row, one part after the other.

    Parts from a generator are freed column by column.
    """
    columns = [list(column) for column in zip(*parts, strict=True)]
    counts = torch.stack([torch.bincount(row, minlength=rows) for row in columns[0]], 1)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).reshape(counts.shape)
    places = []
    for row, start, count in zip(columns[0], starts.unbind(1), counts.unbind(1), strict=True):
        place = (start - (count.cumsum(0) - count))[row]
        places.append(place.add_(torch.arange(len(row), device=row.device)))
    del row
    while columns:
        parts_ = columns.pop(0)
        whole = parts_[0].new_empty(sum(map(len, parts_)))
        for place, part in zip(places, parts_, strict=True):
            whole[place] = part
        yield whole


def _join(row: Tensor, column: Tensor, count: Tensor, mask: Tensor, table: Tensor) -> Runs:
    """Runs without empty ones, with neighbours of one mask joined."""
    row, column, count, mask = where(mask != EMPTY, row, column, count, mask)
    end = column + count
    joins = (row[1:] == row[:-1]) & (column[1:] == end[:-1]) & (mask[1:] == mask[:-1])
    if bool(joins.any()):
        apart = (~joins).nonzero().squeeze(1)
        first = torch.nn.functional.pad(apart + 1, (1, 0))
        last = torch.nn.functional.pad(apart, (0, 1), value=len(row) - 1)
        row, column, mask, end = row[first], column[first], mask[first], end[last]
        count = end - column
    return Runs(row, column, count, mask, table)
