"""Options of a command that are the fields of configurations: each field has one, and its text."""

import inspect
from collections.abc import Callable, Collection
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dilated_factory.cli.options import parse_lengths
from dilated_factory.configs.base import FrozenConfig

Command = TypeVar("Command", bound=Callable[..., int])


def with_fields(*kinds: type[FrozenConfig], but: Collection[str]) -> Callable[[Command], Command]:
    """Give a command that takes any keywords an option for each field of these kinds.

    Args:
        kinds: configurations, whose fields have different names.
        but: fields without an option.
    """
    fields = {
        name: field
        for kind in kinds
        for name, field in kind.model_fields.items()
        if name not in but
    }

    def extend(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
            for name, option in ((name, _option(name, field)) for name, field in fields.items())
        ]
        command.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]  # what inspect reads
        return command

    return extend


def given_fields(kind: type[FrozenConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Of the values of such options those that belong to a kind and were given, parsed."""
    return {
        name: _parsed(name, field, value)
        for name, field in kind.model_fields.items()
        if (value := values.get(name)) not in (None, [], ())
    }


def _parsed(name: str, field: FieldInfo, value: Any) -> Any:
    if field.annotation == tuple[str, ...]:
        return tuple(value)
    return parse_lengths(_name(name), value) if _is_tuple(field) else value


def _name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _option(name: str, field: FieldInfo) -> Any:
    kind = _without_none(field.annotation)
    default = ""
    if name == "dtype":
        kind, default = Literal["auto", "float32", "bfloat16"], "; default: auto"
    elif field.annotation == tuple[str, ...]:
        kind, default = list[str], "; may be repeated"
    elif _is_tuple(field):
        kind = str
    elif field.default is not None:
        default = f"; default: {field.default}"
    metavar = None
    if get_origin(kind) is Literal:
        # Their names beside the option would be cut on a narrow terminal.
        metavar, default = "NAME", f"; one of {', '.join(get_args(kind))}{default}"
    text = f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}{default}."
    return Annotated[kind | None, typer.Option(help=text, metavar=metavar, show_default=False)]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    return annotation


def _is_tuple(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple
