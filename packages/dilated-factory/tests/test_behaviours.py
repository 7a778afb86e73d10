"""The four behaviours that were flaky in earlier systems of this kind, each twenty times."""

import pytest
import torch
from torch import Tensor

from dilated_core import dilated_attention
from dilated_factory import LongNetConfig, LongNetLM, TransformerEncoderLayer
from dilated_factory.configs.attention import AutoConfig, DilatedConfig
from dilated_factory.kinds.default import default_registry
from dilated_factory.kinds.registry import create_attention

DILATED = DilatedConfig(segment_lengths=(8, 24), dilation_rates=(1, 3))
repeats = pytest.mark.parametrize("repeat", range(20))


def heads(length: int = 48) -> Tensor:
    return torch.randn(2, length, 3, 8, generator=torch.Generator().manual_seed(0))


@repeats
def test_auto_selection_creates_a_valid_module(repeat: int) -> None:
    request = AutoConfig(
        length=48, heads=3, head_dim=8, segment_lengths=(8, 24), dilation_rates=(1, 3)
    )
    module = create_attention(request, default_registry())
    q = heads()
    torch.testing.assert_close(module(q, q, q), dilated_attention(q, q, q, DILATED.pattern))


@repeats
def test_config_objects_work(repeat: int) -> None:
    registry = default_registry()
    made = create_attention(DILATED, registry)
    q = heads()
    for same in (DILATED.model_dump(), DILATED.model_copy(), registry.parse(DILATED.model_dump())):
        torch.testing.assert_close(create_attention(same, registry)(q, q, q), made(q, q, q))


@repeats
def test_positional_and_keyword_construction_agree(repeat: int) -> None:
    registry = default_registry()
    values = {"kind": "dilated_multihead", "embed_dim": 24, "num_heads": 3}
    config = registry.parse(values | {"attention": DILATED})
    modules = []
    for make in (
        lambda: create_attention(config, registry),
        lambda: create_attention(config=config, registry=registry),
        lambda: registry.create(config),
        lambda: registry.create(config=config, group=None, buffers=None),
    ):
        torch.manual_seed(5)
        modules.append(make())
    x = heads().flatten(2)
    for module in modules[1:]:
        assert repr(module) == repr(modules[0])
        torch.testing.assert_close(module(x)[0], modules[0](x)[0])


@repeats
def test_use_inside_a_transformer(repeat: int) -> None:
    registry = default_registry()
    layer = TransformerEncoderLayer(24, 3, create_attention(DILATED, registry))
    x = heads().flatten(2).requires_grad_()
    layer(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    config = LongNetConfig(
        embed_dim=48, num_heads=3, num_layers=2, segment_lengths=(8, 24), dilation_rates=(1, 3)
    )
    model = LongNetLM(config, attention=lambda: create_attention(DILATED, registry))
    plain = LongNetLM(config)
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(48)[None]
    torch.testing.assert_close(model(tokens), plain(tokens))
