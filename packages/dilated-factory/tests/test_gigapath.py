"""GigaPath's slide encoder: its own outputs, its size, places on the slide, padding."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory import SlideEncoder, SlideEncoderConfig, load_torchscale
from dilated_factory.interop.gigapath import sine_cosine_2d
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
    cells=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=7),
    quarter=st.sampled_from([1, 5, 192]),
)
def test_places_are_sines_and_cosines(cells: list[tuple[int, int]], quarter: int) -> None:
    found = sine_cosine_2d(torch.tensor(cells), 4 * quarter)
    assert found.dtype == torch.float32
    for row, (first, second) in zip(found.tolist(), cells, strict=True):
        expected = [
            function(place / 10000 ** (i / quarter))
            for place in (second, first)
            for function in (math.sin, math.cos)
            for i in range(quarter)
        ]
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_as_if_it_were_not_there(name: str) -> None:
    model, tensors = golden(name)
    tiles, coords = tensors["tiles"], tensors["coords"]
    mask = torch.arange(90).unsqueeze(0) > 60
    rows = torch.cat((mask, torch.zeros(1, 90, dtype=torch.bool)))
    found = model(
        tiles.expand(2, -1, -1),
        coords.expand(2, -1, -1),
        all_layer_embed=True,
        key_padding_mask=rows,
    )
    assert relative_error(found[2][1:], tensors["out.2"]) < 1e-8
    assert relative_error(found[2][:1], tensors["out.2"]) > 1e-4

    # Of zero keys, torchscale counts those that fill a segment and not those that a mask hides, so
    # a shorter slide is the same only where none is counted.
    for block in model.encoder.blocks:
        attention: Any = block.attention.attention  # type: ignore[union-attr]  # never None
        attention.pattern = DilatedPattern([16, 40, 128], [1, 2, 4], head_offsets="blocked")
    masked = model(tiles, coords, all_layer_embed=True, key_padding_mask=mask)
    short = model(tiles[:, :61], coords[:, :61], all_layer_embed=True)
    for one, two in zip(masked, short, strict=True):
        assert relative_error(one, two) < 1e-10


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
    assert fresh(tiles, torch.zeros(2, 90, 2))[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tiles": torch.zeros(1, 5, 23)}, r"tiles must have shape \(B, N, tile_dim=24\)"),
        ({"coords": torch.zeros(1, 5, 3)}, r"coords must have shape \(1, 5, 2\).*\(1, 5, 3\)"),
        ({"coords": torch.full((1, 5, 2), 5120.0)}, r"in \[0, grid_size \* tile_size = 5120\)"),
        ({"coords": torch.full((1, 5, 2), -1.0)}, "Got -1.0 to -1.0"),
        ({"coords": torch.full((1, 5, 2), math.nan)}, "Got nan"),
        ({"key_padding_mask": torch.zeros(1, 6).bool()}, r"bool of shape \(1, 5\).*\(1, 6\)"),
        ({"key_padding_mask": torch.zeros(1, 5)}, "must be bool.*torch.float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Tensor], says: str) -> None:
    model, _ = golden(NAMES[0])
    given_ones = {
        "tiles": torch.zeros(1, 5, 24, dtype=torch.float64),
        "coords": torch.zeros(1, 5, 2),
        **arguments,
    }
    with pytest.raises(ValueError, match=says):
        model(**given_ones)


def test_a_width_needs_four_parts() -> None:
    with pytest.raises(ValueError, match="embed_dim"):
        SlideEncoderConfig(embed_dim=30, num_heads=1)
