"""`dilated slides`: embed, train, map and probe whole slides."""

import typer

from dilated_factory.cli.app import Command, Group
from dilated_factory.cli.slides_embed import embed
from dilated_factory.cli.slides_map import map_slide
from dilated_factory.cli.slides_probe import probe
from dilated_factory.cli.slides_train import train

slides = typer.Typer(
    name="slides",
    cls=Group,
    help="""From features of tiles to embeddings, trained classifiers and heat maps of slides.

    Features are what TRIDENT, CLAM, STAMP and others write (.h5, .pt, .npz).

    Examples:
        dilated slides embed features/ --checkpoint encoder.pth --out out.h5
        dilated slides probe out.h5 labels.csv --label grade
        dilated slides train task.toml --out runs/grade
        dilated slides map features/a.h5 --run runs/grade/fold0 --out a.png
    """,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)

slides.command(cls=Command)(embed)
slides.command(cls=Command)(train)
slides.command("map", cls=Command)(map_slide)
slides.command(cls=Command)(probe)
