"""One new row of each sequence: kept in its slots, and attended to the slots of all branches.

A program serves one head of one sequence and a share of the slots; a second kernel merges the
shares. Where a sequence is, and whether its new row is real, is read from the device.
"""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    query, key, value, padding, held_key, held_value, held_padding, lengths, real, parts, shifts,
    head_rows, head_offsets, sizes,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_hb, stride_pb, scale,
    branches, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PADDED: tl.constexpr, PADDING: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the share's output to parts (shares, B, H, D) and its log2 of weights to shifts."""
    share, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shares = tl.num_programs(0)
    position = tl.load(lengths + batch)
    there = position >= 0
    if RAGGED:
        there = tl.load(real + batch) > 0
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    lanes = tl.arange(0, BLOCK_ROWS)
    kv_head = head // GROUP
    q = tl.load(query + batch * stride_qb + head * stride_qh + dims, mask=inside, other=0.0)
    q = q.to(tl.float32) * scale
    own_key = tl.load(key + batch * stride_kb + kv_head * stride_kh + dims, mask=inside, other=0.0)
    own_value = tl.load(
        value + batch * stride_vb + kv_head * stride_vh + dims, mask=inside, other=0.0
    )
    held_key += batch * stride_hb
    held_value += batch * stride_hb
    held_padding += batch * stride_pb
    ignored = position < 0
    if PADDING:
        ignored = tl.load(padding + batch) != 0

    # Each lane has a softmax of its own until all slots are seen.
    high = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    count = 0
    for branch in range(branches):
        segment, rate = tl.load(sizes + 2 * branch), tl.load(sizes + 2 * branch + 1)
        first = tl.load(head_rows + branch * HEADS + head)
        offset = tl.load(head_offsets + branch * HEADS + head)
        place = (position % segment).to(tl.int32)
        kept = there & (first >= 0) & (place % rate == offset)
        slots = tl.where(kept, place // rate, 0)
        count += kept.to(tl.int32)
        # No program of this launch reads the slot of this position.
        row = (first + place // rate).to(tl.int64)
        mine = inside & kept & (share == 0)
        tl.store(held_key + row * D + dims, own_key, mask=mine)
        tl.store(held_value + row * D + dims, own_value, mask=mine)
        if PADDED:
            tl.store(held_padding + row, ignored.to(tl.uint8), mask=kept & (share == 0))
        each = tl.cdiv(tl.cdiv(slots, shares), BLOCK_ROWS) * BLOCK_ROWS
        end = tl.minimum((share + 1) * each, slots)
        for start in range(share * each, end, BLOCK_ROWS):
            rows = start + lanes
            present = rows < end
            at = (first + rows).to(tl.int64)
            both = present[:, None] & inside[None, :]
            k = tl.load(held_key + at[:, None] * D + dims[None, :], mask=both, other=0.0)
            v = tl.load(held_value + at[:, None] * D + dims[None, :], mask=both, other=0.0)
            if PADDED:
                present = present & (tl.load(held_padding + at, mask=present, other=1) == 0)
            s = tl.sum(k.to(tl.float32) * q[None, :], 1)
            s = tl.where(present, s, float("-inf"))
            highest = tl.maximum(high, s)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            before, p = tl.exp2(high - shift), tl.exp2(s - shift)
            sums = sums * before + p
            acc = acc * before[:, None] + p[:, None] * v.to(tl.float32)
            high = highest

    weight = tl.where((share == 0) & (ignored == 0), count, 0).to(tl.float32)
    own = tl.sum(own_key.to(tl.float32) * q, 0)
    own = tl.where(weight > 0.0, own, float("-inf"))
    top = tl.maximum(tl.max(high, 0), own)
    shift = tl.where(top == float("-inf"), 0.0, top)
    p, of_own = tl.exp2(high - shift), tl.exp2(own - shift) * weight
    total = tl.sum(sums * p, 0) + of_own
    out = tl.sum(acc * p[:, None], 0) + of_own * own_value.to(tl.float32)
    none = total == 0.0
    to = (share * tl.num_programs(2) + batch) * HEADS + head
    tl.store(parts + to * D + dims, out / tl.where(none, 1.0, total), mask=inside)
    total = tl.where(none, float("-inf"), shift + tl.log2(tl.where(none, 1.0, total)))
    tl.store(shifts + to, total)


@triton.jit
def merge_kernel(
    parts, shifts, lengths, real, out, shares, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SHARES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Merge the shares into out (B, H, D), and count the new row."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SHARES)
    inside, present = dims < D, lanes < shares
    at = (lanes * tl.num_programs(1) + batch) * HEADS + head
    high = tl.load(shifts + at, mask=present, other=float("-inf"))
    top = tl.max(high, 0)
    p = tl.exp2(high - tl.where(top == float("-inf"), 0.0, top))
    both = present[:, None] & inside[None, :]
    part = tl.load(parts + at[:, None] * D + dims[None, :], mask=both, other=0.0)
    total = tl.sum(p, 0)
    merged = tl.sum(part * p[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (batch * HEADS + head) * D + dims, merged, mask=inside)
    # The kernel before is done with it, and no other program of this one reads it.
    if head == 0:
        more = tl.full([], 1, tl.int64)
        if RAGGED:
            more = tl.minimum(tl.maximum(tl.load(real + batch), 0), 1)
        tl.store(lengths + batch, tl.load(lengths + batch) + more)
