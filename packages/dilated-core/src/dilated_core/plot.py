"""Pictures of patterns: which keys queries see, by head and by branch. They need matplotlib."""

# Shapes: K branches, H heads, R and C blocks of queries and of keys.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_core import _checks
from dilated_core._pattern import DilatedPattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pairs are counted in int64.
MAX_LENGTH = 2**30
# Blocks along a side of a panel, and in all panels of a picture.
_MOST_BLOCKS, _MOST_POINTS = 512, 2**21


def block_edges(first: int, last: int, most: int) -> list[int]:
    """Where blocks begin that divide positions, at most so many, alike but for the last; and last.

    Args:
        first: position that the first block begins at.
        last: the position after the last block.
        most: blocks at most.
    """
    return [*range(first, last, -(-(last - first) // most)), last]


def block_counts(
    pattern: DilatedPattern,
    heads: int,
    query_edges: Sequence[int],
    key_edges: Sequence[int],
    *,
    is_causal: bool = False,
) -> Tensor:
    """How many pairs of a query and a key each branch shows between blocks of positions.

    By a formula for each corner of a block: neither time nor memory depends on the length.

    Args:
        pattern: the pattern.
        heads: number of heads H.
        query_edges: R + 1 positions from 0, rising: where blocks of queries begin, and the end.
        key_edges: C + 1 of keys.
        is_causal: hide the keys after each query.

    Returns:
        int64 tensor of shape (K, H, R, C); blocks of one position give `multiplicity`, summed over
        the branches.

    Raises:
        ValueError: edges do not rise, or are not in [0, 2**30].
    """
    _checks.positive_int("heads", heads)
    for name, edges in (("query_edges", query_edges), ("key_edges", key_edges)):
        if len(edges) < 2 or list(edges) != sorted(set(edges)):
            raise ValueError(f"{name} must be two or more rising positions. Got {edges!r}.")
        if not 0 <= edges[0] <= edges[-1] <= MAX_LENGTH:
            raise ValueError(f"{name} must be in [0, 2**30]. Got {edges[0]} to {edges[-1]}.")
    rows = torch.tensor(query_edges)[:, None]
    columns = torch.tensor(key_edges)[None]
    shape = len(pattern.branches), heads, len(query_edges) - 1, len(key_edges) - 1
    counts = torch.zeros(shape, dtype=torch.int64)
    for branch, ((w, r), used) in enumerate(
        zip(pattern.branches, pattern.branch_heads(heads), strict=True)
    ):
        found: dict[int, Tensor] = {}
        for head in used:
            offset = pattern.head_offset(head, heads, r)
            if offset not in found:
                before = _pairs_before(rows, columns, w, r, offset, is_causal)
                found[offset] = before.diff(dim=0).diff(dim=1)
            counts[branch, head] = found[offset]
    return counts


def _pairs_before(
    rows: Tensor, columns: Tensor, w: int, r: int, offset: int, is_causal: bool
) -> Tensor:
    """The pairs of a query before each row and a key before each column, of one branch."""

    def kept(positions: Tensor) -> Tensor:
        # Among the first so many of a segment.
        return (positions.clamp(max=w) - offset + r - 1).clamp(min=0).div(r, rounding_mode="floor")

    near = torch.minimum(rows, columns)
    segments = near.div(w, rounding_mode="floor")
    start = segments * w
    inside, whole = kept(near - start), kept(torch.tensor(w))
    if not is_causal:
        return segments * whole**2 + inside * kept(torch.maximum(rows, columns) - start)
    triangles = segments * (whole * (whole + 1) // 2) + inside * (inside + 1) // 2
    later = kept(rows.clamp(min=0).maximum(near) - start) - inside
    return triangles + later * inside


def plot_pattern(
    pattern: DilatedPattern,
    length: int,
    heads: int = 4,
    *,
    is_causal: bool = False,
    first: int = 0,
    last: int | None = None,
) -> Figure:
    """Draw which keys each query sees: a row for each branch and for all together, by head.

    Where there are more positions than points, a point is a block, and its colour says how many
    pairs of a query and a key it has.

    Args:
        pattern: the pattern to draw.
        length: number of positions N, at most 2**30.
        heads: number of heads H, one column each.
        is_causal: hide the keys after each query.
        first: the first position to draw, of queries and of keys.
        last: the position after the last one; length when None.

    Returns:
        A matplotlib Figure; `figure.savefig("pattern.png")` writes it.

    Raises:
        ValueError: a size is not positive, length is above 2**30, or first and last are not
            positions one after the other.
        ImportError: matplotlib is not installed (the extra `plot` brings it).
    """
    if _checks.positive_int("length", length) > MAX_LENGTH:
        raise ValueError(f"length must be at most {MAX_LENGTH}. Got {length}.")
    _checks.positive_int("heads", heads)
    last = length if last is None else last
    if not 0 <= first < last <= length:
        raise ValueError(
            f"first and last must be in [0, length={length}], rising. Got {first} and {last}."
        )
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError('plot_pattern needs matplotlib: pip install "matplotlib>=3.9"') from error

    titles = [f"w={w:,}, r={r:,}" for w, r in pattern.branches] + ["all"]
    most = min(_MOST_BLOCKS, max(16, math.isqrt(_MOST_POINTS // (heads * len(titles)))))
    edges = block_edges(first, last, most)
    size = edges[1] - edges[0]
    counts = block_counts(pattern, heads, edges, edges, is_causal=is_causal)
    counts = torch.cat([counts, counts.sum(0, keepdim=True)])
    figure = Figure(figsize=(1.8 * heads + 1.2, 1.8 * len(titles) + 0.8), layout="constrained")
    axes = figure.subplots(len(titles), heads, squeeze=False, sharex=True, sharey=True)
    # Thin branches are seen beside dense ones.
    norm = PowerNorm(1 if size == 1 else 0.3, 0, max(1, int(counts.max())))
    place = (first - 0.5, first - 0.5 + size * (len(edges) - 1))
    image: Any = None
    for row, title in enumerate(titles):
        for head in range(heads):
            axis = axes[row][head]
            # Lists, so that numpy is matplotlib's business only.
            image = axis.imshow(
                counts[row, head].tolist(), norm=norm, cmap="Blues", interpolation="nearest",
                extent=(*place, *reversed(place)),
            )  # fmt: skip
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(3, integer=True))
                side.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            if row == 0:
                axis.set_title(f"head {head}")
            if head == 0:
                axis.set_ylabel(f"{title}\nquery position")
            if row == len(titles) - 1:
                axis.set_xlabel("key position")
    whole = MaxNLocator(integer=True, min_n_ticks=1)
    label = "times the key counts" if size == 1 else f"pairs in a block of {size:,} x {size:,}"
    figure.colorbar(image, ax=axes, label=label, shrink=0.6, ticks=whole)
    name = repr(pattern) if len(pattern.branches) <= 4 else f"{len(pattern.branches)} branches"
    figure.suptitle(name + (", causal" if is_causal else ""))
    return figure
