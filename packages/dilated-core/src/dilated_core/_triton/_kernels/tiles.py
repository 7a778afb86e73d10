"""Tiles, their runs, and which columns of a run each row of a tile sees."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(8)
FULL_FIELDS = tl.constexpr(5)
BOUNDED_FIELDS = tl.constexpr(7)
MASKED_FIELDS = tl.constexpr(8)
# These change from call to call and would compile a kernel again for little.
CALL_SCALARS = ["slots", "early", "first_query", "first_key"]


@triton.jit
def place(slots, early, HEADS: tl.constexpr, EARLY: tl.constexpr):
    """What a program serves: slot, batch row, head. The `early` slots of all heads come first."""
    program = tl.program_id(0)
    # Apart, since results of divisions alone are computed anew after the loops, not kept in
    # registers through them.
    if EARLY:
        heads = tl.num_programs(0) // slots
        later = program - early * heads
        others = tl.maximum(slots - early, 1)
        slot = tl.where(later < 0, program // heads, early + later % others)
        head = tl.where(later < 0, program % heads, later // others)
        return slot, head // HEADS, head % HEADS
    return program % slots, program // slots // HEADS, program // slots % HEADS


@triton.jit
def load_tile(
    tiles, full_runs, masked_runs, starts, head_class, slots, early,
    HEADS: tl.constexpr, EARLY: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read the tile of this program.

    Batch row and head, the tile's fields, the first row of its sequence, its runs, where it is.
    """
    slot, batch, head = place(slots, early, HEADS, EARLY)
    index = (tl.load(head_class + head) * slots + slot).to(tl.int64)
    tile = tiles + index * TILE_FIELDS
    sequence, origin = batch, tl.zeros((), tl.int64)
    if PACKED:
        sequence = tl.load(tile + 5)
        origin = tl.load(starts + sequence).to(tl.int64)
    full_runs += tl.load(tile + 6).to(tl.int64) * (BOUNDED_FIELDS if MASK == 2 else FULL_FIELDS)
    masked_runs += tl.load(tile + 7).to(tl.int64) * MASKED_FIELDS
    return (
        batch, head, tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3),
        tl.load(tile + 4), sequence, origin, full_runs, masked_runs, tile,
    )  # fmt: skip


@triton.jit
def reload_rows(tile, offsets):
    """The rows of a tile and which of them are real, read anew.

    For use after the loops: kept alive through them, they would cost registers.
    """
    rows = tl.load(tile, volatile=True) + tl.load(tile + 1, volatile=True) * offsets
    return rows, offsets < tl.load(tile + 2, volatile=True)


@triton.jit
def load_run(run, AHEAD: tl.constexpr, PHASE: tl.constexpr, MASK: tl.constexpr):
    """The run AHEAD of `run`: start, step, columns, log2 weight, and what tells who sees it.

    That is three fields and, where there are bits, the start once more; 0 what is not needed.
    """
    first, second, third, origin = 0, 0, 0, 0
    if PHASE == 1:
        run += AHEAD * MASKED_FIELDS
        if MASK == 3:
            first, second, third = tl.load(run + 5), tl.load(run + 6), tl.load(run + 7)
    elif MASK == 2:
        run += AHEAD * BOUNDED_FIELDS
        first, second = tl.load(run + 5), tl.load(run + 6)
    else:
        run += AHEAD * FULL_FIELDS
    start = tl.load(run)
    if PHASE == 1 and MASK == 3:
        origin = start
    weight = tl.load(run + 3).to(tl.float32, bitcast=True)
    return start, tl.load(run + 1), tl.load(run + 2), weight, first, second, third, origin


@triton.jit
def next_columns(
    run, now, then, BLOCK: tl.constexpr, PHASE: tl.constexpr, MASK: tl.constexpr,
    LOOK_AHEAD: tl.constexpr,
):  # fmt: skip
    """Advance by one block of columns, to the next run where that of `now` ends.

    With LOOK_AHEAD the next run is `then`, and the one after it is read at once, so that it is
    there when it is needed. That takes registers.
    """
    start, step, left, weight, first, second, third, origin = now
    ends = left <= BLOCK
    if PHASE == 1:
        run += tl.where(ends, MASKED_FIELDS, 0)
    elif MASK == 2:
        run += tl.where(ends, BOUNDED_FIELDS, 0)
    else:
        run += tl.where(ends, FULL_FIELDS, 0)
    if LOOK_AHEAD:
        new = then
        then = load_run(run, 1, PHASE, MASK)
        step = tl.where(ends, new[1], step)
        weight = tl.where(ends, new[3], weight)
        first = tl.where(ends, new[4], first)
        second = tl.where(ends, new[5], second)
        third = tl.where(ends, new[6], third)
        origin = tl.where(ends, new[7], origin)
    else:
        new = load_run(run, 0, PHASE, MASK)
        _, step, _, weight, first, second, third, origin = new
    start = tl.where(ends, new[0], start + BLOCK * now[1])
    left = tl.where(ends, new[2], left - BLOCK)
    return run, (start, step, left, weight, first, second, third, origin), then


@triton.jit
def load_words(
    bits, now, rows, lanes, BY_KEY: tl.constexpr, PHASE: tl.constexpr, MASK: tl.constexpr
):
    """Which columns of a step each row sees, as bits of one word and of the next.

    Columns that are not there have no bit, but BY_KEY they may have any: there it is cheaper to
    hide them later. To be called long before they are needed: words come from far.
    """
    low, high = rows, rows
    if PHASE == 1 and MASK == 3:
        offset = now[0] - now[7]
        words = bits + now[4] + offset // 32 + (rows - now[5]) * now[6]
        # Only a step of fewer than 32 columns may start within a word.
        low = tl.load(words) >> offset % 32
        tl.static_assert(lanes.shape[0] <= 64)
        high = low
        if lanes.shape[0] == 64:
            high = tl.load(words + 1)
        if not BY_KEY:
            low, high = lowest(low, now[2]), lowest(high, now[2] - 32)
    return low, high


@triton.jit
def lowest(word, count):
    """The word with only its lowest bits, as many as `count`."""
    last = tl.minimum(tl.maximum(count, 1), 32) - 1
    return tl.where(count > 0, word & ((2 << last) - 1), 0)


@triton.jit
def visible(run, words, rows, now, lanes, CAUSAL: tl.constexpr, BY_KEY: tl.constexpr,
             MASK: tl.constexpr):  # fmt: skip
    """(rows, columns) mask of one step of a masked run; `lanes` number its columns.

    BY_KEY columns that are not there are not hidden: their rows are zeros, which add nothing.
    """
    # Of a run each row sees the columns from one on and before another. To compare them with
    # numbers that no step changes takes an instruction each.
    start, left = now[0], now[2]
    step = tl.maximum(now[1], 1)  # 0 is a zero key, of one column
    if CAUSAL and BY_KEY:
        low = 1 + quotient(rows - start - 1, step)
    elif CAUSAL:
        high = tl.minimum(1 + quotient(rows - start, step), left)
    if MASK == 2:
        segment, residue, row_step = tl.load(run + 5), tl.load(run + 6), tl.load(run + 7)
        begin = rows // segment * segment - start
        first = 1 + quotient(begin - 1, step)
        end = 1 + quotient(begin + (segment - 1), step)
        end = tl.where((rows - residue) % row_step == 0, end, 0)
        if CAUSAL and BY_KEY:
            first = tl.maximum(first, low)
        elif CAUSAL:
            end = tl.minimum(end, high)
        elif not BY_KEY:
            end = tl.minimum(end, left)
        mask = between(lanes[None, :], first[:, None], tl.maximum(first, end)[:, None])
    elif CAUSAL and BY_KEY:
        mask = lanes[None, :] >= low[:, None]
    elif CAUSAL:
        mask = lanes[None, :] < high[:, None]
    else:
        mask = (lanes < left)[None, :]
    if MASK == 3:
        word = words[0][:, None]
        if lanes.shape[0] == 64:
            word = tl.where((lanes < 32)[None, :], word, words[1][:, None])
        shown = (word & (1 << lanes % 32)[None, :]) != 0
        if CAUSAL:
            shown = shown & mask
        mask = shown
    return mask


@triton.jit
def quotient(x, step):
    """x // step, rounded down; above 2**22 it may be off, but is that large."""
    whole = tl.minimum(x.to(tl.float32), 2.0**30) * (1.0 / step.to(tl.float32))
    found = tl.floor(whole).to(tl.int32)
    rest = x - found * step
    return found + (rest >= step).to(tl.int32) - (rest < 0).to(tl.int32)


@triton.jit
def between(rows, first, end):
    """Which rows are from `first` on and before `end`, by one comparison each."""
    return (rows - first).to(tl.uint32, bitcast=True) < (end - first).to(tl.uint32, bitcast=True)


@triton.jit
def load_ignored(padding, positions, present):
    """Which columns are ignored, 0 where none is. Four times, so that they are as many as threads.

    Of fewer triton has each thread read all columns that it needs, with an address for each.
    """
    at = padding + positions[None, :] + tl.zeros([4, 1], tl.int32)
    four = tl.load(at, mask=present[None, :], other=0)
    two, _ = tl.split(tl.reshape(tl.trans(four), [positions.shape[0], 2, 2]))
    ignored, _ = tl.split(two)
    return ignored
