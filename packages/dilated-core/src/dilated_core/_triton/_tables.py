"""The tables of a dilated pattern: its strips laid out as tiles and runs, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dilated_core._branches import Branches
from dilated_core._triton._plan import (
    ANY_SEGMENT,
    FULL_FIELDS,
    SPARE_RUNS,
    BlockSizes,
    TilePlan,
)
from dilated_core._triton._strips import Slot, StepShape, head_offsets, sorted_branches, strips

# "before": rows see columns at or before them, as queries see keys; "after": the transpose.
Causal = Literal["no", "before", "after"]
_TILES_AT_ONCE = 2**15


class Request(NamedTuple):
    """What a plan depends on; positions of rows and columns are half-open ranges."""

    pattern: Branches
    heads: int
    kv_heads: int
    by_key: bool
    rows: tuple[int, int]
    columns: tuple[int, int]
    is_causal: bool
    blocks: BlockSizes

    @property
    def causal(self) -> Causal:
        """How rows and columns are ordered."""
        return ("after" if self.by_key else "before") if self.is_causal else "no"

    @property
    def zero_keys(self) -> bool:
        """Whether the runs of zero keys are wanted; they get no gradients."""
        return self.pattern.count_padding and not self.is_causal and not self.by_key


@dataclass(frozen=True)
class Template:
    """The tiles of one sequence of the largest length, before runs are filled in.

    first, step, lowest and recipe are (classes, tiles): first row, row step, start of the tile's
    block of positions (rising; padded with a huge value), and index into the recipes. recipes is
    (recipes, slots, fields). density and excess bound the tiles of a sequence of length n:
    density * n + excess.
    """

    first: Tensor
    step: Tensor
    rows: Tensor
    lowest: Tensor
    recipe: Tensor
    recipes: Tensor
    head_class: Tensor
    density: float
    excess: float
    largest_step: int
    mask: int = 2
    stream: int = 0

    def tensors(self) -> tuple[Tensor, ...]:
        """The tables."""
        return self.first, self.step, self.rows, self.lowest, self.recipe, self.recipes

    def tiles(self) -> "Tiles":
        """The tiles of the one sequence that the template is for."""
        return Tiles(self.first, self.step, self.rows, self.recipe, torch.zeros_like(self.first))


class Tiles(NamedTuple):
    """Per tile, (classes, tiles) int64: first row, row step, rows, recipe, sequence."""

    first: Tensor
    step: Tensor
    rows: Tensor
    recipe: Tensor
    sequence: Tensor


def _classes(request: Request) -> tuple[list[tuple[tuple[int | None, ...], ...]], list[int]]:
    """Distinct member tuples, and the class of each head (key head by key)."""
    offsets = head_offsets(request.pattern, request.heads)
    size = request.heads // request.kv_heads if request.by_key else 1
    members = [offsets[h : h + size] for h in range(0, request.heads, size)]
    distinct = list(dict.fromkeys(members))
    return distinct, [distinct.index(m) for m in members]


_HUGE = 2**40


def template_of(request: Request, device: torch.device) -> Template:
    branches, _ = sorted_branches(request.pattern)
    shape = StepShape(request.blocks.rows, request.blocks.columns, request.is_causal)
    distinct, head_class = _classes(request)
    recipes: dict[tuple[Slot, ...], int] = {}
    table: list[tuple[int, ...]] = []
    for number, members in enumerate(distinct):
        for strip in strips(
            branches,
            members,
            range(*request.rows),
            range(*request.columns),
            shape,
            request.zero_keys,
        ):
            known = recipes.setdefault(strip.slots, len(recipes))
            per_cut = -(-strip.cut // strip.block)
            cuts = (strip.stop - 1) // strip.cut + 1 - strip.start // strip.cut
            table.append((number, cuts * per_cut, per_cut, known, *strip[:6]))
    columns = torch.tensor(table, dtype=torch.int64).to(device).unbind(1)
    total = sum(row[1] for row in table)
    index = torch.arange(len(table), device=device).repeat_interleave(columns[1], output_size=total)
    tile = torch.arange(total, device=device) - (columns[1].cumsum(0) - columns[1])[index]
    owner, _, tiles_per_cut, recipe, start, stop, residue, step, cut, block = (
        c[index] for c in columns
    )
    segment = (start // cut + tile // tiles_per_cut) * cut
    lowest = segment + tile % tiles_per_cut * block
    highest = torch.minimum(torch.minimum(lowest + block, segment + cut), stop)
    lowest = torch.maximum(lowest, start)
    first = lowest + (residue - lowest) % step
    rows = ((highest - first + step - 1) // step).clamp(min=0)
    # A progression may miss a short block altogether.
    lowest = torch.where(rows > 0, lowest, _HUGE)
    keep = (rows > 0).nonzero().squeeze(1)
    keep = keep[torch.argsort(owner[keep] * _HUGE + lowest[keep], stable=True)]
    owner = owner[keep]
    per_class = torch.bincount(owner, minlength=len(distinct))
    most = int(per_class.max())
    place = torch.arange(len(keep), device=device) - (per_class.cumsum(0) - per_class)[owner]

    def spread(values: Tensor, fill: int) -> Tensor:
        full = torch.full((len(distinct), most), fill, dtype=torch.int64, device=device)
        full[owner, place] = values[keep]
        return full

    lowest = spread(lowest, _HUGE)
    length = max(1, request.rows[1] - request.rows[0])
    density = most / length
    ordinal = torch.arange(1, most + 1, device=device) - density * (lowest - request.rows[0])
    return Template(
        first=spread(first, 0),
        step=spread(step, 1),
        rows=spread(rows, 0),
        lowest=lowest,
        recipe=spread(recipe, 0),
        recipes=_recipe_table(list(recipes), device),
        head_class=torch.tensor(head_class, dtype=torch.int32).to(device),
        density=density,
        excess=max(1.0, float(ordinal.max())),
        largest_step=max((s.step for slots in recipes for s in slots), default=1),
    )


def _recipe_table(recipes: Sequence[Sequence[Slot]], device: torch.device) -> Tensor:
    """(recipes, slots, fields) int64; a slot of step 0 is none."""
    width = max(1, *(len(slots) for slots in recipes))
    nothing = Slot(1, 0, 0, 0, 0, 1, 0, 1, 0, False)
    rows = [[*slots, *[nothing] * (width - len(slots))] for slots in recipes]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def exact_tables(request: Request, template: Template) -> TilePlan:
    """The tables of one sequence, made in pieces: what is made on the way is larger than they."""
    tiles = template.tiles()
    pieces = []
    full = masked = 0
    for start in range(0, max(1, tiles.first.shape[1]), _TILES_AT_ONCE):
        some = Tiles(*(x[:, start : start + _TILES_AT_ONCE] for x in tiles))
        piece = tables(request, template, some, request.columns[1], exact=True)
        piece.tiles[..., 6] += full
        piece.tiles[..., 7] += masked
        full, masked = full + len(piece.full), masked + len(piece.masked)
        pieces.append(piece)
    joined = torch.cat([piece.masked for piece in pieces])
    whole = replace(
        pieces[0],
        tiles=torch.cat([piece.tiles for piece in pieces], dim=1),
        full=torch.cat([piece.full for piece in pieces]),
        masked=joined,
        bits=joined,
        mask=max(piece.mask for piece in pieces),
    )
    return narrowed(whole)


def narrowed(plan: TilePlan) -> TilePlan:
    """The plan without the bounds of rows in its full runs where no run has any."""
    return plan if plan.mask == 2 else replace(plan, full=plan.full[:, :FULL_FIELDS].contiguous())


class _Shown(NamedTuple):
    """The columns that each slot shows each tile, (classes, tiles, slots) int64 or bool.

    Attributes:
        first: the first one.
        columns: how many there are before `end`.
        later_first: where `split`, the first one after `end`.
        later_columns: how many there are after it.
        end: of the first row's segment.
        split: whether rows and columns before `end` and after it are apart, and both have some.
        segment: of which rows and columns must be the same; ANY_SEGMENT if all are.
    """

    first: Tensor
    columns: Tensor
    later_first: Tensor
    later_columns: Tensor
    end: Tensor
    split: Tensor
    segment: Tensor


def _shown(request: Request, tiles: Tiles, slots: Sequence[Tensor], length: Tensor | int) -> _Shown:
    """Clip what slots show to what tiles, causal order and the sequence leave of it."""
    outer, inner, side, residue, step, _, row_residue, row_step, _, zero = slots
    first_row, last_row = _bounds(tiles)
    low = first_row // outer * outer
    high = last_row // outer * outer + outer
    segment = torch.where(low + outer < high, outer, ANY_SEGMENT)
    # Where a tile meets the end of one segment, rows and columns before it and after it are apart.
    end = low + outer
    split = (high - low == 2 * outer) & (row_step == 1) & (zero == 0)
    if request.causal != "no":
        split = torch.zeros_like(split)
    inner_low = first_row // inner.clamp(min=1) * inner
    low = torch.where(side > 0, inner_low + inner, low).clamp(min=request.columns[0])
    high = torch.where(side < 0, inner_low, high)
    high = torch.minimum(high, torch.as_tensor(length, device=high.device))
    if request.causal == "before":
        high = torch.minimum(high, last_row + 1)
    if request.causal == "after":
        low = torch.maximum(low, first_row)
    usable = (step > 0) & (zero == 0) & (tiles.rows.unsqueeze(-1) > 0)
    # Where few rows of a leaf are kept, most of its tiles have none.
    usable &= first_row + (row_residue - first_row) % row_step <= last_row
    step = step.clamp(min=1)
    stop, later = torch.where(split, torch.minimum(end, high), high), torch.maximum(end, low)
    return _Shown(
        low + (residue - low) % step,
        torch.where(usable, _count(low, stop, residue, step), 0),
        later + (residue - later) % step,
        torch.where(usable & split, _count(later, high, residue, step), 0),
        end, split, segment,
    )  # fmt: skip


def tables(
    request: Request, template: Template, tiles: Tiles, length: Tensor | int, *, exact: bool
) -> TilePlan:
    """Fill in the runs of tiles; `length` is that of the columns, per tile or for all.

    With `exact` the tables are cut to the widest tile, which needs to read its width back.
    """
    unit, narrow = request.blocks.columns, request.blocks.masked
    slots = template.recipes[tiles.recipe].unbind(-1)
    outer, _, _, residue, step, weight, row_residue, row_step, member, zero = slots
    if isinstance(length, Tensor):
        length = length.unsqueeze(-1)
    shown = _shown(request, tiles, slots, length)
    first, count, later_first, later_count, end, split, segment = shown
    masked_only = ((segment != ANY_SEGMENT) & ~split) | (row_step > 1)
    full, head = _full(request, tiles, shown, step.clamp(min=1), masked_only)
    later_full = later_count // unit * unit
    log_weight = weight.to(torch.float32).log2()
    rows_seen = member, segment, row_residue, row_step
    runs = [
        (first + (head + full) * step, step, count - head - full, log_weight, *rows_seen),
        (later_first + later_full * step, step, later_count - later_full, log_weight, *rows_seen),
    ]
    if request.causal == "after":
        runs.append((first, step, head, log_weight, *rows_seen))
    none = torch.zeros_like(end)
    if request.zero_keys:
        start, missing = _zero_keys(tiles, outer, residue, step.clamp(min=1), length)
        missing = torch.where(zero > 0, missing, 0)
        # Past the last key all segments are alike.
        alike = torch.where(start >= length, ANY_SEGMENT, segment)
        one = (missing > 0).to(torch.int64)
        weights = missing.to(torch.float32).log2()
        runs.append((start, none, one, weights, member, alike, row_residue, row_step))
    every = torch.full_like(end, ANY_SEGMENT)
    until = torch.where(split, end, every)
    full_runs = [
        (first + head * step, step, full, log_weight, member, none, until),
        (later_first, step, later_full, log_weight, member, end, every),
    ]
    full_records, masked_records = (
        torch.cat([_records(*run) for run in each], dim=2) for each in (full_runs, runs)
    )
    masked_steps = ((masked_records[..., 2] + narrow - 1) // narrow).sum(-1)
    full_records, full_start = _compact(full_records, exact)
    masked_records, masked_start = _compact(masked_records, exact)
    tile_table = torch.stack(
        [
            tiles.first, tiles.step, tiles.rows, (full + later_full).sum(-1), masked_steps,
            tiles.sequence, full_start, masked_start,
        ],
        dim=-1,
    )  # fmt: skip
    mask = template.mask
    if exact:
        bounded = masked_only | (segment != ANY_SEGMENT)
        hidden = [masked_steps.sum(), ((count > 0) & bounded).sum(), zero.sum()]
        some, general, zeros = (int(x) for x in torch.stack(hidden).tolist())
        mask = 2 if general or (zeros and some) else min(some, 1)
    return TilePlan(
        tile_table.to(torch.int32).contiguous(), full_records, masked_records,
        template.head_class, masked_records, template.largest_step, mask,
    )  # fmt: skip


def _full(
    request: Request, tiles: Tiles, shown: _Shown, step: Tensor, masked_only: Tensor
) -> tuple[Tensor, Tensor]:
    """How many columns every row sees, in whole steps, and how many before them need masks."""
    unit = request.blocks.columns
    first_row, last_row = _bounds(tiles)
    head = torch.zeros_like(shown.columns)
    seen = shown.columns
    if request.causal == "before":
        seen = torch.minimum((first_row - shown.first) // step + 1, seen).clamp(min=0)
    if request.causal == "after":
        diagonal = ((last_row - shown.first + step - 1) // step).clamp(min=0)
        head = torch.minimum((diagonal + unit - 1) // unit * unit, seen)
    full = torch.where(masked_only, 0, (seen - head).clamp(min=0) // unit * unit)
    return full, torch.where(full == 0, 0, head)


def _zero_keys(
    tiles: Tiles, outer: Tensor, residue: Tensor, step: Tensor, length: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The last segment of each tile, the only one short of keys, and how many it lacks."""
    length = torch.as_tensor(length, device=outer.device)
    start = _bounds(tiles)[1] // outer * outer
    slots = (torch.minimum(outer, length) + step - 1) // step
    return start, slots - _count(start, torch.minimum(start + outer, length), residue, step)


def _bounds(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """First and last row of each tile, (classes, tiles, 1)."""
    last = tiles.first + (tiles.rows - 1).clamp(min=0) * tiles.step
    return tiles.first.unsqueeze(-1), last.unsqueeze(-1)


def _count(low: Tensor, high: Tensor, residue: Tensor, step: Tensor) -> Tensor:
    """How many positions in [low, high) are congruent to the residue modulo the step."""
    first = low + (residue - low) % step
    return ((high - first + step - 1) // step).clamp(min=0)


def _records(
    start: Tensor, step: Tensor, columns: Tensor, log_weight: Tensor, *rest: Tensor
) -> Tensor:
    bits = log_weight.to(torch.float32).view(torch.int32)
    return torch.stack([x.to(torch.int32) for x in (start, step, columns)]
                       + [bits] + [x.to(torch.int32) for x in rest], dim=-1)  # fmt: skip


def _compact(records: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The runs that have columns, tile after tile, and where each tile's begin.

    Without `exact` no size is read back, so each tile keeps room for all its slots.
    """
    real = records[..., 2] > 0
    counts = real.sum(-1)
    if exact:
        kept = records[real]
        starts = counts.flatten().cumsum(0).view(counts.shape) - counts
    else:
        order = torch.argsort((~real).to(torch.int8), dim=-1, stable=True)
        kept = records.gather(2, order.unsqueeze(-1).expand_as(records)).flatten(0, 2)
        starts = torch.arange(counts.numel(), device=counts.device).view(counts.shape)
        starts = starts * records.shape[2]
    spare = torch.zeros((SPARE_RUNS, records.shape[-1]), dtype=torch.int32, device=records.device)
    return torch.cat([kept, spare]), starts
