"""Inside Hugging Face's models: dense patterns are their attention, others are the definition."""

import copy
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
from dilated_factory import LongNetConfig, LongNetLM, register_with_transformers
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
            model(part, past_key_values=cache, use_cache=True).logits
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


@pytest.mark.parametrize(
    ("change", "call", "says"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            {},
            "the attention mask must be causal or full.*sliding",
        ),
        ({}, {"attention_mask": torch.zeros(2, 1, 37, 37)}, r"must be a padding mask \(B, M\)"),
        (
            {},
            {"position_ids": torch.arange(37).remainder(20).expand(2, -1), "use_cache": False},
            "the attention mask must be causal or full.*packed",
        ),
        ({}, {"output_attentions": True}, "output_attentions"),
    ],
    ids=["sliding window", "4-D mask", "packed", "weights"],
)
def test_what_is_not_served_is_an_error(
    change: dict[str, Any], call: dict[str, Any], says: str
) -> None:
    name = register(SPARSE)
    config = transformers.Qwen2Config(**SHAPE, **change)
    config._attn_implementation = name
    model = transformers.Qwen2ForCausalLM(config)
    with pytest.raises(ValueError, match=says):
        model(tokens(37), **call)


def test_a_cache_of_fixed_size_is_an_error() -> None:
    model = switched(build("Llama"), register(SPARSE))
    with pytest.raises(ValueError, match="past_key_values must hold exactly the positions so far"):
        model.generate(tokens(17), max_new_tokens=3, cache_implementation="static")


def test_a_name_is_for_one_pattern() -> None:
    name = register(SPARSE)
    register_with_transformers(DilatedPattern([5, 12, 40], [1, 2, 3]), name)
    with pytest.raises(ValueError, match=f"not be registered for another.*'{name}'"):
        register_with_transformers(DENSE, name)
    with pytest.raises(ValueError, match="'sdpa'"):
        register_with_transformers(DENSE, "sdpa")
    with pytest.raises(TypeError, match=r"pattern must be a DilatedPattern\. Got list"):
        register_with_transformers([5], "other")  # type: ignore[arg-type]  # wrong


def test_importing_the_package_leaves_transformers_alone() -> None:
    code = "import sys, dilated_factory; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("tied", [True, False])
def test_our_model_saves_and_loads_as_one_of_theirs(tied: bool, tmp_path: Path) -> None:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=61, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5, 12, 40),
        dilation_rates=(1, 2, 3), context=37, positions="xpos", tie_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump()))
    model.eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded: Any = LongNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.longnet.config == config
    assert (loaded.longnet.head.weight is loaded.longnet.embedding.weight) == tied

    batch, mask = tokens(37), torch.arange(37).expand(2, -1) > 4
    out = loaded(batch, attention_mask=mask.long(), labels=batch.masked_fill(~mask, -100))
    assert torch.equal(out.logits, model(batch, attention_mask=mask).logits)
    plain = LongNetLM(config).eval()
    plain.load_state_dict(loaded.longnet.state_dict())
    targets = batch.masked_fill(~mask, -100)[:, 1:]
    expected = plain.loss(batch[:, :-1], targets, key_padding_mask=~mask[:, :-1])
    torch.testing.assert_close(out.loss, expected)
