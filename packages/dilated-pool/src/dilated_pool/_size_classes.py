"""Size classes: which block sizes exist.

Eight sizes per power of two: (8 + i) * 2**k bytes, i = 1 to 8. A request is rounded up by less than
an eighth of itself. The smallest sizes are multiples of a granularity, so a request of less than
eight granules can be rounded up by more than an eighth, but always by less than one granule.
"""


def class_size(nbytes: int, granularity: int) -> int:
    """Return the size in bytes of the smallest block that holds `nbytes`.

    Args:
        nbytes: requested size, 0 or more; 0 is served like 1.
        granularity: a power of two that divides all sizes.
    """
    nbytes = max(nbytes, 1)
    step = max(granularity, 1 << max((nbytes - 1).bit_length() - 4, 0))
    return -(-nbytes // step) * step
