"""Pictures of patterns: which keys each query sees, by head and by branch. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dilated_core import _checks
from dilated_core._pattern import DilatedPattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More positions than this make a picture of pixels that nobody can tell apart.
MAX_LENGTH = 2048


def plot_pattern(
    pattern: DilatedPattern, length: int, heads: int = 4, *, is_causal: bool = False
) -> Figure:
    """Draw which keys each query sees: a row for each branch and for all together, by head.

    Args:
        pattern: the pattern to draw.
        length: number of positions N, at most 2048.
        heads: number of heads H, one column each.
        is_causal: hide the keys after each query.

    Returns:
        A matplotlib Figure; `figure.savefig("pattern.png")` writes it.

    Raises:
        ValueError: a size is not positive, or length is above 2048.
        ImportError: matplotlib is not installed (the extra `plot` brings it).
    """
    if _checks.positive_int("length", length) > MAX_LENGTH:
        raise ValueError(f"length must be at most {MAX_LENGTH}. Got {length}.")
    _checks.positive_int("heads", heads)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('plot_pattern needs matplotlib: pip install "matplotlib>=3.9"') from error

    counts = [*_by_branch(pattern, length, heads, is_causal)]
    total = pattern.multiplicity(length, heads, is_causal=is_causal)
    titles = [f"w={w}, r={r}" for w, r in pattern.branches] + ["all"]
    highest = max(1, int(total.max()))
    figure = Figure(figsize=(1.8 * heads + 1.2, 1.8 * len(titles) + 0.8), layout="constrained")
    axes = figure.subplots(len(titles), heads, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for row, (title, count) in enumerate(zip(titles, [*counts, total], strict=True)):
        for head in range(heads):
            axis = axes[row][head]
            # Lists, so that numpy is matplotlib's business only.
            image = axis.imshow(
                count[head].tolist(), vmin=0, vmax=highest, cmap="Blues", interpolation="nearest"
            )
            if row == 0:
                axis.set_title(f"head {head}")
            if head == 0:
                axis.set_ylabel(f"{title}\nquery")
            if row == len(titles) - 1:
                axis.set_xlabel("key")
    whole = MaxNLocator(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=axes, label="times the key counts", shrink=0.6, ticks=whole)
    figure.suptitle(repr(pattern) + (", causal" if is_causal else ""))
    return figure


def _by_branch(pattern: DilatedPattern, length: int, heads: int, is_causal: bool) -> list[Any]:
    """The multiplicity (H, N, N) of each branch alone, with the heads it has in the pattern."""
    counts = []
    members = pattern.branch_heads(heads)
    for (w, r), used in zip(pattern.branches, members, strict=True):
        alone = DilatedPattern([w], [r], head_offsets=pattern.head_offsets)
        count = alone.multiplicity(length, heads, is_causal=is_causal)
        for head in set(range(heads)) - set(used):
            count[head] = 0
        counts.append(count)
    return counts
