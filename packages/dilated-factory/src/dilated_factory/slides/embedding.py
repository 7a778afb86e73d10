"""Embeddings of many slides, written so that a stopped command goes on where it stood."""

# Shapes: S slides, L encoder states, E embed_dim.

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dilated_factory.errors import InputError, missing_package
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.slides.readers import (
    DAMAGED_NPZ,
    SlideFeatures,
    count_tiles,
    read_slide_features,
)
from dilated_factory.training.atomic import replacing, write_text


@dataclass(frozen=True)
class Embedding:
    """How slides are embedded.

    Attributes:
        tile_size: takes the place of the files', where it is given.
        max_tiles: of slides that are computed together.
        all_layers: keep the embedding of each state of the encoder, not of the last one only.
        autocast: compute in this dtype where that is safe; None computes in the weights' dtype.
    """

    tile_size: float | None = None
    max_tiles: int = 100_000
    all_layers: bool = False
    autocast: torch.dtype | None = None


def embed(
    model: SlideEncoder,
    slides: Sequence[SlideFeatures],
    how: Embedding,
) -> list[torch.Tensor]:
    """The embeddings of slides on the CPU, float32: (E,) of each, or (L, E) with ``all_layers``.

    Raises:
        InputError, ValueError: a slide cannot be embedded.
    """
    placed = [slide.placed(how.tile_size) for slide in slides]
    device = model.cls_token.device.type
    context = nullcontext() if how.autocast is None else torch.autocast(device, how.autocast)
    with torch.inference_mode(), context:
        states = model.encode(
            [(features, coords) for features, coords, _ in placed],
            tile_size=[size for _, _, size in placed],
            all_layer_embed=how.all_layers,
        )
    stacked = torch.stack(states, dim=1).float().cpu()
    return list(stacked if how.all_layers else stacked[:, 0])


def embed_files(
    model: SlideEncoder,
    files: Sequence[Path],
    out: Path,
    how: Embedding,
    settings: dict[str, Any],
    *,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, str]:
    """Write the embeddings of all files to ``out`` (.h5 or .npz), and say which could not be made.

    Each batch is written when it is done, under ``out``'s name and ".parts", and all are put
    together at the end; what is in either is not made again. Under torchrun each process makes a
    share, and the first one puts them together.

    Args:
        model: the encoder.
        files: of features.
        out: the file of embeddings.
        how: see there.
        settings: what decides the embeddings, as plain data; what is there must have the same.
        on_progress: told what is done, and which share of all.

    Returns:
        What was wrong, by the name of the slide.

    Raises:
        InputError: ``out`` has another ending or other settings, or two files have one name.
    """
    check_out(out)
    if how.tile_size is not None and not how.tile_size > 0:
        raise InputError(f"tile_size must be positive. Got {how.tile_size}.")
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"slides must have different names. Got twice: {', '.join(twice[:5])}.")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = out.with_name(out.name + ".parts")
    done = set(read_embeddings(out, settings)[0]) if out.exists() else set()
    _open_parts(parts, settings)
    done |= {name for path in parts.glob("*.npz") for name in np.load(path)["names"].tolist()}
    # First the share: another process may have written in between, and would move the others'.
    todo = [path for path in files[rank::world] if path.stem not in done]
    failed: dict[str, str] = {}
    for ready, slides in _batches(todo, how.max_tiles, failed):
        on_progress(f"embedding {slides[0].name}", ready / len(todo))
        found = _embed_or_tell(model, slides, how, failed)
        if found:
            key = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
            with replacing(parts / f"{key}.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, names=list(found), embeddings=np.stack(list(found.values())))
    if world > 1:
        failed = _meet(failed)
    if rank == 0:
        _join(parts, out, names, settings)
    return failed


def check_out(out: Path) -> None:
    """Raise unless embeddings can be written under a name."""
    if out.suffix not in (".h5", ".npz"):
        raise InputError(f"--out must end in .h5 or .npz. Got {str(out)!r}.")
    if out.suffix == ".h5" and find_spec("h5py") is None:
        raise missing_package(f"writing {out.name}", "h5py")


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
        raise InputError(f"{str(path)!r} holds no embeddings of slides: {error}.") from None
    _check_settings(path, settings_there, settings)
    return names, embeddings


def _check_settings(path: Path, told: dict[str, Any], settings: dict[str, Any] | None) -> None:
    if settings is not None and told != settings:
        other = sorted(key for key in {*told, *settings} if told.get(key) != settings.get(key))
        raise InputError(
            f"{str(path)!r} was made with another {', '.join(other)}: take another --out, or "
            "remove it."
        )


def _open_parts(parts: Path, settings: dict[str, Any]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    told = parts / "settings.json"
    if told.exists():
        _check_settings(parts, json.loads(told.read_text(encoding="utf-8")), settings)
    else:
        write_text(told, json.dumps(settings))


def _batches(
    files: Sequence[Path], max_tiles: int, failed: dict[str, str]
) -> Iterator[tuple[int, list[SlideFeatures]]]:
    """How many files are behind, and the next slides that have at most so many tiles together."""
    batch: list[SlideFeatures] = []
    room = max_tiles
    for index, path in enumerate(files):
        try:
            count = count_tiles(path)
            if batch and count > room:
                yield index, batch
                batch, room = [], max_tiles
            batch.append(read_slide_features(path))
            room -= count
        except (InputError, OSError) as error:
            failed[path.stem] = str(error)
    if batch:
        yield len(files), batch


def _embed_or_tell(
    model: SlideEncoder,
    slides: Sequence[SlideFeatures],
    how: Embedding,
    failed: dict[str, str],
) -> dict[str, torch.Tensor]:
    """The embeddings by name; a slide that cannot be embedded leaves the others alone."""
    try:
        return dict(zip([s.name for s in slides], embed(model, slides, how), strict=True))
    except (TypeError, ValueError) as error:
        if len(slides) == 1:
            failed[slides[0].name] = str(error).removeprefix("slide 0: ")
            return {}
    parts = [_embed_or_tell(model, [slide], how, failed) for slide in slides]
    return {name: found for part in parts for name, found in part.items()}


def _meet(failed: dict[str, str]) -> dict[str, str]:
    """Wait for all processes; what went wrong in any of them."""
    dist.init_process_group("gloo")
    try:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, failed)
    finally:
        dist.destroy_process_group()
    return {name: why for each in everyone for name, why in each.items()}


def _join(parts: Path, out: Path, order: Sequence[str], settings: dict[str, Any]) -> None:
    """Put what was there and all parts into ``out``, in the order of names, then the rest."""
    found: dict[str, Any] = {}
    if out.exists():
        found = dict(zip(*read_embeddings(out, settings), strict=True))
    for path in parts.glob("*.npz"):
        with np.load(path) as part:
            found.update(zip(part["names"].tolist(), part["embeddings"], strict=True))
    if found:
        names = [name for name in order if name in found]
        names += sorted(found.keys() - set(names))
        embeddings, told = np.stack([found[name] for name in names]), json.dumps(settings)
        with replacing(out) as temporary:
            if out.suffix == ".h5":
                with import_module("h5py").File(temporary, "w") as file:
                    file["embeddings"], file["names"] = embeddings, names
                    file.attrs["settings"] = told
            else:
                with temporary.open("wb") as stream:
                    np.savez(stream, embeddings=embeddings, names=names, settings=told)
    shutil.rmtree(parts)
