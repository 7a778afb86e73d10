"""Slide classifiers: GigaPath's logits, its parameter groups, its checkpoints and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dilated_factory import (
    SlideClassifier,
    SlideEncoder,
    SlideEncoderConfig,
    load_torchscale,
    parameter_groups,
    save_gigapath,
)
from dilated_factory.interop.torchscale import slide_names
from dilated_testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("gigapath_classifier", "gigapath_classifier_cls")
SMALL = SlideEncoderConfig(
    tile_dim=12,
    embed_dim=32,
    num_heads=4,
    num_layers=2,
    segment_lengths=(16, 64),
    dilation_rates=(1, 2),
)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The state dict of the real class, inputs and outputs, and what is told of them."""
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return state, tensors, told


def load(name: str, state: Any = None, **options: Any) -> SlideClassifier:
    given, _, told = golden(name)
    config = SlideEncoderConfig(
        tile_dim=told["in_chans"],
        embed_dim=told["embed_dim"],
        num_heads=told["heads"],
        num_layers=told["depth"],
        segment_lengths=told["segment_lengths"],
        dilation_rates=told["dilation_rates"],
        grid_size=told["slide_ngrids"],
        global_pool=told["global_pool"],
    )
    layers = [int(layer) for layer in told["feat_layer"].split("-")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="head_dim")
        return SlideClassifier.load(
            given if state is None else state, config, feat_layers=layers, **options
        )


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_the_logits_of_gigapaths_head(name: str) -> None:
    _, tensors, told = golden(name)
    model = load(name)
    assert not model.training
    slides = [(tensors[f"tiles.{i}"], tensors[f"coords.{i}"]) for i in range(len(told["slides"]))]
    sizes = [slide["tile_size"] for slide in told["slides"]]
    packed = model.classify(slides, tile_size=sizes)
    for i, (slide, size) in enumerate(zip(slides, sizes, strict=True)):
        expected = tensors[f"logits.{i}"].flatten()
        assert relative_error(model(*slide, tile_size=size)[0], expected) < 1e-8
        assert relative_error(packed[i], expected) < 1e-8


def test_learning_rates_are_those_of_gigapaths_function() -> None:
    told = json.loads((GOLDEN / "gigapath_parameter_groups.json").read_text())
    model = load(NAMES[0])
    groups = parameter_groups(
        model,
        learning_rate=0.002,
        weight_decay=told["weight_decay"],
        layer_decay=told["layer_decay"],
    )
    found = {id(p): group for group in groups for p in group["params"]}
    names = slide_names(model.state_dict())
    assert set(names.values()) == set(told["groups"])
    for own, parameter in model.named_parameters():
        scale, decay = told["groups"][names[own]]
        group = found.pop(id(parameter))
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-12), own
        assert group["lr"] == pytest.approx(0.002 * scale, rel=1e-12)
        assert group["weight_decay"] == decay, own
    assert not found
    torch.optim.AdamW(groups)


def test_groups_of_an_encoder_alone_and_of_a_frozen_one() -> None:
    encoder = SlideEncoder(SMALL)
    rates = {group["lr"] for group in parameter_groups(encoder, learning_rate=1, layer_decay=0.5)}
    assert rates == {1, 0.5, 0.25, 0.125}
    frozen = SlideClassifier(encoder, 3, freeze=True)
    groups = parameter_groups(frozen, learning_rate=1.0)
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in frozen.classifier.parameters()
    }


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0}, {"weight_decay": -1}, {"layer_decay": 0}, {"layer_decay": 2}]
)
def test_rates_out_of_range_are_named(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be"):
        parameter_groups(SlideEncoder(SMALL), **{"learning_rate": 1.0, **change})


def test_a_frozen_encoder_neither_trains_nor_drops() -> None:
    encoder = SlideEncoder(SMALL.model_copy(update={"dropout": 0.5}))
    model = SlideClassifier(encoder, 2, feat_layers=(1, -1), freeze=True).train()
    tiles, coords = torch.randn(1, 9, 12), torch.arange(18).view(1, 9, 2) * 300
    logits = model(tiles, coords)
    assert torch.equal(logits, model(tiles, coords))
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.classifier.parameters())


def checkpoints() -> dict[str, Any]:
    """What people have: one set of weights in many wrappings, by what it is."""
    encoder = SlideEncoder(SMALL)
    own = encoder.state_dict()
    theirs = {name: own[ours] for ours, name in slide_names(own).items()}
    tuned = {f"slide_encoder.{name}": tensor for name, tensor in theirs.items()} | {
        "classifier.0.weight": torch.ones(2, 32),
        "classifier.0.bias": torch.zeros(2),
    }
    return {
        "published": {"model": theirs},
        "fine-tuned": tuned,
        "parallel": {"model": {f"module.{name}": tensor for name, tensor in theirs.items()}},
        "Lightning": {
            "state_dict": {f"model.{name}": tensor for name, tensor in tuned.items()}
            | {"loss.weight": torch.ones(2)},
            "epoch": 3,
        },
        "compiled": {f"_orig_mod.module.{name}": tensor for name, tensor in theirs.items()},
        "half": {
            name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in theirs.items()
        },
        "our own": own,
        "our own, tuned": SlideClassifier(encoder, 2).state_dict(),
    }


@pytest.mark.parametrize("kind", checkpoints())
@pytest.mark.parametrize("as_file", [False, True])
def test_every_checkpoint_that_people_have_loads(kind: str, as_file: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source: Any = checkpoints()[kind]
    torch.manual_seed(0)
    expected = SlideEncoder(SMALL).state_dict()
    if as_file:
        torch.save(source, tmp_path / "model.pth")
        source = tmp_path / "model.pth"
    model = load_torchscale(source, SMALL)
    bound = 1e-2 if kind == "half" else 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert (tensor - expected[name]).norm() <= bound * expected[name].norm(), name
    classifier = SlideClassifier.load(
        source, SMALL, num_classes=None if "tuned" in kind or kind == "Lightning" else 2
    )
    assert classifier(torch.randn(3, 12), torch.eye(3, 2) * 300).shape == (1, 2)


def test_what_is_written_is_what_gigapath_reads(tmp_path: Path) -> None:
    state, tensors, _ = golden(NAMES[0])
    model = load(NAMES[0])
    for name in ("tuned.pth", "tuned.safetensors"):
        save_gigapath(model, tmp_path / name)
        found = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    save_gigapath(model.slide_encoder, tmp_path / "encoder.pth")
    nested = torch.load(tmp_path / "encoder.pth")["model"]
    assert nested.keys() == {
        name.removeprefix("slide_encoder.") for name in state if "classifier" not in name
    }
    again = load(NAMES[0], tmp_path / "encoder.pth", num_classes=3)
    slide = tensors["tiles.0"], tensors["coords.0"]
    assert torch.equal(again.slide_encoder(*slide)[0], model.slide_encoder(*slide)[0])
    with pytest.raises(TypeError, match=r"must be a SlideEncoder or a SlideClassifier. Got Linear"):
        save_gigapath(nn.Linear(2, 2), tmp_path / "x.pth")  # type: ignore[arg-type] # the point


def test_the_projection_of_another_tile_encoder_starts_anew_if_told_so() -> None:
    source = checkpoints()["published"]
    other = SMALL.model_copy(update={"tile_dim": 8})
    with pytest.raises(ValueError, match=r"config.tile_dim must be 12, not 8.*strict=False"):
        load_torchscale(source, other)
    with pytest.warns(UserWarning, match="started anew: patch_embed.proj.weight"):
        model = load_torchscale(source, other, strict=False)
    blocks = model.encoder.blocks[0].state_dict()
    for name, tensor in load_torchscale(source, SMALL).encoder.blocks[0].state_dict().items():
        assert torch.equal(tensor, blocks[name])
    assert model(torch.randn(3, 8), torch.eye(3, 2) * 300)[0].isfinite().all()
    # Whose projection is replaced by hand takes what that takes.
    model.patch_embed = nn.Linear(5, 32)
    assert model(torch.randn(3, 5), torch.eye(3, 2) * 300)[0].shape == (1, 32)

    without = {"model": {k: v for k, v in source["model"].items() if "patch_embed" not in k}}
    with pytest.raises(ValueError, match="projection of tiles is missing: strict=False"):
        load_torchscale(without, SMALL)
    with pytest.warns(UserWarning, match="started anew: patch_embed.proj.weight.*bias"):
        load_torchscale(without, SMALL, strict=False)
    without["model"]["decoder_pred.bias"] = torch.ones(2)
    with pytest.warns(UserWarning, match="Left out of the checkpoint: decoder_pred.bias"):
        load_torchscale(without, SMALL, strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"embed_dim": 128, "num_layers": 24}, "embed_dim must be 32, not 128; config.num_layers"),
        ({"num_layers": 1}, "config.num_layers must be 2, not 1"),
        ({"ffn_dim": 77}, "config.ffn_dim must be 128, not 77"),
    ],
)
def test_errors_say_the_likeliest_cause_first_and_stay_short(
    change: dict[str, Any], says: str, strict: bool
) -> None:
    config = SMALL.model_copy(update={"num_heads": 4, **change})
    source = checkpoints()["fine-tuned"]
    source["slide_encoder." + "x" * 3000] = torch.ones(2)
    if not strict:
        source = {"another.model": torch.ones(2)}
        says = "another kind of model: there is no encoder.layers.0, but 'another.model'"
    with pytest.raises(ValueError, match=says) as caught:
        load_torchscale(source, config, strict=strict)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).index(says.split(";")[0].split(" must")[0]) < 200


def test_the_published_size_warns_of_its_class_token_unless_told() -> None:
    published = SlideEncoderConfig()
    with (
        pytest.warns(UserWarning, match="was not trained.*global_pool=True"),
        pytest.raises(ValueError, match="another kind"),
    ):
        load_torchscale({"x": torch.ones(1)}, published)
    for told in (False, True):
        config = SlideEncoderConfig(
            global_pool=told, segment_lengths=(16, 64), dilation_rates=(1, 2)
        )
        with pytest.raises(ValueError, match="another kind"):
            SlideClassifier.load({"x": torch.ones(1)}, config, num_classes=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_classes": 5}, "num_classes must be 2 for this checkpoint. Got 5"),
        ({"feat_layers": (0, 1)}, r"must name 1 layers for this checkpoint.*Got \(0, 1\)"),
        ({"feat_layers": (3,)}, r"feat_layers must be one or more in \[-3, 2\]"),
    ],
)
def test_a_head_that_does_not_fit_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SlideClassifier.load(checkpoints()["fine-tuned"], SMALL, **options)
    with pytest.raises(ValueError, match="num_classes must be given for a checkpoint without"):
        SlideClassifier.load(checkpoints()["published"], SMALL)
    with pytest.raises(ValueError, match=r"num_classes must be at least 1. Got 0"):
        SlideClassifier(SlideEncoder(SMALL), 0)
