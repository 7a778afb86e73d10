"""LongNetLM: causal, initialised as stated, a well-behaved torch module."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.models import head_loss
from dilated_factory.models.layers import TransformerDecoderLayer, magneto_gain


def build(config: LongNetConfig, **options: object) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(config, **options)  # type: ignore[arg-type]


def blocks(model: LongNetLM) -> list[TransformerDecoderLayer]:
    return [block for block in model.blocks if isinstance(block, TransformerDecoderLayer)]


def tokens(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(
    length=st.integers(2, 70),
    positions=st.sampled_from(["rotary", "xpos"]),
    head_offsets=st.sampled_from(["interleaved", "blocked"]),
    head_groups=st.sampled_from(["shared", "split"]),
    data=st.data(),
)
def test_the_future_never_leaks(
    length: int, positions: str, head_offsets: str, head_groups: str, data: st.DataObject
) -> None:
    config = LongNetConfig.model_validate(
        {
            "embed_dim": 32,
            "num_heads": 4,
            "num_layers": 2,
            "segment_lengths": (5, 12, 64),
            "dilation_rates": (1, 2, 3),
            "context": 64,
            "positions": positions,
            "head_offsets": head_offsets,
            "head_groups": head_groups,
        }
    )
    changed = data.draw(st.integers(1, length - 1))
    model = build(config, dtype=torch.float64).eval()
    before = tokens(length)
    after = before.clone()
    after[:, changed:] = (after[:, changed:] + tokens(length - changed, seed=2) % 255 + 1) % 256
    logits, other = model(before), model(after)
    torch.testing.assert_close(other[:, :changed], logits[:, :changed], rtol=0, atol=1e-12)
    assert not torch.equal(other[:, changed], logits[:, changed])


def test_every_weight_receives_a_gradient(tiny_model: LongNetConfig) -> None:
    model = build(tiny_model)
    model.loss(tokens(49)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key bias shifts all scores of a query alike without rotation, not with it.
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("num_layers", [1, 5])
def test_initialisation_follows_magneto(num_layers: int) -> None:
    config = LongNetConfig(embed_dim=192, num_heads=4, num_layers=num_layers)
    gain = math.sqrt(math.log(2 * num_layers))
    assert magneto_gain(num_layers) == gain
    for block in blocks(build(config)):
        attention, feed_forward = block.attention, block.feed_forward
        for layer, expected in [
            (attention.q_proj, 1.0),
            (attention.k_proj, 1.0),
            (attention.v_proj, gain),
            (attention.out_proj, gain),
            (feed_forward.fc1, gain),
            (feed_forward.fc2, gain),
        ]:
            xavier = math.sqrt(2 / (layer.in_features + layer.out_features))
            assert layer.weight.std().item() == pytest.approx(expected * xavier, rel=0.03)
            assert not layer.bias.any()


def test_the_first_loss_is_that_of_a_guess_with_unit_logits(tiny_model: LongNetConfig) -> None:
    config = tiny_model.model_copy(
        update={"embed_dim": 64, "num_heads": 2, "tie_embeddings": False}
    )
    loss = build(config).loss(tokens(4000, batch=1))
    assert loss.item() == pytest.approx(math.log(256) + 0.5, abs=0.15)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_if_tied(tiny_model: LongNetConfig, tied: bool) -> None:
    model = build(tiny_model.model_copy(update={"tie_embeddings": tied}))
    assert (model.head.weight is model.embedding.weight) == tied
    assert (copy.deepcopy(model).head.weight is model.head.weight) is False


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_change_neither_loss_nor_gradients(
    smoothing: float, tiny_model: LongNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_model, dtype=torch.float64), tokens(42, batch=3)
    expected = F.cross_entropy(
        model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=smoothing
    )
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for chunk in (7, 1000):
        monkeypatch.setattr(head_loss, "LOSS_BYTES", 8 * 256 * chunk)
        loss = model.loss(batch, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        found = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing_changes_nothing(tiny_model: LongNetConfig) -> None:
    config = tiny_model.model_copy(update={"dropout": 0.2})
    plain, frugal = build(config), build(config, activation_checkpointing=True)
    found = []
    for model in (plain, frugal):
        torch.manual_seed(3)
        loss = model.loss(tokens(40))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_given_targets_and_positions_are_those_of_a_whole_sequence(
    tiny_model: LongNetConfig,
) -> None:
    model, batch = build(tiny_model, dtype=torch.float64), tokens(42)
    expected = model.loss(batch)
    assert torch.equal(model.loss(batch[:, :-1], batch[:, 1:]), expected)
    # Rotation is relative: a shift of all positions changes nothing, another order does.
    for positions, same in ((torch.arange(41) + 1000, True), (torch.arange(41) * 2, False)):
        found = model.loss(batch, positions=positions)
        assert torch.allclose(found, expected, rtol=1e-9) == same
    with pytest.raises(ValueError, match=r"\(N,\)=\(41,\) or \(B, N\)=\(2, 41\). Got \(40,\)"):
        model.loss(batch, positions=torch.arange(40))
    with pytest.raises(ValueError, match=r"targets must have tokens' shape \(2, 42\)"):
        model.loss(batch, batch[:, 1:])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\). Got 1.0"):
        model.loss(batch, label_smoothing=1.0)


def test_padding_and_ignored_targets_are_as_if_they_were_not_there(
    tiny_model: LongNetConfig,
) -> None:
    model, batch = build(tiny_model, dtype=torch.float64), tokens(42)
    mask = torch.arange(41).expand(2, -1) < torch.tensor([[0], [9]])
    other = batch.clone()
    other[1, :9] = 3
    for given_tokens in (batch, other):
        targets = given_tokens[:, 1:].masked_fill(mask, -100)
        found = model.loss(given_tokens[:, :-1], targets, key_padding_mask=mask)
        logits = model(given_tokens[:, :-1], key_padding_mask=mask)[~mask]
        torch.testing.assert_close(found, F.cross_entropy(logits, batch[:, 1:][~mask]))
    unmasked = model(other[:, :-1])[~mask]
    assert not torch.allclose(unmasked, logits)
    torch.testing.assert_close(model(batch[:, :-1], key_padding_mask=mask)[~mask], logits)


def test_any_attention_can_be_injected(tiny_model: LongNetConfig) -> None:
    class Doubling(torch.nn.Module):
        def forward(self, query: torch.Tensor, *_: object, is_causal: bool, **__: object) -> object:
            assert is_causal
            return 2 * query

    model = LongNetLM(tiny_model, attention=Doubling)
    assert sum(isinstance(module, Doubling) for module in model.modules()) == 2
    model.loss(tokens(40)).backward()
    for block in blocks(model):
        assert block.attention.q_proj.weight.grad is not None
        assert block.attention.k_proj.weight.grad is None


def test_dropout_is_off_in_eval(tiny_model: LongNetConfig) -> None:
    model = build(tiny_model.model_copy(update={"dropout": 0.5}))
    batch = tokens(20)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_state_dict_and_deepcopy_carry_the_whole_model(tiny_model: LongNetConfig) -> None:
    model, batch = build(tiny_model), tokens(30)
    torch.manual_seed(9)
    other = LongNetLM(tiny_model)
    assert not torch.equal(other(batch), model(batch))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))
    assert torch.equal(copy.deepcopy(model)(batch), model(batch))


def test_a_model_on_the_meta_device_can_be_made_real(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    assert model.head.weight is model.embedding.weight
    assert model.loss(tokens(20)).isfinite()


@pytest.mark.parametrize(
    ("given_tokens", "error", "says"),
    [
        (torch.zeros(5, dtype=torch.int64), ValueError, r"tokens must have shape \(B, N\).*\(5,\)"),
        (torch.zeros(1, 5, dtype=torch.int32), TypeError, "tokens must be int64. Got torch.int32"),
    ],
)
def test_wrong_tokens_are_named(
    tiny_model: LongNetConfig, given_tokens: torch.Tensor, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        build(tiny_model)(given_tokens)


def test_a_loss_needs_two_tokens(tiny_model: LongNetConfig) -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, N \+ 1\).*\(2, 1\)"):
        build(tiny_model).loss(tokens(1))


@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
def test_padding_on_either_side_leaves_a_row_what_it_is_alone(
    tiny_model: LongNetConfig, positions: str
) -> None:
    config = tiny_model.model_copy(update={"positions": positions})
    model = LongNetLM(config, dtype=torch.float64).eval()
    ranges = [(0, 53), (7, 53), (0, 31), (19, 38), (52, 53)]
    tokens = torch.randint(256, (len(ranges), 53))
    columns = torch.arange(53)
    mask = torch.stack([(columns < first) | (columns >= end) for first, end in ranges])
    caches = model.new_caches()
    with torch.no_grad():
        found = model(tokens, key_padding_mask=mask)
        cached = model(tokens, key_padding_mask=mask, caches=caches)
        states = model.layer_states(tokens, key_padding_mask=mask)
        more = torch.randint(256, (len(ranges), 9))
        after = model(more, caches=caches)
        for row, (first, end) in enumerate(ranges):
            whole = torch.cat((tokens[row, first:end], more[row]))[None]
            alone = model(whole)[0]
            for some in (found, cached):
                torch.testing.assert_close(
                    some[row, first:end], alone[: end - first], rtol=1e-9, atol=1e-10
                )
            torch.testing.assert_close(after[row], alone[end - first :], rtol=1e-9, atol=1e-10)
            for one, some in zip(model.layer_states(whole), states, strict=True):
                torch.testing.assert_close(
                    some[row, first:end], one[0, : end - first], rtol=1e-9, atol=1e-10
                )
    assert caches[0].lengths.tolist() == [end - first + 9 for first, end in ranges]


def test_padding_between_real_tokens_keeps_its_positions(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model, dtype=torch.float64).eval()
    tokens = torch.randint(256, (2, 41))
    mask = torch.zeros(2, 41, dtype=torch.bool)
    mask[0, :5] = mask[0, 17] = mask[1, 3] = True
    caches = model.new_caches()
    with torch.no_grad():
        found = model(tokens, key_padding_mask=mask)
        cached = model(tokens, key_padding_mask=mask, caches=caches)
        alone = model(tokens[:1, 5:], key_padding_mask=mask[:1, 5:])
    torch.testing.assert_close(found[:1, 5:], alone, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(cached[~mask], found[~mask], rtol=1e-9, atol=1e-10)
    assert caches[0].lengths.tolist() == [36, 41]


def test_rows_of_nothing_but_padding_are_numbers_and_add_nothing(
    tiny_model: LongNetConfig,
) -> None:
    model = LongNetLM(tiny_model).eval()
    tokens = torch.randint(256, (2, 13))
    mask = torch.tensor([[True] * 13, [False] * 13])
    caches = model.new_caches()
    with torch.no_grad():
        assert model(tokens, key_padding_mask=mask).isfinite().all()
        assert model(tokens, key_padding_mask=mask, caches=caches).isfinite().all()
    assert caches[1].lengths.tolist() == [0, 13]
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape .*\(2, 13\)"):
        model(tokens, key_padding_mask=mask[:1])


def test_a_padded_row_trains_as_it_does_alone(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model, dtype=torch.float64)
    tokens = torch.randint(256, (1, 30))
    padded = torch.cat((torch.zeros(1, 11, dtype=torch.int64), tokens), 1)
    mask = torch.arange(40)[None] < 11
    targets = padded[:, 1:].clone()
    targets[:, :11] = -100
    losses = model.loss(tokens), model.loss(padded[:, :-1], targets, key_padding_mask=mask)
    torch.testing.assert_close(*losses)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in losses), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_padded_rows_go_through_one_compiled_graph(
    tiny_model: LongNetConfig, positions: str
) -> None:
    config = tiny_model.model_copy(update={"positions": positions})
    model = LongNetLM(config, dtype=torch.float64).eval()
    tokens, columns = torch.randint(256, (2, 23)), torch.arange(23)
    mask = torch.stack([columns < 5, columns > 19])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens, key_padding_mask=mask)
        expected = model(tokens, key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-9, atol=1e-10)
