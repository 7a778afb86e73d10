"""Markov baselines against counting by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_factory.training.baselines import MarkovModel


def witten_bell(rows: list[bytes], history: bytes, byte: int) -> float:
    """P(byte | history) by the definition, one history at a time."""
    lower = witten_bell(rows, history[1:], byte) if history else 1 / 256
    order = len(history)
    followers = Counter(
        row[index + order]
        for row in rows
        for index in range(len(row) - order)
        if row[index : index + order] == history
    )
    if not followers:
        return lower
    kinds, seen = len(followers), followers.total()
    return (followers[byte] + kinds * lower) / (seen + kinds)


letters = st.binary(min_size=7, max_size=7).map(lambda text: bytes(byte % 5 for byte in text))


@settings(max_examples=20)
@given(st.lists(letters, min_size=1, max_size=6), letters, st.integers(0, 2))
def test_bits_match_a_count_by_hand(rows: list[bytes], text: bytes, order: int) -> None:
    model = MarkovModel(order, torch.tensor([list(row) for row in rows], dtype=torch.uint8))
    data = torch.tensor(list(text), dtype=torch.uint8)
    sections = [range(2, 4), range(5, 7)]
    bits = [
        -math.log2(witten_bell(rows, text[index - order : index], text[index]))
        for section in sections
        for index in section
    ]
    expected = sum(bits) / len(bits)
    assert model.bits_per_byte(data, sections) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_probabilities_of_every_history_sum_to_one(order: int) -> None:
    windows = torch.randint(256, (3, 101), generator=torch.Generator().manual_seed(0))
    model = MarkovModel(order, windows.to(torch.uint8))
    totals = (-model._bits).exp2().sum(dim=1)
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-4, atol=0)


def test_arguments_out_of_range_are_named() -> None:
    windows = torch.zeros(1, 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"order must be 0, 1 or 2\. Got 3"):
        MarkovModel(3, windows)
    with pytest.raises(ValueError, match="must start at 2 or later"):
        MarkovModel(2, windows).bits_per_byte(windows[0], [range(1, 4)])
