"""Attention dropout: one stateless bit per weight, at the right rate, in every backend."""

import pytest
import torch

from dilated_core import DilatedAttention, DilatedPattern, dilated_attention
from dilated_core._dropout import keep_mask, mix


def bits(seed, dropout_p, shape):
    b, h, n, m = (
        torch.arange(size).reshape(-1, *(1,) * (3 - axis)) for axis, size in enumerate(shape)
    )
    return keep_mask(seed, dropout_p, b, h, n, m)


def test_the_hash_is_a_bijection_that_spreads_bits():
    x = torch.arange(2**16)
    assert mix(x).unique().numel() == 2**16
    assert mix(x).max() < 2**32
    flipped = mix(x) ^ mix(x ^ 1)
    share = sum((flipped >> bit) & 1 for bit in range(32)).double().mean() / 32
    assert share.item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_weights_are_dropped_at_the_rate_on_every_axis(dropout_p):
    kept = bits(12345, dropout_p, (7, 5, 61, 67)).double()
    assert kept.mean().item() == pytest.approx(1 - dropout_p, abs=0.005)
    for axis in range(4):
        others = [a for a in range(4) if a != axis]
        assert (kept.mean(others) - (1 - dropout_p)).abs().max() < 0.06
        # Neighbours along an axis are independent.
        size = kept.shape[axis]
        a, b = kept.narrow(axis, 0, size - 1), kept.narrow(axis, 1, size - 1)
        assert (a * b).mean().item() == pytest.approx((1 - dropout_p) ** 2, abs=0.01)


def test_another_seed_is_another_mask():
    masks = [bits(seed, 0.5, (2, 3, 11, 13)) for seed in (0, 1, 2**40)]
    for i, a in enumerate(masks):
        assert all((a == b).double().mean() < 0.6 for b in masks[i + 1 :])


def test_positions_beyond_32_bits_differ():
    position = torch.tensor([5, 5 + 2**32])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    kept = keep_mask(1, 0.5, zero, zero, position[:, None], torch.arange(999))
    assert (kept[0] == kept[1]).double().mean() < 0.6


def test_the_mean_over_seeds_is_attention_without_dropout():
    pattern = DilatedPattern([5, 10], [1, 2])
    q, k, v = (torch.randn(1, 10, 2, 3) for _ in "qkv")
    mean = torch.stack(
        [dilated_attention(q, k, v, pattern, dropout_p=0.3) for _ in range(1000)]
    ).mean(0)
    torch.testing.assert_close(mean, dilated_attention(q, k, v, pattern), atol=0.15, rtol=0.15)


def test_a_module_drops_in_training_only():
    layer = DilatedAttention(DilatedPattern([5], [1]), dropout=0.5)
    q, k, v = (torch.randn(1, 10, 2, 3) for _ in "qkv")
    assert not torch.equal(layer(q, k, v), layer(q, k, v))
    layer.eval()
    assert torch.equal(layer(q, k, v), dilated_attention(q, k, v, layer.pattern))


def test_a_batch_row_keeps_its_mask_when_the_length_changes():
    """The mask is keyed by positions, so a longer batch drops the same weights."""
    pattern = DilatedPattern([7], [1])
    q, k, v = (torch.randn(2, 14, 2, 3, dtype=torch.float64) for _ in "qkv")
    outs = []
    for length in (14, 7):
        torch.manual_seed(3)
        rows = [x[:, :length] for x in (q, k, v)]
        outs.append(dilated_attention(*rows, pattern, dropout_p=0.5))
    assert torch.equal(outs[0][:, :7], outs[1])
