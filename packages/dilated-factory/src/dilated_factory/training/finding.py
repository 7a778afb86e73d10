"""Which files are under some paths, in an order that does not depend on the machine."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from dilated_factory.errors import CorpusError
from dilated_factory.training.run_folder import is_run_folder


def find_files(paths: Iterable[str | Path], *, with_runs: bool = False) -> list[tuple[str, Path]]:
    """Regular files under the given paths as sorted (name, path), each file once.

    The name is the path relative to the given folder, with forward slashes. Run folders inside it
    are passed over unless ``with_runs``: a run that is part of its corpus would change it.

    Raises:
        CorpusError: a path does not exist.
    """
    found: dict[Path, str] = {}
    for given in map(Path, paths):
        if given.is_dir():
            for path in _walk(given, with_runs=with_runs):
                found.setdefault(path.resolve(), path.relative_to(given).as_posix())
        elif given.is_file():
            found.setdefault(given.resolve(), given.name)
        else:
            raise CorpusError(f"path must be an existing file or folder. Got {str(given)!r}.")
    return sorted((name, path) for path, name in found.items())


def standard_library() -> list[tuple[str, Path]]:
    """The Python sources of the running interpreter's standard library, its tests included."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return sorted(
        (path.relative_to(root).as_posix(), path)
        for path in _walk(root)
        if path.suffix == ".py" and installed.isdisjoint(path.relative_to(root).parts)
    )


def _walk(root: Path, *, with_runs: bool = True) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not _passed_over(name) and (with_runs or not is_run_folder(Path(folder, name)))
        ]
        for name in files:
            path = Path(folder, name)
            # Only regular files: reading a named pipe would wait for a writer forever.
            if not _passed_over(name) and path.is_file():
                yield path


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs is of a name or of its last part; `*` spans folders."""
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, glob) or fnmatchcase(last, glob) for glob in globs)
