"""`dilated show`: which keys each query sees."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_core import DilatedPattern
from dilated_factory.cli.options import MOST_HEADS
from dilated_factory.cli.output import plain_console
from dilated_factory.cli.patterns import (
    Causal,
    DilationRates,
    Groups,
    Json,
    Offsets,
    SegmentLengths,
    read_pattern,
)
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.errors import InputError
from dilated_factory.tools.pattern_page import pattern_page
from dilated_factory.training.atomic import replacing, require_file_name, write_text

MAX_TERMINAL = 96
MAX_FILE = 512
MAX_PAIRS = 2**24
MAX_PANELS = 128


def show(
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    length: Annotated[int, typer.Option(min=1, help="Positions to show.")] = 32,
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

    Rows are queries, columns are keys; a number says how many branches show the key. The default
    pattern is that of a model with the length as its context.

    Examples:
        dilated show
        dilated show --segment-lengths 16,64 --dilation-rates 1,4 --length 64
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
    to_file = png is not None or html is not None
    most = MAX_FILE if to_file or as_json else MAX_TERMINAL
    if length > most:
        raise InputError(f"--length must be at most {most} here. Got {length}.")
    if heads * length**2 > MAX_PAIRS:
        raise InputError(
            f"--heads times the square of --length must be at most {MAX_PAIRS:,}. "
            f"Got {heads} and {length}."
        )
    panels = heads * (1 + len(pattern.segment_lengths))
    if png is not None and (panels > MAX_PANELS or panels * length**2 > MAX_PAIRS):
        raise InputError(
            f"--png draws at most {MAX_PANELS} panels, one for each head and branch, of at most "
            f"{MAX_PAIRS:,} points in all. Got {panels} of {length} x {length}."
        )
    for path in (png, html):
        if path is not None:
            require_file_name(path)
    if png is not None:
        save_pattern(png, pattern, length, heads, is_causal=causal)
    if html is not None:
        write_text(html, pattern_page(pattern, length, heads, is_causal=causal))
    if as_json:
        print(json.dumps(pattern_record(pattern, length, heads, causal) | _files(png, html)))
        return 0
    console = plain_console()
    if not to_file:
        console.print(pattern_text(pattern, length, heads, head, is_causal=causal), soft_wrap=True)
    for path in (png, html):
        if path is not None:
            console.print(f"written: {path}", soft_wrap=True)
    return 0


def save_pattern(
    path: Path, pattern: DilatedPattern, length: int, heads: int, *, is_causal: bool
) -> None:
    """Draw the pattern into a PNG file."""
    from dilated_core.plot import plot_pattern

    figure = plot_pattern(pattern, length, heads, is_causal=is_causal)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def pattern_text(
    pattern: DilatedPattern, length: int, heads: int, head: int, *, is_causal: bool
) -> str:
    """The keys of one head as text: a line for each query."""
    seen = pattern.multiplicity(length, heads, is_causal=is_causal)[head].tolist()
    rows = [
        f"{query:4d} " + "".join(str(min(count, 9)) if count else "·" for count in keys)
        for query, keys in enumerate(seen)
    ]
    title = f"{pattern!r}, head {head} of {heads}{', causal' if is_causal else ''}"
    return "\n".join([title, *rows])


def pattern_record(
    pattern: DilatedPattern, length: int, heads: int, is_causal: bool
) -> dict[str, Any]:
    """What machines may want to know of a pattern."""
    seen = pattern.multiplicity(length, heads, is_causal=is_causal)
    return {
        "pattern": pattern.to_dict(),
        "length": length,
        "heads": heads,
        "is_causal": is_causal,
        "visible_pairs": int(seen.sum()),
        "density": (seen > 0).double().mean().item(),
        "blind_queries": int((seen.sum(-1) == 0).sum()),
        "flops_per_head_dim": pattern.flops(length, heads, 1, is_causal=is_causal),
    }


def _files(png: Path | None, html: Path | None) -> dict[str, str | None]:
    return {
        name: None if path is None else str(path) for name, path in (("png", png), ("html", html))
    }
