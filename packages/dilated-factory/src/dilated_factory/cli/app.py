"""The typer application: one command per module, imported only when it is called.

So `dilated --help` and shell completion answer without loading torch.
"""

import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

# The commands, each in the module of its name, and the first line of each one's help.
COMMANDS = {
    "train": "Train a LongNet language model on the bytes of files.",
    "tokenize": "Learn a byte-level BPE tokenizer, for `dilated train --tokenizer`.",
    "compare": "Compare runs: how far each is, its loss, on held-out bytes too, its speed.",
    "evaluate": "Score held-out bytes at several contexts, beside byte Markov models.",
    "generate": "Continue prompts; print prompts and continuations as they come.",
    "export": "Write a trained model as a folder that Hugging Face transformers loads.",
    "demo": "Train a small LongNet on versions of code, and see what a longer context is worth.",
    "slides": "From features of tiles to embeddings, trained classifiers and heat maps of slides.",
    "genomes": "Train on genomes in FASTA files, score bits per base, embed intervals.",
    "convert": "Make a run folder of a checkpoint of torchscale's LongNet recipe for fairseq.",
    "bench": "Time attention: the project's kinds and backends, and installed peers.",
    "plan": "Say what a model's training takes, or one attention: memory, operations, time.",
    "show": "Show a pattern: in the terminal, as a picture, or as a page to explore.",
    "doctor": "Say what is installed, which backends work, and why the others do not.",
    "config": "Print the schema of configurations, and check files.",
}


if TYPE_CHECKING:
    _Command = TyperCommand
else:
    _Command = object


class _ExamplesLast(_Command):
    """Shows the examples of a help text after the options and as they stand, to be copied.

    As a part of the text they would be filled like prose, and break inside an option's value.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        text = inspect.cleandoc(self.help or "")
        self.help, *examples = re.split(r"^(?=Examples?:\n)", text, flags=re.MULTILINE)
        self.examples = "".join(examples)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, text, options, then examples."""
        super().format_help(ctx, formatter)
        if self.examples:
            formatter.write(f"\n{self.examples}\n")


class Command(_ExamplesLast, TyperCommand):
    """One command."""


class Group(_ExamplesLast, TyperGroup):
    """A command of several."""


class LazyCommands(Group):
    """A group that knows its commands by name and imports one to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the help shows of a command."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(name=cmd_name, help=COMMANDS[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run, or to complete."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(str(name)), rest


def load_command(name: str) -> Any:
    """Import the module of a command and make its parser."""
    found = getattr(import_module(f"dilated_factory.cli.{name}"), name)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(
            rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False
        )
        single.command(name, cls=Command)(found)
        found = single
    return typer.main.get_command(found)


app = typer.Typer(
    name="dilated", cls=LazyCommands, rich_markup_mode="markdown", pretty_exceptions_enable=False
)


@app.callback()
def dilated() -> None:
    """Long-context attention and LongNet models: train, measure, plan, look.

    Example:
        dilated COMMAND --help
    """
