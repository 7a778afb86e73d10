"""The last queries of a layout over its first keys: shorter batches, and single steps.

b block_size, R block rows, C block columns.
"""

import torch
from torch import Tensor

from dilated_sparse import _masks
from dilated_sparse._block_mask import TokenLookup
from dilated_sparse._blocks import Kind, compress, from_head_rule
from dilated_sparse._grid import FULL, Grid, from_looks


def cut(layout: Kind, length: int, key_length: int) -> Kind:
    """The layout of the queries from key_length - length on to the first key_length keys.

    O(runs) where the first of these queries begins a block, else O(b^2) for each visible block.

    Args:
        layout: with as many queries and keys at least.
        length: queries.
        key_length: keys.
    """
    b = layout.block_size
    first, shift = divmod(key_length - length, b)
    stop = -(-key_length // b) * b
    source = layout.restrict(
        range(first * b, min(stop, layout.length)), range(min(stop, layout.key_length))
    )
    grid = Grid(length, key_length, b, layout.device)
    if shift:
        return _shifted(source, grid, shift)
    runs = source.runs
    whole = _masks.pack(torch.ones((1, b, b), dtype=torch.bool, device=layout.device))
    look = torch.where(runs.mask == FULL, len(runs.table), runs.mask)
    looks = torch.cat([runs.table, whole])
    found = from_looks(grid, runs.row, runs.column, runs.count, look, looks)
    return compress(type(layout), grid, found, layout.heads, layout.batch)


def _shifted(source: Kind, grid: Grid, shift: int) -> Kind:
    """The rows from `shift` on: each block of them lies in two of the source's."""
    lookup = TokenLookup(source)

    def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return lookup(
            torch.div(head, source.row_heads, rounding_mode="floor"), head, query + shift, key
        )

    blocks, rows = source.blocks, max(1, source.grid.rows)
    candidates = []
    for head in range(source.heads):
        mine = torch.div(blocks.row, rows, rounding_mode="floor") == head
        row, column = blocks.row[mine] % rows, blocks.column[mine]
        both = torch.cat([row, row - 1]), column.repeat(2)
        place = both[0] * max(1, grid.columns) + both[1]
        place = place[(both[0] >= 0) & (both[0] < grid.rows)].unique()
        candidates.append((place // max(1, grid.columns), place % max(1, grid.columns)))
    return from_head_rule(type(source), grid, visible, candidates, source.batch)
