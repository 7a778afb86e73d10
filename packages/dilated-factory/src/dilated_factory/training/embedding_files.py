"""Files of embeddings: rows by name, in HDF5 or .npz, of which no code is run."""

# Shapes: S rows, L states, E embed_dim.

import json
import zipfile
import zlib
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dilated_factory.errors import InputError, missing_package
from dilated_factory.training.atomic import replacing

# What a damaged .npz raises; a TypeError is an array that is in no archive.
DAMAGED_NPZ = (EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def check_out(out: Path) -> None:
    """Raise unless embeddings can be written under a name."""
    if out.suffix not in (".h5", ".npz"):
        raise InputError(f"--out must end in .h5 or .npz. Got {str(out)!r}.")
    if out.suffix == ".h5" and find_spec("h5py") is None:
        raise missing_package(f"writing {out.name}", "h5py")


def write_embeddings(
    out: Path, names: Sequence[str], embeddings: np.ndarray[Any, Any], settings: dict[str, Any]
) -> None:
    """Write named rows (S, E) or (S, L, E), and what they were made with, to .h5 or .npz."""
    told = json.dumps(settings)
    with replacing(out) as temporary:
        if out.suffix == ".h5":
            with import_module("h5py").File(temporary, "w") as file:
                file["embeddings"], file["names"] = embeddings, list(names)
                file.attrs["settings"] = told
        else:
            with temporary.open("wb") as stream:
                np.savez(stream, embeddings=embeddings, names=list(names), settings=told)


def read_embeddings(
    path: Path, settings: dict[str, Any] | None = None
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The names (S,) and embeddings (S, E) or (S, L, E) of a file.

    Raises:
        InputError: it is no file of embeddings, or was made with other settings.
        OSError: there is no such file.
    """
    check_out(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        if path.suffix == ".h5":
            with import_module("h5py").File(path, "r") as file:
                names = [name.decode() for name in file["names"][...]]
                embeddings, told = file["embeddings"][...], file.attrs["settings"]
        else:
            with path.open("rb") as opened, np.load(opened) as file:
                names, embeddings = file["names"].tolist(), file["embeddings"]
                told = str(file["settings"])
        settings_there = json.loads(told)
    except (KeyError, OSError, RecursionError, *DAMAGED_NPZ) as error:
        raise InputError(f"{str(path)!r} holds no embeddings: {error}.") from None
    check_settings(path, settings_there, settings)
    return names, embeddings


def check_settings(path: Path, told: dict[str, Any], settings: dict[str, Any] | None) -> None:
    """Raise an `InputError` where what is there was made with other settings; None takes any."""
    if settings is not None and told != settings:
        other = sorted(key for key in {*told, *settings} if told.get(key) != settings.get(key))
        raise InputError(
            f"{str(path)!r} was made with another {', '.join(other)}: take another --out, or "
            "remove it."
        )
