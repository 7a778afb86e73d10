"""`BlockLayout`: which blocks of keys each block of queries sees, exact to the token.

H heads, N queries, M keys, b block_size, R block rows, C block columns, nnz visible blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dilated_sparse import _checks, _combine, _masks
from dilated_sparse._grid import FULL, Grid, Runs, from_prototypes, spread, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask

    from dilated_core.interfaces import SpanAttention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Blocks(NamedTuple):
    """The visible blocks of a layout, one entry each, by head, row and column.

    Attributes:
        row: (nnz,) int64, head * R + row.
        column: (nnz,) int64.
        mask: (nnz,) int64, an index into the layout's `table`, or -1 where the block is full.
    """

    row: Tensor
    column: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
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

    length: int
    key_length: int
    block_size: int
    heads: int
    run_offsets: Tensor
    run_columns: Tensor
    run_counts: Tensor
    run_masks: Tensor
    table: Tensor

    # Making one.

    @classmethod
    def from_runs(cls, grid: Grid, runs: Runs, heads: int = 1) -> BlockLayout:
        """Compress the rows of a set of blocks (for code inside this package)."""
        counts = torch.bincount(runs.row, minlength=heads * grid.rows)
        return cls(
            grid.length, grid.key_length, grid.block_size, heads,
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            runs.column.to(torch.int32), runs.count.to(torch.int32), runs.mask.to(torch.int32),
            runs.table,
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
        mask = mask if mask.ndim == 3 else mask[None]
        heads, length, key_length = mask.shape

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head, query, key]

        grid = make_grid(length, key_length, block_size, mask.device)
        return cls._from_token_rule(grid, visible, heads)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        length: int,
        *,
        key_length: int | None = None,
        block_size: int = 128,
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """The layout of a FlexAttention `mask_mod(batch, head, query, key)`, called on tensors.

        It is called with batch 0 on every token pair: O(heads * N * M) time, O(nnz) memory.
        """

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _call_mask_mod(mask_mod, head, query, key)

        key_length = length if key_length is None else key_length
        grid = make_grid(length, key_length, block_size, device)
        return cls._from_token_rule(grid, visible, heads)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockLayout:
        """The layout of torch's BlockMask: batch 1, square blocks. O(nnz * b^2) time."""
        from dilated_sparse import _block_mask

        return _block_mask.to_layout(block_mask)

    @classmethod
    def _from_token_rule(
        cls, grid: Grid, visible: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int
    ) -> BlockLayout:
        _checks.integer("heads", heads)
        row = grid.arange(grid.rows).repeat_interleave(grid.columns)
        column = grid.arange(grid.columns).repeat(grid.rows)
        return from_head_rules(
            grid,
            [(row, column, _at_head(visible, head, grid.device)) for head in range(heads)],
        )

    def to_block_mask(self, *, device: torch.device | str | None = None) -> BlockMask:
        """Torch's BlockMask of the same token pairs; its tensors are O(heads * R * C).

        Args:
            device: where it is to be; the layout's device when None.
        """
        from dilated_sparse import _block_mask

        return _block_mask.from_layout(self if device is None else self.to(device))

    def to_dense(self) -> Tensor:
        """The token pairs as a bool tensor (heads, N, M), as large as it looks."""
        grid, b = self.grid, self.block_size
        shape = (self.heads * grid.rows, grid.columns, b, b)
        tiles = torch.zeros(shape, dtype=torch.bool, device=self.device)
        row, column, mask = self.blocks
        full = mask == FULL
        tiles[row[full], column[full]] = True
        partial = ~full
        tiles[row[partial], column[partial]] = _masks.unpack(self.table)[mask[partial]]
        dense = tiles.unflatten(0, (self.heads, grid.rows)).transpose(2, 3)
        dense = dense.reshape(self.heads, grid.rows * b, grid.columns * b)
        inside: Tensor = dense[:, : self.length, : self.key_length]
        return inside.contiguous()

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on a device."""
        if torch.device(device) == self.device:
            return self
        moved = (x.to(device) for x in self._tensors)
        return BlockLayout(self.length, self.key_length, self.block_size, self.heads, *moved)

    # What it is.

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.run_offsets.device

    @property
    def grid(self) -> Grid:
        """The grid of blocks."""
        return Grid(self.length, self.key_length, self.block_size, self.device)

    @cached_property
    def nnz(self) -> int:
        """How many blocks are visible, summed over heads."""
        return int(self.run_counts.sum())

    @property
    def runs(self) -> Runs:
        """The runs, with the row of each."""
        row = torch.repeat_interleave(self.run_offsets.diff(), output_size=len(self.run_columns))
        columns, counts, masks = (
            x.to(torch.int64) for x in (self.run_columns, self.run_counts, self.run_masks)
        )
        return Runs(row, columns, counts, masks, self.table)

    @property
    def blocks(self) -> Blocks:
        """The visible blocks one by one, O(nnz) memory."""
        return Blocks(*self.runs.blocks())

    @cached_property
    def row_offsets(self) -> Tensor:
        """(heads * R + 1,) int64: where the rows start in `columns` and `masks`."""
        before = torch.nn.functional.pad(self.run_counts.cumsum(0), (1, 0))
        return before[self.run_offsets]

    @cached_property
    def columns(self) -> Tensor:
        """(nnz,) int32: the column of each block, rising in a row."""
        index, step = spread(self.run_counts)
        return (self.run_columns[index] + step).to(torch.int32)

    @cached_property
    def masks(self) -> Tensor:
        """(nnz,) int32: -1 where a block is full, else its mask in `table`."""
        return self.run_masks.repeat_interleave(self.run_counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold it."""
        return sum(x.nbytes for x in self._tensors)

    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible, summed over heads."""
        grid, runs = self.grid, self.runs
        queries, _ = grid.sizes(grid.edge(runs.row % max(1, grid.rows), runs.column))
        first, stop = (x * grid.block_size for x in (runs.column, runs.column + runs.count))
        full = queries * (stop.clamp(max=self.key_length) - first)
        seen = torch.nn.functional.pad(_masks.count(self.table), (0, 1))
        return int(torch.where(runs.mask == FULL, full, seen[runs.mask] * runs.count).sum())

    def density(self) -> float:
        """The visible share of the (query, key) pairs, between 0 and 1; 0 where there are none."""
        return self.visible_pairs() / max(1, self.heads * self.length * self.key_length)

    # New layouts from it.

    def transpose(self) -> BlockLayout:
        """Queries and keys exchanged: the rows of dK and dV."""
        grid = Grid(self.key_length, self.length, self.block_size, self.device)
        flipped = _combine.transpose(self.grid, self.runs, self.heads)
        return BlockLayout.from_runs(grid, flipped, self.heads)

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
        allowed = _combine.later_keys_hidden(self.grid, self.heads)
        hidden = _combine.combine(self.grid, self.runs, allowed, torch.bitwise_and)
        return BlockLayout.from_runs(self.grid, hidden, self.heads)

    def restrict(self, queries: range, keys: range) -> BlockLayout:
        """The layout between a span of queries and a span of keys, which then count from 0.

        Raises:
            ValueError: a span has a step, leaves the sequence, does not start at a block, or ends
                neither at a block nor with the sequence.
        """
        _check_span("queries", queries, self.length, self.block_size)
        _check_span("keys", keys, self.key_length, self.block_size)
        grid = Grid(len(queries), len(keys), self.block_size, self.device)
        runs, rows = self.runs, max(1, self.grid.rows)
        head = torch.div(runs.row, rows, rounding_mode="floor")
        row = runs.row % rows - queries.start // self.block_size
        first = runs.column - keys.start // self.block_size
        stop = (first + runs.count).clamp(max=grid.columns)
        first = first.clamp(min=0)
        kept = (row >= 0) & (row < grid.rows) & (first < stop)
        row = head * grid.rows + row
        row, first, stop, mask = where(kept, row, first, stop, runs.mask)
        used = torch.zeros(len(self.table) + 1, dtype=torch.bool, device=self.device)
        used[mask] = True
        used[FULL] = True
        index = used.cumsum(0) - 1
        index[FULL] = FULL
        inside = Runs(row, first, stop - first, index[mask], self.table[used[:-1]])
        return BlockLayout.from_runs(grid, inside, self.heads)

    def per_head(self, heads: int) -> BlockLayout:
        """The same layout with that many heads.

        Raises:
            ValueError: it already has another number of heads.
        """
        if self.heads == _checks.integer("heads", heads):
            return self
        if self.heads != 1:
            raise ValueError(f"heads must be {self.heads}, which the layout has. Got {heads}.")
        return BlockLayout.from_runs(self.grid, _combine.repeat(self.grid, self.runs, heads), heads)

    def __or__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, torch.bitwise_or)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, torch.bitwise_and)

    def _combine(self, other: BlockLayout, operation: _combine.Operation) -> BlockLayout:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self.grid != other.grid:
            raise ValueError(
                f"layouts must have equal lengths, block sizes and devices to combine. "
                f"Got {self!r} on {self.device} and {other!r} on {other.device}."
            )
        heads = max(self.heads, other.heads)
        one, two = self.per_head(heads).runs, other.per_head(heads).runs
        return BlockLayout.from_runs(
            self.grid, _combine.combine(self.grid, one, two, operation), heads
        )

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

    # Sequence-parallel attention.

    @property
    def code(self) -> str:
        """Names the content: equal for equal layouts."""
        return self.digest

    @property
    def spans(self) -> SpanAttention:
        """Attention by this layout span by span, as sequence-parallel attention takes it."""
        from dilated_sparse._spans import LayoutSpans  # which computes with layouts

        return LayoutSpans(self)

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

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.run_offsets, self.run_columns, self.run_counts, self.run_masks, self.table

    @cached_property
    def digest(self) -> str:
        """Names the content."""
        sizes = (self.length, self.key_length, self.block_size, self.heads)
        digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
        for x in self._tensors:
            x = x.cpu().contiguous()
            digest.update(ctypes.string_at(x.data_ptr(), x.nbytes) if x.nbytes else b"")
        return digest.hexdigest()


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


HeadRule = tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


def from_head_rules(grid: Grid, heads: list[HeadRule]) -> BlockLayout:
    """A layout from candidates (row, column) and a token rule for each head, without any reuse."""
    prototypes = [grid.evaluate(rule, row, column) for row, column, rule in heads]
    rows = torch.cat([row + head * grid.rows for head, (row, _, _) in enumerate(heads)])
    columns = torch.cat([column for _, column, _ in heads])
    runs = from_prototypes(
        grid, rows, columns, torch.ones_like(rows), grid.arange(len(rows)), torch.cat(prototypes),
        grid.edge(rows % max(1, grid.rows), columns),
    )  # fmt: skip
    return BlockLayout.from_runs(grid, runs, len(heads))


def _at_head(
    visible: Callable[[Tensor, Tensor, Tensor], Tensor], head: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: visible(torch.tensor(head, device=device), query, key)


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
