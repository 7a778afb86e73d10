"""`dilated evaluate`: held-out bits per byte against context."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.fields import given_fields, with_fields
from dilated_factory.cli.options import (
    Best,
    Cache,
    Device,
    Json,
    parse_lengths,
    sight_warning,
    unit,
)
from dilated_factory.cli.output import plain_console
from dilated_factory.configs.models import TrainConfig
from dilated_factory.interop.harness import evaluate_tasks
from dilated_factory.training.atomic import require_file_name
from dilated_factory.training.figures import save_context_curve
from dilated_factory.training.loop import select_device
from dilated_factory.training.trained import Evaluation, TrainedModel, evaluate_run, load_trained


@with_fields(TrainConfig, but=TrainConfig.model_fields.keys() - {"include", "exclude"})
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of `dilated train`.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files and folders to score; default: the held-out files of the run's corpus.",
            show_default=False,
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="In tokens, by default bytes; default 512,1024,...,16384.",
            show_default=False,
        ),
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="About how many bytes to score at each context.")
    ] = 131072,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Picture; default RUN/contexts.png.", show_default=False)
    ] = None,
    best: Best = False,
    cache: Cache = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            help="Task of lm-evaluation-harness, a YAML file, to score instead; again for more.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: examples of each at most.")
    ] = None,
    device: Device = "auto",
    **globs: Any,
) -> int:
    """Score held-out bytes at several contexts, beside byte Markov models.

    The same bytes are scored at every context, each token of them predicted from at least half a
    context and at most one context of the tokens before it. The Markov models count the bytes that
    the model was trained on and are scored on the same bytes. Other paths are read as the run read
    its own, but for the globs that are given here.

    Examples:
        dilated evaluate runs/longnet
        dilated evaluate runs/longnet README.md docs --contexts 256,4096 --json
        dilated evaluate runs/longnet src --include '*.c'
        dilated evaluate runs/longnet --tasks task.yaml --limit 100
    """
    if tasks:
        return score_tasks(run, tasks, limit, as_json=as_json, best=best, device=device)
    picture = out or run / "contexts.png"
    if out is not None:
        require_file_name(out)
    trained = load_trained(run, device=select_device(device), best=best)
    lengths = parse_lengths("--contexts", contexts)
    with progress_bar() as show:
        evaluation = evaluate_run(
            *(trained, paths or ()),
            contexts=lengths,
            max_bytes=max_bytes,
            **given_fields(TrainConfig, globs),
            cache=cache,
            on_progress=show,
        )
    trained_at = trained.run.config.model.context
    units = unit(trained.run.config)
    save_context_curve(picture, evaluation.scores, evaluation.baselines, trained_at, units)
    if as_json:
        print(json.dumps(evaluation_record(trained, evaluation, picture)))
        return 0
    console = plain_console()
    console.print(evaluation_table(evaluation, units))
    if warning := sight_warning(trained.run.config.model, trained_at, units):
        console.print(warning, soft_wrap=True)
    if not evaluation.baselines:
        console.print("no Markov models: the corpus of the run is gone or has changed")
    console.print(f"bits per byte against context: {picture}", soft_wrap=True)
    return 0


def score_tasks(
    run: Path, tasks: list[Path], limit: int | None, *, as_json: bool, best: bool, device: str
) -> int:
    """Score a run on tasks of lm-evaluation-harness."""
    trained = load_trained(run, device=select_device(device), best=best)
    scores = evaluate_tasks(trained.model, tasks, tokenizer=trained.tokenizer, limit=limit)
    if as_json:
        print(json.dumps({"run": str(run), "step": trained.state.step, "tasks": scores}))
        return 0
    table = Table("task", "metric", "value")
    for task, metrics in scores.items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
    plain_console().print(table)
    return 0


def evaluation_table(evaluation: Evaluation, units: str = "bytes") -> Table:
    """One row per context and per baseline."""
    scored = evaluation.scores[0].scored_bytes
    title = f"Held-out bits per byte, on the same {scored:,} bytes"
    table = Table(title=title, min_width=len(title))
    table.add_column("model")
    table.add_column(f"context, {units}", justify="right")
    table.add_column("bits per byte", justify="right")
    for score in evaluation.scores:
        table.add_row("LongNet", f"{score.context}", f"{score.bits_per_byte:.3f}")
    table.add_section()
    for order, (name, bits) in enumerate(evaluation.baselines.items(), start=1):
        table.add_row(name, f"{order}", f"{bits:.3f}")
    return table


def evaluation_record(
    trained: TrainedModel, evaluation: Evaluation, picture: Path
) -> dict[str, object]:
    """The evaluation for machines."""
    return {
        "run": str(trained.run.path),
        "step": trained.state.step,
        "scored_bytes": evaluation.scores[0].scored_bytes,
        "bits_per_byte": {score.context: score.bits_per_byte for score in evaluation.scores},
        "baselines": evaluation.baselines,
        "picture": str(picture),
    }
