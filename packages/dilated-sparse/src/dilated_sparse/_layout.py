"""`BlockLayout`: which blocks of keys each block of queries sees, exact to the token.

N queries, M keys, b block_size, R block rows, C block columns, nnz visible blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from dilated_sparse import _block_mask, _checks, _picture
from dilated_sparse._blocks import HeadRule, Layout, from_head_rule
from dilated_sparse._grid import Grid, make_grid
from dilated_sparse._spans import LayoutSpans

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, init=False, eq=False, repr=False)
class BlockLayout(Layout):
    """The visible blocks as compressed rows of full and partial blocks; immutable and hashable.

    A block is full (all its token pairs are visible) or partial (a mask says which). Neighbours of
    one kind in a row are stored as one run, so memory is O(runs), and no more than O(nnz). Layouts
    of equal token pairs, sizes and heads are equal, on whatever device. Make one with
    `dilated_sparse.layouts`, a `from_...` method, `|` or `&`, not by this constructor.

    Attributes:
        length: number of queries N.
        key_length: number of keys M.
        block_size: tokens on a side of a block; the last blocks may be short.
        heads: 1 for a layout that all heads share, or the number of query heads.
        run_offsets: (heads * R + 1,) int64; row r of head h has the runs from
            run_offsets[h * R + r] up to the next entry.
        run_columns: (runs,) int32, the first column of each, rising in a row.
        run_counts: (runs,) int32, how many blocks it has.
        run_masks: (runs,) int32; -1 where its blocks are full, else their mask in `table`.
        table: (masks, b, ceil(b / 8)) uint8, each mask once; bit j % 8 of byte j // 8 of row i
            says whether query i of the block sees its key j.
    """

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_size: int = 128) -> Self:
        """The layout of a bool mask (N, M), shared by all heads, or (H, N, M); True = visible.

        Raises:
            TypeError: mask is no bool tensor.
            ValueError: mask has another shape.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor. Got {type(mask).__name__}.")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True = visible. Got {mask.dtype}.")
        if mask.ndim not in (2, 3) or 0 in mask.shape[:-2]:
            raise ValueError(f"mask must have shape (N, M) or (H, N, M). Got {tuple(mask.shape)}.")
        mask = mask if mask.ndim == 3 else mask[None]
        heads, length, key_length = mask.shape

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head, query, key]

        grid = make_grid(length, key_length, block_size, mask.device)
        return cls._from_rule(grid, visible, heads)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: _block_mask.MaskMod,
        length: int,
        *,
        key_length: int | None = None,
        block_size: int = 128,
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The layout of a FlexAttention `mask_mod(batch, head, query, key)`, called on tensors.

        It is called with batch 0 on every token pair: O(heads * N * M) time, O(nnz) memory.
        """
        key_length = length if key_length is None else key_length
        grid = make_grid(length, key_length, block_size, device)
        return cls._from_rule(grid, _block_mask.as_rule(mask_mod), heads)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> Self:
        """The layout of torch's BlockMask: batch 1, square blocks. O(nnz * b^2) time."""
        return _block_mask.to_layout(cls, block_mask)

    @classmethod
    def _from_rule(cls, grid: Grid, visible: HeadRule, heads: int) -> Self:
        _checks.integer("heads", heads)
        row = grid.arange(grid.rows).repeat_interleave(grid.columns)
        column = grid.arange(grid.columns).repeat(grid.rows)
        return from_head_rule(cls, grid, visible, [(row, column)] * heads)

    def to_block_mask(self, *, device: torch.device | str | None = None) -> BlockMask:
        """Torch's BlockMask of the same token pairs; its tensors are O(heads * R * C).

        Args:
            device: where it is to be; the layout's device when None.
        """
        return _block_mask.from_layout(self if device is None else self.to(device))

    def text(self, head: int = 0, *, size: int = 64) -> str:
        """A picture in at most size x size letters: # full, + partial, . empty."""
        return _picture.text(self, head, size)

    def plot(self, *, size: int = 512) -> Figure:
        """A matplotlib Figure with a panel for each head, at most size x size pixels each.

        Raises:
            ImportError: matplotlib is not installed (the extra `plot` brings it).
        """
        return _picture.plot(self, size)

    @property
    def spans(self) -> LayoutSpans:
        """Attention by this layout span by span, as sequence-parallel attention takes it."""
        return LayoutSpans(self)
