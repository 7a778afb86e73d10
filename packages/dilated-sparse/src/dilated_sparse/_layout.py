"""`BlockLayout`: which blocks of keys each block of queries sees, exact to the token.

H heads, N queries, M keys, b block_size, R block rows, C block columns, nnz visible blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_sparse import _checks, _combine, _masks
from dilated_sparse._grid import FULL, Blocks, Grid, from_prototypes, span_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """The visible blocks as compressed rows, in host memory, O(nnz); immutable and hashable.

    A block is full (all its token pairs are visible) or partial (a mask says which). Layouts of
    equal token pairs, sizes and heads are equal. Make one with `dilated_sparse.layouts`, a
    `from_...` method, `|` or `&`, not by this constructor.

    Attributes:
        length: number of queries N.
        key_length: number of keys M.
        block_size: tokens on a side of a block; the last blocks may be short.
        heads: 1 for a layout that all heads share, or the number of query heads.
        row_offsets: (heads * R + 1,) int64; row r of head h has the blocks from
            row_offsets[h * R + r] up to the next entry.
        columns: (nnz,) int32, rising in a row.
        masks: (nnz,) int32; -1 where the block is full, else its mask in `table`.
        table: (masks, b, ceil(b / 8)) uint8, each mask once; bit j % 8 of byte j // 8 of row i
            says whether query i of the block sees its key j.
        digest: names the content.
    """

    length: int
    key_length: int
    block_size: int
    heads: int
    row_offsets: Tensor
    columns: Tensor
    masks: Tensor
    table: Tensor
    digest: str = field(default="")

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", self._digest())

    # Making one.

    @classmethod
    def from_blocks(cls, grid: Grid, blocks: Blocks, heads: int = 1) -> BlockLayout:
        """Compress the rows of a set of blocks (for code inside this package)."""
        counts = torch.bincount(blocks.row, minlength=heads * grid.rows)
        return cls(
            grid.length, grid.key_length, grid.block_size, heads,
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            blocks.column.to(torch.int32), blocks.mask.to(torch.int32), blocks.table,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_size: int = 128) -> BlockLayout:
        """The layout of a bool mask (N, M), shared by all heads, or (H, N, M); True = visible."""
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor. Got {type(mask).__name__}.")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True = visible. Got {mask.dtype}.")
        if mask.ndim not in (2, 3) or 0 in mask.shape[:-2]:
            raise ValueError(f"mask must have shape (N, M) or (H, N, M). Got {tuple(mask.shape)}.")
        mask = mask.cpu() if mask.ndim == 3 else mask.cpu()[None]
        heads, length, key_length = mask.shape

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head, query, key]

        return cls._from_token_rule(visible, length, key_length, block_size, heads)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        length: int,
        *,
        key_length: int | None = None,
        block_size: int = 128,
        heads: int = 1,
    ) -> BlockLayout:
        """The layout of a FlexAttention `mask_mod(batch, head, query, key)`, called on tensors.

        It is called with batch 0 on every token pair: O(heads * N * M) time, O(nnz) memory.
        """

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _call_mask_mod(mask_mod, head, query, key)

        key_length = length if key_length is None else key_length
        return cls._from_token_rule(visible, length, key_length, block_size, heads)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockLayout:
        """The layout of torch's BlockMask: batch 1, square blocks. O(nnz * b^2) time."""
        from dilated_sparse import _block_mask

        return _block_mask.to_layout(block_mask)

    @classmethod
    def _from_token_rule(
        cls,
        visible: Callable[[Tensor, Tensor, Tensor], Tensor],
        length: int,
        key_length: int,
        block_size: int,
        heads: int,
    ) -> BlockLayout:
        grid = make_grid(length, key_length, block_size)
        _checks.integer("heads", heads)
        every = torch.full((grid.rows,), grid.columns)
        row, column = span_pairs(torch.zeros_like(every), every)
        return from_head_rules(
            grid, [(row, column, _at_head(visible, head)) for head in range(heads)]
        )

    def to_block_mask(self, *, device: torch.device | str = "cpu") -> BlockMask:
        """Torch's BlockMask of the same token pairs; its tensors are O(heads * R * C)."""
        from dilated_sparse import _block_mask

        return _block_mask.from_layout(self, torch.device(device))

    def to_dense(self) -> Tensor:
        """The token pairs as a bool tensor (heads, N, M), as large as it looks."""
        grid, b = self.grid, self.block_size
        tiles = torch.zeros(self.heads * grid.rows, grid.columns, b, b, dtype=torch.bool)
        blocks = self.blocks
        full = blocks.mask == FULL
        tiles[blocks.row[full], blocks.column[full]] = True
        partial = ~full
        masks = _masks.unpack(self.table)[blocks.mask[partial]]
        tiles[blocks.row[partial], blocks.column[partial]] = masks
        dense = tiles.unflatten(0, (self.heads, grid.rows)).transpose(2, 3)
        dense = dense.reshape(self.heads, grid.rows * b, grid.columns * b)
        inside: Tensor = dense[:, : self.length, : self.key_length]
        return inside.contiguous()

    # What it is.

    @property
    def grid(self) -> Grid:
        """The grid of blocks."""
        return Grid(self.length, self.key_length, self.block_size)

    @property
    def nnz(self) -> int:
        """How many blocks are visible, summed over heads."""
        return len(self.columns)

    @property
    def blocks(self) -> Blocks:
        """The visible blocks, one entry each."""
        counts = self.row_offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return Blocks(row, self.columns.to(torch.int64), self.masks.to(torch.int64), self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold it."""
        return sum(x.nbytes for x in (self.row_offsets, self.columns, self.masks, self.table))

    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible, summed over heads."""
        blocks = self.blocks
        areas = self.grid.area(self.grid.edge(blocks.row % max(1, self.grid.rows), blocks.column))
        counts = torch.cat([_masks.count(self.table), torch.zeros(1, dtype=torch.int64)])
        return int(torch.where(blocks.mask == FULL, areas, counts[blocks.mask]).sum())

    def density(self) -> float:
        """The visible share of the (query, key) pairs, between 0 and 1; 0 where there are none."""
        return self.visible_pairs() / max(1, self.heads * self.length * self.key_length)

    # New layouts from it.

    def transpose(self) -> BlockLayout:
        """Queries and keys exchanged: the rows of dK and dV."""
        grid, blocks = self.grid, self.blocks
        rows = max(1, grid.rows)
        head = torch.div(blocks.row, rows, rounding_mode="floor")
        row, column = head * grid.columns + blocks.column, blocks.row % rows
        order = torch.argsort(row * rows + column)
        prototypes = _masks.pack(_masks.unpack(self.table).transpose(1, 2))
        table, index = _masks.unique(prototypes)
        index = torch.cat([index, torch.tensor([FULL])])
        flipped = Grid(self.key_length, self.length, self.block_size)
        moved = Blocks(row[order], column[order], index[blocks.mask[order]], table)
        return BlockLayout.from_blocks(flipped, moved, self.heads)

    def causal(self) -> BlockLayout:
        """Without the keys after each query; the queries are the last N of the M positions.

        Raises:
            ValueError: more queries than keys.
        """
        if self.length > self.key_length:
            raise ValueError(
                f"length must not exceed key_length in a causal layout. "
                f"Got {self.length} and {self.key_length}."
            )
        hidden = _combine.hide_later_keys(self.grid, self.blocks)
        return BlockLayout.from_blocks(self.grid, hidden, self.heads)

    def restrict(self, queries: range, keys: range) -> BlockLayout:
        """The layout between a span of queries and a span of keys, which then count from 0.

        Raises:
            ValueError: a span has a step, leaves the sequence, does not start at a block, or ends
                neither at a block nor with the sequence.
        """
        _check_span("queries", queries, self.length, self.block_size)
        _check_span("keys", keys, self.key_length, self.block_size)
        grid = Grid(len(queries), len(keys), self.block_size)
        blocks, rows = self.blocks, max(1, self.grid.rows)
        head = torch.div(blocks.row, rows, rounding_mode="floor")
        row = blocks.row % rows - queries.start // self.block_size
        column = blocks.column - keys.start // self.block_size
        kept = (row >= 0) & (row < grid.rows) & (column >= 0) & (column < grid.columns)
        mask, used = blocks.mask[kept], torch.zeros(len(self.table) + 1, dtype=torch.bool)
        used[mask] = True
        used[FULL] = True
        index = used.cumsum(0) - 1
        index[FULL] = FULL
        inside = Blocks(
            head[kept] * grid.rows + row[kept], column[kept], index[mask], self.table[used[:-1]]
        )
        return BlockLayout.from_blocks(grid, inside, self.heads)

    def per_head(self, heads: int) -> BlockLayout:
        """The same layout with that many heads.

        Raises:
            ValueError: it already has another number of heads.
        """
        if self.heads == _checks.integer("heads", heads):
            return self
        if self.heads != 1:
            raise ValueError(f"heads must be {self.heads}, which the layout has. Got {heads}.")
        steps = torch.arange(heads)[:, None] * self.nnz
        offsets = (steps + self.row_offsets[:-1]).flatten()
        return BlockLayout(
            self.length, self.key_length, self.block_size, heads,
            torch.cat([offsets, offsets.new_tensor([heads * self.nnz])]),
            self.columns.repeat(heads), self.masks.repeat(heads), self.table,
        )  # fmt: skip

    def __or__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, torch.bitwise_or)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, torch.bitwise_and)

    def _combine(self, other: BlockLayout, operation: _combine.Operation) -> BlockLayout:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self.grid != other.grid:
            raise ValueError(
                f"layouts must have equal lengths and block sizes to combine. "
                f"Got {self!r} and {other!r}."
            )
        heads = max(self.heads, other.heads)
        one, two = self.per_head(heads).blocks, other.per_head(heads).blocks
        combined = _combine.combine(self.grid, one, two, operation)
        return BlockLayout.from_blocks(self.grid, combined, heads)

    # Pictures.

    def text(self, head: int = 0, *, size: int = 64) -> str:
        """A picture in at most size x size letters: # full, + partial, . empty."""
        from dilated_sparse import _picture

        return _picture.text(self, head, size)

    def plot(self, *, size: int = 512) -> Figure:
        """A matplotlib Figure with a panel for each head, at most size x size pixels each.

        Raises:
            ImportError: matplotlib is not installed (the extra `plot` brings it).
        """
        from dilated_sparse import _picture

        return _picture.plot(self, size)

    # Identity.

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"BlockLayout(length={self.length}, key_length={self.key_length}, "
            f"block_size={self.block_size}, heads={self.heads}, nnz={self.nnz})"
        )

    def _digest(self) -> str:
        sizes = (self.length, self.key_length, self.block_size, self.heads)
        digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
        for x in (self.row_offsets, self.columns, self.masks, self.table):
            x = x.contiguous()
            digest.update(ctypes.string_at(x.data_ptr(), x.nbytes) if x.nbytes else b"")
        return digest.hexdigest()


def make_grid(length: int, key_length: int, block_size: int) -> Grid:
    """A checked grid."""
    return Grid(
        _checks.integer("length", length, low=0),
        _checks.integer("key_length", key_length, low=0),
        _checks.integer("block_size", block_size),
    )


HeadRule = tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


def from_head_rules(grid: Grid, heads: list[HeadRule]) -> BlockLayout:
    """A layout from candidates (row, column) and a token rule for each head, without any reuse."""
    prototypes = [grid.evaluate(rule, row, column) for row, column, rule in heads]
    rows = torch.cat([row + head * grid.rows for head, (row, _, _) in enumerate(heads)])
    columns = torch.cat([column for _, column, _ in heads])
    blocks = from_prototypes(
        grid, rows, columns, torch.arange(len(rows)), torch.cat(prototypes),
        grid.edge(rows % max(1, grid.rows), columns),
    )  # fmt: skip
    return BlockLayout.from_blocks(grid, blocks, len(heads))


def _at_head(
    visible: Callable[[Tensor, Tensor, Tensor], Tensor], head: int
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: visible(torch.tensor(head), query, key)


def _call_mask_mod(mask_mod: MaskMod, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    seen = mask_mod(torch.zeros_like(head), head, query, key)
    shape = torch.broadcast_shapes(query.shape, key.shape)
    return torch.as_tensor(seen, dtype=torch.bool).expand(shape)


def _check_span(name: str, span: range, length: int, block_size: int) -> None:
    if not isinstance(span, range) or span.step != 1:
        raise ValueError(f"{name} must be a range of step 1. Got {span!r}.")
    if not 0 <= span.start <= span.stop <= length:
        raise ValueError(f"{name} must lie in range(0, {length}). Got {span!r}.")
    if span.start % block_size or (span.stop % block_size and span.stop != length):
        raise ValueError(f"{name} must start and end at multiples of {block_size}. Got {span!r}.")
