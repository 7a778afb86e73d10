"""The layouts of the literature, exact to the token; combine them with | and &.

Each docstring states which keys j a query i sees, for positions 0 <= i, j < length. A layout is
not causal unless its definition says so; `is_causal=True` in the call, or `layout.causal()`, hides
the keys after each query.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_sparse import _checks
from dilated_sparse._grid import Grid, TokenRule, from_rule, full_blocks, span_pairs
from dilated_sparse._layout import BlockLayout, make_grid
from dilated_sparse._longnet import longnet, longnet_order

__all__ = [
    "bigbird",
    "dilated_window",
    "document",
    "fixed",
    "global_tokens",
    "hierarchical",
    "longformer",
    "longnet",
    "longnet_order",
    "prefix",
    "random_blocks",
    "sliding_window",
    "strided",
]


def sliding_window(length: int, window: int, *, block_size: int = 128) -> BlockLayout:
    """|i − j| <= window: the sliding window of Longformer (arXiv 2004.05150, section 3.1).

    Its window size w is 2 * window here.
    """
    return dilated_window(length, window, 1, block_size=block_size)


def dilated_window(
    length: int, window: int, dilation: int, *, block_size: int = 128
) -> BlockLayout:
    """|i − j| <= window * dilation and i ≡ j (mod dilation).

    The dilated sliding window of Longformer (arXiv 2004.05150, section 3.1, figure 2c).
    """
    grid = make_grid(length, length, block_size)
    _checks.integer("window", window, low=0)
    _checks.integer("dilation", dilation)
    reach = window * dilation

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() <= reach) & ((i - j) % dilation == 0)

    most = max(0, min(grid.rows - 1, -(-reach // block_size)))
    return _by_distance(grid, torch.arange(-most, most + 1), visible)


def strided(length: int, stride: int, *, block_size: int = 128) -> BlockLayout:
    """J <= i, and i − j <= stride or i ≡ j (mod stride).

    Both heads of the strided pattern of the Sparse Transformer in one softmax (arXiv 1904.10509,
    section 4.3: A1 = {max(0, i − l) .. i}, A2 = {j : (i − j) mod l = 0}).
    """
    grid = make_grid(length, length, block_size)
    _checks.integer("stride", stride)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j <= stride) | ((i - j) % stride == 0))

    distance = torch.arange(grid.rows)
    # Blocks at this distance have i − j within block_size of distance * block_size.
    remainder = (distance * block_size + block_size - 1) % stride
    near = (distance - 1) * block_size < stride
    return _by_distance(
        grid, distance[near | (remainder <= 2 * block_size - 2)], visible, period=stride
    )


def fixed(length: int, stride: int, summary: int, *, block_size: int = 128) -> BlockLayout:
    """J <= i, and i // stride = j // stride or j mod stride >= stride − summary.

    Both heads of the fixed pattern of the Sparse Transformer in one softmax (arXiv 1904.10509,
    section 4.3, with l = stride and c = summary).
    """
    grid = make_grid(length, length, block_size)
    _checks.integer("stride", stride)
    if _checks.integer("summary", summary) > stride:
        raise ValueError(f"summary must be at most stride={stride}. Got {summary}.")

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i // stride == j // stride) | (j % stride >= stride - summary))

    position = torch.arange(grid.rows) * block_size
    # The first summary token at or after a block's first token, if the block reaches it.
    wait = (stride - summary - position % stride).clamp(min=0)
    summaries = (wait < block_size).nonzero().squeeze(1)
    own = position // stride * stride // block_size
    row, column = span_pairs(own, torch.arange(grid.rows) + 1)
    earlier = torch.searchsorted(summaries, own)
    far_row, index = span_pairs(torch.zeros_like(earlier), earlier)
    far = (summaries[index] * block_size) % stride
    phases = stride + 1
    near = (row * block_size) % stride * grid.rows + row - column
    rows, columns, alike = _sorted(
        grid,
        torch.cat([far_row, row]),
        torch.cat([summaries[index], column]),
        torch.cat([far, near + phases]),
    )
    return BlockLayout.from_blocks(grid, from_rule(grid, rows, columns, alike, visible))


def global_tokens(length: int, count: int, *, block_size: int = 128) -> BlockLayout:
    """I < count or j < count.

    The global attention of Longformer (arXiv 2004.05150, section 3.1) on the first tokens. In a
    causal call these are the attention sinks of StreamingLLM (arXiv 2309.17453).
    """
    grid = make_grid(length, length, block_size)
    _checks.integer("count", count, low=0)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (i < count) | (j < count)

    last = min(grid.rows, -(-count // block_size))
    every = torch.arange(grid.rows)
    stop = torch.where(every < last, grid.rows, last)
    row, column = span_pairs(torch.zeros_like(stop), stop)
    alike = row.clamp(max=last) * (last + 1) + column.clamp(max=last)
    return BlockLayout.from_blocks(grid, from_rule(grid, row, column, alike, visible))


def random_blocks(
    length: int, count: int, *, seed: int = 0, heads: int = 1, block_size: int = 128
) -> BlockLayout:
    """In each block row of each head, min(count, R) of the R key blocks, drawn without return.

    The random attention of BigBird (arXiv 2007.14062, section 2 and appendix D), which draws
    blocks. The same seed gives the same blocks everywhere.
    """
    return _draw_blocks(make_grid(length, length, block_size), count, seed, heads)


def bigbird(
    length: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
    heads: int = 1,
    block_size: int = 64,
) -> BlockLayout:
    """BigBird (arXiv 2007.14062, section 2 and appendix D), whose unit is the block.

    A query block sees the window_blocks blocks around it, the first global_blocks blocks, and
    random_blocks blocks at random; the first global_blocks query blocks see everything.
    The default is the paper's base configuration (its table 8).

    Raises:
        ValueError: window_blocks is even, among others.
    """
    if _checks.integer("window_blocks", window_blocks) % 2 == 0:
        raise ValueError(f"window_blocks must be odd. Got {window_blocks}.")
    _checks.integer("global_blocks", global_blocks, low=0)
    grid = make_grid(length, length, block_size)
    most = window_blocks // 2
    every = torch.arange(grid.rows)
    row, column = span_pairs((every - most).clamp(min=0), (every + most + 1).clamp(max=grid.rows))
    window = BlockLayout.from_blocks(grid, full_blocks(grid, row, column))
    sinks = global_tokens(length, min(length, global_blocks * block_size), block_size=block_size)
    return window | sinks | _draw_blocks(grid, random_blocks, seed, heads)


def longformer(
    length: int, window: int, global_count: int, *, block_size: int = 128
) -> BlockLayout:
    """|i − j| <= window, or i < global_count, or j < global_count (arXiv 2004.05150, figure 2d)."""
    return sliding_window(length, window, block_size=block_size) | global_tokens(
        length, global_count, block_size=block_size
    )


def document(lengths: Sequence[int], *, block_size: int = 128) -> BlockLayout:
    """I and j lie in the same document; the documents have these lengths, one after the other.

    The packing without cross-contamination of Krell et al. (arXiv 2107.02027).
    """
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths must be a sequence of ints. Got {lengths!r}.")
    sizes = [_checks.integer(f"lengths[{i}]", x, low=0) for i, x in enumerate(lengths)]
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    length = sum(sizes)
    grid = make_grid(length, length, block_size)

    def which(position: Tensor) -> Tensor:
        return torch.searchsorted(ends, position, right=True)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return which(i.contiguous()) == which(j.contiguous())

    starts = torch.nn.functional.pad(ends, (1, 0))
    first = torch.arange(grid.rows) * block_size
    last = (first + block_size - 1).clamp(max=length - 1)
    start, stop = starts[which(first)], starts[which(last) + 1]
    row, column = span_pairs(start // block_size, -(-stop // block_size))
    # Off the diagonal two blocks share one document: a rectangle at a corner or along a side.
    head = (starts[which(last)] - first).clamp(min=0)
    tail = (starts[which(first) + 1] - first).clamp(max=block_size)
    size = block_size + 1
    before = tail[row] * size + head[column]
    after = head[row] * size + tail[column]
    corner = torch.where(column < row, before, after + size * size)
    whole = (head[row] == 0) & (tail[row] == block_size)
    alike = torch.where(column == row, torch.where(whole, 0, row + 1) + 2 * size * size, corner)
    return BlockLayout.from_blocks(grid, from_rule(grid, row, column, alike, visible))


def prefix(length: int, count: int, *, block_size: int = 128) -> BlockLayout:
    """J < count or j <= i: the prefix language model of T5 (arXiv 1910.10683, section 3.2.1)."""
    grid = make_grid(length, length, block_size)
    _checks.integer("count", count, low=0)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j < count) | (j <= i)

    last = min(grid.rows, -(-count // block_size))
    stop = (torch.arange(grid.rows) + 1).clamp(min=last)
    row, column = span_pairs(torch.zeros_like(stop), stop)
    side = (column - row).clamp(-1, 1) + 1
    alike = side * 3 + (column - count // block_size).clamp(-1, 1) + 1
    return BlockLayout.from_blocks(grid, from_rule(grid, row, column, alike, visible))


def hierarchical(
    length: int, window: int, levels: int, *, growth: int = 2, block_size: int = 128
) -> BlockLayout:
    """For a level k < levels and s = growth ** k: j ≡ 0 (mod s) and |i // s − j // s| <= window.

    A window at each of several scales, coarser further away, as in H-Transformer-1D (arXiv
    2107.11906, section 4), with one sampled key for each coarse cell where that averages the cell.
    """
    grid = make_grid(length, length, block_size)
    _checks.integer("window", window, low=0)
    _checks.integer("levels", levels)
    scales = [_checks.integer("growth", growth, low=2) ** level for level in range(levels)]

    def visible(i: Tensor, j: Tensor) -> Tensor:
        seen = torch.zeros_like(i - j, dtype=torch.bool)
        for s in scales:
            seen |= (j % s == 0) & ((i // s - j // s).abs() <= window)
        return seen

    most = max(0, min(grid.rows - 1, -(-(window + 1) * scales[-1] // block_size)))
    distance = torch.arange(-most, most + 1)
    return _by_distance(grid, distance, visible, row_period=scales[-1])


def _by_distance(
    grid: Grid,
    distance: Tensor,
    visible: TokenRule,
    *,
    period: int | None = None,
    row_period: int = 1,
) -> BlockLayout:
    """Blocks at some distances (row − column), rising.

    Args:
        grid: a square grid.
        distance: the candidates.
        visible: a rule of i − j, and of i modulo `row_period`.
        period: distances above it in tokens matter modulo it only.
        row_period: see `visible`.
    """
    column = torch.arange(grid.rows)[:, None] - distance.flip(0)
    row = torch.arange(grid.rows)[:, None].expand_as(column)
    inside = (column >= 0) & (column < grid.columns)
    row, column = row[inside], column[inside]
    ahead = row - column + grid.rows
    if period is not None:
        near = (row - column - 2) * grid.block_size <= period
        phase = ((row - column) * grid.block_size) % period
        ahead = torch.where(near, ahead, phase + 2 * grid.rows)
    row_phase = (row * grid.block_size) % row_period
    alike = row_phase * (2 * grid.rows) + ahead
    return BlockLayout.from_blocks(grid, from_rule(grid, row, column, alike, visible))


def _draw_blocks(grid: Grid, count: int, seed: int, heads: int) -> BlockLayout:
    _checks.integer("count", count, low=0)
    _checks.integer("heads", heads)
    generator = torch.Generator().manual_seed(_checks.integer("seed", seed, low=0))
    count = min(count, grid.columns)
    chosen = torch.full((heads * grid.rows, count), -1)
    # Floyd's sampling: a draw that was taken already becomes the newest candidate.
    for i, top in enumerate(range(grid.columns - count, grid.columns)):
        drawn = torch.randint(top + 1, (len(chosen),), generator=generator)
        taken = (chosen[:, :i] == drawn[:, None]).any(1)
        chosen[:, i] = torch.where(taken, top, drawn)
    column = chosen.sort(1).values.flatten()
    row = torch.arange(len(chosen)).repeat_interleave(count)
    return BlockLayout.from_blocks(grid, full_blocks(grid, row, column), heads)


def _sorted(grid: Grid, row: Tensor, column: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    order = torch.argsort(row * grid.columns + column)
    return tuple(x[order] for x in (row, column, *rest))
