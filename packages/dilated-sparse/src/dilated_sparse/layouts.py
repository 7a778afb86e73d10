"""The layouts of the literature, exact to the token; combine them with | and &.

Each docstring states which keys j a query i sees, for positions 0 <= i, j < length. A layout is
not causal unless its definition says so; `is_causal=True` in the call, or `layout.causal()`, hides
the keys after each query.

Of all of them: length is that of queries and keys in tokens, block_size the side of a block in
tokens, heads how many heads have blocks of their own, seed an int >= 0, and device that of the
result. Each raises a TypeError for what is no int, and a ValueError for one that is out of range.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import gcd

import torch
from torch import Tensor

from dilated_sparse import _checks, _masks
from dilated_sparse._blocks import Rule, compress
from dilated_sparse._building import (
    Part,
    alike_neighbours,
    between,
    by_difference,
    coded,
    draw_blocks,
    from_parts,
    number,
    periodic,
)
from dilated_sparse._grid import FULL, Grid, Runs, group, make_grid
from dilated_sparse._layout import BlockLayout, ruled
from dilated_sparse._longnet import longnet, longnet_order

__all__ = [
    "bigbird",
    "dilated_window",
    "document",
    "fixed",
    "global_positions",
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

Device = torch.device | str


@ruled()
def sliding_window(
    length: int, window: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """|i − j| <= window: the sliding window of Longformer (arXiv 2004.05150, section 3.1).

    Its window size w is 2 * window here. length, window and block_size are in tokens; device is
    that of the result.

    Examples:
        >>> print(layouts.sliding_window(128, 32, block_size=32).text(size=4))
        #+..
        +#+.
        .+#+
        ..+#
    """
    return dilated_window(length, window, 1, block_size=block_size, device=device)


@ruled()
def dilated_window(
    length: int, window: int, dilation: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """|i − j| <= window * dilation and i ≡ j (mod dilation).

    The dilated sliding window of Longformer (arXiv 2004.05150, section 3.1, figure 2c). length,
    dilation and block_size are in tokens, window in steps of the dilation to each side; device is
    that of the result.

    Examples:
        >>> print(layouts.dilated_window(128, 16, 2, block_size=32).text(size=4))
        ++..
        +++.
        .+++
        ..++
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("window", window, low=0)
    _checks.integer("dilation", dilation)
    reach = window * dilation
    most = max(0, min(grid.rows - 1, -(-reach // block_size)))

    def visible(difference: Tensor) -> Tensor:
        return (difference.abs() <= reach) & (difference % dilation == 0)

    return by_difference(grid, most, most, visible)


@ruled()
def strided(
    length: int, stride: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """j <= i, and i − j <= stride or i ≡ j (mod stride).

    Both heads of the strided pattern of the Sparse Transformer in one softmax (arXiv 1904.10509,
    section 4.3: A1 = {max(0, i − l) .. i}, A2 = {j : (i − j) mod l = 0}). length, stride and
    block_size are in tokens; device is that of the result.

    Examples:
        >>> print(layouts.strided(128, 32, block_size=32).text(size=4))
        +...
        ++..
        +++.
        ++++
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("stride", stride)

    def visible(difference: Tensor) -> Tensor:
        near = (difference <= stride) | (difference % stride == 0)
        return (difference >= 0) & near

    return by_difference(grid, max(0, grid.rows - 1), 0, visible)


@ruled()
def fixed(
    length: int, stride: int, summary: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """j <= i, and i // stride = j // stride or j mod stride >= stride − summary.

    Both heads of the fixed pattern of the Sparse Transformer in one softmax (arXiv 1904.10509,
    section 4.3, with l = stride and c = summary). length, stride, summary and block_size are in
    tokens; device is that of the result.

    Raises:
        ValueError: summary exceeds stride, among others.

    Examples:
        >>> print(layouts.fixed(128, 32, 4, block_size=32).text(size=4))
        +...
        ++..
        +++.
        ++++
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("stride", stride)
    if _checks.integer("summary", summary) > stride:
        raise ValueError(f"summary must be at most stride={stride}. Got {summary}.")

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i // stride == j // stride) | (j % stride >= stride - summary))

    row = grid.arange(grid.rows)
    first = row * block_size
    # The segment of a block's first query starts `inner` tokens into the block column `own`; the
    # next segment starts `after` tokens into the block row, if it does.
    start = first // stride * stride
    own, inner = start // block_size, start % block_size
    after = (start + stride - first).clamp(max=block_size)
    keys = first[:, None] + grid.arange(block_size)
    summaries, look = torch.unique(keys % stride >= stride - summary, dim=0, return_inverse=True)
    begin, end = alike_neighbours(look)
    shown = summaries.any(1)[look[begin]]
    begin_, end_, zero = begin[shown], end[shown], torch.zeros_like(own)
    size, one = block_size + 1, torch.ones_like(own)
    earlier = (own < row).to(torch.int64)

    def parts() -> Iterator[Part]:
        yield coded(between(begin_, end_, zero, own), lambda _, far: look[far])
        yield row, own, earlier, number(inner * size + after, look[own])
        yield coded(between(begin, end, own + 1, row), lambda i, near: number(after[i], look[near]))
        yield row, row, one, number(after, look)

    return from_parts(grid, parts(), visible)


@ruled()
def global_tokens(
    length: int, count: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """i < count or j < count.

    The global attention of Longformer (arXiv 2004.05150, section 3.1) on the first tokens. In a
    causal call these are the attention sinks of StreamingLLM (arXiv 2309.17453). length, count and
    block_size are in tokens; device is that of the result.

    Examples:
        >>> print(layouts.global_tokens(128, 8, block_size=32).text(size=4))
        ++++
        +...
        +...
        +...
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("count", count, low=0)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (i < count) | (j < count)

    row = grid.arange(grid.rows)
    # The block row and column that the last global token cuts, if it does.
    cut, rest = divmod(min(count, length), block_size)
    above = row < cut
    split = ((row >= cut) & (rest > 0)).to(torch.int64)
    parts = (
        (row, torch.zeros_like(row), torch.where(above, grid.columns, cut), torch.zeros_like(row)),
        (row, torch.full_like(row, cut), split, (row == cut).to(torch.int64)),
        (row, torch.full_like(row, cut + 1), split * (row == cut) * (grid.columns - cut - 1),
         torch.zeros_like(row)),
    )  # fmt: skip
    return from_parts(grid, parts, visible)


def global_positions(
    length: int,
    positions: Tensor | Sequence[int],
    *,
    block_size: int = 128,
    device: Device = "cpu",
) -> BlockLayout:
    """i in positions or j in positions.

    The global attention of Longformer (arXiv 2004.05150, section 3.1) on chosen tokens, as those of
    a question. Made in O(length + blocks seen). length, positions and block_size are in tokens;
    device is that of the result. Where the layout goes on, no later token is global.

    Raises:
        TypeError: positions are no ints.
        ValueError: one is not in range(length), among others.

    Examples:
        >>> print(layouts.global_positions(128, [0, 70], block_size=32).text(size=4))
        ++++
        +.+.
        ++++
        +.+.
    """
    grid = make_grid(length, length, block_size, device)
    chosen = torch.as_tensor(positions)
    if chosen.numel() and (chosen.is_floating_point() or chosen.dtype == torch.bool):
        raise TypeError(f"positions must be ints. Got {chosen.dtype}.")
    chosen = chosen.to(grid.device, torch.int64).flatten()
    if len(chosen) and not (int(chosen.min()) >= 0 and int(chosen.max()) < length):
        raise ValueError(
            f"positions must lie in range({length}). "
            f"Got {int(chosen.min())} to {int(chosen.max())}."
        )
    is_global = torch.zeros(grid.rows * block_size, dtype=torch.bool, device=grid.device)
    is_global[chosen] = True

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return is_global[i] | is_global[j]

    looks, look = torch.unique(is_global.view(-1, block_size), dim=0, return_inverse=True)
    begin, end = alike_neighbours(look)
    some = looks.any(1) if len(looks) else looks.new_zeros(0)
    seen = some[look[begin]]
    # Of most block rows only the columns with global tokens show anything.
    row_shows = some[look]
    zero = torch.zeros(grid.rows, dtype=torch.int64, device=grid.device)
    every = zero + grid.columns

    def alike(i: Tensor, j: Tensor) -> Tensor:
        code: Tensor = look[i] * len(looks) + look[j]
        return code

    parts = (
        coded(between(begin[seen], end[seen], zero, every.masked_fill(row_shows, 0)), alike),
        coded(between(begin, end, zero, every.masked_fill(~row_shows, 0)), alike),
    )
    layout = from_parts(grid, parts, visible)
    again = partial(_global_at, chosen.cpu(), block_size, device)
    return layout.ruled(Rule(again))


def _global_at(chosen: Tensor, block_size: int, device: Device, length: int) -> BlockLayout:
    return global_positions(length, chosen[chosen < length], block_size=block_size, device=device)


@ruled()
def random_blocks(
    length: int,
    count: int,
    *,
    seed: int = 0,
    heads: int = 1,
    block_size: int = 128,
    device: Device = "cpu",
) -> BlockLayout:
    """In each block row of each head, min(count, R) of the R key blocks, drawn without return.

    The random attention of BigBird (arXiv 2007.14062, section 2 and appendix D), which draws
    blocks. The same seed gives the same blocks everywhere. length and block_size are in tokens,
    count in blocks; heads draw each for itself; device is that of the result.

    Examples:
        >>> layouts.random_blocks(128, 2, block_size=32, heads=4).density() < 1
        True
    """
    return draw_blocks(make_grid(length, length, block_size, device), count, seed, heads)


@ruled()
def bigbird(
    length: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
    heads: int = 1,
    block_size: int = 64,
    device: Device = "cpu",
) -> BlockLayout:
    """BigBird (arXiv 2007.14062, section 2 and appendix D), whose unit is the block.

    A query block sees the window_blocks blocks around it, the first global_blocks blocks, and
    random_blocks blocks at random; the first global_blocks query blocks see everything.
    The default is the paper's base configuration (its table 8). length and block_size are in
    tokens, the other sizes in blocks; heads and seed as in `random_blocks`; device is that of the
    result.

    Raises:
        ValueError: window_blocks is even, among others.

    Examples:
        >>> layouts.bigbird(256, block_size=32, heads=4).density() < 1
        True
    """
    if _checks.integer("window_blocks", window_blocks) % 2 == 0:
        raise ValueError(f"window_blocks must be odd. Got {window_blocks}.")
    _checks.integer("global_blocks", global_blocks, low=0)
    grid = make_grid(length, length, block_size, device)
    most = window_blocks // 2
    row = grid.arange(grid.rows)
    start, stop = (row - most).clamp(min=0), (row + most + 1).clamp(max=grid.rows)
    full, no_masks = torch.full_like(row, FULL), _masks.empty(block_size, grid.device)
    window = compress(BlockLayout, grid, Runs(row, start, stop - start, full, no_masks))
    sinks = global_tokens(
        length, min(length, global_blocks * block_size), block_size=block_size, device=device
    )
    return window | sinks | draw_blocks(grid, random_blocks, seed, heads)


@ruled()
def longformer(
    length: int, window: int, global_count: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """|i − j| <= window, or i < global_count, or j < global_count (arXiv 2004.05150, figure 2d).

    length, window, global_count and block_size are in tokens; device is that of the result.

    Examples:
        >>> print(layouts.longformer(128, 32, 4, block_size=32).text(size=4))
        #+++
        +#+.
        ++#+
        +.+#
    """
    window_part = sliding_window(length, window, block_size=block_size, device=device)
    return window_part | global_tokens(length, global_count, block_size=block_size, device=device)


def document(
    lengths: Sequence[int], *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """i and j lie in the same document; the documents have these lengths, one after the other.

    The packing without cross-contamination of Krell et al. (arXiv 2107.02027). lengths and
    block_size are in tokens; device is that of the result.

    Examples:
        >>> print(layouts.document([40, 88], block_size=32).text(size=4))
        #+..
        ++++
        .+##
        .+##
    """
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths must be a sequence of ints. Got {lengths!r}.")
    sizes = [_checks.integer(f"lengths[{i}]", x, low=0) for i, x in enumerate(lengths)]
    length = sum(sizes)
    grid = make_grid(length, length, block_size, device)
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(grid.device)
    owner = torch.searchsorted(ends, grid.arange(length), right=True)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return owner[i] == owner[j]

    starts = torch.nn.functional.pad(ends, (1, 0))
    row = grid.arange(grid.rows)
    first = row * block_size
    earliest, latest = owner[first], owner[(first + block_size - 1).clamp(max=length - 1)]
    start, stop = starts[earliest], starts[latest + 1]
    own, last = start // block_size, (stop - 1) // block_size
    # Earlier columns are seen by the first `tail` queries, later ones by those from `head` on.
    tail = (starts[earliest + 1] - first).clamp(max=block_size)
    head = (starts[latest] - first).clamp(min=0)
    whole = (head == 0) & (tail == block_size)
    size = block_size + 1
    parts = (
        (row, own, (own < row).to(torch.int64), start % block_size * size + tail),
        (row, own + 1, row - own - 1, tail),
        (row, row, torch.ones_like(row), torch.where(whole, 0, row + 1)),
        (row, row + 1, last - row - 1, head),
        (row, last, (last > row).to(torch.int64), stop % block_size * size + head),
    )
    made = from_parts(grid, parts, visible)
    return made.ruled(Rule(partial(_documents_at, tuple(sizes), block_size, device)))


def _documents_at(
    sizes: tuple[int, ...], block_size: int, device: Device, length: int
) -> BlockLayout:
    """Documents cut at a length; the last one grows."""
    ends = [min(end, length) for end in accumulate(sizes)]
    ends[-1:] = [length]
    cut = [end - start for start, end in pairwise([0, *ends])]
    return document(cut, block_size=block_size, device=device)


@ruled()
def prefix(
    length: int, count: int, *, block_size: int = 128, device: Device = "cpu"
) -> BlockLayout:
    """j < count or j <= i: the prefix language model of T5 (arXiv 1910.10683, section 3.2.1).

    length, count and block_size are in tokens; device is that of the result.

    Examples:
        >>> print(layouts.prefix(128, 40, block_size=32).text(size=4))
        #+..
        #+..
        ##+.
        ###+
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("count", count, low=0)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j < count) | (j <= i)

    row = grid.arange(grid.rows)
    # The block column that the end of the prefix cuts, if it does.
    cut, rest = divmod(min(count, length), block_size)
    ones = torch.ones_like(row)
    parts = (
        (row, torch.zeros_like(row), row.clamp(min=cut), ones),
        (row, row.clamp(min=cut), torch.where(row < cut, min(rest, 1), 1), (row - cut).sign() + 1),
    )
    return from_parts(grid, parts, visible)


@ruled()
def hierarchical(
    length: int,
    window: int,
    levels: int,
    *,
    growth: int = 2,
    block_size: int = 128,
    device: Device = "cpu",
) -> BlockLayout:
    """For a level k < levels and s = growth ** k: j ≡ 0 (mod s) and |i // s − j // s| <= window.

    A window at each of several scales, coarser further away, as in H-Transformer-1D (arXiv
    2107.11906, section 4), with one sampled key for each coarse cell where that averages the cell.
    length and block_size are in tokens, window in cells of each level, whose side in tokens grows
    growth times from one to the next; device is that of the result.

    Examples:
        >>> layouts.hierarchical(512, 32, 3, block_size=32).density() < 1
        True
    """
    grid = make_grid(length, length, block_size, device)
    _checks.integer("window", window, low=0)
    _checks.integer("levels", levels)
    scales = [_checks.integer("growth", growth, low=2) ** level for level in range(levels)]

    def visible(i: Tensor, j: Tensor) -> Tensor:
        seen = torch.zeros_like(i - j, dtype=torch.bool)
        for s in scales:
            seen |= (j % s == 0) & ((i // s - j // s).abs() <= window)
        return seen

    b, largest = block_size, scales[-1]
    # A block's look depends on its row modulo `phases` and on column − row + `most`.
    phases = largest // gcd(largest, b)
    most = max(0, min(grid.rows - 1, -(-(window + 1) * largest // b)))
    pitch = 2 * most + 1
    row = grid.arange(min(phases, max(1, grid.rows)))[:, None]
    far, near, reach = [row[:0, 0]], [row[:0, 0]], 0
    for s in scales:
        if s % b == 0:
            # Of each cell, the first key of one block.
            column = (row * b // s + grid.arange(-window, window + 1)) * (s // b)
            far.append(_inside(row, column - row, most))
        else:
            reach = max(reach, min(most, (window + 1) * s // b + 1))
            near.append(_inside(row, grid.arange(-reach, reach + 1), most))
    position = torch.unique(torch.cat(far + near))
    # Where scales divide the block size, the row does not matter; where blocks divide the scale,
    # all that are seen show their first key.
    regular = all(s % b == 0 or b % s == 0 for s in scales)
    place = position % pitch if regular else position
    kept_near = torch.isin(position, near[-1])
    code = torch.where(kept_near, place + 1, 0) * 2 + torch.isin(position, torch.cat(far))
    _, look, example = group(code)
    row, place = position[example] // pitch, position[example] % pitch
    # Anywhere far from the ends.
    endless = Grid(b << 32, b << 32, b, grid.device)
    row = row + -(-most // phases) * phases
    prototypes = endless.evaluate(visible, row, row + place - most)
    return periodic(grid, prototypes, position, look, phases, most, pitch)


def _inside(row: Tensor, place: Tensor, most: int) -> Tensor:
    """Sorted numbers of (row, place), for |place| <= most."""
    place, row = torch.broadcast_tensors(place, row)
    kept = place.abs() <= most
    return (row * (2 * most + 1) + place + most)[kept]
