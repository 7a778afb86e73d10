"""The kernels: one pass over the runs of a tile, forward, to queries and to keys and values.

They know tiles and runs (see `_plan`) and no pattern. Scores are in units of log2: with scale' =
|scale| * log2(e) and a run's log2 weight b, a key counts exp2(scale' * (q . k) + b). A
NEGATIVE scale moves its sign into the rows, which are loaded once.

With ALIKE both tensors that a kernel walks have the same row stride, so offsets are shared. Each
kernel walks its full runs, then, unless MASK is 0, its masked runs: 1 says that only column
counts and causal order can hide a key, 2 that segments and row residues can as well, 3 that bits
can.

A head_dim that is no power of two may be held as a block of BLOCK_D and a narrower one of TAIL
dims (48 = 32 + 16), so that fewer are padded: the names *_tail, which exist only if TAIL is not 0.

B batch, N queries, M keys, H query heads, D head_dim.
"""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TILE_FIELDS = tl.constexpr(8)
FULL_FIELDS = tl.constexpr(5)
BOUNDED_FIELDS = tl.constexpr(7)
MASKED_FIELDS = tl.constexpr(8)
FAR = tl.constexpr(2**31 - 1)
# Keys that are looked at before a shift is chosen, and which sums of weights tell that it will do.
FEW = tl.constexpr(16)
SMALL = tl.constexpr(2.0**-60)
LARGE = tl.constexpr(2.0**60)


@triton.jit
def _mix(x):
    """The hash of `dilated_core._dropout`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _call_state(seed, batch):
    """The hash's state after the seed and the batch row."""
    state = _mix((seed & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(state ^ batch.to(tl.uint32))


@triton.jit
def _query_state(call_state, head, position):
    return _mix(_mix(call_state ^ head.to(tl.uint32)) ^ position.to(tl.uint32))


@triton.jit
def _key_state(position):
    return _mix(position.to(tl.uint32) ^ 0x9E3779B9)


@triton.jit
def _row_pointers(base, start, step, offsets, stride, dims, WIDE: tl.constexpr):
    """Pointers (rows, dims) to the rows start + step * offsets."""
    base += start.to(tl.int64) * stride
    if WIDE:
        rows = offsets.to(tl.int64) * (step.to(tl.int64) * stride)
    else:
        rows = offsets * (step * stride)
    # In this order there is one addition of 64 bits for each pointer.
    return base + (rows[:, None] + dims[None, :])


@triton.jit
def _load_run(run, AHEAD: tl.constexpr, PHASE: tl.constexpr, MASK: tl.constexpr):
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
def _next(
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
        then = _load_run(run, 1, PHASE, MASK)
        step = tl.where(ends, new[1], step)
        weight = tl.where(ends, new[3], weight)
        first = tl.where(ends, new[4], first)
        second = tl.where(ends, new[5], second)
        third = tl.where(ends, new[6], third)
        origin = tl.where(ends, new[7], origin)
    else:
        new = _load_run(run, 0, PHASE, MASK)
        _, step, _, weight, first, second, third, origin = new
    start = tl.where(ends, new[0], start + BLOCK * now[1])
    left = tl.where(ends, new[2], left - BLOCK)
    return run, (start, step, left, weight, first, second, third, origin), then


@triton.jit
def _load_columns(
    base, start, step, offsets, stride, dims, present,
    D: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load the rows start + step * offsets; those not present and padded dims are 0.

    `dims` are below END.
    """
    pointers = _row_pointers(base, start, step, offsets, stride, dims, WIDE)
    if MASKED:
        return tl.load(pointers, mask=present[:, None] & (dims < D)[None, :], other=0.0)
    if END <= D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _load_rows(base, rows, stride, dims, inside, D: tl.constexpr):
    pointers = base + rows[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=inside[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, stride, dims, inside, values, D: tl.constexpr):
    pointers = base + rows[:, None] * stride + dims[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(pointers, values, mask=inside[:, None] & (dims < D)[None, :])


@triton.jit
def _place(slots, early, HEADS: tl.constexpr, EARLY: tl.constexpr):
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
def _load_tile(
    tiles, full_runs, masked_runs, starts, head_class, head, slot, slots, batch,
    PACKED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Read a tile: its fields, the first row of its sequence, its runs, and where it is."""
    index = (tl.load(head_class + head) * slots + slot).to(tl.int64)
    tile = tiles + index * TILE_FIELDS
    sequence, origin = batch, tl.zeros((), tl.int64)
    if PACKED:
        sequence = tl.load(tile + 5)
        origin = tl.load(starts + sequence).to(tl.int64)
    full_runs += tl.load(tile + 6).to(tl.int64) * (BOUNDED_FIELDS if MASK == 2 else FULL_FIELDS)
    masked_runs += tl.load(tile + 7).to(tl.int64) * MASKED_FIELDS
    return (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
        sequence,
        origin,
        full_runs,
        masked_runs,
        tile,
    )


@triton.jit
def _reload_rows(tile, offsets):
    """The rows of a tile and which of them are real, read anew.

    For use after the loops: kept alive through them, they would cost registers.
    """
    rows = tl.load(tile, volatile=True) + tl.load(tile + 1, volatile=True) * offsets
    return rows, offsets < tl.load(tile + 2, volatile=True)


@triton.jit
def _load_words(
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
            low, high = _lowest(low, now[2]), _lowest(high, now[2] - 32)
    return low, high


@triton.jit
def _lowest(word, count):
    """The word with only its lowest bits, as many as `count`."""
    last = tl.minimum(tl.maximum(count, 1), 32) - 1
    return tl.where(count > 0, word & ((2 << last) - 1), 0)


@triton.jit
def _visible(run, words, rows, columns, lanes, present, CAUSAL: tl.constexpr,
             BY_KEY: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """(rows, columns) mask of one step of a masked run."""
    if MASK != 3 or BY_KEY:
        # A column that is not there is one that no row sees: after all rows, or before them.
        columns = tl.where(present, columns, FAR if CAUSAL and not BY_KEY else -1)
    if not CAUSAL:
        mask = (columns >= 0)[None, :]
    elif BY_KEY:
        mask = rows[:, None] <= columns[None, :]
    else:
        mask = rows[:, None] >= columns[None, :]
    if MASK == 2:
        segment, residue, step = tl.load(run + 5), tl.load(run + 6), tl.load(run + 7)
        into_segment = columns[None, :] - (rows // segment * segment)[:, None]
        mask = mask & (into_segment >= 0) & (into_segment < segment)
        mask = mask & ((rows - residue) % step == 0)[:, None]
    if MASK == 3:
        # One comparison each.
        word = words[0][:, None]
        if lanes.shape[0] == 64:
            word = tl.where((lanes < 32)[None, :], word, words[1][:, None])
        shown = (word & (1 << lanes % 32)[None, :]) != 0
        mask = mask & shown if CAUSAL or BY_KEY else shown
    return mask


@triton.jit
def _between(rows, first, end):
    """Which rows are from `first` on and before `end`, by one comparison each."""
    return (rows - first).to(tl.uint32, bitcast=True) < (end - first).to(tl.uint32, bitcast=True)


@triton.jit
def _pack(low, high):
    """Two float32 in one int64, so that they are loaded as one."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def _unpack(pair):
    low = (pair & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _add_dot(a, b, acc, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _walk(
    q, q_tail, key, value, padding, bits, full_runs, masked_runs, full_columns, masked_steps,
    rows, row_state, limit, high, stride_kn, stride_vn, scale, keep_scale,
    CAREFUL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    VALUE_D: tl.constexpr, VALUE_TAIL: tl.constexpr, MASK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, MASKED_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries over its runs: its shift, its sum of weights and its out.

    Weights are relative to the shift `high` (rows,), and so are their sum and out (rows, dims) in
    two blocks. With CAREFUL the shift follows the greatest score, else it stays as it is.
    """
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, VALUE_D)
    acc = tl.zeros([BLOCK_ROWS, VALUE_D], tl.float32)
    acc_tail = acc
    if TAIL:
        tail_dims = BLOCK_D + tl.arange(0, TAIL)
    if VALUE_TAIL:
        value_tail_dims = VALUE_D + tl.arange(0, VALUE_TAIL)
        acc_tail = tl.zeros([BLOCK_ROWS, VALUE_TAIL], tl.float32)
    # Eight sums for a row, each of columns that one thread holds: to add across threads takes long.
    sums = tl.zeros([BLOCK_ROWS, 8], tl.float32)
    for phase in tl.static_range(2 if MASK else 1):
        if phase == 0:
            run = full_runs
            steps = full_columns // FULL_COLUMNS
        else:
            run = masked_runs
            steps = masked_steps
        columns = tl.arange(0, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS)
        now = _load_run(run, 0, phase, MASK)
        then = _load_run(run, 1, phase, MASK)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            words = _load_words(bits, now, rows, columns, False, phase, MASK)
            positions = start + stride * columns
            # A run of step 0 is a zero key: it counts, but has no row.
            present = (columns < left) & (stride > 0)
            k = _load_columns(
                key, start, stride, columns, stride_kn, dims, present, D, BLOCK_D, phase == 1, WIDE
            )
            s = _dot(q, tl.trans(k), IEEE)
            if TAIL:
                k_tail = _load_columns(
                    key, start, stride, columns, stride_kn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                s = _add_dot(q_tail, tl.trans(k_tail), s, IEEE)
            if phase == 1:
                mask = _visible(
                    run, words, rows, positions, columns, columns < left, CAUSAL, False, MASK
                )
            elif MASK == 2:
                bounded = _between(rows, first_row, end_row)
            new_high = high
            shift = high
            # What costs least depends on how long a mask is kept.
            if PADDED or (phase == 1 and (CAREFUL or MASK == 2)):
                s = s * scale + weight
                if phase == 1:
                    s = tl.where(mask, s, float("-inf"))
                elif MASK == 2:
                    s = tl.where(bounded[:, None], s, float("-inf"))
                if PADDED:
                    ignored = tl.load(padding + positions, mask=present, other=0)
                    s = tl.where((ignored != 0)[None, :], float("-inf"), s)
                if CAREFUL:
                    new_high = tl.maximum(high, tl.max(s, 1))
                    shift = tl.where(new_high == float("-inf"), 0.0, new_high)
                p = tl.exp2(s - shift[:, None])
            else:
                if CAREFUL:
                    highest = tl.max(s, 1) * scale + weight
                    if MASK == 2:
                        highest = tl.where(bounded, highest, float("-inf"))
                    new_high = tl.maximum(high, highest)
                    shift = new_high
                from_row = new_high - weight
                if MASK == 2:
                    shift = tl.where(new_high == float("-inf"), 0.0, new_high)
                    from_row = tl.where(bounded, from_row, float("inf"))
                p = tl.exp2(s * scale - from_row[:, None])
                if phase == 1:
                    p = tl.where(mask, p, 0.0)
            if CAREFUL:
                alpha = tl.exp2(high - shift)
                sums = sums * alpha[:, None]
                acc = acc * alpha[:, None]
                if VALUE_TAIL:
                    acc_tail = acc_tail * alpha[:, None]
                high = new_high
            sums += tl.sum(tl.reshape(p, [BLOCK_ROWS, p.shape[1] // 8, 8]), 1)
            if DROPOUT:
                keep = _mix(row_state[:, None] ^ _key_state(positions)[None, :]) >= limit
                p = tl.where(keep, p * keep_scale, 0.0)
            v = _load_columns(
                value, start, stride, columns, stride_vn, value_dims, present, D, VALUE_D,
                phase == 1, WIDE,
            )  # fmt: skip
            acc = _add_dot(p.to(v.dtype), v, acc, IEEE)
            if VALUE_TAIL:
                v_tail = _load_columns(
                    value, start, stride, columns, stride_vn, value_tail_dims, present, D,
                    VALUE_D + VALUE_TAIL, phase == 1, WIDE,
                )  # fmt: skip
                acc_tail = _add_dot(p.to(v.dtype), v_tail, acc_tail, IEEE)
            run, now, then = _next(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, MASK,
                BLOCK_D + TAIL <= 64,
            )  # fmt: skip
    return high, tl.sum(sums, 1), acc, acc_tail


# These change from call to call and would compile a kernel again for little.
_CALL_SCALARS = ["slots", "early", "first_query", "first_key"]


@triton.jit(do_not_specialize=_CALL_SCALARS)
def forward_kernel(
    query, key, value, out, lse,
    tiles, full_runs, masked_runs, head_class, bits, starts, padding, seed,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh, stride_lb, stride_lh,
    stride_pb,
    scale, threshold, keep_scale, slots, early, first_query, first_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, MASK: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, MASKED_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr,
    NEGATIVE: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr, IEEE: tl.constexpr,
    OPTIMISTIC: tl.constexpr, VALUE_D: tl.constexpr, VALUE_TAIL: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile of queries of one head."""
    if ALIKE:
        stride_vn = stride_kn
    slot, batch, head = _place(slots, early, HEADS, EARLY)
    (
        first, step, count, full_columns, masked_steps, sequence, origin, full_runs, masked_runs,
        tile,
    ) = _load_tile(
        tiles, full_runs, masked_runs, starts, head_class, head, slot, slots, batch, PACKED,
        MASK,
    )  # fmt: skip
    if count == 0:
        return

    offsets = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    if TAIL:
        tail_dims = BLOCK_D + tl.arange(0, TAIL)
    rows = first + step * offsets
    inside = offsets < count
    local = origin + rows - first_query
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    query += batch * stride_qb + head * stride_qh
    q = _load_rows(query, local, stride_qn, dims, inside, D)
    if NEGATIVE:
        q = -q
    q_tail = q
    if TAIL:
        q_tail = _load_rows(query, local, stride_qn, tail_dims, inside, D)
        if NEGATIVE:
            q_tail = -q_tail
    origin_key = origin - first_key
    key += batch * stride_kb + head // GROUP * stride_kh + origin_key * stride_kn
    value += batch * stride_vb + head // GROUP * stride_vh + origin_key * stride_vn
    padding += batch * stride_pb + origin_key
    row_state, limit = rows, threshold
    if DROPOUT:
        row_state = _query_state(_call_state(tl.load(seed), sequence), head, rows)
        limit = threshold.to(tl.uint32)

    high = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    if OPTIMISTIC:
        # Any score of a row will do as its shift unless the others are far above or below it, so
        # the greatest is not followed: one of a few keys is taken, and where a sum of weights tells
        # that it will not do, all is done again with care.
        start, stride, left, weight, _, _, _, _ = _load_run(full_runs, 0, 0, 0)
        few = tl.arange(0, FEW)
        there = (few < left) & (full_columns > 0)
        k = _load_columns(key, start, stride, few, stride_kn, dims, there, D, BLOCK_D, True, WIDE)
        s = _dot(q, tl.trans(k), IEEE)
        if TAIL:
            k_tail = _load_columns(
                key, start, stride, few, stride_kn, tail_dims, there, D, BLOCK_D + TAIL, True, WIDE
            )
            s = _add_dot(q_tail, tl.trans(k_tail), s, IEEE)
        high = tl.max(s, 1) * scale + weight
        high, total, acc, acc_tail = _walk(
            q, q_tail, key, value, padding, bits, full_runs, masked_runs, full_columns,
            tl.where(full_columns > 0, masked_steps, 0), rows, row_state, limit, high, stride_kn,
            stride_vn, scale, keep_scale, False, D, BLOCK_D, TAIL, VALUE_D, VALUE_TAIL, MASK,
            BLOCK_ROWS, FULL_COLUMNS, MASKED_COLUMNS, CAUSAL, PADDED, DROPOUT, WIDE, IEEE,
        )  # fmt: skip
        fine = (total >= SMALL) & (total <= LARGE) | (offsets >= count)
        if (full_columns == 0) | (tl.min(fine.to(tl.int32), 0) == 0):
            high = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
            high, total, acc, acc_tail = _walk(
                q, q_tail, key, value, padding, bits, full_runs, masked_runs, full_columns,
                masked_steps, rows, row_state, limit, high, stride_kn, stride_vn, scale, keep_scale,
                True, D, BLOCK_D, TAIL, VALUE_D, VALUE_TAIL, MASK, BLOCK_ROWS, FULL_COLUMNS,
                MASKED_COLUMNS, CAUSAL, PADDED, DROPOUT, WIDE, IEEE,
            )  # fmt: skip
    else:
        high, total, acc, acc_tail = _walk(
            q, q_tail, key, value, padding, bits, full_runs, masked_runs, full_columns,
            masked_steps, rows, row_state, limit, high, stride_kn, stride_vn, scale, keep_scale,
            True, D, BLOCK_D, TAIL, VALUE_D, VALUE_TAIL, MASK, BLOCK_ROWS, FULL_COLUMNS,
            MASKED_COLUMNS, CAUSAL, PADDED, DROPOUT, WIDE, IEEE,
        )  # fmt: skip

    none = total == 0.0
    divisor = tl.where(none, 1.0, total)[:, None]
    rows, inside = _reload_rows(tile, offsets)
    local = origin + rows - first_query
    out += batch * stride_ob + head * stride_oh
    value_dims = tl.arange(0, VALUE_D)
    _store_rows(out, local, stride_on, value_dims, inside, acc / divisor, D)
    if VALUE_TAIL:
        value_dims = VALUE_D + tl.arange(0, VALUE_TAIL)
        _store_rows(out, local, stride_on, value_dims, inside, acc_tail / divisor, D)
    result = tl.where(none, float("-inf"), (high + tl.log2(total)) * LN_2)
    tl.store(lse + batch * stride_lb + head * stride_lh + local, result, mask=inside)


@triton.jit(do_not_specialize=_CALL_SCALARS)
def query_gradient_kernel(
    query, key, value, out, lse, grad_out, grad_lse, grad_query, terms,
    tiles, full_runs, masked_runs, head_class, bits, starts, padding, seed,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh,
    stride_gb, stride_gn, stride_gh, stride_lb, stride_lh, stride_tb, stride_tn, stride_th,
    stride_pb,
    scale, final_scale, threshold, keep_scale, slots, early, first_query, first_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, MASK: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, MASKED_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr,
    NEGATIVE: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr, IEEE: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """grad_query of one tile of queries of one head, and the terms that keys need of a query.

    The terms are two float32 in an int64: lse in units of log2, and grad_out . out - grad_lse.
    grad_query has the strides of out, terms those of lse.
    """
    if ALIKE:
        stride_vn = stride_kn
    slot, batch, head = _place(slots, early, HEADS, EARLY)
    (
        first, step, count, full_columns, masked_steps, sequence, origin, full_runs, masked_runs,
        tile,
    ) = _load_tile(
        tiles, full_runs, masked_runs, starts, head_class, head, slot, slots, batch, PACKED,
        MASK,
    )  # fmt: skip
    if count == 0:
        return

    offsets = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    if TAIL:
        tail_dims = BLOCK_D + tl.arange(0, TAIL)
    rows = first + step * offsets
    inside = offsets < count
    local = origin + rows - first_query
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    at_out = batch * stride_ob + head * stride_oh
    at_lse = batch * stride_lb + head * stride_lh
    grad_out += batch * stride_gb + head * stride_gh
    do = _load_rows(grad_out, local, stride_gn, dims, inside, D)
    o = _load_rows(out + at_out, local, stride_on, dims, inside, D)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if TAIL:
        do_tail = _load_rows(grad_out, local, stride_gn, tail_dims, inside, D)
        o_tail = _load_rows(out + at_out, local, stride_on, tail_dims, inside, D)
        row_delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    if GRAD_LSE:
        grad_lse += batch * stride_tb + head * stride_th
        row_delta -= tl.load(grad_lse + local * stride_tn, mask=inside, other=0.0)
    row_lse = tl.load(lse + at_lse + local, mask=inside, other=float("inf"))
    # exp2(score - inf) = 0: a row that sees nothing gives and gets no gradient.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(terms + at_lse + local, _pack(row_lse, row_delta), mask=inside)
    query += batch * stride_qb + head * stride_qh
    q = _load_rows(query, local, stride_qn, dims, inside, D)
    if NEGATIVE:
        q = -q
    if TAIL:
        q_tail = _load_rows(query, local, stride_qn, tail_dims, inside, D)
        if NEGATIVE:
            q_tail = -q_tail
    origin_key = origin - first_key
    key += batch * stride_kb + head // GROUP * stride_kh + origin_key * stride_kn
    value += batch * stride_vb + head // GROUP * stride_vh + origin_key * stride_vn
    padding += batch * stride_pb + origin_key
    if DROPOUT:
        row_state = _query_state(_call_state(tl.load(seed), sequence), head, rows)
        limit = threshold.to(tl.uint32)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    if TAIL:
        acc_tail = tl.zeros([BLOCK_ROWS, TAIL], tl.float32)
    for phase in tl.static_range(2 if MASK else 1):
        if phase == 0:
            run = full_runs
            steps = full_columns // FULL_COLUMNS
        else:
            run = masked_runs
            steps = masked_steps
        columns = tl.arange(0, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS)
        now = _load_run(run, 0, phase, MASK)
        then = _load_run(run, 1, phase, MASK)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            words = _load_words(bits, now, rows, columns, False, phase, MASK)
            positions = start + stride * columns
            present = (columns < left) & (stride > 0)
            k = _load_columns(
                key, start, stride, columns, stride_kn, dims, present, D, BLOCK_D, phase == 1, WIDE
            )
            v = _load_columns(
                value, start, stride, columns, stride_vn, dims, present, D, BLOCK_D, phase == 1,
                WIDE,
            )  # fmt: skip
            s = _dot(q, tl.trans(k), IEEE)
            dp = _dot(do, tl.trans(v), IEEE)
            if TAIL:
                k_tail = _load_columns(
                    key, start, stride, columns, stride_kn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                v_tail = _load_columns(
                    value, start, stride, columns, stride_vn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                s = _add_dot(q_tail, tl.trans(k_tail), s, IEEE)
                dp = _add_dot(do_tail, tl.trans(v_tail), dp, IEEE)
            from_row = row_lse - weight
            if phase == 0 and MASK == 2:
                from_row = tl.where(_between(rows, first_row, end_row), from_row, float("inf"))
            p = tl.exp2(s * scale - from_row[:, None])
            if phase == 1:
                mask = _visible(run, words, rows, positions, columns, present, CAUSAL, False, MASK)
                p = tl.where(mask, p, 0.0)
            if PADDED:
                ignored = tl.load(padding + positions, mask=present, other=0)
                p = tl.where((ignored != 0)[None, :], 0.0, p)
            if DROPOUT:
                keep = _mix(row_state[:, None] ^ _key_state(positions)[None, :]) >= limit
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - row_delta[:, None])
            acc = _add_dot(ds.to(k.dtype), k, acc, IEEE)
            if TAIL:
                acc_tail = _add_dot(ds.to(k.dtype), k_tail, acc_tail, IEEE)
            run, now, then = _next(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, MASK, True
            )
    rows, inside = _reload_rows(tile, offsets)
    local = origin + rows - first_query
    grad_query += at_out
    _store_rows(grad_query, local, stride_on, dims, inside, acc * final_scale, D)
    if TAIL:
        _store_rows(grad_query, local, stride_on, tail_dims, inside, acc_tail * final_scale, D)


@triton.jit(do_not_specialize=_CALL_SCALARS)
def key_gradient_kernel(
    query, key, value, grad_out, grad_key, grad_value, terms,
    tiles, full_runs, masked_runs, head_class, bits, starts, padding, seed,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_cb, stride_cn, stride_ch,
    stride_gb, stride_gn, stride_gh, stride_lb, stride_lh, stride_pb,
    scale, final_scale, threshold, keep_scale, slots, early, first_query, first_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, MASK: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, MASKED_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr,
    NEGATIVE: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of one tile of keys of one of HEADS key heads.

    Its runs are those of the GROUP query heads that read it. Scores are transposed: (keys,
    queries).
    """
    if ALIKE:
        stride_gn = stride_qn
    slot, batch, head = _place(slots, early, HEADS, EARLY)
    (
        first, step, count, full_columns, masked_steps, sequence, origin, full_runs, masked_runs,
        tile,
    ) = _load_tile(
        tiles, full_runs, masked_runs, starts, head_class, head, slot, slots, batch, PACKED,
        MASK,
    )  # fmt: skip
    if count == 0:
        return

    offsets = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    if TAIL:
        tail_dims = BLOCK_D + tl.arange(0, TAIL)
    rows = first + step * offsets
    inside = offsets < count
    local = origin + rows - first_key
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    k = _load_rows(key, local, stride_kn, dims, inside, D)
    if NEGATIVE:
        k = -k
    v = _load_rows(value, local, stride_vn, dims, inside, D)
    if TAIL:
        k_tail = _load_rows(key, local, stride_kn, tail_dims, inside, D)
        if NEGATIVE:
            k_tail = -k_tail
        v_tail = _load_rows(value, local, stride_vn, tail_dims, inside, D)
    if PADDED:
        ignored = tl.load(padding + batch * stride_pb + local, mask=inside, other=1) != 0
    if DROPOUT:
        call_state = _call_state(tl.load(seed), sequence)
        row_state = _key_state(rows)
        limit = threshold.to(tl.uint32)
    origin_query = origin - first_query
    query += batch * stride_qb + head * GROUP * stride_qh + origin_query * stride_qn
    grad_out += batch * stride_gb + head * GROUP * stride_gh + origin_query * stride_gn
    terms += batch * stride_lb + head * GROUP * stride_lh + origin_query

    dk = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    if TAIL:
        dk_tail = tl.zeros([BLOCK_ROWS, TAIL], tl.float32)
        dv_tail = tl.zeros([BLOCK_ROWS, TAIL], tl.float32)
    CARRIED: tl.constexpr = 1 if MASK == 3 else MASK
    for phase in tl.static_range(2 if MASK else 1):
        if phase == 0:
            run = full_runs
            steps = full_columns // FULL_COLUMNS
        else:
            run = masked_runs
            steps = masked_steps
        columns = tl.arange(0, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS)
        now = _load_run(run, 0, phase, CARRIED)
        then = _load_run(run, 1, phase, CARRIED)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            member = tl.zeros((), tl.int64)
            if GROUP > 1:
                member = tl.load(run + 4).to(tl.int64)
            positions = start + stride * columns
            present = columns < left
            q = _load_columns(
                query + member * stride_qh, start, stride, columns, stride_qn, dims, present,
                D, BLOCK_D, phase == 1, WIDE,
            )  # fmt: skip
            do = _load_columns(
                grad_out + member * stride_gh, start, stride, columns, stride_gn, dims, present,
                D, BLOCK_D, phase == 1, WIDE,
            )  # fmt: skip
            at = terms + member * stride_lh + positions
            if phase == 1:
                column_lse, column_delta = _unpack(tl.load(at, mask=present, other=0))
            else:
                column_lse, column_delta = _unpack(tl.load(at))
            s = _dot(k, tl.trans(q), IEEE)
            if TAIL:
                q_tail = _load_columns(
                    query + member * stride_qh, start, stride, columns, stride_qn, tail_dims,
                    present, D, BLOCK_D + TAIL, phase == 1, WIDE,
                )  # fmt: skip
                do_tail = _load_columns(
                    grad_out + member * stride_gh, start, stride, columns, stride_gn, tail_dims,
                    present, D, BLOCK_D + TAIL, phase == 1, WIDE,
                )  # fmt: skip
                s = _add_dot(k_tail, tl.trans(q_tail), s, IEEE)
            p = tl.exp2(s * scale - (column_lse - weight)[None, :])
            if phase == 0 and MASK == 2:
                p = tl.where(_between(rows, first_row, end_row)[:, None], p, 0.0)
            if phase == 1:
                # Read anew where it is: carried along, it would cost registers.
                at_bits = _load_run(run, 0, phase, MASK)
                here = start, stride, left, weight, at_bits[4], at_bits[5], at_bits[6], at_bits[7]
                words = _load_words(bits, here, rows, columns, True, phase, MASK)
                mask = _visible(run, words, rows, positions, columns, present, CAUSAL, True, MASK)
                p = tl.where(mask, p, 0.0)
            if PADDED:
                p = tl.where(ignored[:, None], 0.0, p)
            dp = _dot(v, tl.trans(do), IEEE)
            if TAIL:
                dp = _add_dot(v_tail, tl.trans(do_tail), dp, IEEE)
            shown = p
            if DROPOUT:
                state = _query_state(call_state, head * GROUP + member, positions)
                keep = _mix(row_state[:, None] ^ state[None, :]) >= limit
                dp = tl.where(keep, dp * keep_scale, 0.0)
                shown = tl.where(keep, p * keep_scale, 0.0)
            dv = _add_dot(shown.to(do.dtype), do, dv, IEEE)
            if TAIL:
                dv_tail = _add_dot(shown.to(do.dtype), do_tail, dv_tail, IEEE)
            ds = p * (dp - column_delta[None, :])
            dk = _add_dot(ds.to(q.dtype), q, dk, IEEE)
            if TAIL:
                dk_tail = _add_dot(ds.to(q.dtype), q_tail, dk_tail, IEEE)
            run, now, then = _next(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, CARRIED, True
            )

    rows, inside = _reload_rows(tile, offsets)
    local = origin + rows - first_key
    grad_key += batch * stride_cb + head * stride_ch
    grad_value += batch * stride_cb + head * stride_ch
    _store_rows(grad_key, local, stride_cn, dims, inside, dk * final_scale, D)
    _store_rows(grad_value, local, stride_cn, dims, inside, dv, D)
    if TAIL:
        _store_rows(grad_key, local, stride_cn, tail_dims, inside, dk_tail * final_scale, D)
        _store_rows(grad_value, local, stride_cn, tail_dims, inside, dv_tail, D)
