"""`dilated slides map`: which tiles of a slide decide."""

from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.options import Device
from dilated_factory.cli.output import plain_console
from dilated_factory.cli.slides_embed import Pooling, Shape, TileSizeOption
from dilated_factory.configs.kinds import read_config
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError
from dilated_factory.interop.classifier import SlideClassifier
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.interop.torchscale import load_torchscale
from dilated_factory.slides.maps import By, draw_map, tile_weights
from dilated_factory.slides.models import encoder_config, loaded, local_device
from dilated_factory.slides.readers import read_slide_features
from dilated_factory.slides.training import CHECKPOINT, load_classifier


def map_slide(
    features: Annotated[Path, typer.Argument(help="Feature file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Picture, .png.")],
    run: Annotated[
        Path | None,
        typer.Option(
            help="Fold of `dilated slides train`, e.g. runs/grade/fold0.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a slide encoder.", show_default=False)
    ] = None,
    config: Shape = None,
    pool: Pooling = None,
    by: Annotated[
        By, typer.Option(help="Weights of attention, or features times gradient (needs --run).")
    ] = "attention",
    layer: Annotated[int, typer.Option(help="Layer of the attention; -1 is the last.")] = -1,
    output: Annotated[
        int | None,
        typer.Option(help="Output of the gradient, from 0; default: largest.", show_default=False),
    ] = None,
    tile_size: TileSizeOption = None,
    device: Device = "cpu",
) -> int:
    """Draw which tiles of a slide decide, at their places.

    By attention: how a layer weighs the tiles for the embedding, the mean over heads. By gradient:
    how much an output of a trained classifier would fall, to first order, without the tile.

    Examples:
        dilated slides map features/case7.h5 --run runs/grade/fold0 --by gradient --out case7.png
        dilated slides map features/case7.h5 --checkpoint slide_encoder.pth --out case7.png
    """
    if (run is None) == (checkpoint is None):
        raise InputError("one of --run and --checkpoint must be given.")
    if out.suffix != ".png":
        raise InputError(f"--out must end in .png. Got {str(out)!r}.")
    slide = read_slide_features(features)
    task: SlideTaskConfig | None = None
    if run is not None:
        told = read_config(run / "config.json")
        if not isinstance(told, SlideTaskConfig) or told.model != "encoder":
            raise InputError(f"{str(run)!r} must be a fold with a slide encoder.")
        task = told
    placed = slide.placed(task.tile_size if task and tile_size is None else tile_size)
    model: SlideEncoder | SlideClassifier
    if task is not None and run is not None:
        model = load_classifier(run / CHECKPOINT, task, placed[0].shape[1])
    else:
        assert checkpoint is not None
        shape = encoder_config(config, pool)
        model = loaded(lambda path: load_torchscale(path, shape), checkpoint)
    model = model.to(local_device(device))
    try:
        weights = tile_weights(model, placed, by, layer=layer, output=output)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{slide.name}: {error}") from None
    what = f"attention, layer {layer}" if by == "attention" else "gradient times features"
    draw_map(out, placed[1], placed[2], weights, f"{slide.name}: {what}")
    plain_console().print(f"{len(weights)} tiles: {out}", soft_wrap=True)
    return 0
