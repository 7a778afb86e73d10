"""`dilated plan attention`: what a sequence takes, before anything is run."""

import dataclasses
import json
from typing import Annotated

import torch
import typer
from rich.table import Table

from dilated_factory.cli.options import MOST_HEADS, MOST_POSITIONS, MOST_SEQUENCES, MOST_WIDTH, Json
from dilated_factory.cli.output import plain_console, seconds, size
from dilated_factory.cli.patterns import (
    Causal,
    DilationRates,
    Dtype,
    Offsets,
    SegmentLengths,
    pattern_summary,
    read_pattern,
)
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.errors import InputError
from dilated_factory.tools.planning import Needs, Workload, make_plan, measure_flops_per_second

MOST_DEVICES = 2**16
MOST_SHARES = 2**22  # heads times devices: rows are counted for each


def attention(
    length: Annotated[
        int, typer.Argument(min=1, max=MOST_POSITIONS, help="Positions N of a sequence.")
    ],
    devices: Annotated[
        int, typer.Option(min=1, max=MOST_DEVICES, help="Devices P that share it.")
    ] = 1,
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    head_offsets: Offsets = "interleaved",
    heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads.")] = 12,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_HEADS, help="Key heads; default: as many.", show_default=False
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=MOST_WIDTH, help="Width of a head.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences.")] = 1,
    causal: Causal = False,
    dtype: Dtype = "bfloat16",
    training: Annotated[bool, typer.Option("--training", help="Count the backward too.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="10^12 operations a second of a device; default: measured on this CPU.",
            show_default=False,
        ),
    ] = None,
    gigabytes_per_second: Annotated[
        float | None,
        typer.Option(min=1e-6, help="What a device receives from others.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> int:
    r"""Say what N tokens on P devices take: memory, bytes, operations, time.

    All numbers are of the attention of one layer, on the device that has most to do. The default
    pattern is that of a model with the length as its context. Several devices need dilated-ring,
    whose plan this is.

    Examples:
        dilated plan 1000000 --training
        dilated plan attention 1000000000 --devices 1024 --training --tflops 400 \
            --gigabytes-per-second 40
    """
    if heads * devices > MOST_SHARES:
        raise InputError(
            f"--heads times --devices must be at most {MOST_SHARES:,}. Got {heads} and {devices}."
        )
    pattern = read_pattern(
        segment_lengths,
        dilation_rates,
        default_pattern(length),
        head_offsets=head_offsets,
        heads=heads,
    )
    try:
        work = Workload(
            pattern,
            length,
            heads,
            head_dim,
            batch,
            causal,
            getattr(torch, dtype),
            forward_only=not training,
            kv_heads=kv_heads,
        )
        rate = 1e12 * tflops if tflops else measure_flops_per_second(work)
        made = make_plan(
            work,
            devices,
            flops_per_second=rate,
            bytes_per_second=1e9 * gigabytes_per_second if gigabytes_per_second else None,
        )
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from None
    if as_json:
        record = dataclasses.asdict(made) | {
            "memory_bytes": made.memory_bytes,
            "flops_per_second": rate,
            "pattern": pattern.to_dict(),
        }
        print(json.dumps(record))
        return 0
    console = plain_console()
    where = f"{devices:,} device{'s' if devices > 1 else ''}"
    summary = f"{pattern_summary(pattern)}, {batch} x {length:,} positions on {where}"
    console.print(summary, soft_wrap=True)
    console.print(table(made, rate, measured=tflops is None))
    if made.strategy is not None:
        console.print(f"how rows travel: {made.strategy}")
    return 0


def table(made: Needs, rate: float, *, measured: bool) -> Table:
    """The plan as rows of name and value."""
    result = Table(show_header=False)
    result.add_column()
    result.add_column(justify="right")
    how = "measured here" if measured else "given"
    rows = [
        ("positions on a device", f"{made.rows:,}"),
        ("query, key, value, output, log-sum-exp", size(made.tensor_bytes)),
        ("gradients of query, key, value", size(made.gradient_bytes)),
        ("rows of other devices", size(made.message_bytes)),
        ("memory in all", size(made.memory_bytes)),
        ("received from other devices", size(made.received_bytes)),
        ("operations", f"{made.flops / 1e12:,.3f} TFLOP"),
        (f"time to compute, at {rate / 1e12:.3g} TFLOP/s ({how})", seconds(made.compute_seconds)),
        ("time to exchange", seconds(made.exchange_seconds)),
        ("of it, not hidden by computing", seconds(made.exposed_seconds)),
    ]
    for row in rows:
        result.add_row(*row)
    return result
