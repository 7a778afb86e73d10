"""A dilated pattern as blocks, in the order of positions in which its runs are contiguous."""

from itertools import pairwise

import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_sparse import _checks
from dilated_sparse._blocks import compress
from dilated_sparse._grid import Grid, from_prototypes, group, make_grid, spread
from dilated_sparse._layout import BlockLayout, ruled

# Branches whose flags go into one int32.
_BITS = 31


def longnet_order(
    length: int, pattern: DilatedPattern, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The positions (length,) in the order of `longnet`: rows[order] gives the rows it is for.

    Inside each smallest segment, positions are sorted by their residue for the smallest rate, then
    for the next, and so on, so the positions that any branch keeps are contiguous there. length is
    in tokens; device is that of the result.

    Raises:
        ValueError: the rates do not divide one another in turn, a segment length is no multiple of
            the smallest, or the smallest is no multiple of the largest rate.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> layouts.longnet_order(8, DilatedPattern([4, 8], [1, 2]))
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    _checks.integer("length", length, low=0)
    smallest, rates = _nesting(pattern)
    position = torch.arange(length, device=device)
    inner, key = position % smallest, torch.div(position, smallest, rounding_mode="floor")
    for r in rates:
        key = key * r + inner % r
    return torch.argsort(key, stable=True)


@ruled(is_cut=False)
def longnet(
    length: int,
    pattern: DilatedPattern,
    *,
    heads: int = 1,
    is_causal: bool = False,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """With p = longnet_order(length, pattern): a branch shows key p[j] to query p[i].

    LongNet (arXiv 2307.02486, section 2.2) as blocks; a key counts once, however many branches
    show it. The layout is for rows in the order p, so is_causal (p[j] <= p[i]) belongs here and
    not in the call of the attention. length and block_size are in tokens; heads is the number of
    query heads, which decide their offsets; device is that of the result.

    Raises:
        ValueError: as `longnet_order`, or the pattern has `count_padding`.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> pattern = DilatedPattern([32, 128], [1, 4])
        >>> print(layouts.longnet(128, pattern, block_size=32).text(size=4))
        #+++
        +#++
        ++#+
        +++#
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
    if pattern.count_padding:
        raise ValueError("pattern must not have count_padding: a layout has no zero keys.")
    grid = make_grid(length, length, block_size, device)
    _checks.integer("heads", heads)
    _checks.boolean("is_causal", is_causal)
    order = longnet_order(length, pattern, device=device)
    members = pattern.branch_heads(heads)
    parts = []
    for head in range(heads):
        branches = [
            (w, r, pattern.head_offset(head, heads, r))
            for (w, r), used in zip(pattern.branches, members, strict=True)
            if head in used
        ]
        parts.append(_HeadBlocks(grid, order, branches, is_causal, _nesting(pattern)[0]))
    return _gather(grid, parts)


class _HeadBlocks:
    """The candidates of one head, with packed masks evaluated once for those that look alike."""

    def __init__(
        self,
        grid: Grid,
        order: Tensor,
        branches: list[tuple[int, int, int]],
        is_causal: bool,
        smallest: int,
    ) -> None:
        self.row, self.column = _candidates(grid, order, branches, smallest)
        whole = smallest % grid.block_size == 0

        def visible(i: Tensor, j: Tensor) -> Tensor:
            query, key = order[i], order[j]
            # A whole number of blocks in a segment: all pairs of two blocks share one, or none.
            ends = (query[:, :1], key[..., :1]) if whole else (query, key)
            seen = torch.zeros_like(query - key, dtype=torch.bool)
            for first in range(0, len(branches), _BITS):
                some = branches[first : first + _BITS]
                # One bit for each branch; segments are multiples of all rates.
                shared = _bits([ends[0] // w == ends[1] // w for w, _, _ in some])
                shown = (_bits([x % r == s for _, r, s in some]) for x in (query, key))
                seen |= (next(shown) & shared & next(shown)) != 0
            return seen & (key <= query) if is_causal else seen

        alike = _alike(grid, self.row, self.column, [w for w, _, _ in branches], smallest)
        _, self.index, example = group(alike)
        row, column = self.row[example], self.column[example]
        self.prototypes = grid.evaluate(visible, row, column)
        self.edge = grid.edge(row, column)


def _bits(flags: list[Tensor]) -> Tensor:
    """Bit i of the result is flag i, for at most _BITS flags of one shape."""
    total = flags[0].to(torch.int32)
    for i, flag in enumerate(flags[1:], 1):
        total = total | flag.to(torch.int32) << i
    return total


def _gather(grid: Grid, parts: list[_HeadBlocks]) -> BlockLayout:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.prototypes))
    row = torch.cat([part.row + head * grid.rows for head, part in enumerate(parts)])
    runs = from_prototypes(
        grid,
        row,
        torch.cat([part.column for part in parts]),
        torch.ones_like(row),
        torch.cat([part.index + start for part, start in zip(parts, starts, strict=False)]),
        torch.cat([part.prototypes for part in parts]),
        torch.cat([part.edge for part in parts]),
    )
    return compress(BlockLayout, grid, runs, len(parts))


def _candidates(
    grid: Grid, order: Tensor, branches: list[tuple[int, int, int]], smallest: int
) -> tuple[Tensor, Tensor]:
    """All pairs of blocks in which a branch keeps positions of one segment."""
    # Sorting narrow numbers is faster.
    dtype = torch.int32 if grid.rows * grid.columns < 2**31 else torch.int64
    pairs = [grid.arange(0).to(dtype)]
    for w, r, s in branches:
        block, segment = _touched(grid, order, w, r, s, smallest)
        ends = torch.bincount(segment).cumsum(0) if len(segment) else segment
        starts = torch.nn.functional.pad(ends, (1, 0))
        query, step = spread((ends - starts[:-1])[segment])
        row = (block * grid.columns)[query]
        pairs.append((row + block[starts[segment][query] + step]).to(dtype))
    places = torch.unique(torch.cat(pairs)).to(torch.int64)
    row = torch.div(places, max(1, grid.columns), rounding_mode="floor")
    return row, places - row * grid.columns


def _touched(
    grid: Grid, order: Tensor, w: int, r: int, s: int, smallest: int
) -> tuple[Tensor, Tensor]:
    """The pairs (block, segment), rising, in which a branch keeps a position."""
    b = grid.block_size
    if smallest % b:
        kept = (order % r == s).nonzero().squeeze(1)
        # The order moves no position out of its smallest segment.
        segment = torch.div(kept, w, rounding_mode="floor")
        touched = torch.unique_consecutive(
            segment * grid.rows + torch.div(kept, b, rounding_mode="floor")
        )
        return touched % max(1, grid.rows), torch.div(
            touched, max(1, grid.rows), rounding_mode="floor"
        )
    # All smallest segments but a short last one have the same order.
    cut = grid.length // smallest * smallest
    first, last = (
        torch.unique_consecutive((rows % r == s).nonzero().squeeze(1) // b)
        for rows in (order[: min(cut, smallest)], order[cut:])
    )
    per_segment = smallest // b
    regular = grid.arange(cut // smallest)[:, None] * per_segment + first
    block = torch.cat([regular.flatten(), last + cut // b])
    return block, torch.div(block * b, w, rounding_mode="floor")


def _alike(grid: Grid, row: Tensor, column: Tensor, lengths: list[int], smallest: int) -> Tensor:
    """Equal where two pairs of blocks surely have the same mask."""
    per_segment, rest = divmod(smallest, grid.block_size)
    if rest:
        return grid.arange(len(row))
    cut = grid.length // smallest * per_segment
    sub_row, sub_column = (torch.div(x, per_segment, rounding_mode="floor") for x in (row, column))
    code = (sub_row - sub_column).clamp_(-1, 1).add_(1)
    for block in (row, column):
        # The last smallest segment, if short, has an order of its own.
        place = torch.where(block >= cut, block - cut + per_segment, block % per_segment)
        code = code * (2 * per_segment) + place
    block = grid.arange(grid.rows)
    for w in sorted(set(lengths)):
        segment = torch.div(block, w // grid.block_size, rounding_mode="floor")
        same = segment.index_select(0, row) == segment.index_select(0, column)
        code = code.mul_(2).add_(same)
    return code


def _nesting(pattern: DilatedPattern) -> tuple[int, list[int]]:
    """The smallest segment length and the different rates, rising; raise unless they nest."""
    smallest, rates = min(pattern.segment_lengths), sorted(set(pattern.dilation_rates))
    for a, b in pairwise(rates):
        if b % a:
            raise ValueError(f"dilation_rates must divide one another in turn. Got {rates}.")
    for w in pattern.segment_lengths:
        if w % smallest:
            raise ValueError(f"segment_lengths must be multiples of {smallest}. Got {w}.")
    if smallest % rates[-1]:
        raise ValueError(
            f"the smallest segment length must be a multiple of the largest dilation rate "
            f"({rates[-1]}). Got {smallest}."
        )
    return smallest, rates
