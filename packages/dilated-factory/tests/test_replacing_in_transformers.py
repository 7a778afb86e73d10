"""Patterns and layouts in Hugging Face's models: one for each layer, or why not."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory import register_with_transformers, replace_attention
from dilated_testing import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WHOLE = DilatedPattern([64], [1])
HIDING = DilatedPattern([5, 12, 40], [1, 2, 3])
NAMES = (f"dilated_layout_{number}" for number in itertools.count())
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True)
def _no_registration_stays() -> Iterator[None]:
    tables = [
        interface._global_mapping
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    ]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def build(name: str, own: str = "sdpa", **options: Any) -> Any:
    config_name = name.removesuffix("ForCausalLM").removesuffix("Model")
    config = getattr(transformers, f"{config_name}Config")(**{**SHAPE, **options})
    config._attn_implementation = own
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(length: int = 23) -> Tensor:
    return torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(1))


def states(model: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
    out: Tensor = model(tokens() if ids is None else ids, **options)[0]
    return out


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_one_pattern_for_all_is_what_it_is_when_registered(name: str) -> None:
    model = build(name)
    dense, hiding, registered = (copy.deepcopy(model) for _ in range(3))
    replace_attention(dense, WHOLE)
    assert relative_error(states(dense), states(model)) < 1e-12
    table = replace_attention(hiding, HIDING)
    assert [row.visible for row in table.modules] == [HIDING, HIDING]
    name = next(NAMES)
    register_with_transformers(HIDING, name)
    registered.set_attn_implementation(name)
    mask = (torch.arange(23) >= torch.tensor([[4], [0]])).int()
    for options in ({}, {"attention_mask": mask}):
        expected = states(registered, **options)
        assert torch.equal(states(hiding, **options), expected)
        assert torch.equal(states(copy.deepcopy(hiding), **options), expected)
        assert relative_error(expected, states(model, **options)) > 1e-3


def test_each_layer_has_its_pattern_in_training_and_generation() -> None:
    model = build("LlamaForCausalLM")
    first = copy.deepcopy(model)
    found = replace_attention(first, {"*.0.self_attn": HIDING})
    assert [row.visible for row in found.modules] == [HIDING, None]
    # The layer without a pattern is dense: the same by name for both.
    both = copy.deepcopy(model)
    replace_attention(both, lambda name: HIDING if ".0." in name else WHOLE)
    assert relative_error(states(first), states(both)) < 1e-12
    all_hiding = copy.deepcopy(model)
    replace_attention(all_hiding, HIDING)
    assert relative_error(states(first), states(all_hiding)) > 1e-3
    first(tokens(), labels=tokens()).loss.backward()
    assert all(x.grad is not None for x in first.parameters())
    longer = [
        first.generate(tokens(), max_new_tokens=20, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*longer)


def test_one_graph_holds_the_pattern_of_a_layer() -> None:
    model = build("LlamaForCausalLM")
    replace_attention(model, HIDING)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 23, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turns = model.model.rotary_emb(x, torch.arange(23)[None])
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = attention(hidden_states=x, position_embeddings=turns, attention_mask=None)[0]
        got = compiled(hidden_states=x, position_embeddings=turns, attention_mask=None)[0]
    assert relative_error(got, expected) < 1e-12


def test_cross_attention_stays_dense_unless_it_is_named() -> None:
    options = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 48, "dropout": 0.0}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    model = build("BartModel", **options, **heads)
    found = replace_attention(model, HIDING)
    rows = {row.name: row.why_not for row in found.modules}
    assert rows["decoder.layers.0.encoder_attn"] == "cross attention"
    assert list(rows.values()).count("") == len(rows) - 1
    named = copy.deepcopy(model)
    replace_attention(named, {"*": HIDING})
    ids = tokens()
    assert (
        relative_error(
            states(named, ids, decoder_input_ids=ids), states(model, ids, decoder_input_ids=ids)
        )
        > 1e-3
    )


@pytest.mark.parametrize(
    ("name", "own", "options", "reasons"),
    [
        ("MistralForCausalLM", "sdpa", {}, {"sliding windows"}),
        ("Gemma2ForCausalLM", "eager", {}, {"sliding windows", "capped scores (soft-capping)"}),
        (
            "ModernBertModel",
            "eager",
            {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
            {
                "sliding windows",
                "its model has attention that cannot be replaced, and all of it shares a mask",
            },
        ),
        (
            "T5Model",
            "eager",
            {"d_model": 48, "num_layers": 1, "num_heads": 6, "d_kv": 8, "d_ff": 72},
            {"a bias of positions on the scores"},
        ),
        (
            "LongformerModel",
            "eager",
            {"attention_window": 4},
            {"its attention is not from transformers' AttentionInterface"},
        ),
    ],
)
def test_a_model_that_asks_for_more_is_left_with_the_reason(
    name: str, own: str, options: dict[str, Any], reasons: set[str]
) -> None:
    model = build(name, own, **options)
    with pytest.raises(ValueError, match="model must have attention that can be replaced") as told:
        replace_attention(model, WHOLE)
    rows = str(told.value).splitlines()[2:]
    assert rows
    assert {line.partition("  no  ")[2].strip() for line in rows} == reasons
    assert model.config._attn_implementation == own


def test_models_without_sliding_windows_are_replaced_though_their_kind_has_them() -> None:
    model = build("MistralForCausalLM", sliding_window=None)
    expected = states(model)
    replace_attention(model, WHOLE)
    assert relative_error(states(model), expected) < 1e-12


def test_the_name_alone_is_an_error_that_says_how_a_model_gets_its_patterns() -> None:
    replace_attention(build("LlamaForCausalLM"), WHOLE)
    other = build("LlamaForCausalLM")
    other.set_attn_implementation("dilated_modules")
    with pytest.raises(ValueError, match="must be set by replace_attention"):
        states(other)


def window(length: int) -> Any:
    layouts = pytest.importorskip("dilated_sparse", reason="dilated-sparse is absent").layouts
    return layouts.sliding_window(length, 5, block_size=4)


def test_a_layout_is_registered_as_a_pattern_is_and_holds_at_any_length() -> None:
    layout, name, model = window(32), next(NAMES), build("LlamaForCausalLM")
    register_with_transformers(layout, name)
    register_with_transformers(layout, name)  # the same again changes nothing
    new = copy.deepcopy(model)
    new.set_attn_implementation(name)
    for length in (9, 32, 41):
        ids = tokens(length)
        near = torch.arange(length)[:, None] - torch.arange(length) <= 5
        mask = (near & near.new_ones(length, length).tril()).expand(2, 1, -1, -1)
        expected = states(model, ids, attention_mask=mask)
        assert relative_error(states(new, ids), expected) < 1e-10
    longer = [
        new.generate(tokens(), max_new_tokens=20, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*longer)


def test_a_row_padded_on_the_left_is_what_it_is_alone_by_a_layout() -> None:
    model = build("LlamaForCausalLM")
    replace_attention(model, window(32))
    ids = tokens(20)
    mask = (torch.arange(20) >= torch.tensor([[0], [6]])).int()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = states(model, ids, attention_mask=mask, position_ids=positions)
    assert relative_error(padded[1:, 6:], states(model, ids[1:, 6:])) < 1e-10
    assert relative_error(padded[:1], states(model, ids[:1])) < 1e-10


def test_layouts_serve_encoders_and_torch_and_no_group() -> None:
    layout, model = window(32), build("BertModel")
    near = (torch.arange(23)[:, None] - torch.arange(23)).abs() <= 5
    expected = states(model, attention_mask=near.expand(2, 1, -1, -1))
    replace_attention(model, layout)
    assert relative_error(states(model), expected) < 1e-10
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(20, 4, 28, 0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 23, 20, dtype=torch.float64)
    expected = layer(x, src_mask=~near)
    replace_attention(layer, layout)
    assert relative_error(layer(x), expected) < 1e-10
    with pytest.raises(TypeError, match="pattern must be a DilatedPattern or a BlockLayout"):
        register_with_transformers("window", next(NAMES))  # type: ignore[arg-type] # the wrong type is the point
    pytest.importorskip("dilated_ring", reason="dilated-ring is absent")
    with pytest.raises(ValueError, match="must be a DilatedPattern with a group"):
        register_with_transformers(layout, next(NAMES), group=object())  # type: ignore[arg-type] # it is not looked at
