"""`dilated slides embed`: an embedding of each slide."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.options import Device
from dilated_factory.cli.output import plain_console, silent_console
from dilated_factory.interop.torchscale import load_torchscale
from dilated_factory.slides.embedding import Embedding, embed_files
from dilated_factory.slides.models import (
    Pool,
    autocast_dtype,
    digest,
    encoder_config,
    loaded,
    local_device,
)
from dilated_factory.slides.readers import slide_files
from dilated_factory.training.embedding_files import check_out

EXIT_SOME_FAILED = 1

Checkpoint = Annotated[
    Path, typer.Option(help="Weights: GigaPath's file, a fine-tuned one, or ours.")
]
Shape = Annotated[
    Path | None,
    typer.Option(
        help="A slide_encoder in JSON or TOML; default: the published one.", show_default=False
    ),
]
Pooling = Annotated[
    Pool | None,
    typer.Option(
        help="What becomes the embedding. The token of the published weights was not trained, by "
        "their authors' word. Default: what the configuration says, else tiles.",
        show_default=False,
    ),
]
TileSizeOption = Annotated[
    float | None,
    typer.Option(
        help="Side of a tile in pixels of level 0, in place of the files' word.", show_default=False
    ),
]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option(help="Compute in this dtype (autocast)."),
]


def embed(
    features: Annotated[
        list[Path], typer.Argument(help="Feature files, and folders of them.", show_default=False)
    ],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Embeddings: .h5, or .npz without h5py.")],
    config: Shape = None,
    pool: Pooling = None,
    tile_size: TileSizeOption = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Keep the embedding of each state.")
    ] = False,
    max_tiles: Annotated[
        int, typer.Option(min=1, help="Tiles of slides that are computed together.")
    ] = 100_000,
    dtype: Precision = "float32",
    device: Device = "cpu",
) -> int:
    r"""Embed slides: one row of numbers each, of what TRIDENT, CLAM, STAMP and others extracted.

    What is done is kept, so that a stopped command goes on where it stood, and files that come
    later are added. A slide that cannot be embedded is told and left out; the exit code is then 1.
    The file holds "embeddings" (slides, width) and "names".

    Examples:
        dilated slides embed features/ --checkpoint slide_encoder.pth --out embeddings.h5
        dilated slides embed a.h5 b.h5 --checkpoint tuned.pt --config slide.toml --out few.npz
        torchrun --nproc-per-node 4 -m dilated_factory slides embed features/ \
            --checkpoint slide_encoder.pth --out embeddings.h5 --device cuda --dtype float16
    """
    check_out(out)
    files = slide_files(features)
    shape = encoder_config(config, pool)
    how = Embedding(tile_size, max_tiles, all_layers, autocast_dtype(dtype))
    settings = {
        "checkpoint": digest(checkpoint),
        "config": shape.model_dump(mode="json"),
        "tile_size": tile_size,
        "all_layers": all_layers,
        "dtype": dtype,
    }
    model = loaded(lambda path: load_torchscale(path, shape), checkpoint).to(local_device(device))
    with progress_bar() as show:
        failed = embed_files(model, files, out, how, settings, on_progress=show)
    console = silent_console() if int(os.environ.get("RANK", "0")) else plain_console()
    for name, why in failed.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True)
    console.print(f"{len(files) - len(failed)} of {len(files)} slides: {out}", soft_wrap=True)
    return EXIT_SOME_FAILED if failed else 0
