"""The forward: out and lse of a tile of queries."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

from dilated_core._triton._kernels.dropout import mix, state_of_call, state_of_key, state_of_query
from dilated_core._triton._kernels.rows import (
    add_product,
    load_columns,
    load_rows,
    product,
    store_rows,
)
from dilated_core._triton._kernels.tiles import (
    CALL_SCALARS,
    between,
    load_ignored,
    load_run,
    load_tile,
    load_words,
    next_columns,
    reload_rows,
    visible,
)

# Keys that are looked at before a shift is chosen, and which sums of weights tell that it will do.
FEW = tl.constexpr(16)
SMALL = tl.constexpr(2.0**-60)
LARGE = tl.constexpr(2.0**60)
# In float16 they are of its range: a column's mean weight, below which rounded weights would tell.
SMALL_MEAN = tl.constexpr(2.0**-13)
LN_2 = tl.constexpr(0.6931471805599453)


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
        now = load_run(run, 0, phase, MASK)
        then = load_run(run, 1, phase, MASK)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            words = load_words(bits, now, rows, columns, False, phase, MASK)
            positions = start + stride * columns
            # A run of step 0 is a zero key: it counts, but has no row.
            present = (columns < left) & (stride > 0)
            k = load_columns(  # (COLUMNS, BLOCK_D)
                key, start, stride, columns, stride_kn, dims, present, D, BLOCK_D, phase == 1, WIDE
            )
            s = product(q, tl.trans(k), IEEE)  # (ROWS, COLUMNS)
            if TAIL:
                k_tail = load_columns(  # (COLUMNS, TAIL)
                    key, start, stride, columns, stride_kn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                s = add_product(q_tail, tl.trans(k_tail), s, IEEE)
            if phase == 1:
                mask = visible(run, words, rows, now, columns, CAUSAL, False, MASK)
            elif MASK == 2:
                bounded = between(rows, first_row, end_row)
            new_high = high
            shift = high
            # What costs least depends on how long a mask is kept. With care a row's greatest weight
            # is 1: by one rounding more or less it is not, and is rounded where scores are large.
            if PADDED or CAREFUL or (phase == 1 and MASK == 2):
                if PADDED:
                    ignored = load_ignored(padding, positions, present)
                    s = s * scale + tl.where(ignored != 0, float("-inf"), weight)[None, :]
                else:
                    s = s * scale + weight
                if phase == 1:
                    s = tl.where(mask, s, float("-inf"))
                elif MASK == 2:
                    s = tl.where(bounded[:, None], s, float("-inf"))
                if CAREFUL:
                    new_high = tl.maximum(high, tl.max(s, 1))
                    shift = tl.where(new_high == float("-inf"), 0.0, new_high)
                p = tl.exp2(s - shift[:, None])  # (ROWS, COLUMNS)
            else:
                from_row = high - weight
                if MASK == 2:
                    from_row = tl.where(bounded, from_row, float("inf"))
                p = tl.exp2(s * scale - from_row[:, None])  # (ROWS, COLUMNS)
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
                keep = mix(row_state[:, None] ^ state_of_key(positions)[None, :]) >= limit
                p = tl.where(keep, p * keep_scale, 0.0)
            v = load_columns(  # (COLUMNS, VALUE_D)
                value, start, stride, columns, stride_vn, value_dims, present, D, VALUE_D,
                phase == 1, WIDE,
            )  # fmt: skip
            acc = add_product(p.to(v.dtype), v, acc, IEEE)
            if VALUE_TAIL:
                v_tail = load_columns(  # (COLUMNS, VALUE_TAIL)
                    value, start, stride, columns, stride_vn, value_tail_dims, present, D,
                    VALUE_D + VALUE_TAIL, phase == 1, WIDE,
                )  # fmt: skip
                acc_tail = add_product(p.to(v.dtype), v_tail, acc_tail, IEEE)
            run, now, then = next_columns(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, MASK,
                BLOCK_D + TAIL <= 64,
            )  # fmt: skip
    return high, tl.sum(sums, 1), acc, acc_tail


@triton.jit(do_not_specialize=CALL_SCALARS)
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
    VALUE_D: tl.constexpr, VALUE_TAIL: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile of queries of one head."""
    if ALIKE:
        stride_vn = stride_kn
    (
        batch, head, first, step, count, full_columns, masked_steps, sequence, origin, full_runs,
        masked_runs, tile,
    ) = load_tile(
        tiles, full_runs, masked_runs, starts, head_class, slots, early, HEADS, EARLY, PACKED, MASK,
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
    q = load_rows(query, local, stride_qn, dims, inside, D)  # (ROWS, BLOCK_D)
    if NEGATIVE:
        q = -q
    q_tail = q
    if TAIL:
        q_tail = load_rows(query, local, stride_qn, tail_dims, inside, D)  # (ROWS, TAIL)
        if NEGATIVE:
            q_tail = -q_tail
    origin_key = origin - first_key
    key += batch * stride_kb + head // GROUP * stride_kh + origin_key * stride_kn
    value += batch * stride_vb + head // GROUP * stride_vh + origin_key * stride_vn
    padding += batch * stride_pb + origin_key
    row_state, limit = rows, threshold
    if DROPOUT:
        row_state = state_of_query(state_of_call(tl.load(seed), sequence), head, rows)
        limit = threshold.to(tl.uint32)

    # Any score of a row will do as its shift unless the others are far above or below it, so
    # the greatest is not followed: one of a few keys is taken, and where a sum of weights tells
    # that it will not do, all is done again with care.
    start, stride, left, weight, _, _, _, _ = load_run(full_runs, 0, 0, 0)
    few = tl.arange(0, FEW)
    there = (few < left) & (full_columns > 0)
    k = load_columns(key, start, stride, few, stride_kn, dims, there, D, BLOCK_D, True, WIDE)
    s = product(q, tl.trans(k), IEEE)  # (ROWS, COLUMNS)
    if TAIL:
        k_tail = load_columns(  # (COLUMNS, TAIL)
            key, start, stride, few, stride_kn, tail_dims, there, D, BLOCK_D + TAIL, True, WIDE
        )
        s = add_product(q_tail, tl.trans(k_tail), s, IEEE)
    hopeless = full_columns == 0
    if PADDED:
        heard = there & (tl.load(padding + start + stride * few, mask=there, other=1) == 0)
        s = tl.where(heard[None, :], s, float("-inf"))
        hopeless = tl.max(heard.to(tl.int32), 0) == 0
    high = tl.max(s, 1) * scale + weight
    high, total, acc, acc_tail = _walk(
        q, q_tail, key, value, padding, bits, full_runs, masked_runs,
        tl.where(hopeless, 0, full_columns), tl.where(hopeless, 0, masked_steps), rows, row_state,
        limit, high, stride_kn, stride_vn, scale, keep_scale, False, D, BLOCK_D, TAIL, VALUE_D,
        VALUE_TAIL, MASK, BLOCK_ROWS, FULL_COLUMNS, MASKED_COLUMNS, CAUSAL, PADDED, DROPOUT, WIDE,
        IEEE,
    )  # fmt: skip
    if query.dtype.element_ty == tl.float16:
        # A weight that is too large for it is infinite, and so are its products, or no numbers.
        columns = full_columns + masked_steps * MASKED_COLUMNS
        finite = tl.min((tl.abs(acc) < float("inf")).to(tl.int32), 1) == 1
        fine = (total >= columns * SMALL_MEAN) & finite
    else:
        fine = (total >= SMALL) & (total <= LARGE)
    if hopeless | (tl.min((fine | (offsets >= count)).to(tl.int32), 0) == 0):
        high = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        high, total, acc, acc_tail = _walk(
            q, q_tail, key, value, padding, bits, full_runs, masked_runs, full_columns,
            masked_steps, rows, row_state, limit, high, stride_kn, stride_vn, scale, keep_scale,
            True, D, BLOCK_D, TAIL, VALUE_D, VALUE_TAIL, MASK, BLOCK_ROWS, FULL_COLUMNS,
            MASKED_COLUMNS, CAUSAL, PADDED, DROPOUT, WIDE, IEEE,
        )  # fmt: skip

    none = total == 0.0
    divisor = tl.where(none, 1.0, total)[:, None]
    rows, inside = reload_rows(tile, offsets)
    local = origin + rows - first_query
    out += batch * stride_ob + head * stride_oh
    value_dims = tl.arange(0, VALUE_D)
    store_rows(out, local, stride_on, value_dims, inside, acc / divisor, D)
    if VALUE_TAIL:
        value_dims = VALUE_D + tl.arange(0, VALUE_TAIL)
        store_rows(out, local, stride_on, value_dims, inside, acc_tail / divisor, D)
    result = tl.where(none, float("-inf"), (high + tl.log2(total)) * LN_2)
    tl.store(lse + batch * stride_lb + head * stride_lh + local, result, mask=inside)
