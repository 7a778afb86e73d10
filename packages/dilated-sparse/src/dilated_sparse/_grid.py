"""The grid of blocks over queries and keys, and the sets of blocks that a layout chooses from it.

N queries, M keys, b block_size, R = ceil(N / b) block rows, C = ceil(M / b) block columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_sparse import _masks

FULL = -1
EMPTY = -2
_CHUNK_TOKENS = 1 << 22

# (query positions, key positions) -> bool; int64 tensors that broadcast.
TokenRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Sizes of a grid of blocks."""

    length: int
    key_length: int
    block_size: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.length // self.block_size)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.key_length // self.block_size)

    def edge(self, row: Tensor, column: Tensor) -> Tensor:
        """Which blocks the ends of the sequences cut: 2 for the last row, plus 1 for the column."""
        cut_row = (row == self.rows - 1) & (self.length % self.block_size != 0)
        cut_column = (column == self.columns - 1) & (self.key_length % self.block_size != 0)
        return 2 * cut_row.to(torch.int64) + cut_column

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
        inner = torch.arange(self.block_size)
        rows, columns = self.sizes(edge)
        return (inner < rows[:, None])[:, :, None] & (inner < columns[:, None])[:, None, :]

    def evaluate(self, rule: TokenRule, row: Tensor, column: Tensor) -> Tensor:
        """The packed masks that a rule gives to blocks, clipped to the sequences."""
        inner = torch.arange(self.block_size)
        edge = self.edge(row, column)
        size = max(1, _CHUNK_TOKENS // self.block_size**2)
        parts = []
        for start in range(0, len(row), size):
            here = slice(start, start + size)
            q = row[here, None, None] * self.block_size + inner[:, None]
            k = column[here, None, None] * self.block_size + inner
            # Rules may look positions up, so they only see positions that exist.
            seen = rule(q.clamp(max=self.length - 1), k.clamp(max=self.key_length - 1))
            parts.append(_masks.pack(seen & self.inside(edge[here])))
        return torch.cat(parts) if parts else _masks.empty(self.block_size)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A set of blocks of a grid, by head, row and column in this order.

    Attributes:
        row: (nnz,) int64, head * R + row.
        column: (nnz,) int64.
        mask: (nnz,) int64, an index into `table`, or FULL.
        table: the different masks of the partial blocks, packed.
    """

    row: Tensor
    column: Tensor
    mask: Tensor
    table: Tensor


def from_prototypes(
    grid: Grid, row: Tensor, column: Tensor, index: Tensor, prototypes: Tensor, edge: Tensor
) -> Blocks:
    """Blocks that each look like one of some prototypes (packed masks with edges).

    What turns out empty is dropped, what turns out full is marked so, and the table holds each
    mask once in an order of its own, so equal sets of token pairs have equal Blocks.
    """
    seen = _masks.count(prototypes)
    full, void = seen == grid.area(edge), seen == 0
    partial = ~(full | void)
    table, position = _masks.unique(prototypes[partial])
    kind = torch.where(full, FULL, EMPTY)
    kind[partial] = position
    mask = kind[index]
    if bool(void.any()):
        kept = mask != EMPTY
        row, column, mask = row[kept], column[kept], mask[kept]
    return Blocks(row, column, mask, table)


def from_rule(grid: Grid, row: Tensor, column: Tensor, alike: Tensor, rule: TokenRule) -> Blocks:
    """Blocks by a token rule, evaluated once for all blocks that look alike.

    Args:
        grid: the grid.
        row: (n,) int64 candidates, sorted by row and column. Rows of heads after the first need a
            `rule` that is the same for all heads.
        column: (n,) int64.
        alike: (n,) int64, at least 0: candidates with the same number
            have the same mask, the cut at the ends of the sequences apart.
        rule: which tokens are visible.
    """
    if not len(row):
        return Blocks(row, column, row, _masks.empty(grid.block_size))
    key = alike * 4 + grid.edge(row, column)
    kinds, index, example = _group(key)
    prototypes = grid.evaluate(rule, row[example], column[example])
    return from_prototypes(grid, row, column, index, prototypes, kinds % 4)


def _group(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different keys, which of them each entry has, and an entry that has each."""
    highest = int(key.max())
    if highest > 4 * len(key) + (1 << 20):
        kinds, index = torch.unique(key, return_inverse=True)
    else:
        # Much faster than sorting when there are millions of blocks of few kinds.
        seen = torch.zeros(highest + 1, dtype=torch.bool)
        seen[key] = True
        kinds = seen.nonzero().squeeze(1)
        index = (seen.cumsum(0) - 1)[key]
    example = torch.empty_like(kinds)
    example[index] = torch.arange(len(key))
    return kinds, index, example


def full_blocks(grid: Grid, row: Tensor, column: Tensor) -> Blocks:
    """Blocks all of whose token pairs are visible, sorted by row and column."""
    return Blocks(row, column, torch.full_like(row, FULL), _masks.empty(grid.block_size))


def span_pairs(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """All (row, column) with start[row] <= column < stop[row], sorted."""
    counts = (stop - start).clamp(min=0)
    row = torch.repeat_interleave(torch.arange(len(start)), counts)
    ends = counts.cumsum(0)
    shift = start - (ends - counts)
    return row, torch.arange(len(row)) + torch.repeat_interleave(shift, counts)
