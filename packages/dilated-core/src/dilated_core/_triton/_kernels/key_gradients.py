"""The gradients to keys and values."""

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
    load_run,
    load_tile,
    load_words,
    next_columns,
    reload_rows,
    visible,
)


@triton.jit(do_not_specialize=CALL_SCALARS)
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
    local = origin + rows - first_key
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    k = load_rows(key, local, stride_kn, dims, inside, D)  # (ROWS, BLOCK_D)
    if NEGATIVE:
        k = -k
    v = load_rows(value, local, stride_vn, dims, inside, D)  # (ROWS, BLOCK_D)
    if TAIL:
        k_tail = load_rows(key, local, stride_kn, tail_dims, inside, D)  # (ROWS, TAIL)
        if NEGATIVE:
            k_tail = -k_tail
        v_tail = load_rows(value, local, stride_vn, tail_dims, inside, D)  # (ROWS, TAIL)
    if DROPOUT:
        call_state = state_of_call(tl.load(seed), sequence)
        row_state = state_of_key(rows)
        limit = threshold.to(tl.uint32)
    origin_query = origin - first_query
    query += batch * stride_qb + head * GROUP * stride_qh + origin_query * stride_qn
    grad_out += batch * stride_gb + head * GROUP * stride_gh + origin_query * stride_gn
    terms += batch * stride_lb + head * GROUP * stride_lh + origin_query
    terms = terms.to(tl.pointer_type(tl.float32))

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
        now = load_run(run, 0, phase, CARRIED)
        then = load_run(run, 1, phase, CARRIED)
        for _ in range(steps):
            start, stride, left, weight, first_row, end_row, _, _ = now
            member = tl.zeros((), tl.int64)
            if GROUP > 1:
                member = tl.load(run + 4).to(tl.int64)
            positions = start + stride * columns
            present = columns < left
            q = load_columns(  # (COLUMNS, BLOCK_D)
                query + member * stride_qh, start, stride, columns, stride_qn, dims, present,
                D, BLOCK_D, phase == 1, WIDE,
            )  # fmt: skip
            do = load_columns(  # (COLUMNS, BLOCK_D)
                grad_out + member * stride_gh, start, stride, columns, stride_gn, dims, present,
                D, BLOCK_D, phase == 1, WIDE,
            )  # fmt: skip
            # Both numbers of a column are elements of their own, as many as threads: of fewer,
            # triton has each thread read all columns that it needs, with an address for each.
            at = terms + member * stride_lh * 2
            at += (2 * positions)[None, :] + tl.arange(0, 2)[:, None]
            pairs = tl.load(at, mask=present[None, :], other=0.0) if phase == 1 else tl.load(at)
            column_lse, column_delta = tl.split(tl.trans(pairs))
            s = product(k, tl.trans(q), IEEE)  # (ROWS, COLUMNS)
            if TAIL:
                q_tail = load_columns(  # (COLUMNS, TAIL)
                    query + member * stride_qh, start, stride, columns, stride_qn, tail_dims,
                    present, D, BLOCK_D + TAIL, phase == 1, WIDE,
                )  # fmt: skip
                do_tail = load_columns(  # (COLUMNS, TAIL)
                    grad_out + member * stride_gh, start, stride, columns, stride_gn, tail_dims,
                    present, D, BLOCK_D + TAIL, phase == 1, WIDE,
                )  # fmt: skip
                s = add_product(k_tail, tl.trans(q_tail), s, IEEE)
            p = tl.exp2(s * scale - (column_lse - weight)[None, :])
            if phase == 0 and MASK == 2:  # noqa: SIM102 # decided when it is compiled
                # Most steps show all rows of a tile; a choice for each score takes long.
                if (first_row > first) | (end_row < first + step * count):
                    p = tl.where(between(rows, first_row, end_row)[:, None], p, 0.0)
            if phase == 1:
                # Read anew where it is: carried along, it would cost registers.
                at_bits = load_run(run, 0, phase, MASK)
                here = start, stride, left, weight, at_bits[4], at_bits[5], at_bits[6], at_bits[7]
                words = load_words(bits, here, rows, columns, True, phase, MASK)
                mask = visible(run, words, rows, now, columns, CAUSAL, True, MASK)
                p = tl.where(mask, p, 0.0)
            dp = product(v, tl.trans(do), IEEE)  # (ROWS, COLUMNS)
            if TAIL:
                dp = add_product(v_tail, tl.trans(do_tail), dp, IEEE)
            shown = p
            if DROPOUT:
                state = state_of_query(call_state, head * GROUP + member, positions)
                keep = mix(row_state[:, None] ^ state[None, :]) >= limit
                dp = tl.where(keep, dp * keep_scale, 0.0)
                shown = tl.where(keep, p * keep_scale, 0.0)
            dv = add_product(shown.to(do.dtype), do, dv, IEEE)
            if TAIL:
                dv_tail = add_product(shown.to(do.dtype), do_tail, dv_tail, IEEE)
            ds = p * (dp - column_delta[None, :])
            dk = add_product(ds.to(q.dtype), q, dk, IEEE)
            if TAIL:
                dk_tail = add_product(ds.to(q.dtype), q_tail, dk_tail, IEEE)
            # To read a run ahead takes registers, which wide rows have not.
            run, now, then = next_columns(
                run, now, then, FULL_COLUMNS if phase == 0 else MASKED_COLUMNS, phase, CARRIED,
                BLOCK_D + TAIL <= 64,
            )  # fmt: skip

    rows, inside = reload_rows(tile, offsets)
    local = origin + rows - first_key
    if PADDED:
        # Whatever they have by now, nothing is due to ignored keys.
        ignored = tl.load(padding + batch * stride_pb + local, mask=inside, other=1) != 0
        dk = tl.where(ignored[:, None], 0.0, dk)
        dv = tl.where(ignored[:, None], 0.0, dv)
        if TAIL:
            dk_tail = tl.where(ignored[:, None], 0.0, dk_tail)
            dv_tail = tl.where(ignored[:, None], 0.0, dv_tail)
    grad_key += batch * stride_cb + head * stride_ch
    grad_value += batch * stride_cb + head * stride_ch
    store_rows(grad_key, local, stride_cn, dims, inside, dk * final_scale, D)
    store_rows(grad_value, local, stride_cn, dims, inside, dv, D)
    if TAIL:
        store_rows(grad_key, local, stride_cn, tail_dims, inside, dk_tail * final_scale, D)
        store_rows(grad_value, local, stride_cn, tail_dims, inside, dv_tail, D)
