"""Packed positions, found row by row and token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_factory.interop.unserved import refuse_packed_positions


def first_restart(positions: Tensor, mask: Tensor, past: int) -> tuple[int, int] | None:
    """The row and token at which a sequence begins that is not the row's first: the definition."""
    for row, real in enumerate(mask.tolist()):
        seen: list[tuple[int, int]] = []  # token and position
        for token, position in enumerate(positions[row % len(positions)].tolist(), past):
            if not real[token]:
                continue
            if position < sum(real[:token]):
                return row, token
            if seen and seen[-1][0] == token - 1 and position != seen[-1][1] + 1:
                return row, token
            if seen and position <= max(earlier for _, earlier in seen):
                return row, token
            seen.append((token, position))
    return None


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    past = draw(st.integers(0, 5))
    size = rows * (past + length)
    mask = draw(st.lists(st.sampled_from([True, True, False]), min_size=size, max_size=size))
    starts = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    positions = torch.tensor(starts).unsqueeze(1) + torch.arange(length)
    if draw(st.booleans()):
        positions[draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1)) :] = draw(
            st.integers(0, 9)
        )
    if draw(st.booleans()):
        positions = positions[:1]
    return positions, torch.tensor(mask).view(rows, -1), past


@given(calls())
def test_a_restart_is_found_where_it_is_and_nowhere_else(
    call: tuple[Tensor, Tensor, int],
) -> None:
    positions, mask, past = call
    expected = first_restart(positions, mask, past)
    # A mask that hides nothing is that of no mask at all.
    for given_mask in (mask, None) if mask.all() else (mask,):
        if expected is None:
            refuse_packed_positions(positions, given_mask, past)
        else:
            row, token = expected
            row = row % len(positions) if given_mask is None else row
            with pytest.raises(ValueError, match=rf"at token {token} of row {row}\.$"):
                refuse_packed_positions(positions, given_mask, past)


def test_the_same_positions_are_read_again_for_another_mask_or_cache() -> None:
    positions = torch.tensor([[3, 4, 5]])
    padding = torch.tensor([[False, True, True, True, True, True]])
    refuse_packed_positions(positions, None, 0)
    refuse_packed_positions(positions, None, 3)
    with pytest.raises(ValueError, match="Got position 3 at token 5"):
        refuse_packed_positions(positions, None, 5)
    refuse_packed_positions(positions, padding, 3)
    with pytest.raises(ValueError, match="Got position 3 at token 4"):
        refuse_packed_positions(positions, torch.ones(1, 7, dtype=torch.bool), 4)
    with torch.inference_mode():
        held = positions.clone()
        refuse_packed_positions(held, None, 0)
        held[0, 2] = 0
        with pytest.raises(ValueError, match="Got position 0 after 4"):
            refuse_packed_positions(held, None, 0)


def test_the_same_positions_are_read_again_for_another_mask_of_the_same_cache() -> None:
    positions = torch.tensor([[0, 7, 1]])
    refuse_packed_positions(positions, torch.tensor([[True, False, True]]), 0)
    with pytest.raises(ValueError, match="Got position 7 after 0 at token 1"):
        refuse_packed_positions(positions, torch.tensor([[True, True, True]]), 0)
    with pytest.raises(ValueError, match="Got position 7 after 0 at token 1"):
        refuse_packed_positions(positions, None, 0)
