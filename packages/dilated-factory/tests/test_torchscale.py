"""torchscale's checkpoints: its own outputs, from a dict and from files, and clear errors."""

import argparse
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dilated_factory import (
    LongNetConfig,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetLM,
    load_torchscale,
)
from dilated_factory.interop.torchscale import their_name
from dilated_testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("torchscale_decoder", "torchscale_decoder_xpos")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The checkpoint, the other tensors, and the fields of our configuration."""
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    fields = {
        "vocab_size": told["vocab_size"],
        "embed_dim": told["embed_dim"],
        "num_heads": told["heads"],
        "num_layers": told["layers"],
        "ffn_dim": told["ffn_dim"],
        "segment_lengths": told["segment_lengths"],
        "dilation_rates": told["dilation_rates"],
        "layer_norm_eps": told["layernorm_eps"],
    }
    if not name.endswith(("xpos", "learned")):
        fields["positions"] = "none"
    return state, tensors, fields


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_gives_torchscales_logits(name: str) -> None:
    state, tensors, fields = golden(name)
    model = load_torchscale(state, LongNetConfig(**fields))
    logits = model(tensors["tokens"])
    assert logits.dtype == torch.float64
    assert relative_error(logits, tensors["logits"]) < 1e-8
    assert not model.training


@pytest.mark.parametrize(
    "change",
    [
        {"segment_lengths": [8, 16, 16]},
        {"dilation_rates": [1, 2, 2]},
        {"num_heads": 2},
        {"layer_norm_eps": 1e-3},
        {"scale_embedding": True},
        {"xpos_scale_base": 99},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_golden_data_tells_each_field_apart(change: dict[str, Any]) -> None:
    # Without xPos, whose bases would tell another number of heads.
    state, tensors, fields = golden(NAMES["xpos_scale_base" in change])
    model = load_torchscale(state, LongNetConfig(**{**fields, **change}))
    assert relative_error(model(tensors["tokens"]), tensors["logits"]) > 1e-5


def test_torchscales_gelu_is_that_of_float32() -> None:
    state, tensors, fields = golden("torchscale_decoder")
    model = load_torchscale(state, LongNetConfig(**fields))
    for block in model.blocks:
        block.feed_forward.float32_gelu = False  # type: ignore[union-attr]  # nn.Module
    error = relative_error(model(tensors["tokens"]), tensors["logits"])
    assert 1e-8 < error < 1e-6


def test_generation_continues_a_loaded_model() -> None:
    state, tensors, fields = golden("torchscale_decoder_xpos")
    model = load_torchscale(state, LongNetConfig(**fields))
    caches = model.new_caches()
    with torch.no_grad():
        parts = [model(part, caches=caches) for part in tensors["tokens"].split((23, 1, 16), 1)]
    assert relative_error(torch.cat(parts, 1), tensors["logits"]) < 1e-8


def test_an_encoder_takes_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    state, tensors, fields = golden("torchscale_decoder")
    config = LongNetEncoderConfig(**fields, head=True)
    model = load_torchscale(state, config)
    assert isinstance(model, LongNetEncoder)
    assert model.config.count_padding
    assert model.config.head_offsets == "blocked"
    # torchscale's encoders and decoders differ in the direction of attention alone.
    for block in model.blocks:
        attention = block.attention.attention  # type: ignore[union-attr]  # nn.Module
        forward = attention.forward  # type: ignore[union-attr]
        monkeypatch.setattr(
            attention,
            "forward",
            lambda *heads, forward=forward, **options: forward(
                *heads, **{**options, "is_causal": True}
            ),
        )
    assert relative_error(model(tensors["tokens"]), tensors["logits"]) < 1e-8
    monkeypatch.undo()
    assert relative_error(model(tensors["tokens"]), tensors["logits"]) > 1e-3


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested pth"])
def test_a_file_is_as_good_as_a_dict(kind: str, tmp_path: Path) -> None:
    state, tensors, fields = golden("torchscale_decoder")
    if kind == "safetensors":
        path: Path = tmp_path / "model.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "model.pth"
        torch.save({"model": state, "epoch": 3} if kind == "nested pth" else state, path)
    for source in (path, str(path)):
        model = load_torchscale(source, LongNetConfig(**fields))
        assert relative_error(model(tensors["tokens"]), tensors["logits"]) < 1e-8


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"model": {"x": Harm()}}, tmp_path / "model.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_torchscale(tmp_path / "model.pth", LongNetConfig())
    assert not (tmp_path / "harm").exists()


def test_the_checkpoint_and_the_model_share_nothing() -> None:
    state, _, fields = golden("torchscale_decoder")
    model = load_torchscale(state, LongNetConfig(**fields))
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_equal_ends_become_one_weight() -> None:
    state, tensors, fields = golden("torchscale_decoder")
    assert not load_torchscale(state, LongNetConfig(**fields)).config.tie_embeddings
    state["output_projection.weight"] = state["embed_tokens.weight"]
    tied = load_torchscale(state, LongNetConfig(**fields))
    assert tied.config.tie_embeddings
    assert tied.head.weight is tied.embedding.weight
    untied = load_torchscale(state, LongNetConfig(**fields, tie_embeddings=False))
    assert untied.head.weight is not untied.embedding.weight
    assert torch.equal(untied(tensors["tokens"]), tied(tensors["tokens"]))


def test_positions_that_leave_no_trace_in_tensors_have_to_be_said() -> None:
    """A model that was trained with sines would lose them without a word."""
    state, _, fields = golden("torchscale_decoder")
    del fields["positions"]
    with pytest.warns(UserWarning, match="positions are taken as 'none'"):
        assert load_torchscale(state, LongNetConfig(**fields)).config.positions == "none"
    state, _, fields = golden("torchscale_decoder_xpos")
    assert load_torchscale(state, LongNetConfig(**fields)).config.positions == "xpos"


def test_a_dtype_is_kept() -> None:
    state, tensors, fields = golden("torchscale_decoder_xpos")
    state = {name: tensor.float() for name, tensor in state.items()}
    model = load_torchscale(state, LongNetConfig(**fields))
    logits = model(tensors["tokens"])
    assert logits.dtype == torch.float32
    assert relative_error(logits.double(), tensors["logits"]) < 1e-5


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    state, _, fields = golden("torchscale_decoder")
    state["layers.1.ffn.fc1.bias"] = torch.zeros(3, dtype=torch.float64)
    state["layers.0.surplus"] = state["embed_patches.weight"] = torch.zeros(1)
    del state["layer_norm.weight"], state["layers.0.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match="state_dict must hold exactly") as caught:
        load_torchscale(state, LongNetConfig(**fields))
    for problem in (
        "missing layer_norm.weight",
        "missing layers.0.self_attn.k_proj.bias",
        "unexpected layers.0.surplus",
        "unexpected embed_patches.weight",
        "layers.1.ffn.fc1.bias must have shape (64,), got (3,)",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        (NAMES[0], {"head_offsets": "interleaved"}, "config.head_offsets must be 'blocked'"),
        (NAMES[0], {"head_groups": "split"}, "config.head_groups must be 'shared'"),
        (NAMES[0], {"positions": "rotary"}, "config.positions must be 'none'.*'rotary'"),
        (NAMES[1], {"positions": "none"}, "config.positions must be 'xpos'"),
        (NAMES[0], {"tie_embeddings": True}, "config.tie_embeddings must be False"),
        (NAMES[0], {"float32_gelu": False}, "config.float32_gelu must be True"),
        (NAMES[1], {"xpos_scale_base": 9}, "xpos_scale_base must be at least context / 100"),
    ],
)
def test_fields_that_contradict_the_checkpoint_are_named(
    name: str, fields: dict[str, Any], says: str
) -> None:
    state, _, shape = golden(name)
    with pytest.raises(ValueError, match=says):
        load_torchscale(state, LongNetConfig(**{**shape, **fields}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers.1.self_attn.xpos.scale": None}, "xPos in all layers. Missing layers.1.self_attn"),
        ({"layers.0.self_attn.xpos.scale": torch.ones(4)}, r"bases \[0.28.*Got \[1.0, 1.0"),
        ({"layers.2.self_attn.xpos.scale": torch.ones(4)}, "unexpected layers.2.self_attn.xpos"),
    ],
)
def test_bases_of_xpos_must_be_xpos(change: dict[str, Tensor | None], says: str) -> None:
    state, _, fields = golden("torchscale_decoder_xpos")
    merged = {**state, **change}
    kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
    with pytest.raises(ValueError, match=says):
        load_torchscale(kept, LongNetConfig(**fields))


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}, {"model": {"x": "y"}}])
def test_what_is_no_checkpoint_is_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="a checkpoint must hold named tensors"):
        load_torchscale(tmp_path / "model.pth", LongNetConfig())


def test_a_misplaced_branch_is_warned_of_and_no_other() -> None:
    state, _, fields = golden("torchscale_decoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_torchscale(state, LongNetConfig(**fields))
    fields.update(segment_lengths=(8, 20, 33, 64), dilation_rates=(1, 3, 4, 4))
    with pytest.warns(UserWarning, match="inputs longer than 20 positions") as caught:
        load_torchscale(state, LongNetConfig(**fields))
    said = str(caught[0].message)
    assert "(segment length 20, dilation rate 3), (segment length 33, dilation rate 4)." in said
    assert caught[0].filename == __file__


ENCODERS = ("torchscale_encoder_relu", "torchscale_encoder_swish_learned")


def encoder(name: str, **change: Any) -> tuple[LongNetEncoder, dict[str, Tensor]]:
    state, tensors, fields = golden(name)
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    fields |= {
        "activation": told["activation"],
        "scale_embedding": told["scale_embedding"],
        "head": True,
        **change,
    }
    return load_torchscale(state, LongNetEncoderConfig(**fields)), tensors


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_torchscales_logits_by_its_activation_and_positions(name: str) -> None:
    model, tensors = encoder(name)
    assert relative_error(model(tensors["tokens"]), tensors["logits"]) < 1e-8
    assert model.config.positions == ("learned" if "learned" in name else "none")
    for change in (
        {"activation": "gelu"},
        {"scale_embedding": not model.config.scale_embedding},
        {"positions": "sinusoidal"},
    ):
        if "positions" in change and "learned" in name:
            with pytest.raises(ValueError, match="positions must be 'learned' for this checkpoint"):
                encoder(name, **change)
        else:
            other, _ = encoder(name, **change)
            assert relative_error(other(tensors["tokens"]), tensors["logits"]) > 1e-3


def test_learned_positions_end_where_their_table_does() -> None:
    model, tensors = encoder(ENCODERS[1])
    rows = golden(ENCODERS[1])[0]["embed_positions.weight"].shape[0]
    assert model.config.context == rows - 2
    with pytest.raises(ValueError, match=f"no longer than context={rows - 2}.*Got {rows - 1}"):
        model(torch.zeros(1, rows - 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"config.context must be {rows - 2} for this checkpoint"):
        encoder(ENCODERS[1], context=rows + 7)
    shifted = torch.arange(3, 3 + tensors["tokens"].shape[1] - 7)
    tokens = tensors["tokens"][:, : len(shifted)]
    found = model(tokens, positions=shifted)
    assert relative_error(found, model(tokens)) > 1e-3


def fairseq(tmp_path: Path, settings: Any) -> tuple[Path, LongNetConfig, Tensor, Tensor]:
    """A file of torchscale's recipe, its shape, tokens, and the logits that it means."""
    shape: dict[str, Any] = {
        "embed_dim": 16, "num_heads": 1, "num_layers": 2, "vocab_size": 11, "context": 32,
    }  # fmt: skip
    pattern: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
    source = LongNetLM(
        LongNetConfig(
            **shape, **pattern, positions="none", head_offsets="blocked", activation="relu"
        )
    ).eval()
    tokens = torch.randint(11, (1, 12))
    rates = torch.exp(torch.arange(8) * -(math.log(10000) / 7))
    angles = torch.arange(2, 14)[:, None] * rates
    hidden = source.embedding(tokens) * 4 + torch.cat((angles.sin(), angles.cos()), 1)
    for block in source.blocks:
        hidden = block(hidden)
    logits = source.head(source.norm(hidden))
    state = {"decoder." + their_name(name): tensor for name, tensor in source.state_dict().items()}
    state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    content = {"model": state, **settings}
    torch.save(content, tmp_path / "fairseq.pt")
    return tmp_path / "fairseq.pt", LongNetConfig(**shape, **pattern), tokens, logits


SETTINGS = {
    "activation_fn": "relu",
    "no_scale_embedding": False,
    "segment_length": "[8,16]",
    "dilated_ratio": "[1,2]",
}


@pytest.mark.parametrize("where", ["cfg", "args"])
def test_fairseqs_recipe_loads_by_the_settings_beside_the_weights(
    where: str, tmp_path: Path
) -> None:
    told = argparse.Namespace(**SETTINGS)
    settings = {"cfg": {"model": told}} if where == "cfg" else {"args": told}
    path, config, tokens, logits = fairseq(tmp_path, settings)
    model = load_torchscale(path, config)
    assert model.config.positions == "sinusoidal"
    assert model.config.activation == "relu"
    assert model.config.scale_embedding
    assert relative_error(model(tokens), logits) < 1e-5
    caches = model.new_caches()
    with torch.no_grad():
        parts = [model(part, caches=caches) for part in tokens.split((5, 1, 6), 1)]
    assert relative_error(torch.cat(parts, 1), logits) < 1e-5
    wrong = config.model_dump(exclude={"segment_lengths", "dilation_rates"}, exclude_defaults=True)
    fields = {**wrong, "segment_lengths": (4, 16), "dilation_rates": (1, 2)}
    with pytest.raises(ValueError, match=r"segment_lengths must be \(8, 16\) for this checkpoint"):
        load_torchscale(path, LongNetConfig(**fields))


def test_what_fairseqs_tensors_do_not_tell_has_to_be_said(tmp_path: Path) -> None:
    path, config, tokens, logits = fairseq(tmp_path, {})
    fields = config.model_dump(include=config.model_fields_set)
    with pytest.raises(ValueError, match="activation must be given for a checkpoint of fairseq"):
        load_torchscale(path, LongNetConfig(**fields))
    with pytest.raises(ValueError, match="scale_embedding must be given"):
        load_torchscale(path, LongNetConfig(**fields, activation="relu"))
    model = load_torchscale(path, LongNetConfig(**fields, activation="relu", scale_embedding=True))
    assert relative_error(model(tokens), logits) < 1e-5
    with pytest.raises(ValueError, match=r"config.positions must be 'sinusoidal'"):
        load_torchscale(path, LongNetConfig(**fields, activation="relu", positions="none"))


def test_settings_run_no_code(tmp_path: Path) -> None:
    class Harm(argparse.Namespace):
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    path, config, _, _ = fairseq(tmp_path, {"cfg": {"model": Harm()}})
    with pytest.raises(pickle.UnpicklingError):
        load_torchscale(path, config)
    assert not (tmp_path / "harm").exists()


def test_an_embedding_norm_is_taken_from_the_tensors_and_no_last_norm_is_told() -> None:
    torch.manual_seed(0)
    config = LongNetEncoderConfig(
        embed_dim=16, num_heads=2, num_layers=1, segment_lengths=(8,), dilation_rates=(1,),
        head_offsets="blocked", count_padding=True, positions="none", embedding_norm=True,
        final_norm=False, float32_gelu=True,
    )  # fmt: skip
    source = LongNetEncoder(config)
    assert source.embedding_norm is not None
    nn.init.normal_(source.embedding_norm.weight)
    state = {their_name(name): tensor for name, tensor in source.state_dict().items()}
    fields: dict[str, Any] = {
        "embed_dim": 16, "num_heads": 2, "num_layers": 1, "segment_lengths": (8,),
        "dilation_rates": (1,), "positions": "none",
    }  # fmt: skip
    model = load_torchscale(state, LongNetEncoderConfig(**fields, final_norm=False))
    inputs = torch.randn(1, 9, 16) * 3
    assert model.config.embedding_norm
    assert torch.equal(model(inputs), source(inputs))
    assert torch.equal(model(inputs), model.layer_states(inputs)[-1])
    normed = nn.functional.layer_norm(
        inputs, (16,), source.embedding_norm.weight, source.embedding_norm.bias
    )
    assert torch.allclose(model.layer_states(inputs)[0], normed)
    with pytest.raises(ValueError, match=r"Likeliest cause: config.final_norm must be False"):
        load_torchscale(state, LongNetEncoderConfig(**fields))
