"""Launching the kernels of one new row.

B batch, H query heads, H_kv key heads, D head_dim, R held rows.
"""

import math

import torch
from torch import Tensor

from dilated_core._triton import _kernels
from dilated_core._triton._driving import HeldTensors
from dilated_core._triton._launch import _flat
from dilated_core._triton._support import on_device

# Programs that keep a GPU busy, and the most into which the slots of a head are split.
_PROGRAMS, _MOST_SHARES = 264, 32
_ELEMENTS_OF_A_BLOCK = 4096


def decode(
    held: HeldTensors, scale: float, real: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, padding: Tensor | None,
) -> Tensor:  # fmt: skip
    """`decode` of the package."""
    batch, _, heads, head_dim = query.shape
    query, key, value = _flat(query), _flat(key), _flat(value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not batch:
        return out
    width = 1 << (head_dim - 1).bit_length()
    rows = max(16, min(64, _ELEMENTS_OF_A_BLOCK // width))
    blocks = -(-held.most_slots // rows)
    shares = min(-(-_PROGRAMS // (batch * heads)), _MOST_SHARES, max(blocks, 1))
    parts = torch.empty((shares, batch, heads, head_dim), dtype=torch.float32, device=query.device)
    shifts = torch.empty((shares, batch, heads), dtype=torch.float32, device=query.device)
    any_pointer = held.lengths
    ignored = None if padding is None else padding.contiguous().view(torch.uint8)
    real_rows = any_pointer if real is None else real
    with on_device(query):
        _kernels.decode_kernel[(shares, heads, batch)](
            query, key, value, any_pointer if ignored is None else ignored,
            held.key, held.value,
            any_pointer if held.padding is None else held.padding.view(torch.uint8),
            held.lengths, real_rows, parts, shifts, held.head_rows, held.head_offsets, held.sizes,
            query.stride(0), query.stride(2), key.stride(0), key.stride(2), value.stride(0),
            value.stride(2), held.key.stride(0), 0 if held.padding is None else held.key.shape[1],
            scale * math.log2(math.e), len(held.sizes), HEADS=heads, GROUP=heads // key.shape[2],
            D=head_dim, BLOCK_D=width, BLOCK_ROWS=rows, PADDED=held.padding is not None,
            PADDING=padding is not None, RAGGED=real is not None, num_warps=4,
        )  # fmt: skip
        _kernels.merge_kernel[(heads, batch)](
            parts, shifts, held.lengths, real_rows, out, shares, HEADS=heads, D=head_dim,
            BLOCK_D=width, BLOCK_SHARES=1 << (shares - 1).bit_length(), RAGGED=real is not None,
            num_warps=4,
        )  # fmt: skip
    return out
