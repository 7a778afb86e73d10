"""`dilated config`: the schema of configurations, and whether files are valid."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.app import Command, Group
from dilated_factory.cli.options import Json
from dilated_factory.cli.output import plain_console
from dilated_factory.configs.files import read_values, to_toml
from dilated_factory.configs.kinds import CONFIG_TYPES, config_type, parse_any
from dilated_factory.errors import InputError

EXIT_INVALID = 1

config = typer.Typer(
    name="config",
    cls=Group,
    help="""Print the schema of configurations, and check files.

    Examples:
        dilated config schema ring
        dilated config validate attention.toml model.json
    """,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


@config.command(cls=Command)
def schema(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="Kind of configuration; default: all kinds.",
            autocompletion=lambda: list(CONFIG_TYPES),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the JSON schema of a kind of configuration, or of all.

    Examples:
        dilated config schema
        dilated config schema block_sparse > block_sparse.schema.json
    """
    kinds = CONFIG_TYPES if kind is None else {kind: config_type(kind)}
    schemas = {name: each.model_json_schema() for name, each in kinds.items()}
    print(json.dumps(schemas if kind is None else schemas[kind], indent=2))


@config.command(cls=Command)
def validate(
    files: Annotated[list[Path], typer.Argument(help="JSON and TOML files.", show_default=False)],
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of files that do not say theirs.", show_default=False),
    ] = None,
    as_json: Json = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print each valid one whole, as TOML, with defaults.")
    ] = False,
) -> int:
    """Check configurations in files; exit with code 1 if one is invalid.

    Examples:
        dilated config validate attention.toml
        dilated config validate runs/mine/config.json --kind train --show
    """
    if kind is not None:
        config_type(kind)  # a wrong kind is the command's mistake, not the files'
    problems: dict[str, str | None] = {}
    console = plain_console()
    for path in files:
        problem, text = _check(path, kind)
        problems[str(path)] = problem
        if not as_json:
            console.print(f"{path}: {problem or 'valid'}", soft_wrap=True)
            if show and problem is None:
                console.print(text, soft_wrap=True)
    if as_json:
        print(
            json.dumps({path: {"valid": p is None, "problem": p} for path, p in problems.items()})
        )
    return EXIT_INVALID if any(problems.values()) else 0


def _check(path: Path, kind: str | None) -> tuple[str | None, str]:
    """What is wrong with a file, or None and the configuration as TOML."""
    try:
        values = read_values(path)
        if kind is not None:
            values = {"kind": kind, **values}
        return None, to_toml(parse_any(values))
    except InputError as error:
        return str(error), ""
