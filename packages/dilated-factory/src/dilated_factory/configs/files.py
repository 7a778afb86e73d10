"""Configurations in files: JSON and TOML, in and out without loss."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilated_factory.configs.base import FrozenConfig
from dilated_factory.errors import InputError


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain data of a JSON or TOML file; the name's ending says which.

    Raises:
        InputError: another ending, or the content is not what the ending says.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_bytes())
        elif path.suffix == ".toml":
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        else:
            raise InputError(f"the file's name must end in .json or .toml. Got {str(path)!r}.")
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{str(path)!r} must hold an object. Got {type(values).__name__}.")
    return values


def to_toml(config: FrozenConfig) -> str:
    """A configuration as TOML, nested ones as sections.

    TOML has no null, so fields that are None are left out; None is their default everywhere.
    """
    return "".join(_section(config.model_dump(mode="json", exclude_none=True), ()))


def _section(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {_value(value)}\n" for key, value in values.items() if key not in nested]
    if path and (lines or not nested):
        lines.insert(0, f"\n[{'.'.join(path)}]\n")
    for key, value in nested.items():
        lines += _section(value, (*path, key))
    return lines


def _value(value: Any) -> str:
    # JSON's numbers, booleans, arrays and strings are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
