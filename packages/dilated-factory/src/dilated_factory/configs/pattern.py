"""The pattern that a context asks for where none is given, and how far any pattern sees."""

import math

from dilated_core import DilatedPattern

_LONGEST_OF_TWO = 64  # past it, three shorter dense segments cost less than two


def default_pattern(context: int) -> DilatedPattern:
    """The pattern with which every position of a context is within reach of every later one.

    Two or three dense branches, in whose lengths no factor is common: so of the positions of the
    context only the first is at the border of all, and every other one sees the one before it.
    Dilated branches follow, each 8 times as long and 4 times as thin; the last one covers the
    context, at a rate that the shortest segment spans. Through three layers information comes from
    the first position to any other, in head 0 already. Work per position grows as the cube root of
    the context.

    Args:
        context: positions that must be reached.

    Raises:
        ValueError: the context is less than 1.

    Examples:
        >>> default_pattern(8192)
        DilatedPattern([64, 129, 1024, 8192], [1, 1, 4, 16])
    """
    if context < 1:
        raise ValueError(f"context must be at least 1. Got {context}.")
    lengths: tuple[int, ...] = (context,)
    rates: tuple[int, ...] = (1,)
    if context >= 16:
        lengths = _dense_segments(context)
        rates, shortest = (1,) * len(lengths), lengths[0]
        length, rate = 16 * shortest, 4
        while 2 * length <= context and rate <= shortest:
            lengths, rates = (*lengths, length), (*rates, rate)
            length, rate = 8 * length, 4 * rate
        lengths, rates = (*lengths, context), (*rates, min(rate, shortest))
    return DilatedPattern(lengths, rates)


def sight(pattern: DilatedPattern, layers: int) -> int:
    """How many positions at most, itself included, decide the output of one after some layers.

    Where the borders of all branches coincide, nothing passes, so it is never more than their
    distance.
    """
    longest = max(pattern.segment_lengths)
    return min(math.lcm(*pattern.segment_lengths), layers * (longest - 1) + 1)


def _dense_segments(context: int) -> tuple[int, ...]:
    """Lengths without a common factor, the shortest a power of 2; their product is the context."""
    two = context <= _LONGEST_OF_TWO * (2 * _LONGEST_OF_TWO + 1)
    n = 2
    while True:
        # Odd numbers have no factor in common with a power of 2, nor these two with each other:
        # 3 * (2n - 1) - 2 * (3n - 1) = -1.
        dense = (n, 2 * n + 1) if two else (n, 2 * n - 1, 3 * n - 1)
        if 8 * n >= min(context, 256) and math.prod(dense) >= context:
            return dense
        n *= 2
