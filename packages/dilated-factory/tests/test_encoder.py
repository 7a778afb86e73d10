"""LongNetEncoder: both directions, tokens or embeddings, padding, states of all layers."""

import copy

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedAttention
from dilated_factory import LongNetEncoder, LongNetEncoderConfig
from dilated_testing import relative_error

VALUES = {
    "embed_dim": 32,
    "num_heads": 4,
    "num_layers": 3,
    "segment_lengths": (5, 12, 40),
    "dilation_rates": (1, 2, 3),
    "context": 37,
}


def build(**changes: object) -> LongNetEncoder:
    torch.manual_seed(0)
    config = LongNetEncoderConfig.model_validate({**VALUES, **changes})
    return LongNetEncoder(config, dtype=torch.float64).eval()


def embeddings(length: int = 29) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
def test_it_sees_both_directions(positions: str) -> None:
    model, x = build(positions=positions), embeddings()
    changed = x.clone()
    changed[:, 17] *= -1
    moved = (model(changed) - model(x)).abs().amax((0, 2))
    assert moved[:17].max() > 1e-6
    assert moved[18:].max() > 1e-6


def test_states_run_from_the_input_to_the_last_layer() -> None:
    model, x = build(), embeddings()
    states = model.layer_states(x)
    assert len(states) == 4
    assert torch.equal(states[0], x)
    for block, before, after in zip(model.blocks, states, states[1:], strict=False):
        assert torch.equal(block(before), after)
    assert torch.equal(model.norm(states[-1]), model.hidden_states(x))
    assert torch.equal(model(x), model.hidden_states(x))


def test_padding_is_as_if_it_were_not_there() -> None:
    model, x = build(), embeddings()
    mask = torch.zeros(2, 29, dtype=torch.bool)
    mask[0, 19:] = True
    found = model(x, key_padding_mask=mask)
    assert relative_error(found[0, :19], model(x[:1, :19])[0]) < 1e-10
    assert relative_error(found[1], model(x)[1]) < 1e-10
    assert relative_error(model(x)[0, :19], found[0, :19]) > 1e-4


@pytest.mark.parametrize("scaled", [True, False])
def test_tokens_are_embedded_and_a_head_gives_logits(scaled: bool) -> None:
    model = build(vocab_size=23, scale_embedding=scaled, head=True)
    plain = build()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.randint(23, (2, 29))
    assert model.embedding is not None
    assert model.head is not None
    embedded = model.embedding.weight[tokens] * (32**0.5 if scaled else 1)
    assert model(tokens).shape == (2, 29, 23)
    assert relative_error(model(tokens), plain(embedded) @ model.head.weight.T) < 1e-12


def test_count_padding_is_torchscales_habit() -> None:
    x = embeddings()
    assert relative_error(build(count_padding=True)(x), build()(x)) > 1e-4


def test_each_layer_gets_an_attention_of_its_own() -> None:
    made: list[DilatedAttention] = []
    plain = build()

    def attention() -> DilatedAttention:
        made.append(DilatedAttention(plain.config.pattern))
        return made[-1]

    model = LongNetEncoder(plain.config, attention=attention, dtype=torch.float64).eval()
    model.load_state_dict(plain.state_dict())
    assert len(made) == 3
    assert {id(module) for module in model.modules()} > {id(module) for module in made}
    assert torch.equal(model(embeddings()), plain(embeddings()))


def test_it_is_a_well_behaved_module() -> None:
    model, x = build(vocab_size=23, head=True, dropout=0.3), torch.randint(23, (2, 29))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    empty = LongNetEncoder(model.config, device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    loss = empty(x).square().mean()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in empty.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("config", "inputs", "error", "says"),
    [
        ({}, torch.zeros(2, 5), ValueError, r"\(B, N, embed_dim=32\) without a.*\(2, 5\)"),
        ({}, torch.zeros(2, 5, 31), ValueError, r"\(2, 5, 31\)"),
        ({"vocab_size": 7}, torch.zeros(2, 5, 32), ValueError, r"tokens must have shape"),
        ({"vocab_size": 7}, torch.zeros(2, 5), TypeError, "tokens must be int64"),
    ],
)
def test_wrong_inputs_are_named(
    config: dict[str, object], inputs: Tensor, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        build(**config)(inputs)


def test_a_head_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size must be given with head=True"):
        build(head=True)
