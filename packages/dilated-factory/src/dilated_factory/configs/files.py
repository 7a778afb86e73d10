"""Configurations in files: JSON and TOML, in and out without loss."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dilated_factory.configs.base import FrozenConfig
from dilated_factory.errors import InputError

MOST_BYTES = 2**20  # of a configuration in a file


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device, which may have no end, is refused.

    Raises:
        InputError: it is something else.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK the opening of a pipe waits for a writer. O_BINARY is Windows'.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{str(path)!r} must be a regular file.")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file that holds at most so many bytes; raises as `open_regular`."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{str(path)!r} must hold at most {most:,} bytes. Got more.")
    return content


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Where a disk is full, safetensors and torch.save have errors of their own: make them one.

    Raises:
        OSError: the file could not be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's writer, which counts what was written
            raise
        raise OSError(f"{str(path)!r} cannot be written; the disk may be full.") from error


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain data of a JSON or TOML file; the name's ending says which.

    Raises:
        InputError: another ending, no regular file, more than `MOST_BYTES`, or the content is not
            what the ending says.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            values = json.loads(read_regular(path))
        elif path.suffix == ".toml":
            values = tomllib.loads(read_regular(path).decode("utf-8"))
        else:
            raise InputError(f"the file's name must end in .json or .toml. Got {str(path)!r}.")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits
        raise InputError(f"{str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{str(path)!r} must hold an object. Got {type(values).__name__}.")
    return values


def to_toml(config: FrozenConfig) -> str:
    """A configuration as TOML, nested ones as sections.

    TOML has no null, so fields that are None are left out; None is their default everywhere.

    Examples:
        >>> print(to_toml(PoolConfig(limit_bytes=1024)).splitlines()[:2])
        ['kind = "pool"', 'limit_bytes = 1024']
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
