"""How layouts are made: of differences of positions, of rows that repeat, of parts, of draws."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dilated_sparse import _checks, _masks
from dilated_sparse._blocks import compress
from dilated_sparse._grid import (
    Grid,
    TokenRule,
    from_looks,
    from_rule,
    group,
    interleave,
    single_blocks,
    where,
)
from dilated_sparse._layout import BlockLayout

# Row, first column, count, and a number that is the same for what looks alike.
Part = tuple[Tensor, Tensor, Tensor, Tensor]
_MOST_PARTS = 8


def by_difference(
    grid: Grid, behind: int, ahead: int, visible: Callable[[Tensor], Tensor]
) -> BlockLayout:
    """The layout of a rule of i − j, which reaches so many block columns behind and ahead."""
    inner, b = grid.arange(grid.block_size), grid.block_size
    place = grid.arange(-behind, ahead + 1)
    diagonals = visible(grid.arange(1 - b, b) - place[:, None] * b)
    looks, look = torch.unique(diagonals, dim=0, return_inverse=True)
    prototypes = _masks.pack(looks[:, inner[:, None] - inner + b - 1])
    return periodic(grid, prototypes, place + behind, look, 1, behind, len(place))


def periodic(
    grid: Grid,
    prototypes: Tensor,
    position: Tensor,
    look: Tensor,
    phases: int,
    behind: int,
    pitch: int,
) -> BlockLayout:
    """The layout whose row r shows, in column r − behind + p, what position (r % phases, p) says.

    Args:
        grid: a square grid.
        prototypes: (P, b, ceil(b / 8)) packed masks, one for each look.
        position: (n,) rising, phase * pitch + p; what is left out is empty.
        look: (n,) of each.
        phases: see above.
        behind: see above.
        pitch: p is less.
    """
    shown = (_masks.count(prototypes) > 0)[look]
    position, look = position[shown], look[shown]
    first, stop = alike_neighbours(look, position, pitch)
    begin, end = position[first], position[stop - 1] + 1
    every = grid.arange(grid.rows)
    phase = every % phases * pitch
    low = phase + (behind - every).clamp(min=0)
    high = phase + (grid.columns + behind - every).clamp(max=pitch)
    row, index, column, count = between(begin, end, low, high, every - phase - behind)
    looks = look[first[index]]
    return compress(BlockLayout, grid, from_looks(grid, row, column, count, looks, prototypes))


def alike_neighbours(
    look: Tensor, position: Tensor | None = None, pitch: int = 1
) -> tuple[Tensor, Tensor]:
    """First and stop index of each run of equal looks at successive positions of one phase."""
    differs = look[1:] != look[:-1]
    if position is not None:
        differs |= (position.diff() != 1) | (position[1:] % pitch == 0)
    change = torch.nn.functional.pad(differs, (1, 1), value=True)
    ends = change[: len(look) + 1].nonzero().squeeze(1)
    return ends[:-1], ends[1:]


def between(
    begin: Tensor, end: Tensor, low: Tensor, high: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of intervals that lie in [low, high) of each row.

    Args:
        begin: (n,) rising.
        end: (n,) rising, no more than the next begin.
        low: (rows,).
        high: (rows,).
        shift: (rows,) to add to the results, 0 when None.

    Returns:
        row, interval, start and count of each part that is not empty, by row.
    """
    first = torch.searchsorted(end, low, right=True)
    count = (torch.searchsorted(begin, high) - first).clamp(min=0)
    row = torch.repeat_interleave(count)
    after = count.cumsum(0)
    interval = torch.repeat_interleave(first - after + count, count)
    interval += torch.arange(len(interval), device=count.device)
    start, stop = begin[interval], end[interval]
    # Only the first interval and the last of a row may reach out.
    some = count > 0
    at, low = (after - count)[some], low[some]
    start[at] = torch.maximum(start[at], low)
    at, high = after[some] - 1, high[some]
    stop[at] = torch.minimum(stop[at], high)
    count_ = stop.sub_(start)
    if shift is not None:
        start += torch.repeat_interleave(shift, count)
    row, interval, start, count_ = where(count_ > 0, row, interval, start, count_)
    return row, interval, start, count_


def number(*codes: Tensor) -> Tensor:
    """A number below the length for each different tuple of codes."""
    total = codes[0]
    for code in codes[1:]:
        total = total * (code.max() + 1 if len(code) else 1) + code
    return group(total)[1]


def coded(
    found: tuple[Tensor, Tensor, Tensor, Tensor], alike: Callable[[Tensor, Tensor], Tensor]
) -> Part:
    """What `between` found, with a number for its look from rows and columns."""
    row, _, column, count = found
    return row, column, count, alike(row, column)


def from_parts(grid: Grid, parts: Iterable[Part], rule: TokenRule) -> BlockLayout:
    """The layout of parts (row, column, count, alike), from left to right in every row."""
    coded = ((*part[:3], part[3] * _MOST_PARTS + i) for i, part in enumerate(parts))
    row, column, count, alike = interleave(grid.rows, coded)
    return compress(BlockLayout, grid, from_rule(grid, row, column, count, alike, rule))


def draw_blocks(grid: Grid, count: int, seed: int, heads: int) -> BlockLayout:
    """So many blocks of each row, drawn without return, or all if there are fewer."""
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
    column = chosen.sort(1).values.flatten().to(grid.device)
    row = grid.arange(len(chosen)).repeat_interleave(count)
    return compress(BlockLayout, grid, single_blocks(grid, row, column), heads)
