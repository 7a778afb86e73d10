"""Transformer layers: what they compute, with any attention, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dilated_core import DilatedAttention, DilatedKVCache, DilatedPattern
from dilated_core.extending import linear
from dilated_core.interfaces import AttentionModule
from dilated_factory import (
    LongNetEncoder,
    LongNetEncoderConfig,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from dilated_factory.models import layers
from dilated_factory.models.layers import DropPath, FeedForward
from dilated_factory.models.positions import RotaryEmbedding
from dilated_testing import relative_error

PATTERN = DilatedPattern([5, 12, 40], [1, 2, 3])
OTHER = DilatedPattern([7, 40], [1, 3])


class Dense(nn.Module):
    """Torch's own attention, with a mask that hides the padded keys."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        shown = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
        shown = shown.tril() if is_causal else shown
        if key_padding_mask is not None:
            shown = shown & ~key_padding_mask[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return out.transpose(1, 2)


def block_sparse() -> AttentionModule:
    sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    layout = sparse.layouts.sliding_window(23, 6, block_size=4)
    return sparse.BlockSparseAttention(layout)  # type: ignore[no-any-return]  # importorskip


ATTENTIONS: dict[str, Callable[[], AttentionModule]] = {
    "dilated": lambda: DilatedAttention(PATTERN),
    "dense": Dense,
    "block_sparse": block_sparse,
}


def double(layer: nn.Module) -> nn.Module:
    """Float64, with norms that are not the identity."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.double().eval()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_encoder_layer_is_its_formula(kind: str) -> None:
    attention = ATTENTIONS[kind]()
    layer = double(TransformerEncoderLayer(48, 6, attention, ffn_dim=19))
    assert isinstance(layer, TransformerEncoderLayer)
    x = torch.randn(2, 23, 48, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[1, 17:] = True

    normed = layer.attention_norm(x)
    heads = [
        linear(normed).unflatten(-1, (6, 8))
        for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    ]
    attended = attention(*heads, key_padding_mask=mask).flatten(-2)
    assert layer.attention.inner_norm is not None
    hidden = x + layer.attention.out_proj(layer.attention.inner_norm(attended))
    parts = layer.feed_forward
    inner = nn.functional.gelu(parts.fc1(layer.feed_forward_norm(hidden)))
    expected = hidden + parts.fc2(parts.inner_norm(inner))

    found = layer(x, key_padding_mask=mask)
    assert relative_error(found, expected) < 1e-12
    upstream = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True
    ):
        # A key bias shifts all scores of a query alike, so its gradient is rounding on both sides.
        assert relative_error(a, b) < 1e-10 or max(a.abs().max(), b.abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_decoder_layer_never_sees_the_future(kind: str) -> None:
    layer = double(TransformerDecoderLayer(48, 6, ATTENTIONS[kind]()))
    x = torch.randn(2, 23, 48, dtype=torch.float64)
    changed = x.clone()
    changed[:, 11:] *= -1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(after[:, :11], before[:, :11], rtol=0, atol=1e-12)
    assert (after[:, 11:] != before[:, 11:]).any(-1).all()


@settings(max_examples=20)
@given(length=st.integers(1, 41), memory_length=st.integers(1, 43), seed=st.integers(0, 99))
def test_cross_attention_reads_the_memory_with_its_own_attention(
    length: int, memory_length: int, seed: int
) -> None:
    torch.manual_seed(seed)
    crossing = DilatedAttention(OTHER)
    layer = double(
        TransformerDecoderLayer(
            48, 6, DilatedAttention(PATTERN), cross_attention=crossing, num_kv_heads=2
        )
    )
    assert isinstance(layer, TransformerDecoderLayer)
    x = torch.randn(2, length, 48, dtype=torch.float64)
    memory = torch.randn(2, memory_length, 48, dtype=torch.float64)
    mask = torch.rand(2, memory_length) < 0.3

    plain = double(TransformerDecoderLayer(48, 6, DilatedAttention(PATTERN), num_kv_heads=2))
    assert isinstance(plain, TransformerDecoderLayer)
    plain.load_state_dict(layer.state_dict(), strict=False)
    hidden = x + plain._attended(x, is_causal=True)
    assert layer.cross_attention is not None
    assert layer.cross_attention_norm is not None
    normed = layer.cross_attention_norm(hidden)
    q = layer.cross_attention.q_proj(normed).unflatten(-1, (6, 8))
    k = layer.cross_attention.k_proj(memory).unflatten(-1, (2, 8))
    v = layer.cross_attention.v_proj(memory).unflatten(-1, (2, 8))
    read = crossing(q, k, v, key_padding_mask=mask).flatten(-2)
    assert layer.cross_attention.inner_norm is not None
    read = layer.cross_attention.out_proj(layer.cross_attention.inner_norm(read))
    expected = plain._feed(hidden, read)

    found = layer(x, memory, memory_key_padding_mask=mask)
    assert relative_error(found, expected) < 1e-12


def test_a_decoder_layer_decodes_with_a_cache_and_a_memory() -> None:
    layer = double(
        TransformerDecoderLayer(
            48,
            6,
            DilatedAttention(PATTERN),
            cross_attention=Dense(),
            position_embedding=RotaryEmbedding(8),
        )
    )
    x = torch.randn(2, 29, 48, dtype=torch.float64)
    memory = torch.randn(2, 13, 48, dtype=torch.float64)
    cache = DilatedKVCache(PATTERN)
    with torch.no_grad():
        parts = [layer(part, memory, cache=cache) for part in x.split((11, 1, 17), dim=1)]
        assert relative_error(torch.cat(parts, 1), layer(x, memory)) < 1e-12


def test_positions_reach_the_position_embedding() -> None:
    embedding = RotaryEmbedding(8)
    layer = double(TransformerEncoderLayer(48, 6, Dense(), position_embedding=embedding))
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert relative_error(layer(x[:, order], positions=order), layer(x)[:, order]) < 1e-12
    assert relative_error(layer(x[:, order]), layer(x)[:, order]) > 1e-3


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_parameters_can_be_drawn_anew_on_a_real_device(kind: type[nn.Module]) -> None:
    crossing = {"cross_attention": Dense()} if kind is TransformerDecoderLayer else {}
    layer = kind(48, 6, Dense(), device="meta", gain=2.0, dropout=0.1, **crossing)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 99.0)
    assert isinstance(layer, TransformerEncoderLayer | TransformerDecoderLayer)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter.abs().max() < 5, name
    xavier = (2 / (48 + 192)) ** 0.5
    assert layer.feed_forward.fc1.weight.std().item() == pytest.approx(2.0 * xavier, rel=0.05)


def test_dropout_acts_on_what_each_part_adds() -> None:
    layer = TransformerEncoderLayer(48, 6, Dense(), dropout=0.5)
    x = torch.randn(2, 7, 48)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (
            lambda: TransformerEncoderLayer(48, 6, PATTERN),  # type: ignore[arg-type]  # wrong
            TypeError,
            "attention must be a module that satisfies .*AttentionModule. Got DilatedPattern",
        ),
        (
            lambda: TransformerDecoderLayer(48, 6, Dense(), cross_attention=Dense),  # type: ignore[arg-type]
            TypeError,
            "cross_attention must be a module that satisfies",
        ),
        (lambda: TransformerEncoderLayer(47, 6, Dense()), ValueError, "embed_dim must be divis"),
        (
            lambda: TransformerDecoderLayer(48, 6, Dense())(torch.ones(1, 2, 48), torch.ones(1, 2)),
            ValueError,
            "exactly if the layer has cross attention. Got a memory without",
        ),
        (
            lambda: TransformerDecoderLayer(48, 6, Dense(), cross_attention=Dense())(
                torch.ones(1, 2, 48)
            ),
            ValueError,
            "exactly if the layer has cross attention. Got None with",
        ),
        (
            lambda: TransformerDecoderLayer(48, 6, Dense())(
                torch.ones(1, 2, 48), memory_key_padding_mask=torch.ones(1, 2).bool()
            ),
            ValueError,
            "memory_key_padding_mask must be None without a memory",
        ),
    ],
)
def test_wrong_arguments_are_named(build: object, error: type[Exception], says: str) -> None:
    assert callable(build)
    with pytest.raises(error, match=says):
        build()


@pytest.mark.parametrize("name", ["gelu", "relu", "swish"])
def test_an_activation_is_the_one_of_its_name(name: str) -> None:
    function = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}[name]
    feed = FeedForward(8, 16, activation=name)
    hidden = torch.randn(2, 5, 8)
    assert torch.equal(feed(hidden), feed.fc2(feed.inner_norm(function(feed.fc1(hidden)))))
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', 'swish'"):
        FeedForward(8, 16, activation="tanh")


def test_a_skipped_path_adds_nothing_in_training_and_its_mean_stays() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    added = torch.randn(4000, 2, 3)
    left = drop(added)
    skipped = (left == 0).all(-1).all(-1)
    assert 0.2 < skipped.double().mean() < 0.3
    assert torch.allclose(left[~skipped], added[~skipped] / 0.75)
    assert torch.equal(drop.eval()(added), added)


def test_the_chance_to_skip_rises_to_the_last_layer() -> None:
    config = LongNetEncoderConfig(
        embed_dim=16, num_heads=1, num_layers=3, drop_path=0.4, segment_lengths=(8,),
        dilation_rates=(1,),
    )  # fmt: skip
    model = LongNetEncoder(config)
    chances = [module.chance for module in model.modules() if isinstance(module, DropPath)]
    assert chances == [0.2, 0.4]
    inputs = torch.randn(64, 9, 16)
    assert not torch.equal(model(inputs), model(inputs))
    plain = LongNetEncoder(config.model_copy(update={"drop_path": 0.0})).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(inputs), plain(inputs))


@pytest.mark.parametrize("shape", [(), (2500,), (3, 2500), (1, 1024), (2, 1), (2, 0)])
def test_without_gradients_rows_go_through_the_feed_forward_part_in_turn(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, calls = FeedForward(8, 16, dtype=torch.float64), list[tuple[int, ...]]()

    def counted(layer: nn.Module, given: Tensor) -> Tensor:
        calls.append(given.shape[:-1])
        return linear(layer, given)

    monkeypatch.setattr(layers, "linear", counted)
    hidden = torch.randn(*shape, 8, dtype=torch.float64)
    expected = feed(hidden)
    assert calls == [shape] * 2
    calls.clear()
    with torch.no_grad():
        found = feed(hidden)
    parts = (1024, 1024, 452) if shape[-1:] == (2500,) else shape[-1:]
    assert calls == [(*shape[:-1], part) for part in parts or [()] for _ in range(2)] or not shape
    assert found.shape == expected.shape
    if found.numel():
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", ["fc1", "inner_norm", "fc2"])
def test_a_hook_inside_the_feed_forward_part_sees_all_rows_at_once(name: str) -> None:
    feed, seen = FeedForward(8, 16), list[Tensor]()
    feed.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        feed(torch.randn(2, 2500, 8))
    assert [x.shape[:-1] for x in seen] == [(2, 2500)]
