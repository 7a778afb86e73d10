"""Pictures of layouts, as text and with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_sparse import _checks
from dilated_sparse._blocks import Layout
from dilated_sparse._grid import FULL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LETTERS = ".+#"


def text(layout: Layout, head: int, size: int) -> str:
    """A picture of one head in at most size x size letters: # full, + partial, . empty."""
    shares = _shares(layout, head, _checks.integer("size", size))
    kinds = torch.where(shares >= 1, 2, torch.where(shares > 0, 1, 0))
    return "\n".join("".join(_LETTERS[kind] for kind in row) for row in kinds.tolist())


def plot(layout: Layout, size: int) -> Figure:
    """A Figure with a panel for each head."""
    _checks.integer("size", size)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "matplotlib>=3.9"') from error
    heads = layout.heads
    figure = Figure(figsize=(3.2 * heads + 0.8, 3.6), layout="constrained")
    for head, axis in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
        # Lists, so that numpy is matplotlib's business only.
        axis.imshow(
            _shares(layout, head, size).tolist(), vmin=0, vmax=1, cmap="Blues",
            interpolation="nearest", extent=(0, layout.key_length, layout.length, 0),
        )  # fmt: skip
        axis.set(title=f"head {head}", xlabel="key", ylabel="query" if head == 0 else "")
    figure.suptitle(repr(layout))
    return figure


def _shares(layout: Layout, head: int, size: int) -> Tensor:
    """How visible each cell of a coarse grid is: 1 where all its blocks are full."""
    if not 0 <= head < layout.heads:
        raise ValueError(f"head must be in [0, {layout.heads}). Got {head}.")
    grid, blocks = layout.grid, layout.blocks
    here = torch.div(blocks.row, max(1, grid.rows), rounding_mode="floor") == head
    row, column, mask = blocks.row[here] - head * grid.rows, blocks.column[here], blocks.mask[here]
    step = max(1, -(-max(grid.rows, grid.columns) // size))
    rows, columns = -(-grid.rows // step), -(-grid.columns // step)
    cell = row // step * columns + column // step
    seen = torch.bincount(cell, (mask == FULL) * 0.5 + 0.5, minlength=rows * columns)
    height = (grid.rows - torch.arange(rows) * step).clamp(max=step)
    width = (grid.columns - torch.arange(columns) * step).clamp(max=step)
    return seen.reshape(rows, columns) / (height[:, None] * width)
