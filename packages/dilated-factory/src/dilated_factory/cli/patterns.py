"""Options that describe a dilated pattern, shared by the commands that take one."""

from typing import Annotated, Literal

import typer

from dilated_core import DilatedPattern
from dilated_factory.cli.options import parse_lengths
from dilated_factory.errors import InputError

SegmentLengths = Annotated[
    str | None,
    typer.Option(help="Segment of each branch, as in 64,256,1024.", show_default=False),
]
DilationRates = Annotated[
    str | None,
    typer.Option(help="Dilation of each branch, as in 1,4,16.", show_default=False),
]
Offsets = Annotated[
    Literal["interleaved", "blocked"], typer.Option(help="Which rows a head keeps.")
]
Groups = Annotated[
    Literal["shared", "split"], typer.Option(help="Whether all heads use all branches.")
]
Causal = Annotated[bool, typer.Option("--causal", help="Hide the keys after each query.")]
Dtype = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    typer.Option(metavar="TYPE", help="Of all tensors: float16, bfloat16, float32 or float64."),
]
# More branches than this are not told one by one.
_MOST_BRANCHES = 4


def pattern_summary(pattern: DilatedPattern) -> str:
    """A pattern in a line that can be read: its `repr`, or of many branches from where to where."""
    branches = len(pattern.segment_lengths)
    if branches <= _MOST_BRANCHES:
        return repr(pattern)
    spans = (
        f"{name} {min(values):,} to {max(values):,}"
        for name, values in (
            ("segments", pattern.segment_lengths),
            ("dilation rates", pattern.dilation_rates),
        )
    )
    return f"pattern of {branches} branches ({', '.join(spans)})"


def read_pattern(
    segment_lengths: str | None,
    dilation_rates: str | None,
    default: DilatedPattern,
    *,
    head_offsets: Literal["interleaved", "blocked"] = "interleaved",
    head_groups: Literal["shared", "split"] = "shared",
    heads: int,
) -> DilatedPattern:
    """The pattern that the options describe; without lengths and rates, the default's.

    Raises:
        InputError: only one of them is given, or they do not fit together or the heads.
    """
    lengths = parse_lengths("--segment-lengths", segment_lengths)
    rates = parse_lengths("--dilation-rates", dilation_rates)
    if (lengths is None) != (rates is None):
        raise InputError("--segment-lengths and --dilation-rates must be given together.")
    if lengths is None or rates is None:
        lengths, rates = default.segment_lengths, default.dilation_rates
    try:
        pattern = DilatedPattern(lengths, rates, head_offsets=head_offsets, head_groups=head_groups)
        pattern.branch_heads(heads)
    except ValueError as error:
        raise InputError(str(error)) from None
    return pattern
