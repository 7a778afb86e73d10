"""`dilated bench`: how long attention takes here."""

import json
import math
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dilated_factory.cli import EXIT_INTERRUPTED
from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.options import (
    MOST_HEADS,
    MOST_POSITIONS,
    MOST_SEQUENCES,
    MOST_WIDTH,
    Device,
    Json,
)
from dilated_factory.cli.output import plain_console
from dilated_factory.cli.patterns import (
    Causal,
    DilationRates,
    Dtype,
    Offsets,
    SegmentLengths,
    pattern_summary,
    read_pattern,
)
from dilated_factory.configs.files import read_values
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.kinds.default import default_registry
from dilated_factory.room import require_room
from dilated_factory.tools.benchmark import Timing, contenders, run
from dilated_factory.tools.planning import Workload
from dilated_factory.training.atomic import require_file_name
from dilated_factory.training.figures import save_timings
from dilated_factory.training.loop import select_device


def bench(
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    length: Annotated[int, typer.Option(min=1, max=MOST_POSITIONS, help="Positions.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, max=MOST_WIDTH, help="Width of a head.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences.")] = 1,
    head_offsets: Offsets = "interleaved",
    causal: Causal = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Leave the backward out.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Calls that are timed.")] = 5,
    config: Annotated[
        Path | None,
        typer.Option(help="Attention to time as well: a JSON or TOML file.", show_default=False),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the times into this file.")] = None,
    as_json: Json = False,
) -> int:
    """Time attention: the project's kinds and backends, and installed peers.

    The default pattern is that of a model with the length as its context. Dense attention computes
    another function; it is there to compare with. Ctrl-C ends the timing; what was timed until then
    is printed.

    Examples:
        dilated bench --length 16384 --causal --png bench.png
        dilated bench --device cuda --dtype bfloat16 --length 262144 --json
        dilated bench --config attention.toml --forward-only
    """
    pattern = read_pattern(
        segment_lengths,
        dilation_rates,
        default_pattern(length),
        head_offsets=head_offsets,
        heads=heads,
    )
    workload = Workload(
        pattern,
        length,
        heads,
        head_dim,
        batch,
        causal,
        getattr(torch, dtype),
        str(select_device(device)),
        forward_only,
    )
    if png is not None:
        require_file_name(png)
    if not workload.device.startswith("cuda"):
        size = batch * length * heads * head_dim * workload.dtype.itemsize
        # Query, key, value and output, and of a backward the gradients of all.
        require_room("the tensors of --batch, --length, --heads, --head-dim", 4 * size)
    registry = default_registry()
    extra = None if config is None else registry.parse(read_values(config))
    timings: list[Timing] = []
    interrupted = False
    entries = contenders(workload, registry, extra)
    with progress_bar() as show:
        try:
            run(
                *(workload, entries),
                rounds=rounds,
                on_start=lambda entry: show(f"timing {entry.name}", len(timings) / len(entries)),
                on_done=timings.append,
            )
        except KeyboardInterrupt:
            interrupted = True
    code = EXIT_INTERRUPTED if interrupted else 0
    if png is not None:
        save_timings(png, {t.name: t.seconds for t in timings if t.seconds}, describe(workload))
    if as_json:
        print(json.dumps(record(workload, timings, png)))
        return code
    console = plain_console()
    console.print(describe(workload), soft_wrap=True)
    console.print(table(timings))
    for timing in timings:
        if timing.obstacle is not None:
            console.print(f"not timed: {timing.name}: {timing.obstacle}", soft_wrap=True)
    if png is not None:
        console.print(f"written: {png}", soft_wrap=True)
    if interrupted:
        console.print(f"interrupted: {len(entries) - len(timings)} not timed", soft_wrap=True)
    return code


def describe(workload: Workload) -> str:
    """What the numbers depend on, in one line."""
    cuda = workload.device.startswith("cuda")
    where = (
        torch.cuda.get_device_name(workload.device)
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return (
        f"{pattern_summary(workload.pattern)}, {workload.batch} x {workload.length} positions, "
        f"{workload.heads} heads of {workload.head_dim}, {str(workload.dtype).split('.')[-1]}"
        f"{', causal' if workload.is_causal else ''}, "
        f"{'forward' if workload.forward_only else 'forward and backward'}; "
        f"{where}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def table(timings: list[Timing]) -> Table:
    """A row for each contender that ran."""
    result = Table()
    result.add_column("attention", no_wrap=True)
    for column in ("least, ms", "median, ms", "GFLOP/s by the definition"):
        result.add_column(column, justify="right")
    for timing in timings:
        if timing.obstacle is None:
            times = (f"{1e3 * seconds:.2f}" for seconds in (timing.least, timing.median))
            rate = timing.flops_per_second
            result.add_row(timing.name, *times, "-" if rate is None else f"{rate / 1e9:.0f}")
    return result


def record(workload: Workload, timings: list[Timing], png: Path | None) -> dict[str, Any]:
    """The measurement for machines."""
    return {
        "description": describe(workload),
        "pattern": workload.pattern.to_dict(),
        "forward_flops": workload.flops(),
        "timings": [
            {
                "name": timing.name,
                "least_seconds": None if math.isnan(timing.least) else timing.least,
                "median_seconds": None if math.isnan(timing.median) else timing.median,
                "rounds": list(timing.seconds),
                "flops_per_second": timing.flops_per_second,
                "obstacle": timing.obstacle,
            }
            for timing in timings
        ],
        "png": None if png is None else str(png),
    }
