"""The gradient to queries."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

from dilated_core._triton._kernels.dropout import mix, state_of_call, state_of_key, state_of_query
from dilated_core._triton._kernels.rows import (
    add_product,
    load_columns,
    load_rows,
    pack,
    product,
    store_rows,
)
from dilated_core._triton._kernels.tiles import (
    CALL_SCALARS,
    between,
    load_run,
    load_tile,
    load_words,
    next_columns,
    reload_rows,
    visible,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=CALL_SCALARS)
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
    at_out = batch * stride_ob + head * stride_oh
    at_lse = batch * stride_lb + head * stride_lh
    grad_out += batch * stride_gb + head * stride_gh
    do = load_rows(grad_out, local, stride_gn, dims, inside, D)  # (ROWS, BLOCK_D)
    o = load_rows(out + at_out, local, stride_on, dims, inside, D)  # (ROWS, BLOCK_D)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if TAIL:
        do_tail = load_rows(grad_out, local, stride_gn, tail_dims, inside, D)  # (ROWS, TAIL)
        o_tail = load_rows(out + at_out, local, stride_on, tail_dims, inside, D)  # (ROWS, TAIL)
        row_delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    if GRAD_LSE:
        grad_lse += batch * stride_tb + head * stride_th
        row_delta -= tl.load(grad_lse + local * stride_tn, mask=inside, other=0.0)
    row_lse = tl.load(lse + at_lse + local, mask=inside, other=float("inf"))
    # exp2(score - inf) = 0: a row that sees nothing gives and gets no gradient.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(terms + at_lse + local, pack(row_lse, row_delta), mask=inside)
    query += batch * stride_qb + head * stride_qh
    q = load_rows(query, local, stride_qn, dims, inside, D)  # (ROWS, BLOCK_D)
    if NEGATIVE:
        q = -q
    if TAIL:
        q_tail = load_rows(query, local, stride_qn, tail_dims, inside, D)  # (ROWS, TAIL)
        if NEGATIVE:
            q_tail = -q_tail
    origin_key = origin - first_key
    key += batch * stride_kb + head // GROUP * stride_kh + origin_key * stride_kn
    value += batch * stride_vb + head // GROUP * stride_vh + origin_key * stride_vn
    padding += batch * stride_pb + origin_key
    if DROPOUT:
        row_state = state_of_query(state_of_call(tl.load(seed), sequence), head, rows)
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
        now = load_run(run, 0, phase, MASK)
        then = load_run(run, 1, phase, MASK)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            words = load_words(bits, now, rows, columns, False, phase, MASK)
            positions = start + stride * columns
            present = (columns < left) & (stride > 0)
            k = load_columns(  # (COLUMNS, BLOCK_D)
                key, start, stride, columns, stride_kn, dims, present, D, BLOCK_D, phase == 1, WIDE
            )
            v = load_columns(  # (COLUMNS, BLOCK_D)
                value, start, stride, columns, stride_vn, dims, present, D, BLOCK_D, phase == 1,
                WIDE,
            )  # fmt: skip
            s = product(q, tl.trans(k), IEEE)  # (ROWS, COLUMNS)
            dp = product(do, tl.trans(v), IEEE)  # (ROWS, COLUMNS)
            if TAIL:
                k_tail = load_columns(  # (COLUMNS, TAIL)
                    key, start, stride, columns, stride_kn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                v_tail = load_columns(  # (COLUMNS, TAIL)
                    value, start, stride, columns, stride_vn, tail_dims, present, D, BLOCK_D + TAIL,
                    phase == 1, WIDE,
                )  # fmt: skip
                s = add_product(q_tail, tl.trans(k_tail), s, IEEE)
                dp = add_product(do_tail, tl.trans(v_tail), dp, IEEE)
            from_row = row_lse - weight
            if phase == 0 and MASK == 2:
                from_row = tl.where(between(rows, first_row, end_row), from_row, float("inf"))
            p = tl.exp2(s * scale - from_row[:, None])  # (ROWS, COLUMNS)
            if phase == 1:
                mask = visible(run, words, rows, now, columns, CAUSAL, False, MASK)
                p = tl.where(mask, p, 0.0)
            if PADDED:
                ignored = tl.load(padding + positions, mask=present, other=0)
                p = tl.where((ignored != 0)[None, :], 0.0, p)
            if DROPOUT:
                keep = mix(row_state[:, None] ^ state_of_key(positions)[None, :]) >= limit
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - row_delta[:, None])
            acc = add_product(ds.to(k.dtype), k, acc, IEEE)
            if TAIL:
                acc_tail = add_product(ds.to(k.dtype), k_tail, acc_tail, IEEE)
            run, now, then = next_columns(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, MASK, True
            )
    rows, inside = reload_rows(tile, offsets)
    local = origin + rows - first_query
    grad_query += at_out
    store_rows(grad_query, local, stride_on, dims, inside, acc * final_scale, D)
    if TAIL:
        store_rows(grad_query, local, stride_on, tail_dims, inside, acc_tail * final_scale, D)
