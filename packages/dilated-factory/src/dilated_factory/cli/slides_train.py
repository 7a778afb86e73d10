"""`dilated slides train`: a classifier of slides from a table of labels."""

from pathlib import Path
from timeit import repeat
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.options import Device
from dilated_factory.cli.output import plain_console
from dilated_factory.configs.base import parse_config
from dilated_factory.configs.files import read_values
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError
from dilated_factory.slides.models import local_device
from dilated_factory.slides.readers import named_files, slide_files
from dilated_factory.slides.tasks import read_labels
from dilated_factory.slides.training import SlideTask

MOST_MINUTES = 10  # that are not worth a word


def train(
    task: Annotated[Path, typer.Argument(help="A slide_task in TOML or JSON.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run; each fold gets one inside.")],
    fold: Annotated[
        list[int] | None,
        typer.Option(help="Train this fold only; may be repeated.", show_default=False),
    ] = None,
    device: Device = "cpu",
) -> int:
    """Train and test a classifier of slides: fold by fold, with all slides of a patient together.

    The file names a CSV of slides and labels, the features and the model; paths in it are relative
    to its folder. Of the folds one tests, the next one chooses the best epoch, and the rest trains.
    Each fold's folder holds best.pth (under GigaPath's names), metrics.jsonl, curves.png and
    predictions.csv; results.json has the scores of all folds that are done, with 95 % intervals
    over patients. Called again, it trains what is not done: a fold that was stopped begins anew.

    All fields of a task are in `dilated config schema slide_task`.

    Examples:
        dilated slides train task.toml --out runs/mutated
        dilated slides train task.toml --out runs/quick --fold 0 --device cuda

        # task.toml
        table = "labels.csv"
        features = ["features"]
        task = "binary"
        labels = ["mutated"]
        patient_column = "patient"
        checkpoint = "slide_encoder.pth"
    """
    config = read_task(task)
    files = named_files(slide_files([Path(path) for path in config.features]))
    slides, missing = read_labels(config, list(files))
    folds = sorted(set(range(config.folds) if fold is None else fold))
    if not set(folds) <= set(range(config.folds)):
        raise InputError(f"--fold must be in [0, {config.folds - 1}]. Got {folds}.")
    console = plain_console()
    if missing:
        some = ", ".join(missing[:5])
        console.print(f"{len(missing)} slides have no features: {some}", soft_wrap=True)
    chosen = [files[name] for name in slides.names]
    work = SlideTask(config, slides, chosen, local_device(device))
    left = [k for k in folds if not work.predictions(out, k)]
    if len(left) < len(folds):
        done = ", ".join(str(k) for k in folds if k not in left)
        console.print(f"done before, and not trained again: fold {done}")
    if work.device.type == "cpu" and (cost := cpu_cost(work, len(left))):
        console.print(cost, soft_wrap=True)
    with progress_bar() as show:
        results = work.run(out, folds, show)
    title = f"{len(chosen)} slides, {len(set(slides.patients))} patients: {out}"
    console.print(score_table(title, {**results["folds"], "all": results["all folds"]}))
    return 0


def cpu_cost(work: SlideTask, folds: int) -> str | None:
    """What so many folds take on a CPU, and what takes less; None where it is little."""
    minutes = work.operations(folds) / operations_a_second() / 60
    if minutes < MOST_MINUTES:
        return None
    time = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:,.0f} hours"
    told = "encoder" in work.config.model_fields_set or work.config.checkpoint is not None
    size = "" if told else ", the published size, since the task says nothing of it"
    return (
        f"this takes at least {time} on this CPU: the slide encoder has "
        f"{work.encoder_weights / 1e6:,.0f} million weights{size}. Less take --device cuda, "
        'freeze = true, model = "abmil", or a smaller [encoder] in the task.'
    )


def operations_a_second() -> float:
    """How many this machine does, by a product of matrices."""
    tiles, weights = torch.randn(1024, 768), torch.randn(768, 3072)
    return 2 * tiles.numel() * weights.shape[1] / min(repeat(lambda: tiles @ weights, number=1))


def read_task(path: Path) -> SlideTaskConfig:
    """The task in a file, with its paths made absolute.

    Raises:
        InputError: it is no task.
        OSError: there is no such file.
    """
    values = read_values(path)
    config = parse_config(SlideTaskConfig, {"kind": "slide_task", **values})
    home = path.parent.absolute()
    paths: dict[str, Any] = {
        "table": str(home / config.table),
        "features": tuple(str(home / place) for place in config.features),
        "checkpoint": None if config.checkpoint is None else str(home / config.checkpoint),
    }
    return config.model_copy(update=paths)


def score_table(title: str, scores: dict[str, dict[str, Any]]) -> Table:
    """A row for each fold, a column for each metric."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    table = Table("fold", *names, title=title, title_justify="left")
    for fold, found in scores.items():
        cells = [
            "{:.3f} ({:.3f}-{:.3f})".format(found[name]["value"], *found[name]["interval"])
            if name in found
            else "-"
            for name in names
        ]
        table.add_row(fold, *cells)
    return table
