"""GigaPath's slide encoder: its own outputs, its size, places on the slide, padding."""

import json
import math
import warnings
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dilated_factory import (
    SlideEncoder,
    SlideEncoderConfig,
    load_torchscale,
    read_config,
    to_toml,
)
from dilated_factory.cli import main
from dilated_factory.interop import gigapath
from dilated_factory.interop.places import PlaceTable
from dilated_factory.interop.torchscale import warn_of_misplacement
from dilated_testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("gigapath_slide_encoder", "gigapath_slide_encoder_pool")


def golden(name: str) -> tuple[SlideEncoder, dict[str, Tensor]]:
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    config = SlideEncoderConfig(
        tile_dim=told["in_chans"],
        embed_dim=told["embed_dim"],
        num_heads=told["heads"],
        num_layers=told["depth"],
        ffn_dim=told["ffn_dim"],
        segment_lengths=told["segment_lengths"],
        dilation_rates=told["dilation_rates"],
        grid_size=told["slide_ngrids"],
        tile_size=told["tile_size"],
        global_pool=told["global_pool"],
        layer_norm_eps=told["layernorm_eps"],
        final_norm_eps=told["final_norm_eps"],
    )
    return load_torchscale(state, config), tensors


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_give_gigapaths_embeddings(name: str) -> None:
    model, tensors = golden(name)
    found = model(tensors["tiles"], tensors["coords"], all_layer_embed=True)
    assert len(found) == 3
    for index, embedding in enumerate(found):
        assert relative_error(embedding, tensors[f"out.{index}"]) < 1e-8
    assert relative_error(found[1], found[2]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_one_embedding_goes_through_the_encoders_last_norm(name: str) -> None:
    model, tensors = golden(name)
    inside: list[Tensor] = []
    model.encoder.blocks[-1].register_forward_hook(lambda *call: inside.append(call[-1]))
    (found,) = model(tensors["tiles"], tensors["coords"])
    state = model.encoder.norm(inside[0])
    pooled = state[:, 1:].mean(1) if model.config.global_pool else state[:, 0]
    assert torch.equal(found, model.norm(pooled))


def test_coordinates_decide_and_pixels_inside_a_tile_do_not() -> None:
    model, tensors = golden(NAMES[0])
    tiles, coords = tensors["tiles"], tensors["coords"]
    (found,) = model(tiles, coords)
    corner = torch.floor(coords / 256) * 256
    assert torch.equal(model(tiles, corner + 255.5)[0], found)
    assert torch.equal(model(tiles, corner.long())[0], found)
    assert relative_error(model(tiles, corner.flip(-1))[0], found) > 1e-4


def test_the_published_size() -> None:
    model = SlideEncoder(SlideEncoderConfig(), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_330_880
    assert len(model.encoder.blocks) == 12
    # 2 ** (10, 12.5, 15, 17.5, 20), rounded down.
    expected = tuple(math.floor(2 ** (10 + 2.5 * k)) for k in range(5))
    assert model.config.segment_lengths == expected


def test_the_published_pattern_is_misplaced_from_185363_tiles_on() -> None:
    with pytest.warns(UserWarning, match=r"longer than 185363 positions.*185363, dilation rate 8"):
        warn_of_misplacement(SlideEncoderConfig().pattern)


@given(
    cells=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=7),
    quarter=st.sampled_from([1, 5, 192]),
)
def test_places_are_sines_and_cosines(cells: list[tuple[int, int]], quarter: int) -> None:
    found = PlaceTable(100, 4 * quarter)(torch.tensor(cells), torch.ones(len(cells)).bool())
    assert found.dtype == torch.float32
    for row, (first, second) in zip(found.tolist(), cells, strict=True):
        expected = [
            function(place / 10000 ** (i / quarter))
            for place in (second, first)
            for function in (math.sin, math.cos)
            for i in range(quarter)
        ]
        assert row == pytest.approx(expected, abs=1e-6)


CLASSIFIERS = ("gigapath_classifier", "gigapath_classifier_cls")


class Cohort(NamedTuple):
    """Slides of several lengths and tile sizes, and what the real class gives for each."""

    model: SlideEncoder
    slides: list[tuple[Tensor, Tensor]]
    sizes: list[float]
    layers: list[list[Tensor]]
    single: list[Tensor]


def cohort(name: str) -> Cohort:
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="head_dim")
        model = load_torchscale(
            {
                key.removeprefix("state.slide_encoder."): tensor
                for key, tensor in tensors.items()
                if key.startswith("state.slide_encoder.")
            },
            SlideEncoderConfig(
                tile_dim=told["in_chans"],
                embed_dim=told["embed_dim"],
                num_heads=told["heads"],
                num_layers=told["depth"],
                segment_lengths=told["segment_lengths"],
                dilation_rates=told["dilation_rates"],
                grid_size=told["slide_ngrids"],
                global_pool=told["global_pool"],
            ),
        )
    slides = range(len(told["slides"]))
    return Cohort(
        model,
        [(tensors[f"tiles.{i}"], tensors[f"coords.{i}"]) for i in slides],
        [slide["tile_size"] for slide in told["slides"]],
        [[tensors[f"out.{i}.{k}"][0] for k in range(told["depth"] + 1)] for i in slides],
        [tensors[f"single.{i}"][0] for i in slides],
    )


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_slides_alone_give_gigapaths_embeddings_at_their_tile_sizes(name: str) -> None:
    model, slides, sizes, layers, single = cohort(name)
    for slide, size, expected, last in zip(slides, sizes, layers, single, strict=True):
        found = model(*slide, True, tile_size=size)
        for one, two in zip(found, expected, strict=True):
            assert relative_error(one[0], two) < 1e-8
        model.tile_size = size  # as pipelines around the real class do
        assert relative_error(model(*slide)[0][0], last) < 1e-8
    assert relative_error(model(*slides[-1], tile_size=sizes[-1] * 1.9)[0][0], single[-1]) > 1e-4


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_packed_slides_give_what_they_give_alone_in_any_order(name: str) -> None:
    model, slides, sizes, layers, single = cohort(name)
    for order in permutations(range(len(slides))):
        some, told = [slides[i] for i in order], [sizes[i] for i in order]
        (found,) = model.encode(some, tile_size=told)
        every = model.encode(some, tile_size=torch.tensor(told), all_layer_embed=True)
        for place, i in enumerate(order):
            assert relative_error(found[place], single[i]) < 1e-8
            for state, expected in zip(every, layers[i], strict=True):
                assert relative_error(state[place], expected) < 1e-8


@pytest.mark.parametrize("fits", [True, False], ids=["trimmed", "as on a device"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padded_slides_give_what_they_give_alone(
    name: str, left: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slides, sizes, layers, single = cohort(name)
    if not fits:  # what a device does, where counting would wait for it
        monkeypatch.setattr(gigapath, "readable", lambda x: False)
    most = max(len(tiles) for tiles, _ in slides) + 3
    tiles = torch.full((len(slides), most, slides[0][0].shape[-1]), math.nan, dtype=torch.float64)
    coords = torch.full((len(slides), most, 2), math.nan, dtype=torch.float64)
    mask = torch.ones(len(slides), most, dtype=torch.bool)
    for i, (some, places) in enumerate(slides):
        rows = slice(most - len(some), most) if left else slice(len(some))
        tiles[i, rows], coords[i, rows], mask[i, rows] = some, places, False
    options = {"key_padding_mask": mask, "tile_size": torch.tensor(sizes)}
    assert relative_error(model(tiles, coords, **options)[0], torch.stack(single)) < 1e-8
    for k, state in enumerate(model(tiles, coords, True, **options)):
        assert relative_error(state, torch.stack([layer[k] for layer in layers])) < 1e-8

    states = model.tile_states(tiles, coords, **options)
    assert not states[mask].any()
    pooled = model.norm(torch.stack([row[~m].mean(0) for row, m in zip(states, mask, strict=True)]))
    assert (relative_error(pooled, torch.stack(single)) < 1e-8) == model.config.global_pool
    states.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_gradients_of_packed_slides_are_those_of_each_alone() -> None:
    model, slides, sizes, _, _ = cohort(CLASSIFIERS[0])
    weights = torch.randn(len(slides), 48, dtype=torch.float64)
    parameters = list(model.parameters())
    (packed,) = model.encode(slides, tile_size=sizes)
    found = torch.autograd.grad((packed * weights).sum(), parameters)
    alone = [
        (model(*slide, tile_size=size)[0] * weight).sum()
        for slide, size, weight in zip(slides, sizes, weights, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(alone).sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        assert relative_error(one, two) < 1e-10


def test_shapes_are_taken_as_the_real_class_takes_them() -> None:
    model, tensors = golden(NAMES[0])
    tiles, coords = tensors["tiles"], tensors["coords"]
    for some in (tiles, tiles[0]):
        for places in (coords, coords[0]):
            assert relative_error(model(some, places)[0], tensors["out.2"]) > 0
            assert torch.equal(model(some, places)[0], model(tiles, coords)[0])
    assert torch.equal(model.encode([(tiles, coords)])[0], model.encode([(tiles[0], coords[0])])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tiles_of_any_float_dtype_are_taken(dtype: torch.dtype) -> None:
    model = SlideEncoder(SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1))
    tiles, coords = torch.randn(1, 3, 4), torch.arange(6).view(1, 3, 2) * 256
    (found,) = model(tiles.to(dtype), coords)
    assert found.dtype == torch.float32
    assert torch.equal(found, model(tiles.to(dtype).float(), coords)[0])


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int64, torch.float64])
def test_coordinates_of_any_dtype_are_taken(dtype: torch.dtype) -> None:
    config = SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1, tile_size=7.5)
    model = SlideEncoder(config)
    tiles, coords = torch.randn(1, 3, 4), torch.tensor([[[0, 7], [8, 200], [15, 127]]])
    expected = torch.tensor([[[0, 0], [1, 26], [2, 16]]])
    found = model(tiles, coords.clamp(max=127).to(dtype))[0]
    assert torch.equal(found, model(tiles, expected.clamp(max=16), tile_size=1)[0])


def test_the_table_of_places_stays_float32_and_true() -> None:
    config = SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1, grid_size=9)
    expected = SlideEncoder(config).places.table
    half = SlideEncoder(config).half().float()
    empty = SlideEncoder(config, device="meta").to_empty(device="cpu")
    for model in (half, empty, SlideEncoder(config, dtype=torch.bfloat16)):
        assert torch.equal(model.places.table, expected)
    assert not any("table" in name for name in half.state_dict())


LIKE_A_GRID = torch.stack(torch.meshgrid(torch.arange(40, 80), torch.arange(20), indexing="ij"), -1)


@pytest.mark.parametrize(
    ("coords", "says"),
    [
        ((LIKE_A_GRID * 256).to(torch.bfloat16), "too large for torch.bfloat16.*float32 or an int"),
        (LIKE_A_GRID, r"800 tiles on 1 places of 256 pixels.*indices in a grid: multiply"),
        (LIKE_A_GRID / 80 * 1000, "scaled, in micrometres, or of a lower level"),
        (LIKE_A_GRID / 80, r"scaled to \[0, 1\]"),
        (LIKE_A_GRID * 0, r"missing: all are 0"),
        (torch.tensor([0, 255_000]).repeat(400, 2).view(20, 40, 2) + 0.5, "800 tiles on 1 places"),
    ],
)
def test_coordinates_that_cannot_be_right_are_warned_of(coords: Tensor, says: str) -> None:
    model = SlideEncoder(SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1))
    tiles = torch.randn(800, 4)
    with pytest.warns(UserWarning, match=says):
        model(tiles, coords.flatten(0, 1))
    with pytest.warns(UserWarning, match=says):
        model.encode([(tiles, coords.flatten(0, 1))])
    # Tiles that overlap by half are right.
    model(tiles, LIKE_A_GRID.flatten(0, 1) * 128)


def test_it_compiles_into_one_graph_and_exports_with_a_free_length() -> None:
    config = SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1)
    model = SlideEncoder(config).eval()
    tiles, coords = torch.randn(2, 5, 4), torch.arange(20).view(2, 5, 2) * 300
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for options in ({}, {"key_padding_mask": mask, "tile_size": torch.tensor([256.0, 506.5])}):
            (expected,) = model(tiles, coords, **options)
            assert relative_error(compiled(tiles, coords, **options)[0], expected) < 1e-5
        length = torch.export.Dim("N", min=2, max=4096)
        exported = torch.export.export(
            model, (tiles, coords), dynamic_shapes={"tiles": {1: length}, "coords": {1: length}}
        ).module()
        more, places = torch.randn(2, 77, 4), torch.randint(256_000, (2, 77, 2))
        assert relative_error(exported(more, places)[0], model(more, places)[0]) < 1e-5


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tells of all that it fixes
def test_torch_jit_traces_it() -> None:
    config = SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1)
    model = SlideEncoder(config).eval()
    inputs = torch.randn(2, 5, 4), torch.arange(20).view(2, 5, 2) * 300
    (traced,) = torch.jit.trace(model, inputs)(*inputs)
    assert relative_error(traced, model(*inputs)[0]) < 1e-5


def test_forward_computes_in_no_float64_and_reads_nothing_back_from_a_device() -> None:
    config = SlideEncoderConfig(tile_dim=4, embed_dim=32, num_heads=4, num_layers=1)
    model = SlideEncoder(config, device="meta")  # a tensor that cannot be read back
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    inputs = torch.empty(2, 5, 4, device="meta"), torch.empty(2, 5, 2, device="meta")

    class NoFloat64(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            wide = isinstance(found, Tensor) and found.dtype == torch.float64
            assert not (wide and found.device.type == "meta"), func
            return found

    with NoFloat64():
        for size in (None, 506.5, [256, 512]):
            assert model(*inputs, tile_size=size)[0].shape == (2, 32)
            model(*inputs, key_padding_mask=mask, tile_size=size)


def test_it_trains() -> None:
    config = SlideEncoderConfig(tile_dim=24, embed_dim=32, num_heads=4, num_layers=2, dropout=0.1)
    model = SlideEncoder(config, activation_checkpointing=True)
    tiles = torch.randn(2, 90, 24)
    (found,) = model(tiles, torch.randint(256_000, (2, 90, 2)))
    (found * torch.randn(2, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    fresh = SlideEncoder(config, device="meta").to_empty(device="cpu")
    fresh.reset_parameters()
    assert fresh(tiles, torch.arange(360).view(2, 90, 2) * 700)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tiles": torch.zeros(1, 5, 23)}, r"tiles must have shape \(B, N, tile_dim=24\)"),
        ({"coords": torch.zeros(1, 5, 3)}, r"coords must have shape \(1, 5, 2\).*\(1, 5, 3\)"),
        ({"tiles": torch.zeros(1, 5, 24).long()}, "tiles must be of a float dtype.*int64"),
        ({"tiles": [1.0]}, "tiles must be a Tensor. Got list"),
        ({"coords": torch.zeros(1, 5, 2).numpy()}, "coords must be a Tensor. Got ndarray"),
        ({"coords": torch.zeros(1, 5, 2).bool()}, "coords must be of a real or integer dtype"),
        ({"tile_size": 0}, r"tile_size must be positive and finite. Got 0"),
        ({"tile_size": math.nan}, "tile_size must be positive and finite. Got nan"),
        ({"tile_size": [256, 256]}, r"one for each of 1 slides. Got shape \(2,\)"),
        ({"tile_size": "256"}, "tile_size must be a number, or one for each slide. Got str"),
        ({"key_padding_mask": torch.ones(1, 5).bool()}, "at least one tile.*none in slide 0"),
        ({"coords": torch.full((1, 5, 2), 5120.0)}, r"in \[0, grid_size \* tile_size = 5120\)"),
        ({"coords": torch.full((1, 5, 2), -1.0)}, "Got -1.0 to -1.0"),
        ({"coords": torch.full((1, 5, 2), math.nan)}, "Got nan"),
        ({"key_padding_mask": torch.zeros(1, 6).bool()}, r"bool of shape \(1, 5\).*\(1, 6\)"),
        ({"key_padding_mask": torch.zeros(1, 5)}, "must be bool.*torch.float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    model, _ = golden(NAMES[0])
    given_ones: dict[str, Any] = {
        "tiles": torch.zeros(1, 5, 24, dtype=torch.float64),
        "coords": torch.zeros(1, 5, 2),
        **arguments,
    }
    with pytest.raises((TypeError, ValueError), match=says):
        model(**given_ones)


@pytest.mark.parametrize(
    ("slide", "says"),
    [
        ((torch.zeros(0, 24), torch.zeros(0, 2)), "slide 1: tiles must hold at least one tile"),
        ((torch.zeros(3, 23), torch.zeros(3, 2)), r"slide 1: tiles must have.*tile_dim=24"),
        ((torch.zeros(3, 24), torch.zeros(2, 2)), r"slide 1: coords must have shape \(3, 2\)"),
        ((torch.zeros(3, 24), torch.zeros(3, 2) - 1), "slide 1: coords must be in"),
    ],
)
def test_a_slide_that_cannot_be_encoded_is_named(slide: tuple[Tensor, Tensor], says: str) -> None:
    model, _ = golden(NAMES[0])
    with pytest.raises(ValueError, match=says):
        model.encode([(torch.zeros(3, 24), torch.zeros(3, 2)), slide])
    with pytest.raises(ValueError, match="slides must hold at least one slide"):
        model.encode([])
    with pytest.raises(ValueError, match="tiles must hold at least one tile of each slide"):
        model(torch.zeros(1, 0, 24), torch.zeros(1, 0, 2))


def test_a_width_needs_four_parts() -> None:
    with pytest.raises(ValueError, match="embed_dim"):
        SlideEncoderConfig(embed_dim=30, num_heads=1)


def test_a_configuration_is_read_back_from_files(tmp_path: Path) -> None:
    config = SlideEncoderConfig(global_pool=True, tile_size=506.5)
    for ending, text in (("json", config.model_dump_json()), ("toml", to_toml(config))):
        path = tmp_path / f"slide.{ending}"
        path.write_text(text)
        assert read_config(path) == config
        assert main(["config", "validate", str(path)]) == 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_tile_attention_is_that_of_each_slide_alone_in_the_layer_asked_for(name: str) -> None:
    model, slides, sizes, _, _ = cohort(name)
    most = max(len(tiles) for tiles, _ in slides)
    mask = torch.stack([torch.arange(most) >= len(tiles) for tiles, _ in slides])
    tiles, coords = (
        torch.stack([nn.functional.pad(s[i], (0, 0, 0, most - len(s[i]))) for s in slides])
        for i in (0, 1)
    )
    for layer in (0, -1):
        found = model.tile_attention(
            tiles, coords, layer=layer, key_padding_mask=mask, tile_size=sizes
        )
        assert found.shape == (len(slides), model.config.num_heads, most)
        for weights, slide, size, hidden in zip(found, slides, sizes, mask, strict=True):
            alone = model.tile_attention(*slide, layer=layer, tile_size=size)[0]
            assert torch.allclose(weights[:, ~hidden], alone, atol=1e-10)
            assert not weights[:, hidden].any()
            total = weights.sum(-1)
            if model.config.global_pool:
                assert torch.allclose(total, torch.ones_like(total))
            else:
                assert (total <= 1 + 1e-9).all()
    with pytest.raises(ValueError, match=r"layer must be in \[-"):
        model.tile_attention(*slides[0], layer=9)


def test_the_class_tokens_attention_is_its_row_of_all_weights() -> None:
    model, slides, sizes, _, _ = cohort(CLASSIFIERS[1])
    rows: list[Tensor] = []
    attention = model.encoder.blocks[-1].attention
    assert isinstance(attention, nn.Module)
    attention.register_forward_pre_hook(lambda module, given: rows.append(given[0]))
    model(*slides[1], tile_size=sizes[1])
    _, weights = attention(rows[0], need_weights=True)
    found = model.tile_attention(*slides[1], tile_size=sizes[1])
    assert torch.allclose(found[0], weights[0, :, 0, 1:], atol=1e-10)
