"""`dilated plan model`: whether training a model fits, and how long it takes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dilated_factory.cli.fields import given_fields, with_fields
from dilated_factory.cli.options import MOST_HEADS, MOST_POSITIONS, MOST_SEQUENCES, MOST_WIDTH, Json
from dilated_factory.cli.output import plain_console, seconds, size
from dilated_factory.cli.patterns import pattern_summary
from dilated_factory.configs.models import LongNetConfig, TrainConfig, parse_config
from dilated_factory.errors import InputError
from dilated_factory.training.parallel import DataParallel
from dilated_factory.training.planning import (
    Setup,
    TrainingNeeds,
    Way,
    plan_training,
    ways_to_fit,
)
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.sources import changed, values_in

MOST_RANKS = 2**16
# What decides how much is counted.
_MOST = {
    "context": MOST_POSITIONS,
    "batch_size": MOST_SEQUENCES,
    "embed_dim": MOST_WIDTH,
    "num_heads": MOST_HEADS,
    "num_layers": 2**20,
    "vocab_size": 2**32,
    "ffn_dim": 2**24,
}
_CURVE = (
    "kind", "model", "paths", "parent", "minutes", "learning_rate", "weight_decay", "schedule",
    "decay", "warmup", "warmup_steps", "short_context", "short_share", "gradient_clip",
    "validation_fraction", "validate_every",
    "validation_bytes", "documents", "seed", "count_padding", "rotary_base", "xpos_scale_base",
    "layer_norm_eps", "scale_embedding", "float32_gelu", "drop_path",
)  # fmt: skip


@with_fields(TrainConfig, LongNetConfig, but=_CURVE)
def model(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="TOML or JSON file of a training, or run folder, of which options change some; "
            "default: the defaults of `dilated train`.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(metavar="NAME", help="Of each rank: cuda or cpu.")
    ] = "cuda",
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile; default: on cuda, where one process has whole sequences.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Processes, one a device.")] = 1,
    sequence_parallel: Annotated[
        int, typer.Option(min=1, max=MOST_RANKS, help="How many of them share each sequence.")
    ] = 1,
    data_parallel: Annotated[
        DataParallel,
        typer.Option(metavar="NAME", help="All weights on every rank: ddp; or a part: fsdp."),
    ] = "ddp",
    device_memory: Annotated[
        float, typer.Option(min=1e-3, help="What a device has, in GB (10^9 bytes).")
    ] = 80.0,
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="10^12 operations a second of a device.", show_default=False),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Share of --tflops that training reaches.")
    ] = 1.0,
    epoch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an epoch, to say how long one is.", show_default=False),
    ] = None,
    as_json: Json = False,
    **fields: Any,
) -> int:
    r"""Say whether training a model fits into a device, with which options, and how long it takes.

    Weights, optimizer state, gradients and what is kept for backward are exact, but for rows of
    other ranks and for fsdp's whole layers; the peak is an estimate, without what the device and
    its libraries take for themselves. With bfloat16, the default here, weights stay float32.
    Nothing is allocated.

    Examples:
        dilated plan model --embed-dim 512 --num-heads 8 --num-layers 8
        dilated plan model run.toml --recompute feed_forward --tflops 989 --mfu 0.35
        dilated plan model runs/mine --batch-size 64 --ranks 8 --data-parallel fsdp
    """
    config = _config(source, fields)
    shape = config.model
    if compiled is None:
        compiled = device == "cuda" and sequence_parallel == 1
    setup = Setup(device, compiled, ranks, sequence_parallel, data_parallel)
    needs = plan_training(config, setup)
    limit = round(device_memory * 1e9)
    ways = list(ways_to_fit(config, setup, limit))
    rate = None if tflops is None else 1e12 * tflops * mfu
    epoch = epoch_tokens and epoch_tokens / (config.batch_size * shape.context)
    times = _times(rate, needs, {"step": 1, "run": config.steps, "epoch": epoch})
    if as_json:
        record = dataclasses.asdict(needs) | {
            "activations": needs.activations,
            "peak": needs.peak,
            "fits": needs.peak <= limit,
            "ways": [way._asdict() | {"needs": way.needs.peak} for way in ways],
            **times,
            "config": config.model_dump(mode="json"),
        }
        print(json.dumps(record))
        return 0
    console = plain_console()
    console.print(_summary(needs, config, setup), soft_wrap=True)
    console.print(pattern_summary(shape.pattern), soft_wrap=True)
    console.print(_table(needs, rate, times, config.steps))
    for line in _verdict(needs, limit, ways, config, setup):
        console.print(line, soft_wrap=True)
    return 0


def _config(source: Path | None, fields: dict[str, Any]) -> TrainConfig:
    """What is planned: what a file or run says, changed by options."""
    values: dict[str, Any] = {}
    if source is not None and source.is_dir():
        values = RunFolder.open(source).config.model_dump(exclude_none=True)
    elif source is not None:
        values = values_in(source)
    given, shape = given_fields(TrainConfig, fields), given_fields(LongNetConfig, fields)
    for name, most in _MOST.items():
        if (value := (given | shape).get(name, 1)) > most:
            raise InputError(f"--{name.replace('_', '-')} must be at most {most:,}. Got {value}.")
    values = changed(values, given, shape)
    if values.get("dtype", "auto") == "auto":
        values["dtype"] = "bfloat16"
    if not {"steps", "minutes"} & values.keys():
        values["minutes"] = 1.0
    return parse_config(TrainConfig, values)


def _times(
    rate: float | None, needs: TrainingNeeds, steps: dict[str, float | None]
) -> dict[str, float | None]:
    """Seconds of so many steps each, where the operations a second are known."""
    step = None if rate is None else (needs.flops + needs.flops_again) / rate
    return {
        f"{name}_seconds": None if step is None or count is None else step * count
        for name, count in steps.items()
    }


def _summary(needs: TrainingNeeds, config: TrainConfig, setup: Setup) -> str:
    """What is trained where."""

    def some(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    shape = config.model
    return (
        f"{needs.parameters:,} parameters in {some(shape.num_layers, 'layer')}; "
        f"{some(config.batch_size, 'sequence')} of {shape.context:,} tokens a step on "
        f"{some(setup.ranks, f'{setup.device} rank')}, {config.dtype}"
        f"{', compiled' if setup.compiled else ''}"
    )


def _table(
    needs: TrainingNeeds, rate: float | None, times: dict[str, float | None], steps: int | None
) -> Table:
    """The plan as rows of name and value."""
    result = Table(show_header=False)
    result.add_column()
    result.add_column(justify="right")
    held = [
        ("weights", needs.weights),
        ("optimizer state", needs.optimizer),
        ("gradients", needs.gradients),
        ("gradients once more, to be averaged", needs.buckets),
        ("layers that are whole while they run", needs.whole),
        ("kept for backward by the blocks", needs.layers),
        ("kept for backward by embedding, norm and loss", needs.ends),
        ("tokens and positions", needs.inputs),
        ("logits at once, or the loss' backward", needs.logits),
        ("a block's backward works with", needs.again),
        ("rows of other ranks on their way", needs.messages),
        ("the optimizers work with", needs.update),
    ]
    for name, count in held:
        if count:
            result.add_row(name, size(count))
    result.add_row("the most at once", size(needs.peak))
    result.add_row("batches in the host's memory", size(needs.host_bytes))
    again = f" + {needs.flops_again / 1e12:,.3f} again" if needs.flops_again else ""
    result.add_row("operations of a step", f"{needs.flops / 1e12:,.3f}{again} TFLOP")
    if rate is not None:
        result.add_row(
            f"a step at {rate / 1e12:.3g} TFLOP/s, without exchange", seconds(times["step_seconds"])
        )
        for name, key in ((f"{steps} steps", "run_seconds"), ("an epoch", "epoch_seconds")):
            if times[key] is not None:
                result.add_row(name, seconds(times[key]))
    return result


def _verdict(
    needs: TrainingNeeds, limit: int, ways: list[Way], config: TrainConfig, setup: Setup
) -> list[str]:
    """Whether it fits, and options that do."""
    fits = needs.peak <= limit
    lines = [f"fits in {limit / 1e9:g} GB: {'yes' if fits else 'no'} ({needs.peak / 1e9:,.1f} GB)"]
    if not ways:
        more = "more --ranks with --data-parallel fsdp, more --sequence-parallel, a shorter context"
        return [*lines, f"no --recompute and --micro-batch-size fit; {more} or a smaller model may"]
    lines.append("what fits, with the largest micro batch:")
    for way in ways:
        kind = f" --data-parallel {way.data_parallel}" if setup.ranks > 1 else ""
        lines.append(
            f"  --recompute {way.recompute} --micro-batch-size {way.micro_batch}{kind}: "
            f"{way.needs.peak / 1e9:,.1f} GB"
        )
    return lines
