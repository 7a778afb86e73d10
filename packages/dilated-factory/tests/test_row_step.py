"""A step of generation on the CPU computes what the modules of the model do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.models.generation import generate_tokens
from dilated_factory.models.row_step import RowStep


@pytest.mark.parametrize("positions", ["rotary", "xpos", "none", "learned", "sinusoidal"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_row_gives_the_states_that_the_model_gives(positions: str, ragged: bool) -> None:
    torch.manual_seed(0)
    config = LongNetConfig.model_validate(
        {
            "vocab_size": 23, "embed_dim": 24, "num_heads": 3, "num_layers": 2, "context": 48,
            "segment_lengths": (5, 12), "dilation_rates": (1, 3), "positions": positions,
            "embedding_norm": ragged, "float32_gelu": ragged, "drop_path": 0.2, "dropout": 0.1,
        }
    )  # fmt: skip
    model = LongNetLM(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        # So that no bias is 0 and no gain 1.
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(23, (3, 31))
    step, caches, expected = RowStep(model), model.new_caches(), model.new_caches()
    assert RowStep.can_serve(model)
    with torch.no_grad():
        first = torch.tensor([7, 3, 5]) if ragged else None
        for both in (caches, expected):
            model.hidden_states(tokens[:, :7], caches=both, lengths=first)
        for i in range(7, 31):
            alive = torch.tensor([1, i % 2, 1]) if ragged else None
            token = tokens[:, i : i + 1]
            states = model.hidden_states(token, caches=expected, lengths=alive)[:, 0]
            with torch.inference_mode():
                actual = step(token, caches, alive)
            torch.testing.assert_close(actual, states, rtol=1e-10, atol=1e-12)
    assert caches[1].lengths.tolist() == expected[1].lengths.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_narrow_model_stays_narrow(tiny_model: LongNetConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LongNetLM(tiny_model, dtype=dtype).eval()
    caches, expected = model.new_caches(), model.new_caches()
    with torch.no_grad():
        for token in torch.randint(256, (5, 2, 1)):
            states = model.hidden_states(token, caches=expected)[:, 0]
            actual = RowStep(model)(token, caches, None)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, states)


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _hook(model: LongNetLM) -> None:
    model.blocks[0].register_forward_hook(lambda _module, _given, out: 2 * out)


def _early_hook(model: LongNetLM) -> None:
    model.norm.register_forward_pre_hook(lambda _module, given: (2 * given[0].roll(1, -1),))


def _module(model: LongNetLM) -> None:
    layer = next(model.layers())
    layer.attention.v_proj = _Doubled(16, 16)


def _method(model: LongNetLM) -> None:
    layer = next(model.layers())
    forward = layer.feed_forward.forward
    layer.feed_forward.forward = lambda hidden: -forward(hidden)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_hook, _early_hook, _module, _method])
def test_a_model_of_other_modules_is_called_as_it_is(
    change: Callable[[LongNetLM], None], tiny_model: LongNetConfig
) -> None:
    torch.manual_seed(0)
    model = LongNetLM(tiny_model)
    change(model)
    assert not RowStep.can_serve(model)
    tokens = torch.randint(256, (2, 9))
    found = [
        generate_tokens(model, tokens, max_new_tokens=12, temperature=0, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


def test_what_was_generated_can_be_trained_on(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model)
    added = generate_tokens(model, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=9)
    assert not added.is_inference()
    model.loss(added).backward()


def test_new_weights_are_used_from_the_next_call_on(tiny_model: LongNetConfig) -> None:
    torch.manual_seed(0)
    model, other = LongNetLM(tiny_model), LongNetLM(tiny_model)
    tokens = torch.randint(256, (2, 9))
    generate_tokens(model, tokens, max_new_tokens=3)
    model.load_state_dict(other.state_dict())
    found = [
        generate_tokens(each, tokens, max_new_tokens=9, temperature=0) for each in (model, other)
    ]
    assert torch.equal(*found)
