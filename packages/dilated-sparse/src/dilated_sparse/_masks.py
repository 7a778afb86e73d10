"""Token masks of blocks as packed bits: P masks (P, b, b) bool are (P, b, ceil(b / 8)) bytes.

A mask covers a square of b queries by b keys. Bits outside the sequence, in the last block of a
length that b does not divide, are 0.
"""

import torch
from torch import Tensor

_BIT = [1 << i for i in range(8)]
_ONES = [bin(byte).count("1") for byte in range(256)]


def pack(masks: Tensor) -> Tensor:
    """(P, b, b) bool to bytes."""
    count, rows, size = masks.shape
    padded = torch.nn.functional.pad(masks.to(torch.uint8), (0, -size % 8))
    bits = padded.reshape(count, rows, -(-size // 8), 8)
    return (bits * torch.tensor(_BIT, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Bytes to (P, b, b) bool."""
    bits = packed.unsqueeze(-1) & torch.tensor(_BIT, dtype=torch.uint8, device=packed.device)
    return (bits != 0).flatten(-2)[..., : packed.shape[1]]


def count(packed: Tensor) -> Tensor:
    """How many bits of each mask are set: (P,) int64."""
    return torch.tensor(_ONES)[packed.to(torch.int64)].sum((-1, -2))


def unique(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The different masks in a canonical order, and which of them each mask is."""
    if not len(packed):
        return packed, torch.empty(0, dtype=torch.int64)
    table, index = torch.unique(packed.flatten(1), dim=0, return_inverse=True)
    return table.reshape(-1, *packed.shape[1:]), index


def empty(size: int) -> Tensor:
    """No masks at all, of blocks of that size."""
    return torch.empty(0, size, -(-size // 8), dtype=torch.uint8)
