"""`dilated plan`: what attention over a sequence takes, and what training a model does."""

from typing import Any

import typer

from dilated_factory.cli.app import Command, Group
from dilated_factory.cli.plan_attention import attention
from dilated_factory.cli.plan_model import model


class _Plans(Group):
    """A number in place of a command is the positions of an attention."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].lstrip("+-").isdigit():
            args = ["attention", *args]
        return super().resolve_command(ctx, args)


plan = typer.Typer(
    name="plan",
    cls=_Plans,
    help="""Say what a model's training takes, or one attention: memory, operations, time.

    Examples:
        dilated plan model --embed-dim 512 --num-heads 8 --num-layers 8
        dilated plan model run.toml --tflops 400
        dilated plan 1000000 --training
    """,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)

plan.command(cls=Command)(model)
plan.command(cls=Command)(attention)
