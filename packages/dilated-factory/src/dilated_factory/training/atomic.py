"""Writes that are either complete or absent, even if the process or the machine dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dilated_factory.errors import InputError


def require_file_name(path: Path) -> None:
    """Raise an `InputError` where a file of that name cannot be."""
    if not path.name or path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"a file to write must have a name, in a folder that exists. Got {str(path)!r}."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is made durable and renamed to it.

    Raises:
        InputError: the path names no file.
    """
    require_file_name(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its renames are in the journal
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
