"""From a layout to a plan of the GPU kernels: tiles of query rows, runs of key columns.

A run of full blocks is one full run of the plan, cut to a multiple of the columns that a step
takes; what is left of it, and what causal order may hide, is a masked run. A partial block is cut
into chunks of columns: one that all rows see is a full run, one that no row sees is left out, and
any other is a masked run with bits. The tiles of a block row share its runs, unless causal order or
partial blocks tell them apart.
Backward to keys it is the same on the transposed layout. O(runs and partial blocks), on the device.

R block rows and b block_size of the layout, or of its transpose by key.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import SPARE_RUNS, BlockSizes, Sizes, TilePlan
from dilated_sparse._blocks import Layout
from dilated_sparse._grid import FULL, spread

_WORD = 32
_LIMIT = 2**31
# Tiles of so many times the mean work, such as those of global tokens, would be waited for.
_EARLY = 4.0

# Rows see columns at or "before" them, as queries see keys, or "after" them, the transpose.
_Order = Literal["no", "before", "after"]


class _Axes(NamedTuple):
    """The rows that programs own and the columns that they walk.

    Attributes:
        layout: rows are its queries and columns its keys; by key it is the transposed one.
        first_row, first_column: their positions in the sequence.
        parts: groups of rows in a block row. The tiles of a group share their runs.
        part_rows: rows of a group; the last one of a block may be short or empty.
    """

    layout: Layout
    first_row: int
    first_column: int
    parts: int
    part_rows: int

    @property
    def groups(self) -> int:
        """How many groups a head has."""
        return self.layout.grid.rows * self.parts

    def rows(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the first and last row of groups of any head; of empty ones last < first."""
        b, length = self.layout.block_size, self.layout.length
        local = group % self.groups
        block = torch.div(local, self.parts, rounding_mode="floor")
        first = block * b + local % self.parts * self.part_rows
        end = torch.minimum(first + self.part_rows, (block + 1) * b).clamp(max=length)
        return first + self.first_row, end - 1 + self.first_row

    def columns(self, first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the first column of runs of blocks and of the one after their last."""
        b, length = self.layout.block_size, self.layout.key_length
        end = ((first + count) * b).clamp(max=length)
        return first * b + self.first_column, end + self.first_column


class _Records(NamedTuple):
    """Runs of columns, (n,) int64 each: of which group of rows, first column, how many columns.

    A masked run also has its first word of bits, the first row of these, and words per row.
    """

    group: Tensor
    start: Tensor
    columns: Tensor
    word: Tensor
    row: Tensor
    words: Tensor

    def take(self, index: Tensor) -> "_Records":
        """Some of them, by index or where true."""
        return _Records(*(x[index] for x in self))


class _Table(NamedTuple):
    """The runs of one kind, group after group.

    `first` (classes * groups,) is the index of each group's first run, and `total` the sum of what
    its runs cost: columns or steps.
    """

    runs: Tensor
    first: Tensor
    total: Tensor


def build(layout: Layout, sizes: Sizes, by_key: bool, blocks: BlockSizes) -> TilePlan:
    """The plan of a layout with these block sizes, over query tiles or over key tiles."""
    layout = layout.to(sizes.device)
    layout = layout.transpose() if by_key else layout
    tiles = -(-layout.block_size // blocks.rows)
    positions = sizes.first_query, sizes.first_key
    differ = sizes.is_causal or len(layout.table) > 0
    parts = (tiles, blocks.rows) if differ else (1, layout.block_size)
    axes = _Axes(layout, *(positions[::-1] if by_key else positions), *parts)
    words = 2 * -(-layout.block_size // (2 * _WORD))
    # Runs without bits of their own read these ones; the longest has a step and a block.
    ones = (blocks.columns + layout.block_size) // _WORD + 2
    order: _Order = ("after" if by_key else "before") if sizes.is_causal else "no"
    found = (
        _full_runs(axes, order, blocks.columns),
        _partial_runs(axes, order, words, ones, max(blocks.columns, _WORD)),
    )
    full, masked = (
        _Records(*(torch.cat(x) for x in zip(*kind, strict=True)))
        for kind in zip(*found, strict=True)
    )
    size = sizes.heads // sizes.kv_heads if by_key else 1
    heads = sizes.heads // size
    classes = 1 if layout.heads == 1 else heads
    full_table = _compress(axes, full, full.columns, size, classes, 5)
    steps = -(-masked.columns // blocks.masked)
    masked_table = _compress(axes, masked, steps, size, classes, 8)
    has_bits = len(found[1][1].group) > 0
    head_class = torch.arange(heads, dtype=torch.int32, device=layout.device)
    tile_table, early = _tiles(axes, full_table, masked_table, tiles, classes, blocks)
    return TilePlan(
        tiles=tile_table,
        full=full_table.runs,
        masked=masked_table.runs,
        head_class=head_class if classes > 1 else torch.zeros_like(head_class),
        bits=_bits(layout, words, ones, blocks.rows) if has_bits else masked_table.runs,
        largest_step=1,
        mask=3 if has_bits else int(len(masked.group) > 0),
        early=early,
    )


def _full_runs(axes: _Axes, order: _Order, unit: int) -> tuple[_Records, _Records]:
    """Runs of full blocks: what all rows see, in multiples of `unit`, and what is left."""
    runs = axes.layout.runs
    whole = (runs.mask == FULL).nonzero().squeeze(1)
    group, run = _groups(axes, runs.row[whole])
    start, end = axes.columns(runs.column[whole][run], runs.count[whole][run])
    first_row, last_row = axes.rows(group)
    # All rows see the columns from `low` to `high`, and some those from `start` to `end`.
    low, high = start, end
    if order == "before":
        high, end = torch.minimum(end, first_row + 1), torch.minimum(end, last_row + 1)
    if order == "after":
        low, start = torch.maximum(start, last_row), torch.maximum(start, first_row)
    columns = torch.div((high - low).clamp(min=0), unit, rounding_mode="floor") * unit
    # What is left is one run: behind the full one, or in front of it.
    begin = end - columns if order == "after" else start
    left = (end - start - columns).clamp(min=0)
    nothing = torch.zeros_like(group)
    full = _Records(group, begin, columns, nothing, nothing, nothing)
    behind = start if order == "after" else start + columns
    rest = _Records(group, behind, left, nothing, nothing, nothing)
    real = last_row >= first_row
    return full.take(real & (columns > 0)), rest.take(real & (left > 0))


def _partial_runs(
    axes: _Axes, order: _Order, words: int, ones: int, chunk: int
) -> tuple[_Records, _Records]:
    """Chunks of partial blocks: those that all rows see, and those that some do."""
    runs = axes.layout.runs
    partial = (runs.mask != FULL).nonzero().squeeze(1)
    index, step = spread(runs.count[partial])
    block = partial[index]
    group, which = _groups(axes, runs.row[block])
    start, end = axes.columns((runs.column[block] + step)[which], torch.ones_like(group))
    mask = runs.mask[block][which]
    seen, whole = (x[mask, group % axes.parts] for x in _chunks(axes, chunk))
    number = torch.arange(seen.shape[1], device=seen.device)
    begin = start[:, None] + number * chunk
    stop = torch.minimum(begin + chunk, end[:, None])
    first_row, last_row = (x[:, None] for x in axes.rows(group))
    seen = seen & (last_row >= first_row)
    if order == "before":
        whole = whole & (stop <= first_row + 1)
        stop = torch.minimum(stop, last_row + 1)
    if order == "after":
        whole = whole & (begin >= last_row)
        seen = seen & (stop > first_row)
    seen = seen & (stop > begin)
    whole = seen & whole & (stop - begin == chunk)
    b, rows = axes.layout.block_size, axes.layout.grid.rows
    origin = runs.row[block][which] % max(1, rows) * b + axes.first_row
    word = (ones + mask * (b * words))[:, None] + number * (chunk // _WORD)

    def records(chosen: Tensor) -> _Records:
        at, _ = chosen.nonzero(as_tuple=True)
        columns = (stop - begin)[chosen]
        found = word[chosen], origin[at], torch.full_like(at, words)
        return _Records(group[at], begin[chosen], columns, *found)

    return records(whole), records(seen & ~whole)


def _chunks(axes: _Axes, chunk: int) -> tuple[Tensor, Tensor]:
    """Whether any row of a part sees anything of a chunk, and whether all see all of it.

    (masks, parts, chunks) bool each, for each mask of the layout.
    """
    table, b = axes.layout.table, axes.layout.block_size
    size = chunk // 8
    count = -(-b // chunk)
    margin = 0, count * size - table.shape[2], 0, axes.parts * axes.part_rows - b
    shape = len(table), axes.parts, axes.part_rows, count, size
    # Rows and columns that a block does not have are not seen, and hide nothing.
    seen, hidden = (
        torch.nn.functional.pad(table, margin, value=filling).view(shape) != filling
        for filling in (0, 255)
    )
    return seen.any(4).any(2), ~hidden.any(4).any(2)


def _groups(axes: _Axes, row: Tensor) -> tuple[Tensor, Tensor]:
    """The groups of block rows (head * R + row), and the index of each group's row."""
    part = torch.arange(axes.parts, device=row.device)
    index = torch.arange(len(row), device=row.device)
    group = row[:, None] * axes.parts + part
    return group.flatten(), index.repeat_interleave(axes.parts)


def _compress(
    axes: _Axes, records: _Records, cost: Tensor, size: int, classes: int, fields: int
) -> _Table:
    """Give runs to the classes and members of `size` heads that walk them, and sort by group."""
    head = torch.div(records.group, axes.groups, rounding_mode="floor")
    place, member = records.group % axes.groups, torch.zeros_like(head)
    index = torch.arange(len(head), device=head.device)
    if axes.layout.heads > 1:
        place = place + torch.div(head, size, rounding_mode="floor") * axes.groups
        member = head % size
    else:
        # One key head's program walks the runs of each of its query heads.
        member = torch.arange(size, device=head.device).repeat_interleave(len(head))
        place, index, cost = place.repeat(size), index.repeat(size), cost.repeat(size)
    order = torch.argsort(place, stable=True)
    place, member, found, cost = place[order], member[order], index[order], cost[order]
    kept = records.take(found)
    step, weight = torch.ones_like(place), torch.zeros_like(place)
    columns = [kept.start, step, kept.columns, weight, member, kept.word, kept.row, kept.words]
    assert len(place) < _LIMIT
    runs = torch.stack(columns[:fields], 1).to(torch.int32)
    runs = torch.nn.functional.pad(runs, (0, 0, 0, SPARE_RUNS))
    counts = torch.bincount(place, minlength=classes * axes.groups)
    total = torch.zeros_like(counts).index_add_(0, place, cost)
    return _Table(runs, counts.cumsum(0) - counts, total)


def _tiles(
    axes: _Axes, full: _Table, masked: _Table, tiles: int, classes: int, blocks: BlockSizes
) -> tuple[Tensor, int]:
    """(classes, R * tiles, 8) int32, those with the most work first, and how many stand out."""
    layout, device = axes.layout, axes.layout.device
    b = layout.block_size
    tile = torch.arange(layout.grid.rows * tiles, device=device)
    block = torch.div(tile, tiles, rounding_mode="floor")
    first = block * b + tile % tiles * blocks.rows
    end = torch.minimum(first + blocks.rows, (block + 1) * b).clamp(max=layout.length)
    rows = (end - first).clamp(min=0)
    local = tile if axes.parts == tiles else block
    group = torch.arange(classes, device=device)[:, None] * axes.groups + local
    shared = [x.expand(classes, -1) for x in (first + axes.first_row, torch.ones_like(tile), rows)]
    table = torch.stack(
        [
            *shared, full.total[group], masked.total[group], torch.zeros_like(group),
            full.first[group], masked.first[group],
        ],
        dim=-1,
    )  # fmt: skip
    work = ((table[..., 3] + table[..., 4] * blocks.masked) * (rows > 0)).float()
    # Neighbours of about equal work stay neighbours, since they read the same columns.
    rank = (2.0 * (work + 1.0).log2()).round()
    order = torch.argsort(rank, dim=1, descending=True, stable=True)
    early = int((work > _EARLY * work.mean()).sum(1).max())
    table = table.gather(1, order.unsqueeze(-1).expand_as(table))
    return table.to(torch.int32).contiguous(), early


def _bits(layout: Layout, words: int, ones: int, spare_rows: int) -> Tensor:
    """Words of ones, then the masks of the layout, `words` for each row, then spare rows."""
    table = layout.table
    padded = torch.nn.functional.pad(table, (0, 4 * words - table.shape[2])).contiguous()
    flat = padded.view(torch.int32).flatten()
    assert ones + len(flat) < _LIMIT
    return torch.cat([flat.new_full((ones,), -1), flat, flat.new_zeros(spare_rows * words)])
