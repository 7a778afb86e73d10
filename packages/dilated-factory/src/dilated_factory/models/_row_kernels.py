"""The kernel that turns one new row of each sequence; importing this module imports triton."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

# Shapes: B batch, H query heads, H_kv key heads, D head_dim.

import triton
import triton.language as tl
from torch import Tensor


def turn(rows: Tensor, positions: Tensor, turns: Tensor, heads: int, kv_heads: int) -> None:
    """Turn the queries and keys of rows (B, (H + 2 * H_kv) * D), where they are.

    Args:
        rows: contiguous; the H queries come first, then H_kv keys.
        positions: (B, 1) int64, or (1,) for all.
        turns: (D / 2,) int64, turns of each pair from a position to the next, in units of 2 ** -64.
        heads: H.
        kv_heads: H_kv.
    """
    pairs = len(turns)
    _turn_kernel[(len(rows), heads + kv_heads)](
        rows, positions, turns, rows.stride(0), int(positions.numel() > 1), PAIRS=pairs,
        BLOCK=triton.next_power_of_2(pairs), num_warps=1,
    )  # fmt: skip


@triton.jit
def _turn_kernel(
    rows, positions, turns, stride, stride_positions, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < PAIRS
    # As `positions._cosine_and_sine`: whole turns overflow and are gone.
    turned = tl.load(positions + batch * stride_positions) * tl.load(turns + pair, mask=inside)
    quarters = (turned + 2305843009213693952) >> 62
    rest = (turned - (quarters << 62)).to(tl.float32) * 3.4061215800304e-19  # pi * 2 ** -63
    cosine, sine, odd = tl.cos(rest), tl.sin(rest), (quarters & 1) != 0
    c = tl.where(odd, sine, cosine) * (1 - ((quarters + 1) & 2)).to(tl.float32)
    s = tl.where(odd, cosine, sine) * (1 - (quarters & 2)).to(tl.float32)
    rows += batch * stride + head * PAIRS * 2 + 2 * pair
    x = tl.load(rows, mask=inside).to(tl.float32)
    y = tl.load(rows + 1, mask=inside).to(tl.float32)
    tl.store(rows, x * c - y * s, mask=inside)
    tl.store(rows + 1, x * s + y * c, mask=inside)
