"""Stateless attention dropout: one bit per (seed, batch, head, query position, key position).

No state and no order of evaluation enters, so every backend, the forward, the backward and any
split of the sequence draw the same mask. The mixing function is a 32-bit integer hash, chosen so
that GPU kernels compute it with native 32-bit multiplies.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_HIGH = 0x9E3779B9


def mix(x: Tensor) -> Tensor:
    """A bijective 32-bit avalanche hash, on int64 tensors that hold values below 2**32.

    The multipliers and shifts of "lowbias32" (Christopher Wellons, Hash Function Prospector, 2018).
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _fold(position: Tensor) -> Tensor:
    """64-bit positions to 32 bits; identity below 2**32."""
    return (position & _MASK) ^ (((position >> 32) * _HIGH) & _MASK)


def threshold(dropout_p: float) -> int:
    """A hash below this drops its key: dropout_p in units of 2**-32."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: int,
    dropout_p: float,
    batch: Tensor,
    head: Tensor,
    query_position: Tensor,
    key_position: Tensor,
) -> Tensor:
    """True where a weight is kept. The four int64 index tensors broadcast against each other."""
    state = mix(torch.tensor(seed & _MASK, device=batch.device))
    state = mix(state ^ ((seed >> 32) & _MASK))
    row = mix(mix(mix(state ^ batch) ^ head) ^ _fold(query_position))
    column = mix(_fold(key_position) ^ _HIGH)
    return mix(row ^ column) >= threshold(dropout_p)
