"""Token masks of blocks as packed bits: P masks (P, b, b) bool are (P, b, ceil(b / 8)) bytes.

A mask covers a square of b queries by b keys. Bits outside the sequence, in the last block of a
length that b does not divide, are 0.
"""

import torch
from torch import Tensor

# As an integer, eight bools are b_i << 8 i; this product has bit i of the result at bit 56 + i.
_GATHER_BITS = 0x0102040810204080


def pack(masks: Tensor) -> Tensor:
    """(P, b, b) bool to bytes."""
    count, rows, size = masks.shape
    padded = torch.nn.functional.pad(masks.to(torch.uint8), (0, -size % 8)).flatten()
    words = padded.view(torch.int64).reshape(count, rows, -(-size // 8))
    return (words * _GATHER_BITS >> 56).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Bytes to (P, b, b) bool."""
    bit = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) & bit) != 0).flatten(-2)[..., : packed.shape[1]]


def count(packed: Tensor) -> Tensor:
    """How many bits of each mask are set: (P,) int64."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum((-1, -2), dtype=torch.int64)


def unique(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The different masks in a canonical order, and which of them each mask is."""
    if not len(packed):
        return packed, torch.empty(0, dtype=torch.int64, device=packed.device)
    flat = packed.flatten(1).contiguous()
    words = flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
    table, index = torch.unique(words, dim=0, return_inverse=True)
    return table.view(torch.uint8).reshape(-1, *packed.shape[1:]), index


def empty(size: int, device: torch.device) -> Tensor:
    """No masks at all, of blocks of that size."""
    return torch.empty(0, size, -(-size // 8), dtype=torch.uint8, device=device)
