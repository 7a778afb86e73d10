"""Partials merge like one softmax over the union of their keys."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import Partial, merge
from dilated_core._partial import add_zero_keys_, merge_
from dilated_testing import relative_error

B, N, H, D = 2, 5, 3, 7


def partial_of(scores, value):
    """Attention over some keys; scores (B, H, N, M) may be -inf, value (B, M, H, D)."""
    lse = torch.logsumexp(scores, -1)
    shift = lse.masked_fill(lse == -math.inf, math.inf)
    weights = (scores - shift[..., None]).exp()
    return Partial(torch.einsum("bhnm,bmhd->bnhd", weights, value), lse)


def scores_and_value(seed, keys=11, hidden=0.6):
    generator = torch.Generator().manual_seed(seed)
    scores = 30 * torch.randn(B, H, N, keys, dtype=torch.float64, generator=generator)
    gone = torch.rand(B, H, N, keys, generator=generator) < hidden
    value = torch.randn(B, keys, H, D, dtype=torch.float64, generator=generator)
    scores = scores.masked_fill(gone, -math.inf)
    scores[0, 0] = -math.inf
    return scores, value


@given(st.integers(0, 999), st.lists(st.integers(0, 11), max_size=3))
def test_merge_of_any_split_is_the_whole(seed, cuts):
    scores, value = scores_and_value(seed)
    edges = [0, *sorted(cuts), 11]
    parts = [
        partial_of(scores[..., a:b], value[:, a:b])
        if b > a
        else Partial(torch.zeros(B, N, H, D), torch.full((B, H, N), -math.inf))
        for a, b in pairwise(edges)
    ]
    whole, merged = partial_of(scores, value), merge(*parts)
    assert relative_error(merged.out, whole.out) < 1e-14
    assert relative_error(merged.lse, whole.lse) < 1e-14
    assert relative_error(merge(*parts[::-1]).out, whole.out) < 1e-14
    nested = merge(parts[0], merge(*parts[1:])) if len(parts) > 1 else merged
    assert relative_error(nested.out, whole.out) < 1e-14
    total = Partial(
        torch.zeros_like(whole.out).transpose(1, 2), torch.full_like(whole.lse, -math.inf)
    )
    for part in parts:
        merge_(total, Partial(part.out.transpose(1, 2), part.lse))
    assert relative_error(total.out.transpose(1, 2), whole.out) < 1e-14
    assert relative_error(total.lse, whole.lse) < 1e-14


def test_rows_nobody_sees_stay_zero_and_give_zero_gradients():
    nothing = Partial(
        torch.zeros(B, N, H, D, dtype=torch.float64, requires_grad=True),
        torch.full((B, H, N), -math.inf, dtype=torch.float64, requires_grad=True),
    )
    out, lse = merge(nothing, nothing)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    grads = torch.autograd.grad(out.sum() + lse.clamp(min=0).sum(), [*nothing])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_merge_has_the_gradient_of_one_softmax():
    scores, value = scores_and_value(3, hidden=0.0)
    scores = (scores / 30).masked_fill(scores == -math.inf, -1.0).requires_grad_()
    value.requires_grad_()

    def halves(scores, value):
        parts = (partial_of(scores[..., s], value[:, s]) for s in (slice(4), slice(4, None)))
        return tuple(merge(*parts))

    assert torch.autograd.gradcheck(halves, (scores, value))


def test_merge_accumulates_half_precision_in_float32():
    out, lse = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1)
    merged = merge(*[Partial(out, lse)] * 3)
    assert merged.out.dtype == merged.lse.dtype == torch.float32
    assert merged.lse.item() == pytest.approx(math.log(3))


def test_extreme_lse_do_not_overflow():
    out = torch.ones(1, 1, 1, 1)
    merged = merge(
        Partial(out, torch.full((1, 1, 1), 1e4)), Partial(3 * out, torch.full((1, 1, 1), 1e4))
    )
    assert merged.out.item() == 2.0
    merged = merge(
        Partial(out, torch.full((1, 1, 1), -1e4)), Partial(3 * out, torch.full((1, 1, 1), 1e4))
    )
    assert merged.out.item() == 3.0


def test_zero_keys_are_keys_of_score_zero():
    scores, value = scores_and_value(5)
    padded = torch.cat([scores, torch.zeros(B, H, N, 3, dtype=torch.float64)], -1)
    whole = partial_of(padded, torch.cat([value, value.new_zeros(B, 3, H, D)], 1))
    part = partial_of(scores, value)
    total = Partial(part.out.transpose(1, 2), part.lse)
    add_zero_keys_(total, 3)
    assert relative_error(total.out.transpose(1, 2), whole.out) < 1e-14
    assert relative_error(total.lse, whole.lse) < 1e-14


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="at least one"):
        merge()
    good = Partial(torch.zeros(B, N, H, D), torch.zeros(B, H, N))
    with pytest.raises(ValueError, match=r"partials\[1\] must have out"):
        merge(good, Partial(torch.zeros(B, N, H, D), torch.zeros(B, N, H)))
    with pytest.raises(ValueError, match=r"partials\[1\].out must have shape"):
        merge(good, Partial(torch.zeros(B, 4, H, D), torch.zeros(B, H, 4)))
