"""Block sizes of the kernels: which are fast, by pass, head_dim and dtype."""

import torch

from dilated_core._caches import remembered
from dilated_core._triton._driving import Config, Pair, Pass


def _same(config: Config) -> Pair:
    """Tiles of one height for everything."""
    return Pair(config, config)


_FORWARD_64 = Pair(Config(128, 64, 4, 4, 32), Config(64, 64, 4, 3, 64, 128), 0.95)
_KEY_64 = Pair(Config(64, 64, 4, 3), Config(64, 64, 4, 3, 64), 0.95)
# By pass and the width of the blocks that hold head_dim, for 16-bit inputs; measured on an H200,
# see benchmarks/NOTES.md.
_HALF: dict[Pass, dict[int, Pair]] = {
    "forward": {
        64: _FORWARD_64,
        80: Pair(Config(128, 64, 4, 3, 64), Config(64, 64, 4, 3, 64), 0.92),
        96: _same(Config(128, 64, 4, 3, 64)),
        128: Pair(Config(128, 64, 4, 2, 64), Config(64, 64, 4, 3, 64), 0.975),
        192: _same(Config(128, 64, 8, 3)),
        256: _same(Config(128, 32, 8, 3)),
    },
    "query": {
        32: _same(Config(64, 64, 4, 3)),
        48: Pair(Config(128, 64, 8, 4), Config(64, 64, 4, 3), 0.99),
        64: Pair(Config(128, 64, 8, 3), Config(64, 64, 4, 3, 64), 0.99),
        96: _same(Config(64, 64, 4, 2)),
        128: Pair(Config(128, 64, 8, 4), Config(64, 64, 4, 2, 64), 0.975),
        192: Pair(Config(128, 32, 8, 3), Config(64, 32, 4, 2)),
        256: _same(Config(128, 32, 8, 2)),
    },
    "key": {
        32: _KEY_64,
        48: Pair(Config(64, 64, 4, 3, 32, 168), Config(64, 64, 4, 2, 64, 168)),
        64: _KEY_64,
        96: _same(Config(64, 64, 4, 3)),
        128: _same(Config(64, 64, 4, 2, 64)),
        192: _same(Config(64, 32, 4, 2)),
        256: _same(Config(64, 32, 8, 2, 16)),
    },
}
# float32 products are exact, so they run on the ordinary units and want small tiles.
_SINGLE: dict[int, Pair] = {
    32: _same(Config(64, 32, 8, 1)),
    64: _same(Config(32, 32, 8, 1)),
    128: _same(Config(32, 16, 8, 1)),
    256: _same(Config(16, 16, 8, 1)),
}


@remembered(1024)
def head_dim_blocks(which: Pass, head_dim: int) -> tuple[int, int]:
    """The widths of one block, or two, that hold a head_dim.

    Two where they pad nothing, and in the forward from 97 to 128, by measurement. Not where they
    would pad less than one: compiled by triton 3.6 for an H200, products in 16 bits with a second
    block of 16 columns of which some are hidden are wrong (dims 43, 66, 67, 72, 75, 131), while
    its interpreter and 32 bits are right.
    """
    padded = _power_of_two(head_dim)
    width = padded // 2
    tail = _power_of_two(head_dim - width)
    halves = which == "forward" and padded == 128 and tail == width
    two = halves or width + tail == head_dim < padded
    return (width, tail) if two else (padded, 0)


def value_blocks(head_dim: int) -> tuple[int, int]:
    """The same for the values in the forward: up to 64 one block is faster than to pad less."""
    padded = _power_of_two(head_dim)
    return (padded, 0) if padded <= 64 else head_dim_blocks("forward", head_dim)


def _power_of_two(head_dim: int) -> int:
    """The smallest width of a block that holds these dims."""
    return max(16, 1 << (head_dim - 1).bit_length())


@remembered(1024)
def pair_of(which: Pass, head_dim: int, dtype: torch.dtype) -> Pair:
    """The block sizes that are fast for such inputs; they do not depend on the length."""
    table = _SINGLE if dtype == torch.float32 else _HALF[which]
    width = sum(head_dim_blocks(which, head_dim))
    return table[min(size for size in table if size >= width)]
