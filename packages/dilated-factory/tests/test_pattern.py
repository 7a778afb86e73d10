"""The default pattern of a context: everything before a position is within its reach."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.configs.pattern import default_pattern, sight

LAYERS = LongNetConfig().num_layers


def reach(pattern: DilatedPattern, length: int, hops: int) -> Tensor:
    """Which positions get something from position 0 in head 0 through so many layers, causal."""
    reached = torch.zeros(length, dtype=torch.bool)
    reached[0] = True
    for _ in range(hops):
        new = reached.clone()
        for w, r in pattern.branches:
            whole = -(-length // w) * w
            rows = torch.zeros(whole, dtype=torch.bool)
            rows[:length] = reached
            kept = rows.view(-1, w)[:, ::r]  # head 0 has offset 0
            seen = torch.zeros(whole // w, w, dtype=torch.bool)
            seen[:, ::r] = kept.cummax(1).values
            new |= seen.flatten()[:length]
        reached = new
    return reached


def test_the_tests_reach_is_that_of_the_definition() -> None:
    pattern = DilatedPattern([6, 10, 44], [1, 1, 3])
    sees = pattern.multiplicity(53, 1, is_causal=True)[0] > 0
    column = torch.zeros(53, dtype=torch.bool)
    column[0] = True
    for hops in range(1, 4):
        column = column | (sees & column).any(1)
        assert torch.equal(reach(pattern, 53, hops), column)


@given(st.integers(1, 2**20) | st.integers(1, 2000))
@example(2**20)
def test_every_position_sees_the_one_before_it_and_in_the_end_the_first(context: int) -> None:
    pattern = default_pattern(context)
    assert max(pattern.segment_lengths) >= context
    assert min(pattern.segment_lengths) <= context
    dense = [w for w, r in pattern.branches if r == 1]
    # Position p sees p - 1 in a dense branch unless its border is there.
    assert math.lcm(*dense) >= context
    assert sight(pattern, LAYERS) >= context
    assert reach(pattern, context, LAYERS).all()


@pytest.mark.parametrize("context", [2**k for k in range(10, 21)])
def test_work_grows_slower_than_a_power_of_the_context(context: int) -> None:
    pattern = default_pattern(context)
    keys = pattern.flops(context, 16, 1, is_causal=False) / (4 * 16 * context)
    assert keys <= 18 * context ** (1 / 3)


@pytest.mark.parametrize("context", [2**k for k in range(10, 17)])
def test_the_last_loss_depends_on_the_first_token(context: int) -> None:
    torch.manual_seed(0)
    config = LongNetConfig(context=context, embed_dim=16, num_heads=1, ffn_dim=8)
    model = LongNetLM(config)
    embedded = []
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    hidden = model.hidden_states(torch.randint(256, (1, context)))
    logits = model.head(hidden[0, -1])
    (gradient,) = torch.autograd.grad(logits.logsumexp(0), embedded)
    assert gradient[0, 0].norm() > 0


def test_borders_that_coincide_cut_the_sight() -> None:
    pattern = DilatedPattern((64, 96, 1024, 8192), (1, 1, 4, 16))
    assert sight(pattern, 12) == 24576
    assert not reach(pattern, 24577, 12)[24576]
    assert sight(pattern, 1) == 8192


def test_a_pattern_follows_the_context_unless_it_is_given() -> None:
    assert LongNetConfig(context=32768).pattern == default_pattern(32768)
    given_one = LongNetConfig(context=32768, segment_lengths=(64,), dilation_rates=(1,))
    assert given_one.segment_lengths == (64,)
    stored = given_one.model_dump_json()
    assert LongNetConfig.model_validate_json(stored) == given_one
    copied = LongNetConfig.model_validate_json(LongNetConfig(context=999).model_dump_json())
    assert copied.pattern == default_pattern(999)
    with pytest.raises(ValueError, match="dilation_rates"):
        LongNetConfig(segment_lengths=(64, 128))
    with pytest.raises(ValueError, match=r"context must be at least 1\. Got 0\."):
        default_pattern(0)
