"""The modules: shapes, checks, initialisation, weights, injection, cache."""

import pytest
import torch
from torch import nn

from dilated_core import (
    DilatedAttention,
    DilatedKVCache,
    DilatedPattern,
    MultiheadDilatedAttention,
    dilated_attention,
)
from dilated_testing import relative_error

PATTERN = DilatedPattern([5, 11], [1, 2])


def multihead(**options):
    return MultiheadDilatedAttention(48, 6, PATTERN, **options).double()


@pytest.mark.parametrize("is_causal", [False, True])
def test_multihead_is_projection_attention_norm_projection(is_causal):
    layer = multihead(num_kv_heads=2)
    x = torch.randn(2, 13, 48, dtype=torch.float64)
    mask = torch.rand(2, 13) < 0.3
    q = layer.q_proj(x).reshape(2, 13, 6, 8)
    k, v = (proj(x).reshape(2, 13, 2, 8) for proj in (layer.k_proj, layer.v_proj))
    inner = dilated_attention(
        q, k, v, PATTERN, is_causal=is_causal, key_padding_mask=mask, enable_gqa=True
    )
    expected = layer.out_proj(nn.functional.layer_norm(inner.reshape(2, 13, 48), (48,)))
    actual, weights = layer(x, is_causal=is_causal, key_padding_mask=mask)
    assert relative_error(actual, expected) < 1e-10
    assert weights is None


def test_one_full_segment_is_torch_multihead_attention():
    """With one branch of rate 1 that covers everything, dilated attention is dense attention."""
    layer = MultiheadDilatedAttention(48, 6, DilatedPattern([99], [1]), layer_norm=False).double()
    dense = nn.MultiheadAttention(48, 6, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        dense.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        dense.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        dense.out_proj.load_state_dict(layer.out_proj.state_dict())
    query, key = torch.randn(2, 7, 48).double(), torch.randn(2, 13, 48).double()
    mask = torch.rand(2, 13) < 0.3
    expected, expected_weights = dense(
        query, key, key, key_padding_mask=mask, average_attn_weights=False
    )
    actual, weights = layer(query, key, key_padding_mask=mask, need_weights=True)
    assert relative_error(actual, expected) < 1e-10
    assert relative_error(weights, expected_weights) < 1e-10


def test_need_weights_are_the_effective_weights():
    layer = multihead(layer_norm=False)
    x = torch.randn(2, 13, 48, dtype=torch.float64)
    out, weights = layer(x, is_causal=True, need_weights=True)
    v = layer.v_proj(x).reshape(2, 13, 6, 8)
    inner = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    assert relative_error(layer.out_proj(inner.flatten(-2)), out) < 1e-10
    with pytest.raises(ValueError, match="query and key must have at most 67108864 weights"):
        layer(torch.randn(1, 4096, 48, dtype=torch.float64), need_weights=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim must be positive. Got 0"),
        ({"num_heads": -3}, ValueError, "num_heads must be positive. Got -3"),
        ({"embed_dim": 48.0}, TypeError, "embed_dim must be an int"),
        ({"num_heads": 7}, ValueError, "embed_dim must be divisible by num_heads. Got 48 and 7"),
        ({"num_kv_heads": 4}, ValueError, "divisible by num_kv_heads. Got 6 and 4"),
        ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\). Got 1.5"),
        ({"gamma_init": 0.0}, ValueError, "gamma_init must be positive. Got 0.0"),
        ({"pattern": [5]}, TypeError, "pattern must be a DilatedPattern. Got list"),
        (
            {"attention": DilatedAttention(PATTERN), "dropout": 0.1},
            ValueError,
            "dropout must be 0 when attention is given",
        ),
        ({"pattern": None}, TypeError, "pattern must be a DilatedPattern. Got NoneType"),
        (
            {"attention": DilatedAttention(PATTERN)},
            ValueError,
            r"pattern must be None when attention is given, which knows\. Got DilatedPattern",
        ),
        (
            {"pattern": DilatedPattern([1] * 7, [1] * 7, head_groups="split")},
            ValueError,
            r"number of branches \(7\)",
        ),
    ],
)
def test_bad_constructor_arguments_are_named(arguments, error, message):
    defaults = {"embed_dim": 48, "num_heads": 6, "pattern": PATTERN}
    with pytest.raises(error, match=message):
        MultiheadDilatedAttention(**(defaults | arguments))


@pytest.mark.parametrize(("embed_dim", "head_dim"), [(36, 6), (816, 136)])
def test_a_slow_head_dim_is_warned_of(embed_dim, head_dim):
    with pytest.warns(UserWarning, match=f"is {head_dim}: GPU kernels are fast"):
        MultiheadDilatedAttention(embed_dim, 6, PATTERN, device="meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"query": torch.randn(13, 48)},
            ValueError,
            r"query must have shape .*embed_dim=48.*13, 48",
        ),
        ({"key": torch.randn(2, 13, 47)}, ValueError, "key must have shape"),
        ({"value": "x"}, TypeError, "value must be a Tensor. Got str"),
        ({"positions": torch.arange(13)}, ValueError, "positions must be None without"),
        ({"cache": {}}, TypeError, "cache must be a DilatedKVCache. Got dict"),
        ({"cache": DilatedKVCache(DilatedPattern([5], [1]))}, ValueError, "attention's pattern"),
        ({"cache": DilatedKVCache(PATTERN)}, ValueError, "causal self-attention.*is_causal=False"),
    ],
)
def test_bad_forward_arguments_are_named(arguments, error, message):
    layer = MultiheadDilatedAttention(48, 6, PATTERN)
    with pytest.raises(error, match=message):
        layer(**({"query": torch.randn(2, 13, 48)} | arguments))


def test_initialisation_scales_value_and_output():
    plain, scaled = (MultiheadDilatedAttention(480, 6, PATTERN, gamma_init=g) for g in (1.0, 3.0))
    for name, factor in (("q_proj", 1), ("k_proj", 1), ("v_proj", 3), ("out_proj", 3)):
        weight = getattr(scaled, name).weight
        assert weight.std().item() == pytest.approx(factor * (2 / 960) ** 0.5, rel=0.02)
        assert getattr(plain, name).weight.std().item() == pytest.approx((2 / 960) ** 0.5, rel=0.02)
        assert not getattr(scaled, name).bias.any()


def test_an_injected_attention_is_used():
    class Doubling(nn.Module):
        def forward(self, query, key, value, *, is_causal=False, key_padding_mask=None):
            assert is_causal
            assert key_padding_mask is None
            return 2 * query

    layer = MultiheadDilatedAttention(48, 6, None, layer_norm=False, attention=Doubling())
    x = torch.randn(2, 13, 48)
    torch.testing.assert_close(layer(x, is_causal=True)[0], layer.out_proj(2 * layer.q_proj(x)))
    with pytest.raises(ValueError, match="need_weights must be False with an injected"):
        layer(x, is_causal=True, need_weights=True)
    with pytest.raises(ValueError, match="cache must be None with an injected attention"):
        layer(x, is_causal=True, cache=DilatedKVCache(PATTERN))


class Shift(nn.Module):
    """A position embedding that shows which positions it was given."""

    def forward(self, query, key, query_positions, key_positions):
        return (
            query * query_positions[:, None, None].to(query.dtype).cos(),
            key * key_positions[:, None, None].to(key.dtype).cos(),
        )


def test_positions_default_to_the_row_and_can_be_given():
    layer = multihead(position_embedding=Shift())
    x = torch.randn(2, 13, 48, dtype=torch.float64)
    default = layer(x, is_causal=True)[0]
    assert torch.equal(layer(x, is_causal=True, positions=torch.arange(13))[0], default)
    assert not torch.equal(layer(x, is_causal=True, positions=torch.arange(13) + 1)[0], default)
    with pytest.raises(ValueError, match=r"positions must have shape \(key length,\)=\(13,\)"):
        layer(x, positions=torch.arange(12))


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_a_cache_continues_the_full_forward(kv_heads):
    layer = multihead(position_embedding=Shift(), num_kv_heads=kv_heads)
    x = torch.randn(2, 29, 48, dtype=torch.float64)
    full = layer(x, is_causal=True)[0]
    cache = DilatedKVCache(PATTERN)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, cache=cache)[0] for part in x.split([13, 1, 1, 14], 1)]
    assert relative_error(torch.cat(parts, 1), full) < 1e-10
    training = multihead(dropout=0.1)
    with pytest.raises(ValueError, match=r"training with dropout=0\.1: call eval"):
        training(x, is_causal=True, cache=DilatedKVCache(PATTERN))


def test_repr_says_what_is_not_default():
    layer = DilatedAttention(PATTERN, dropout=0.5)
    assert repr(layer) == "DilatedAttention(DilatedPattern([5, 11], [1, 2]), dropout=0.5)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": "a"}, TypeError, "dropout must be a float. Got 'a'"),
        ({"dropout": True}, TypeError, "dropout must be a float. Got True"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\). Got 1.0"),
        ({"scale": "x"}, TypeError, "scale must be a float or None. Got 'x'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite. Got nan"),
        ({"backend": "nope"}, ValueError, "backend must be None or one of 'reference'"),
    ],
)
def test_options_are_checked_when_a_module_is_made(options, error, message):
    with pytest.raises(error, match=message):
        DilatedAttention(DilatedPattern([4], [1]), **options)
