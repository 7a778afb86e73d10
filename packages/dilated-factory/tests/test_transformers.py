"""Inside Hugging Face's models: dense patterns are their attention, others are the definition."""

import copy
import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory import LongNetConfig, register_with_transformers
from dilated_testing import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DENSE = DilatedPattern([64], [1])
SPARSE = DilatedPattern([5, 12, 40], [1, 2, 3])
NAMES = (f"dilated_test_{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def _no_registration_stays() -> Iterator[None]:
    """Leave transformers' two tables as they were."""
    tables = [
        interface._global_mapping
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    ]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}


def build(family: str) -> Any:
    """A tiny model in float64 whose weights are large enough for attention to matter.

    Its own attention is torch's: transformers' eager attention takes its softmax in float32.
    """
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def register(pattern: DilatedPattern) -> str:
    name = next(NAMES)
    register_with_transformers(pattern, name)
    return name


def switched(model: Any, name: str) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    assert other.config._attn_implementation == name
    return other


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that hand a cache to a model, by the name that it has for it."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


def gradients(model: Any, batch: Tensor, **options: Tensor) -> list[Tensor]:
    loss = model(batch, labels=batch, **options).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_dense_pattern_is_the_models_own_attention(family: str) -> None:
    model = build(family)
    dilated = switched(model, register(DENSE))
    batch = tokens(37)
    for found, expected in zip(gradients(dilated, batch), gradients(model, batch), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_another_pattern_is_its_definition() -> None:
    model = build("Llama")
    dilated = switched(model, register(SPARSE))
    batch = tokens(37)
    # A 4-D mask is added to the scores: the logarithm of the multiplicities.
    count = SPARSE.multiplicity(37, 6, is_causal=True).double()
    assert (count.diagonal(dim1=1, dim2=2) > 0).all()
    mask = count.log().clamp(min=-1e4).expand(2, -1, -1, -1)
    expected = gradients(model, batch, attention_mask=mask)
    for found, wanted in zip(gradients(dilated, batch), expected, strict=True):
        assert relative_error(found, wanted) < 1e-9
    assert relative_error(expected[0], gradients(model, batch)[0]) > 1e-3


@pytest.mark.parametrize("pattern", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(pattern: DilatedPattern, side: str) -> None:
    model = switched(build("Llama"), register(pattern))
    lengths, batch = (23, 37, 30), tokens(37, batch=3)
    real = torch.arange(37).expand(3, -1) < torch.tensor(lengths).unsqueeze(1)
    real = real.flip(1) if side == "left" else real
    positions = (real.cumsum(1) - 1).clamp(min=0)
    found = model(
        batch.masked_fill(~real, 0), attention_mask=real.long(), position_ids=positions
    ).logits
    for row, length in enumerate(lengths):
        alone = model(batch[row][real[row]].unsqueeze(0)).logits[0]
        assert len(alone) == length
        assert relative_error(found[row][real[row]], alone) < 1e-9


def test_a_padding_mask_comes_as_it_is_and_not_as_a_square() -> None:
    seen = []
    name = register(SPARSE)
    attention = transformers.AttentionInterface()[name]

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return attention(module, q, k, v, mask, **options)

    transformers.AttentionInterface.register(name, spy)
    model = switched(build("Llama"), name)
    mask = torch.arange(37).expand(2, -1) > 4
    model(tokens(37), attention_mask=mask.long())
    model(tokens(37), attention_mask=torch.ones(2, 37, dtype=torch.int64))
    model(tokens(37))
    assert len(seen) == 6
    assert all(torch.equal(found, mask) for found in seen[:2])
    assert seen[2:] == [None] * 4


@pytest.mark.parametrize(
    ("family", "pattern", "padded"),
    [("Llama", DENSE, True), ("Llama", SPARSE, True), ("Qwen3", SPARSE, False)],
    ids=str,
)
def test_generation_with_the_cache_is_that_without(
    family: str, pattern: DilatedPattern, padded: bool
) -> None:
    model = switched(build(family), register(pattern))
    prompt, mask = tokens(17), torch.ones(2, 17, dtype=torch.int64)
    if padded:
        mask[0, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 11, "do_sample": False}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    if pattern == DENSE:
        assert torch.equal(cached, build(family).generate(prompt, **options))
    if padded:
        alone = model.generate(prompt[:1, 6:], max_new_tokens=11, do_sample=False)
        assert torch.equal(cached[0, 17:], alone[0, 11:])


def test_decoding_in_chunks_with_a_dynamic_cache_is_one_call() -> None:
    model = switched(build("Llama"), register(SPARSE))
    batch, cache = tokens(37), transformers.DynamicCache()
    with torch.no_grad():
        parts = [
            model(part, **with_cache(model, cache)).logits
            for part in batch.split((13, 1, 23), dim=1)
        ]
        assert relative_error(torch.cat(parts, 1), model(batch).logits) < 1e-10


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_training_lowers_the_loss_and_checkpointing_changes_nothing() -> None:
    model = switched(build("Llama"), register(SPARSE)).float().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    batch = tokens(37)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, batch), plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(batch, labels=batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_reaches_the_attention() -> None:
    model = switched(build("Llama"), register(SPARSE)).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = tokens(37)
    assert not torch.equal(model(batch).logits, model(batch).logits)
    assert torch.equal(model.eval()(batch).logits, model(batch).logits)


def test_an_encoder_sees_both_directions() -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=72, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).double().eval()
    batch, mask = tokens(37), (torch.arange(37).expand(2, -1) < 31).long()
    found = switched(model, register(DENSE))(batch, attention_mask=mask).last_hidden_state
    expected = model(batch, attention_mask=mask).last_hidden_state
    assert relative_error(found[:, :31], expected[:, :31]) < 1e-9


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    name = register(SPARSE)
    model = switched(build("Llama"), name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=name, dtype=torch.float64
    )
    assert loaded.config._attn_implementation == name
    found, expected = (one.eval()(tokens(37)).logits for one in (loaded, model))
    # Its rotary frequencies are made anew, in float32 or float64.
    assert relative_error(found, expected) < 1e-6


LENGTHS = [13, 24]  # of packed sequences
PACKED = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)


def build_with(family: str, name: str, kind: str = "ForCausalLM", **change: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**SHAPE | change)
    config._attn_implementation = name
    return getattr(transformers, family.removesuffix("Text") + kind)(config).eval()


@pytest.mark.parametrize(
    ("family", "kind", "change", "says"),
    [
        ("Mistral", "ForCausalLM", {"sliding_window": 8}, "a sliding window of 8"),
        (
            "Qwen2",
            "ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
            "a sliding window of 7",
        ),
        ("Gemma2", "ForCausalLM", {"sliding_window": 9}, "a sliding window of 9"),
        (
            "ModernBert",
            "ForMaskedLM",
            {"local_attention": 10, "cls_token_id": 1, "sep_token_id": 2},
            "a sliding window of 5",
        ),
        (
            "Llama4Text",
            "ForCausalLM",
            {"attention_chunk_size": 8, "num_local_experts": 2},
            "chunked attention in chunks of 8",
        ),
    ],
    ids=["Mistral", "Qwen2", "Gemma2", "ModernBERT", "Llama4"],
)
def test_a_mask_that_is_not_served_is_refused_by_the_name_of_its_feature(
    family: str, kind: str, change: dict[str, Any], says: str
) -> None:
    model = build_with(family, register(SPARSE), kind, **change)
    with pytest.raises(ValueError, match=rf"must be causal or full for dilated .*\. Got {says}\.$"):
        model(tokens(37))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"or_mask_function": lambda b, h, q, k: k >= 0}, "a mask function of its own, .*lambda>"),
        (
            {"position_ids": PACKED},
            r"packed sequences \(position_ids that restart or jump\)",
        ),
        ({"block_sequence_ids": torch.zeros(1, 37, dtype=torch.int64)}, r"blocks that see .*"),
    ],
    ids=["own", "packed", "blocks"],
)
def test_a_mask_function_is_named_and_never_printed(extra: dict[str, Any], says: str) -> None:
    from transformers.masking_utils import create_causal_mask

    names = inspect.signature(create_causal_mask).parameters
    if not extra.keys() <= names.keys():
        pytest.skip(f"this version of transformers has no {', '.join(extra)}")
    config = transformers.LlamaConfig(**SHAPE)
    config._attn_implementation = register(SPARSE)
    cache = "cache" if "cache" in names else "past_key_values"
    with pytest.raises(ValueError, match=rf"must be causal or full .*\. Got {says}\.$") as caught:
        create_causal_mask(
            config=config, inputs_embeds=torch.zeros(1, 37, 48), attention_mask=None,
            **{cache: None}, **extra,
        )  # fmt: skip
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("GptOss", {"num_local_experts": 2}, r"s_aux must be None .* attention sinks.*of \(6,\)"),
        ("Gemma2", {"attn_logit_softcapping": 30.0}, "softcap must be None .*capped.* Got 30.0"),
    ],
)
def test_what_changes_the_scores_is_refused_by_the_name_of_its_feature(
    family: str, change: dict[str, Any], says: str
) -> None:
    layer_types = ["full_attention", "full_attention"]
    model = build_with(family, register(SPARSE), layer_types=layer_types, **change)
    cosine = torch.ones(1, 37, 4 if family == "GptOss" else 8)
    # These models make masks of sliding windows whatever their layers are, so ask a layer.
    with pytest.raises(ValueError, match=says):
        model.model.layers[0].self_attn(
            hidden_states=torch.zeros(1, 37, 48),
            position_embeddings=(cosine, 0 * cosine),
            attention_mask=None,
        )


def test_a_bias_of_positions_is_refused_without_printing_it() -> None:
    from transformers.models.t5 import modeling_t5

    if not hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("T5 has only an attention of its own in this version of transformers")
    config = transformers.T5Config(
        vocab_size=61, d_model=48, d_kv=8, d_ff=72, num_layers=2, num_heads=6,
        decoder_start_token_id=0,
    )  # fmt: skip
    config._attn_implementation = register(SPARSE)
    model = transformers.T5ForConditionalGeneration(config)
    says = r"position_bias must be None .*Got torch.float32 of \(1, 6, 37, 37\)\.$"
    with pytest.raises(ValueError, match=says):
        model(tokens(37), decoder_input_ids=tokens(5))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"attention_mask": torch.zeros(2, 1, 37, 37)}, r"must be a padding mask \(B, M\)"),
        (
            {"attention_mask": torch.ones(2, 1, 37, 37, dtype=torch.bool)},
            r"neither square masks nor biases.*Got torch.bool of \(2, 1, 37, 37\)",
        ),
        ({"output_attentions": True}, "output_attentions must be False"),
    ],
    ids=["added mask", "bool mask", "weights"],
)
def test_what_is_not_served_is_an_error(call: dict[str, Any], says: str) -> None:
    model = build_with("Qwen2", register(SPARSE))
    with pytest.raises(ValueError, match=says):
        model(tokens(37), **call)


def test_a_block_mask_is_an_error() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model = build_with("Llama", register(SPARSE))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 37, 37, device="cpu")
    with pytest.raises(ValueError, match=r"must be a padding mask \(B, M\).*Got BlockMask\."):
        model(tokens(37), attention_mask=mask)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX"])
@pytest.mark.parametrize(
    "call",
    [
        {"use_cache": False},
        {"use_cache": True},
        {"use_cache": False, "attention_mask": torch.ones(1, 37, dtype=torch.int64)},
        {"use_cache": True, "attention_mask": torch.ones(1, 37, dtype=torch.int64)},
        {"use_cache": True, "attention_mask": (torch.arange(37) > 2).long().unsqueeze(0)},
        {"use_cache": True, "attention_mask": (torch.arange(37) != 13).long().unsqueeze(0)},
    ],
    ids=["plain", "cache", "mask", "cache and mask", "left padding", "padding between"],
)
@pytest.mark.parametrize("start", [0, 100])
def test_packed_positions_are_refused_whatever_else_comes(
    family: str, call: dict[str, Any], start: int
) -> None:
    model = build_with(family, register(SPARSE))
    with pytest.raises(ValueError, match="packed sequences"):
        model(tokens(37, batch=1), position_ids=PACKED + start, **call)


def test_a_jump_says_where_it_is() -> None:
    model = build_with("Llama", register(SPARSE))
    positions = torch.arange(37).expand(2, -1).clone()
    positions[1, 30:] += 5
    says = r"position_ids must count up by one .*Got position 35 after 29 at token 30 of row 1\.$"
    with pytest.raises(ValueError, match=says):
        model(tokens(37), position_ids=positions)
    positions[1, 30:] -= 5
    model(tokens(37), position_ids=positions)
    positions[1, 30:] += 5  # the same tensor, with other numbers
    with pytest.raises(ValueError, match=says):
        model(tokens(37), position_ids=positions)
    with pytest.raises(ValueError, match="Got position 0 after 5 at token 6 of row 0"):
        model(tokens(37), position_ids=torch.arange(37).remainder(6).unsqueeze(0))


def test_a_sequence_that_begins_after_a_cache_is_refused() -> None:
    model = build_with("Llama", register(SPARSE))
    cache = transformers.DynamicCache()
    model(tokens(13), **with_cache(model, cache))
    again = torch.arange(5).unsqueeze(0)
    with pytest.raises(ValueError, match="Got position 0 at token 13 of row 0"):
        model(tokens(5), position_ids=again, **with_cache(model, cache))


def test_positions_of_padding_mean_nothing_and_a_first_position_may_be_late() -> None:
    model = build_with("Llama", register(SPARSE)).double()
    batch, positions = tokens(37), torch.arange(37).expand(2, -1).clone()
    plain = model(batch).logits
    late = model(batch, position_ids=positions + 50).logits
    assert relative_error(late, plain) < 1e-5  # rotary positions are relative
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[0, :6] = mask[1, 31:] = mask[:, 20] = 0
    expected = model(batch, attention_mask=mask, position_ids=positions).logits
    positions[mask == 0] = 1
    found = model(batch, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(found[mask == 1], expected[mask == 1])


def test_a_collator_that_flattens_is_refused_by_each_thing_that_it_hands_over() -> None:
    model = build_with("Llama", register(SPARSE))
    samples = [{"input_ids": list(range(1, 1 + length))} for length in LENGTHS]
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = dict(collator(samples))
    whole = torch.arange(37).unsqueeze(0)
    assert torch.equal(batch["position_ids"], PACKED)
    lengths = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ids = {"input_ids": batch["input_ids"]}
    for names, says in (
        (("position_ids",), "position_ids must count up by one"),
        (lengths, "cu_seq_lens_q must be None .*packed sequences"),
        (("seq_idx",), "seq_idx must be None .*packed sequences"),
    ):
        given = ids | {"position_ids": whole} | {name: batch[name] for name in names}
        with pytest.raises(ValueError, match=says):
            model(**given)
    with pytest.raises(ValueError, match="packed sequences"):
        model(**batch)


def test_packed_positions_are_refused_in_a_compiled_graph() -> None:
    model = build_with("Llama", register(SPARSE))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch, positions = tokens(37, batch=1), torch.arange(37).unsqueeze(0)
    with torch.no_grad():
        found = compiled(batch, position_ids=positions).logits
        assert relative_error(found, model(batch).logits) < 1e-5
        with pytest.raises(RuntimeError, match="position_ids must count up by one"):
            compiled(batch, position_ids=PACKED)


def test_a_cache_of_fixed_size_is_an_error() -> None:
    model = switched(build("Llama"), register(SPARSE))
    with pytest.raises(ValueError, match="must hold exactly the positions so far") as caught:
        model.generate(tokens(17), max_new_tokens=3, cache_implementation="static")
    (name,) = with_cache(model, None).keys() - {"use_cache"}
    assert str(caught.value).startswith(name)


# What we rely on in transformers itself, seen in 5.6.0, 5.17.0 and 5.24.0.


def test_transformers_cuts_at_positions_only_without_a_cache_and_without_a_mask() -> None:
    model = build("Llama")
    batch = tokens(37, batch=1)
    alone = model(batch[:, 13:]).logits
    cut = model(batch, position_ids=PACKED, use_cache=False).logits
    assert relative_error(cut[:, 13:], alone) < 1e-9
    for options in ({"use_cache": True}, {"attention_mask": torch.ones_like(batch)}):
        options = {"use_cache": False} | options
        across = model(batch, position_ids=PACKED, **options).logits
        assert relative_error(across[:, 13:], alone) > 1e-2


def test_transformers_asks_for_masks_by_these_names() -> None:
    name = register(SPARSE)
    seen: list[dict[str, Any]] = []

    def spy(**options: Any) -> None:
        seen.append(options)

    transformers.AttentionMaskInterface.register(name, spy)
    model = build_with("Llama", name)
    cache = transformers.DynamicCache()
    model(tokens(13), **with_cache(model, cache))
    model(tokens(4), **with_cache(model, cache))
    model(tokens(4), attention_mask=torch.ones(2, 4, dtype=torch.int64), use_cache=False)
    model.config.is_causal = False
    model(tokens(4), use_cache=False)
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
    found = [tuple(int(options[name]) for name in names) for options in seen]
    assert found == [(2, 13, 13, 0, 0), (2, 4, 17, 13, 0), (2, 4, 4, 0, 0), (2, 4, 4, 0, 0)]
    from transformers import masking_utils

    causal, full = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    assert [options["mask_function"] for options in seen] == [causal] * 3 + [full]
    assert seen[0]["attention_mask"] is None
    assert seen[2]["attention_mask"].dtype == torch.bool


def test_transformers_hands_positions_and_heads_to_the_attention() -> None:
    seen: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []
    name = register(SPARSE)
    attention = transformers.AttentionInterface()[name]

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        seen.append(([tuple(x.shape) for x in (q, k, v)], options))
        return attention(module, q, k, v, mask, **options)

    transformers.AttentionInterface.register(name, spy)
    build_with("Llama", name)(tokens(37))
    shapes, options = seen[0]
    assert shapes == [(2, 6, 37, 8), (2, 2, 37, 8), (2, 2, 37, 8)]
    assert options["position_ids"].tolist() == [list(range(37))]
    assert options["scaling"] == 8**-0.5
    assert options["dropout"] == 0.0


def test_a_decoder_that_is_not_causal_sees_both_directions() -> None:
    model = build("Llama")
    model.config.is_causal = False
    expected = model(tokens(37)).logits
    assert relative_error(switched(model, register(DENSE))(tokens(37)).logits, expected) < 1e-9
    model.config.is_causal = True
    assert relative_error(model(tokens(37)).logits, expected) > 1e-2


def test_a_model_comes_back_in_the_dtype_that_it_was_saved_in(tmp_path: Path) -> None:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=61, embed_dim=32, num_heads=4, num_layers=1, segment_lengths=(5,),
        dilation_rates=(1,), context=37,
    )  # fmt: skip
    ours = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump()))
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    loaded: Any = LongNetForCausalLM.from_pretrained(tmp_path / "ours")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    build("Llama").save_pretrained(tmp_path / "theirs")
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "theirs", attn_implementation=register(SPARSE)
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}


def test_a_name_is_for_one_pattern() -> None:
    name = register(SPARSE)
    register_with_transformers(DilatedPattern([5, 12, 40], [1, 2, 3]), name)
    with pytest.raises(ValueError, match=f"not be registered for another.*'{name}'"):
        register_with_transformers(DENSE, name)
    with pytest.raises(ValueError, match="'sdpa'"):
        register_with_transformers(DENSE, "sdpa")
    with pytest.raises(TypeError, match="must be a DilatedPattern or a BlockLayout"):
        register_with_transformers([5], "other")  # type: ignore[arg-type]  # wrong


def test_importing_the_package_leaves_transformers_alone() -> None:
    code = "import sys, dilated_factory; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_parts_of_a_batch_and_layers_computed_again_train_as_the_whole() -> None:
    """As transformers' Trainer 5.24 accumulates: it gives the number of targets of all parts."""
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=61, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5,),
        dilation_rates=(1,), context=37,
    )  # fmt: skip
    model: Any = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump())).double()
    assert model.accepts_loss_kwargs
    batch = torch.randint(61, (2, 37))
    labels = batch.clone()
    labels[0, 5:] = -100
    model(batch, labels=labels).loss.backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    assert model.longnet.activation_checkpointing is True
    count = (labels[:, 1:] != -100).sum()
    for part, targets in zip(batch.split(1), labels.split(1), strict=True):
        model(part, labels=targets, num_items_in_batch=count).loss.backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        assert relative_error(parameter.grad, expected) < 1e-10
