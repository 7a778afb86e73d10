"""Set operations on blocks: union, intersection, and hiding the keys after each query."""

from collections.abc import Callable

import torch
from torch import Tensor

from dilated_sparse import _masks
from dilated_sparse._grid import EMPTY, FULL, Blocks, Grid, from_prototypes

Operation = Callable[[Tensor, Tensor], Tensor]


def combine(grid: Grid, a: Blocks, b: Blocks, operation: Operation) -> Blocks:
    """Blocks of two sets, token by token; `operation` works on bytes of bits."""
    keys = torch.cat([x.row * grid.columns + x.column for x in (a, b)])
    places, index = torch.unique(keys, return_inverse=True)
    masks = []
    for x, where in zip((a, b), index.split([len(a.row), len(b.row)]), strict=True):
        mask = torch.full_like(places, EMPTY)
        mask[where] = x.mask
        masks.append(mask)
    row = torch.div(places, max(1, grid.columns), rounding_mode="floor")
    column = places - row * grid.columns
    return _combine_masks(grid, row, column, masks, [a.table, b.table], operation)


def hide_later_keys(grid: Grid, blocks: Blocks) -> Blocks:
    """Blocks without the keys after each query; the queries are the last of the key positions."""
    row = blocks.row % max(1, grid.rows)
    ahead = grid.key_length - grid.length + (row - blocks.column) * grid.block_size
    # The first query of a block may see the keys up to `ahead` in it.
    kept = ahead > -grid.block_size
    ahead = ahead[kept]
    crossing = ahead < grid.block_size - 1
    shifts, which = torch.unique(ahead[crossing], return_inverse=True)
    inner = torch.arange(grid.block_size)
    visible = inner <= inner[:, None] + shifts[:, None, None]
    order = torch.full_like(ahead, FULL)
    order[crossing] = which
    return _combine_masks(
        grid, blocks.row[kept], blocks.column[kept], [blocks.mask[kept], order],
        [blocks.table, _masks.pack(visible)], torch.bitwise_and,
    )  # fmt: skip


def _combine_masks(
    grid: Grid,
    row: Tensor,
    column: Tensor,
    masks: list[Tensor],
    tables: list[Tensor],
    operation: Operation,
) -> Blocks:
    """Apply the operation once to each different (mask, mask, edge)."""
    width = len(tables[1]) + 2
    edge = grid.edge(row % max(1, grid.rows), column)
    code = ((masks[0] - EMPTY) * width + (masks[1] - EMPTY)) * 4 + edge
    codes, index = torch.unique(code, return_inverse=True)
    edges, pair = codes % 4, torch.div(codes, 4, rounding_mode="floor")
    first = torch.div(pair, width, rounding_mode="floor") + EMPTY
    inside = _masks.pack(grid.inside(edges))
    one, other = (
        _bits(mask, table, inside)
        for mask, table in zip((first, pair % width + EMPTY), tables, strict=True)
    )
    return from_prototypes(grid, row, column, index, operation(one, other) & inside, edges)


def _bits(mask: Tensor, table: Tensor, inside: Tensor) -> Tensor:
    bits = torch.where((mask == FULL)[:, None, None], inside, torch.zeros_like(inside))
    partial = mask >= 0
    bits[partial] = table[mask[partial]]
    return bits
