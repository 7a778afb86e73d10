"""What a block layout is made of, as data: sizes and runs of blocks, and sets of token pairs.

H heads, N queries, M keys, b block_size, R block rows, C block columns, nnz visible blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from dilated_sparse import _checks, _combine, _masks
from dilated_sparse._grid import FULL, Grid, Runs, from_prototypes, spread, where

# (head, query positions, key positions) -> bool; int64 tensors that broadcast.
HeadRule = Callable[[Tensor, Tensor, Tensor], Tensor]


_TENSORS = ("run_offsets", "run_columns", "run_counts", "run_masks", "table")


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


class Rule(NamedTuple):
    """How a layout is made for any length.

    Attributes:
        make: gives it.
        is_cut: whether a shorter one is the beginning of a longer one; else each is made anew.
    """

    make: Callable[[int], Layout]
    is_cut: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """The facts of a layout, for code below `BlockLayout`, which says what they mean."""

    length: int
    key_length: int
    block_size: int
    heads: int
    run_offsets: Tensor
    run_columns: Tensor
    run_counts: Tensor
    run_masks: Tensor
    table: Tensor
    batch: int = 1
    _rows: ClassVar[tuple[Any, ...]] = ()

    @property
    def row_heads(self) -> int:
        """The heads of one batch row: 1, or the number of query heads."""
        return self.heads // self.batch

    def __post_init__(self) -> None:
        """Make the layouts of batch rows at once: what is traced could not.

        Tensors of torch.inference_mode() are copied: a layout made there may be trained with later.
        """
        for name in _TENSORS:
            if (x := getattr(self, name)).is_inference():
                with torch.inference_mode(False):
                    object.__setattr__(self, name, x.clone())
        if self.batch > 1:
            every = range(self.heads)
            each = (every[i : i + self.row_heads] for i in range(0, self.heads, self.row_heads))
            runs = (used_masks(_combine.take(self.grid, self.runs, heads)) for heads in each)
            rows = tuple(compress(type(self), self.grid, x, self.row_heads) for x in runs)
            object.__setattr__(self, "_rows", rows)

    @property
    def rows(self) -> tuple[Self, ...]:
        """The layout of each batch row."""
        found: tuple[Self, ...] = (self,) if self.batch == 1 else self._rows
        return found

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

    def to(self, device: torch.device | str) -> Self:
        """The same layout on a device."""
        if torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def to_dense(self) -> Tensor:
        """The token pairs as a bool tensor, as large as it looks.

        (heads, N, M), or (batch, heads of a row, N, M) where rows of a batch differ.
        """
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
        inside = inside.contiguous()
        return inside if self.batch == 1 else inside.unflatten(0, (self.batch, -1))

    def transpose(self) -> Self:
        """Queries and keys exchanged: the rows of dK and dV."""
        grid = Grid(self.key_length, self.length, self.block_size, self.device)
        flipped = _combine.transpose(self.grid, self.runs, self.heads)
        return compress(type(self), grid, flipped, self.heads, self.batch)

    def causal(self) -> Self:
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
        return compress(type(self), self.grid, hidden, self.heads, self.batch)

    def restrict(self, queries: range, keys: range) -> Self:
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
        inside = used_masks(Runs(row, first, stop - first, mask, self.table))
        return compress(type(self), grid, inside, self.heads, self.batch)

    def per_head(self, heads: int) -> Self:
        """The same layout with that many heads, in each row of a batch.

        Raises:
            ValueError: it already has another number of heads.
        """
        if _checks.integer("heads", heads) != self.row_heads != 1:
            raise ValueError(f"heads must be {self.row_heads}, which the layout has. Got {heads}.")
        return self._widened(self.batch, heads)

    def _widened(self, batch: int, heads: int) -> Self:
        """With so many batch rows, and heads of each; what there is one of is repeated."""
        if (self.batch, self.row_heads) == (batch, heads):
            return self
        taken = [
            (row if self.batch > 1 else 0) * self.row_heads + (head if self.row_heads > 1 else 0)
            for row in range(batch)
            for head in range(heads)
        ]
        runs = _combine.take(self.grid, self.runs, taken)
        return compress(type(self), self.grid, runs, batch * heads, batch)

    def __or__(self, other: Layout) -> Self:
        return self._combine(other, torch.bitwise_or)

    def __and__(self, other: Layout) -> Self:
        return self._combine(other, torch.bitwise_and)

    def _combine(self, other: Layout, operation: _combine.Operation) -> Self:
        if not isinstance(other, Layout):
            return NotImplemented
        if self.grid != other.grid:
            raise ValueError(
                f"layouts must have equal lengths, block sizes and devices to combine. "
                f"Got {self!r} on {self.device} and {other!r} on {other.device}."
            )
        heads, batch = max(self.row_heads, other.row_heads), max(self.batch, other.batch)
        if not {self.batch, other.batch} <= {1, batch}:
            raise ValueError(
                "layouts must have as many batch rows, or one, to combine. "
                f"Got {self.batch} and {other.batch}."
            )
        one, two = (x.per_head(heads)._widened(batch, heads).runs for x in (self, other))
        combined = _combine.combine(self.grid, one, two, operation)
        return compress(type(self), self.grid, combined, batch * heads, batch)

    @property
    def code(self) -> str:
        """Names the content: equal for equal layouts."""
        return self.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        batch = f"batch={self.batch}, " if self.batch > 1 else ""
        return (
            f"{type(self).__name__}(length={self.length}, key_length={self.key_length}, "
            f"block_size={self.block_size}, {batch}heads={self.heads}, nnz={self.nnz})"
        )

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _TENSORS)

    @cached_property
    def digest(self) -> str:
        """Names the content."""
        sizes = (self.length, self.key_length, self.block_size, self.heads, self.batch)
        digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
        for x in self._tensors:
            x = x.cpu().contiguous()
            digest.update(ctypes.string_at(x.data_ptr(), x.nbytes) if x.nbytes else b"")
        return digest.hexdigest()


Kind = TypeVar("Kind", bound=Layout)


def compress(kind: type[Kind], grid: Grid, runs: Runs, heads: int = 1, batch: int = 1) -> Kind:
    """The layout of a set of blocks: their rows compressed."""
    counts = torch.bincount(runs.row, minlength=heads * grid.rows)
    return kind(
        grid.length, grid.key_length, grid.block_size, heads,
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        runs.column.to(torch.int32), runs.count.to(torch.int32), runs.mask.to(torch.int32),
        runs.table, batch,
    )  # fmt: skip


def used_masks(runs: Runs) -> Runs:
    """The same runs, without the masks that none of them has."""
    used = torch.zeros(len(runs.table) + 1, dtype=torch.bool, device=runs.table.device)
    used[runs.mask] = True
    used[FULL] = True
    index = used.cumsum(0) - 1
    index[FULL] = FULL
    return replace(runs, mask=index[runs.mask], table=runs.table[used[:-1]])


def from_head_rule(
    kind: type[Kind],
    grid: Grid,
    rule: HeadRule,
    candidates: Sequence[tuple[Tensor, Tensor]],
    batch: int = 1,
) -> Kind:
    """The layout of a rule, from the candidates (row, column) of each head, without any reuse."""
    prototypes = []
    for head, (row, column) in enumerate(candidates):
        own = partial(rule, torch.tensor(head, device=grid.device))
        prototypes.append(grid.evaluate(own, row, column))
    rows = torch.cat([row + head * grid.rows for head, (row, _) in enumerate(candidates)])
    columns = torch.cat([column for _, column in candidates])
    runs = from_prototypes(
        grid, rows, columns, torch.ones_like(rows), grid.arange(len(rows)), torch.cat(prototypes),
        grid.edge(rows % max(1, grid.rows), columns),
    )  # fmt: skip
    return compress(kind, grid, runs, len(candidates), batch)


def _check_span(name: str, span: range, length: int, block_size: int) -> None:
    if not isinstance(span, range) or span.step != 1:
        raise ValueError(f"{name} must be a range of step 1. Got {span!r}.")
    if not 0 <= span.start <= span.stop <= length:
        raise ValueError(f"{name} must lie in range(0, {length}). Got {span!r}.")
    if span.start % block_size or (span.stop % block_size and span.stop != length):
        raise ValueError(
            f"{name} must start and end at multiples of {block_size}. Got {span!r}. "
            "`layout.at` cuts anywhere."
        )
