"""`dilated slides probe`: how much embeddings tell of a label."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dilated_factory.cli.output import plain_console
from dilated_factory.cli.slides_train import score_table
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.slides.probing import probe_embeddings
from dilated_factory.slides.tasks import read_labels, require_metrics
from dilated_factory.training.embedding_files import read_embeddings


def probe(
    embeddings: Annotated[
        Path, typer.Argument(help="Embeddings of `dilated slides embed`.", show_default=False)
    ],
    table: Annotated[
        Path, typer.Argument(help="CSV file of slides and labels.", show_default=False)
    ],
    label: Annotated[list[str], typer.Option(help="Column of the table; several for multilabel.")],
    task: Annotated[
        Literal["multiclass", "binary", "multilabel", "regression"],
        typer.Option(help="What the column holds."),
    ] = "multiclass",
    slide_column: Annotated[str, typer.Option(help="Column of the slides' names.")] = "slide",
    patient_column: Annotated[
        str | None, typer.Option(help="Column of patients.", show_default=False)
    ] = None,
    folds: Annotated[int, typer.Option(min=3, help="Parts of whole patients.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of parts and intervals.")] = 0,
) -> int:
    r"""Say how much embeddings tell of a label: a linear model, tested on patients it has not seen.

    Features are standardised and a logistic (or ridge) regression is fitted to all parts but one,
    which it is tested on, for each part in turn.

    Examples:
        dilated slides probe embeddings.h5 labels.csv --label grade
        dilated slides probe embeddings.h5 labels.csv --label mutated --task binary \
            --patient-column patient
    """
    require_metrics()
    names, features = read_embeddings(embeddings)
    config = SlideTaskConfig(
        table=str(table),
        features=(str(embeddings),),
        task=task,
        labels=tuple(label),
        slide_column=slide_column,
        patient_column=patient_column,
        folds=folds,
        seed=seed,
    )
    slides, missing = read_labels(config, names)
    rows = [names.index(name) for name in slides.names]
    results = probe_embeddings(slides, features[rows], folds=folds, seed=seed)
    console = plain_console()
    if missing:
        some = ", ".join(missing[:5])
        console.print(f"{len(missing)} slides have no embedding: {some}", soft_wrap=True)
    console.print(score_table(f"{len(rows)} slides, {features.shape[-1]} numbers each", results))
    return 0
