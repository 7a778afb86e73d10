"""`dilated show`: which keys each query sees."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_core import DilatedPattern
from dilated_core.plot import block_counts, block_edges, plot_pattern
from dilated_factory.cli.options import MOST_HEADS, Json
from dilated_factory.cli.output import plain_console
from dilated_factory.cli.patterns import (
    Causal,
    DilationRates,
    Groups,
    Offsets,
    SegmentLengths,
    pattern_summary,
    read_pattern,
)
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.errors import InputError
from dilated_factory.tools.pattern_page import pattern_page
from dilated_factory.training.atomic import replacing, require_file_name, write_text

# Cells along a side of what the terminal shows; a cell of several positions is twice as high.
MOST_CELLS = 96
MOST_ROWS = 48
MAX_LENGTH = 2**25  # pairs of so many positions are numbers that the page's arithmetic holds
MAX_PANELS = 128
# Up to here, facts that have no formula are counted in the dense pattern.
MAX_DENSE = 512
MAX_PAIRS = 2**24
# A cell of several positions: the share of its pairs that is seen, from so much on.
SHADES = ((1.0, "█"), (0.1, "▓"), (0.01, "▒"), (0.0, "░"))


def show(
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    length: Annotated[
        int, typer.Option(min=1, max=MAX_LENGTH, help="Positions of the sequence.")
    ] = 32,
    first: Annotated[
        int, typer.Option("--from", min=0, help="First position to show; it zooms.")
    ] = 0,
    last: Annotated[
        int | None,
        typer.Option(
            "--to",
            min=1,
            help="Position after the last one; default: the length.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Heads of the attention.")] = 4,
    head: Annotated[int, typer.Option(min=0, help="Head to show in the terminal.")] = 0,
    head_offsets: Offsets = "interleaved",
    head_groups: Groups = "shared",
    causal: Causal = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw all heads and branches into this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to explore into this file; it needs no net.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show a pattern: in the terminal, as a picture, or as a page to explore.

    Rows are queries, columns are keys; a number says how many branches show the key. Where there
    are more positions than cells, a cell is a block of them, and says how many of its pairs are
    seen. The default pattern is that of a model with the length as its context.

    Examples:
        dilated show
        dilated show --segment-lengths 16,64 --dilation-rates 1,4 --length 64
        dilated show --length 65536 --causal
        dilated show --length 1000000 --from 500000 --to 500500
        dilated show --heads 8 --png pattern.png --html pattern.html
    """
    pattern = read_pattern(
        segment_lengths,
        dilation_rates,
        default_pattern(length),
        head_offsets=head_offsets,
        head_groups=head_groups,
        heads=heads,
    )
    if head >= heads:
        raise InputError(f"--head must be less than --heads ({heads}). Got {head}.")
    last = length if last is None else last
    if not first < last <= length:
        raise InputError(
            f"--from must be less than --to, and --to at most --length ({length}). "
            f"Got {first} and {last}."
        )
    panels = heads * (1 + len(pattern.segment_lengths))
    if png is not None and panels > MAX_PANELS:
        raise InputError(
            f"--png draws at most {MAX_PANELS} panels, one for each head and branch. Got {panels}."
        )
    for path in (png, html):
        if path is not None:
            require_file_name(path)
    if png is not None:
        figure = plot_pattern(pattern, length, heads, is_causal=causal, first=first, last=last)
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    if html is not None:
        view = (first, last)
        write_text(html, pattern_page(pattern, length, heads, is_causal=causal, view=view))
    if as_json:
        print(json.dumps(pattern_record(pattern, length, heads, causal) | _files(png, html)))
        return 0
    console = plain_console()
    if png is None and html is None:
        shown = pattern_text(pattern, heads, head, first, last, is_causal=causal)
        console.print(shown, soft_wrap=True)
    for path in (png, html):
        if path is not None:
            console.print(f"written: {path}", soft_wrap=True)
    return 0


def pattern_text(
    pattern: DilatedPattern, heads: int, head: int, first: int, last: int, *, is_causal: bool
) -> str:
    """The keys of one head as text: a line for each block of queries, from first to last."""
    keys = block_edges(first, last, MOST_CELLS)
    size = keys[1] - keys[0]
    queries = keys if size == 1 else block_edges(first, last, MOST_ROWS)
    counts = block_counts(pattern, heads, queries, keys, is_causal=is_causal)[:, head].sum(0)
    title = f"{pattern_summary(pattern)}, head {head} of {heads}{', causal' if is_causal else ''}"
    wide = len(f"{last - 1:,}")
    lines = [title]
    if size > 1:
        lines.append(
            f"a cell: {queries[1] - queries[0]:,} queries down, {size:,} keys across; of its pairs "
            "· none, ░ < 1%, ▒ < 10%, ▓ < 100%, █ more"
        )
    lines.append(f"{'query':>{wide}} key {first:,} to {last - 1:,}")
    for query, row in zip(pairwise(queries), counts.tolist(), strict=True):
        cells = (
            _cell(count, (query[1] - query[0]) * (right - left))
            for count, (left, right) in zip(row, pairwise(keys), strict=True)
        )
        lines.append(f"{query[0]:{wide},} {''.join(cells)}")
    return "\n".join(lines)


def _cell(count: int, pairs: int) -> str:
    if not count:
        return "·"
    if pairs == 1:
        return str(min(count, 9))
    return next(shade for share, shade in SHADES if count >= share * pairs)


def pattern_record(
    pattern: DilatedPattern, length: int, heads: int, is_causal: bool
) -> dict[str, Any]:
    """What machines may want to know of a pattern; what takes the dense one is null for long ones.

    That is the share of pairs that any branch shows, and how many queries see no key.
    """
    flops = pattern.flops(length, heads, 1, is_causal=is_causal)
    seen = None
    if length <= MAX_DENSE and heads * length**2 <= MAX_PAIRS:
        seen = pattern.multiplicity(length, heads, is_causal=is_causal)
    return {
        "pattern": pattern.to_dict(),
        "length": length,
        "heads": heads,
        "is_causal": is_causal,
        "visible_pairs": flops // 4,
        "density": None if seen is None else (seen > 0).double().mean().item(),
        "blind_queries": None if seen is None else int((seen.sum(-1) == 0).sum()),
        "flops_per_head_dim": flops,
    }


def _files(png: Path | None, html: Path | None) -> dict[str, str | None]:
    return {
        name: None if path is None else str(path) for name, path in (("png", png), ("html", html))
    }
