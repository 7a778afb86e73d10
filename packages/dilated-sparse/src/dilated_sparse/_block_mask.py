"""Layouts to and from torch's BlockMask."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dilated_sparse._blocks import HeadRule, Kind, Layout, from_head_rule
from dilated_sparse._grid import EMPTY, FULL, make_grid

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def as_rule(mask_mod: MaskMod, heads: int) -> HeadRule:
    """What a FlexAttention `mask_mod(batch, head, query, key)` shows; `heads` a batch row."""

    def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = mask_mod(torch.div(head, heads, rounding_mode="floor"), head % heads, query, key)
        shape = torch.broadcast_shapes(query.shape, key.shape)
        return torch.as_tensor(seen, dtype=torch.bool).expand(shape)

    return visible


def from_layout(layout: Layout) -> BlockMask:
    """A BlockMask of the same token pairs, on the layout's device."""
    partial, full = (_padded(layout, kind) for kind in (False, True))
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=layout.block_size, mask_mod=TokenLookup(layout),
        seq_lengths=(layout.length, layout.key_length),
    )  # fmt: skip


def to_layout(kind: type[Kind], block_mask: BlockMask) -> Kind:
    """The layout of a BlockMask of square blocks."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask. Got {type(block_mask).__name__}.")
    rows, columns = block_mask.BLOCK_SIZE
    if rows != columns:
        raise ValueError(f"block_mask must have square blocks. Got {(rows, columns)}.")
    batch, heads, _ = block_mask.kv_num_blocks.shape
    grid = make_grid(*block_mask.seq_lengths, rows, block_mask.kv_indices.device)
    partial = _candidates(block_mask.kv_num_blocks, block_mask.kv_indices)
    layout = from_head_rule(kind, grid, as_rule(block_mask.mask_mod, heads), partial, batch)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return layout
    full = _candidates(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return layout | from_head_rule(
        kind, grid, lambda _, i, j: torch.ones_like(i + j, dtype=torch.bool), full, batch
    )


def _candidates(counts: Tensor, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(row, column) of the blocks that a BlockMask lists, for each head of a row, sorted."""
    pairs = []
    for count, index in zip(counts.flatten(0, 1), indices.flatten(0, 1), strict=True):
        listed = torch.arange(index.shape[1], device=index.device) < count[:, None]
        shape = index.shape[0], index.shape[1] + 1
        chosen = torch.zeros(shape, dtype=torch.bool, device=index.device)
        chosen.scatter_(1, index.masked_fill(~listed, index.shape[1]).to(torch.int64), True)
        row, column = chosen[:, :-1].nonzero().unbind(1)
        pairs.append((row, column))
    return pairs


def _padded(layout: Layout, full: bool) -> tuple[Tensor, Tensor]:
    """Counts (B, heads, R) and columns (B, heads, R, C) of the blocks of one kind."""
    grid, blocks = layout.grid, layout.blocks
    here = (blocks.mask == FULL) == full
    row, column = blocks.row[here], blocks.column[here]
    counts = torch.bincount(row, minlength=layout.heads * grid.rows)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = layout.heads * grid.rows, grid.columns
    indices = torch.zeros(shape, dtype=torch.int32, device=row.device)
    indices[row, place] = column.to(torch.int32)
    return (
        counts.to(torch.int32).reshape(layout.batch, layout.row_heads, grid.rows),
        indices.reshape(layout.batch, layout.row_heads, grid.rows, grid.columns),
    )


class TokenLookup:
    """The token pairs of a layout as a FlexAttention mask_mod."""

    def __init__(self, layout: Layout) -> None:
        grid, blocks = layout.grid, layout.blocks
        shape = layout.heads * grid.rows, grid.columns
        kinds = torch.full(shape, EMPTY, dtype=torch.int32, device=layout.device)
        kinds[blocks.row, blocks.column] = blocks.mask.to(torch.int32)
        self._kinds = kinds.reshape(layout.heads, grid.rows, grid.columns)
        # One row more, so that the lookup of a block without a mask stays inside.
        self._table = torch.nn.functional.pad(layout.table, (0, 0, 0, 0, 0, 1))
        self._block_size = layout.block_size
        self._batch, self._heads = layout.batch, layout.row_heads

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        b = self._block_size
        # Padding up to whole blocks is asked for as well; its answer is never used.
        q = query.clamp(max=self._kinds.shape[1] * b - 1)
        k = key.clamp(max=self._kinds.shape[2] * b - 1)
        row = batch % self._batch * self._heads + head % self._heads
        kind = self._kinds[row, q // b, k // b]
        byte = self._table[kind.clamp(min=FULL), q % b, k % b // 8]
        return (kind == FULL) | ((kind >= 0) & ((byte >> (k % b % 8)) & 1 == 1))
