"""The typer application: one command per module."""

import typer

from dilated_factory.cli.demo import demo
from dilated_factory.cli.evaluate import evaluate
from dilated_factory.cli.generate import generate
from dilated_factory.cli.train import train

app = typer.Typer(
    name="dilated",
    help="Train, evaluate and sample long-context LongNet language models over bytes.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, generate, demo):
    app.command()(command)
