"""Memory: nothing of size N x N, and temporaries no larger than two branches' packed rows."""

import pytest
import torch

from dilated_core import DilatedPattern, dilated_attention
from live_bytes import LiveBytes

HEADS, HEAD_DIM = 4, 16


def measure(pattern, length, is_causal, *, backward):
    """(Peak bytes above inputs, largest single allocation) of a call."""
    tensors = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]
    upstream = torch.randn(1, length, HEADS, HEAD_DIM)
    with LiveBytes(*tensors, upstream) as mode:
        out = dilated_attention(*tensors, pattern, is_causal=is_causal)
        if backward:
            torch.autograd.grad(out, tensors, upstream)
    return mode.peak, mode.largest


PATTERNS = {
    "nested": DilatedPattern([512, 1024, 2048, 4096], [1, 2, 4, 8]),
    "other": DilatedPattern([500, 1024, 3000, 4096], [1, 3, 4, 6]),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_temporaries_stay_below_two_branches_packed_rows(name, is_causal, backward):
    length = 65536
    rows = length * HEADS * HEAD_DIM * 4
    lse = length * HEADS * 4
    peak, largest = measure(PATTERNS[name], length, is_causal, backward=backward)
    results = rows + lse + (3 * rows if backward else 0)
    # Packed rows of a branch of rate 1: query, key and value.
    assert peak - results <= 2 * 3 * rows
    assert largest <= 1.01 * rows


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_no_faster_than_length(backward):
    peaks = [
        measure(PATTERNS["other"], length, True, backward=backward)[0]
        for length in (32768, 65536, 131072)
    ]
    assert peaks[1] <= 2.05 * peaks[0]
    assert peaks[2] <= 2.05 * peaks[1]
