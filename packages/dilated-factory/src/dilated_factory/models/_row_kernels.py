"""Kernels of one new row of each sequence; importing this module imports triton."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

# Shapes: B batch, E embed_dim, H query heads, H_kv key heads, D head_dim.

import torch
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


def add_norm(
    hidden: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden + added (B, E), and the layer norm of that, both in hidden's dtype."""
    width = hidden.shape[1]
    both = torch.empty((2, *hidden.shape), dtype=hidden.dtype, device=hidden.device)
    _add_norm_kernel[(len(hidden),)](
        hidden.contiguous(), added.contiguous(), weight, bias, both, width, both.stride(0), eps,
        BLOCK=triton.next_power_of_2(width), num_warps=min(max(width // 512, 1), 8),
    )  # fmt: skip
    return both[0], both[1]


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


@triton.jit
def _add_norm_kernel(
    hidden, added, weight, bias, both, width, second, eps, BLOCK: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(hidden + start + columns, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(added + start + columns, mask=inside, other=0.0).to(tl.float32)
    # As it is read again, rounded.
    kept = total.to(both.dtype.element_ty)
    tl.store(both + start + columns, kept, mask=inside)
    total = kept.to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(both + second + start + columns, centred * scale * w + b, mask=inside)
