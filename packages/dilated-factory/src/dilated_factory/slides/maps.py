"""Heat maps: which tiles of a slide decide, drawn at their places."""

# Shapes: N tiles, H heads.

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dilated_factory.errors import InputError
from dilated_factory.interop.classifier import SlideClassifier
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.interop.places import grid_cells
from dilated_factory.training.atomic import replacing

By: TypeAlias = Literal["attention", "gradient"]

# Longest side of a picture's field of tiles, in pixels.
_PIXELS = 1600


def tile_weights(
    model: SlideEncoder | SlideClassifier,
    slide: tuple[Tensor, Tensor, float],
    by: By,
    *,
    layer: int = -1,
    output: int | None = None,
) -> Tensor:
    """How much each tile decides (N,), on the CPU.

    Args:
        model: a classifier, or by attention an encoder as well.
        slide: tiles (N, tile_dim), coordinates (N, 2), tile size.
        by: "attention" is the mean over heads of `SlideEncoder.tile_attention`; "gradient" the sum
            of features times the gradient of an output to them: how much the output falls, to first
            order, if the tile's features become 0.
        layer: of the attention.
        output: of the gradient; the largest when None.

    Raises:
        InputError: a gradient of an encoder, or there is no such output or layer.
    """
    encoder = model if isinstance(model, SlideEncoder) else model.slide_encoder
    tiles, coords, size = slide
    tiles = tiles.to(encoder.cls_token.device)
    if by == "attention":
        try:
            weights = encoder.tile_attention(tiles, coords, layer=layer, tile_size=size)
        except ValueError as error:
            raise InputError(str(error)) from None
        return weights[0].mean(0).float().cpu()
    if isinstance(model, SlideEncoder):
        raise InputError("a map by gradient needs a trained classifier. Got a slide encoder.")
    frozen, model.freeze = model.freeze, False
    try:
        tiles = tiles.detach().to(encoder.cls_token.dtype).requires_grad_()
        logits = model(tiles, coords, tile_size=size)[0]
        if output is not None and not 0 <= output < len(logits):
            raise InputError(f"output must be in [0, {len(logits) - 1}]. Got {output}.")
        chosen = logits.argmax() if output is None else output
        (gradient,) = torch.autograd.grad(logits[chosen], tiles)
    finally:
        model.freeze = frozen
    return (gradient * tiles).sum(-1).detach().float().cpu()


def draw_map(path: Path, coords: Tensor, tile_size: float, weights: Tensor, title: str) -> None:
    """Draw tiles (N, 2) coloured by their weights (N,) into a PNG file; x goes to the right.

    Weights of one sign are coloured by their rank, so that a few large ones do not hide the rest;
    of both signs by their value, blue below zero and red above.
    """
    from matplotlib.figure import Figure

    cells = grid_cells(coords.cpu().double(), torch.tensor(tile_size, dtype=torch.float64)).long()
    cells = cells - cells.amin(0)
    across, down = (cells.amax(0) + 1).tolist()
    field = np.full((down, across), np.nan)
    signed = bool((weights < 0).any() and (weights > 0).any())
    shown = weights if signed else weights.argsort().argsort() / max(len(weights) - 1, 1)
    field[cells[:, 1].numpy(), cells[:, 0].numpy()] = shown.numpy()
    most = float(weights.abs().quantile(0.99)) if len(weights) <= 1 << 24 else 1.0
    limits = (-(most or 1.0), most or 1.0) if signed else (0.0, 1.0)

    side = max(across, down)
    inches = 8 * np.array([across, down]) / side + np.array([1.6, 0.8])
    figure = Figure(figsize=tuple(inches.clip(3)), dpi=_PIXELS / 8 / 2)
    axes = figure.add_subplot()
    axes.set_facecolor("0.93")
    picture = axes.imshow(
        field,
        cmap="RdBu_r" if signed else "magma",
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
    )
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axes, label="weight" if signed else "rank of weight", fraction=0.04)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
