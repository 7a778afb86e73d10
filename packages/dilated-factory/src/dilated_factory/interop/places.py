"""Places of tiles on a slide: from coordinates to cells of a grid, and to sines and cosines."""

# Shapes: B batch or one packed batch, N tiles, E embed_dim.

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A number, or one for each slide.
TileSize: TypeAlias = float | Sequence[float] | Tensor

# More tiles than this on each place, on average, are no overlap of tiles any more.
CROWD = 8


class PlaceTable(nn.Module):
    """The sines and cosines of each place along a side of the grid, float32 whatever the model is.

    GigaPath keeps a table of all cells (3 GB at its size), float64 rounded to float32; a cell's row
    is that of its second coordinate and then that of its first. The table follows from its size, so
    it is in no state dict.
    """

    def __init__(self, grid_size: int, embed_dim: int) -> None:
        super().__init__()
        self.grid_size, self.embed_dim = grid_size, embed_dim
        table, device = self._made(), torch.get_default_device()
        # Real in a model on the meta device, too: what loads its weights knows of no table.
        table = table if device.type == "meta" else table.to(device)
        self.register_buffer("table", table, persistent=False)
        self.table: Tensor

    def _made(self) -> Tensor:
        # On the CPU under any default device, since some have no float64.
        places = torch.arange(self.grid_size, device="cpu").unsqueeze(-1)
        return sine_cosine(places, self.embed_dim // 2)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's has no types
        # Neither a cast of the model nor `to_empty` may touch what is in it.
        if self.table.device.type != "meta":
            self.table = self._made().to(self.table.device)
        return self

    def forward(self, cells: Tensor, inside: Tensor) -> Tensor:
        """Embeddings (..., E) of cells int64 (..., 2); NaN where not ``inside`` (...)."""
        table = self.table.to(cells.device)
        places = F.embedding(cells.flip(-1).clamp(0, self.grid_size - 1), table).flatten(-2)
        return places.masked_fill(~inside.unsqueeze(-1), math.nan)


def sine_cosine(places: Tensor, width: int) -> Tensor:
    """Sines of place * 10000 ** (-2i / width), then the cosines, float32.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5. Computed in float64 and rounded, because
    that is GigaPath's table.

    Args:
        places: (..., 1), where on the axis.
        width: how many sines and cosines, an even number.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=places.device) / half
    angles = places.to(torch.float64) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(torch.float32)


def check_coords(coords: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``coords`` is a real tensor of a shape."""
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a Tensor. Got {type(coords).__name__}.")
    if coords.is_complex() or coords.dtype == torch.bool:
        raise TypeError(f"coords must be of a real or integer dtype. Got {coords.dtype}.")
    if coords.shape != shape:
        raise ValueError(f"coords must have shape {shape}. Got {tuple(coords.shape)}.")


def tile_sizes(tile_size: TileSize, slides: int, device: torch.device) -> Tensor:
    """The tile size of each slide (slides,) on ``device``, float64 on the CPU and else float32.

    Raises:
        TypeError: it is no number and no sequence of them.
        ValueError: a size is not positive, or there is not one for each slide.
    """
    wide = torch.float64 if device.type == "cpu" else torch.float32
    if not isinstance(tile_size, Tensor):
        numbers = tile_size if isinstance(tile_size, list | tuple) else [tile_size]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(
                    "tile_size must be a number, or one for each slide. "
                    f"Got {type(number).__name__}."
                )
    sizes = torch.as_tensor(tile_size, dtype=None if isinstance(tile_size, Tensor) else wide)
    if sizes.ndim > 1 or (sizes.ndim == 1 and len(sizes) != slides):
        raise ValueError(
            f"tile_size must be a number, or one for each of {slides} slides. "
            f"Got shape {tuple(sizes.shape)}."
        )
    if readable(sizes) and not ((sizes > 0) & (sizes < math.inf)).all():
        raise ValueError(f"tile_size must be positive and finite. Got {sizes.tolist()}.")
    return sizes.to(wide).to(device, non_blocking=True).expand(slides)


def grid_cells(coords: Tensor, sizes: Tensor) -> Tensor:
    """The cells (..., 2) of coordinates by tile sizes that broadcast with them, as whole floats.

    Exact for numbers that float32 holds, float64 on the CPU.
    """
    return torch.div(coords.to(sizes.dtype), sizes, rounding_mode="floor")


def check_places(coords: Tensor, cells: Tensor, sizes: Tensor, grid_size: int) -> None:
    """Raise or warn where the coordinates of a slide cannot be right.

    Only where that waits for nothing: not on a GPU, and not while a graph is made.

    Args:
        coords: (N, 2) of one slide.
        cells: (N, 2), of `grid_cells`.
        sizes: () the slide's tile size.
        grid_size: cells along a side.

    Raises:
        ValueError: a coordinate is out of range.

    Warns:
        UserWarning: the dtype cannot tell pixels apart, or most tiles lie on few places.
    """
    if not readable(coords) or not len(coords):
        return
    if not ((cells >= 0) & (cells < grid_size)).all():
        raise ValueError(
            f"coords must be in [0, grid_size * tile_size = {grid_size * sizes.item():g}). "
            f"Got {coords.min().item()} to {coords.max().item()}."
        )
    size, most = sizes.item(), coords.max().item()
    if coords.is_floating_point() and torch.finfo(coords.dtype).eps * most > size / 8:
        warnings.warn(
            f"coords up to {most:g} are too large for {coords.dtype}, which rounds them to "
            f"steps of up to {torch.finfo(coords.dtype).eps * most:g} pixels: places are wrong. "
            "Keep coordinates in float32 or an integer dtype.",
            UserWarning,
            stacklevel=2,
        )
    places = _count(cells.long())
    if len(cells) > CROWD * places:
        warnings.warn(
            f"coords put {len(cells)} tiles on {places} places of {size:g} pixels, which looks "
            f"like {_guess(coords, size)}. The encoder takes pixels of the level that tile_size "
            "is given at.",
            UserWarning,
            stacklevel=2,
        )


def _count(cells: Tensor) -> int:
    """How many different cells there are."""
    low = cells.amin(0)
    spans = (cells.amax(0) - low + 1).tolist()
    if math.prod(spans) > 1 << 24:
        return len(torch.unique(cells, dim=0))
    seen = torch.zeros(math.prod(spans), dtype=torch.bool)
    seen[(cells - low) @ torch.tensor([spans[1], 1])] = True
    return int(seen.sum())


def _guess(coords: Tensor, size: float) -> str:
    wide = coords.to(torch.float64)
    if not wide.any():
        return "coordinates that are missing: all are 0"
    if wide.max() <= 1:
        return "coordinates scaled to [0, 1]"
    if torch.equal(wide, wide.floor()) and wide.max() - wide.min() < 8 * len(wide):
        return f"indices in a grid: multiply them by tile_size = {size:g}"
    return "coordinates that were scaled, in micrometres, or of a lower level"


def readable(x: Tensor) -> bool:
    """Whether to read what is in it waits for no device and goes into no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
