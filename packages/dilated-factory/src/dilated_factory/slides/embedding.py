"""Embeddings of many slides, written so that a stopped command goes on where it stood."""

# Shapes: S slides, L encoder states, E embed_dim.

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dilated_core.extending import let_gloo_rest_at_exit
from dilated_factory.configs.files import read_values
from dilated_factory.errors import InputError
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.slides.readers import (
    SlideFeatures,
    count_tiles,
    named_files,
    read_slide_features,
)
from dilated_factory.training.atomic import write_text
from dilated_factory.training.embedding_files import (
    check_out,
    check_settings,
    read_embeddings,
    write_embeddings,
)
from dilated_factory.training.parallel import leave


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
    together at the end; what is in either is made again only if its file of features is newer.
    Under torchrun each process makes a share, and the first one puts them together.

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
    names = list(named_files(files))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = out.with_name(out.name + ".parts")
    done = _made(out, settings)
    start = _open_parts(parts, settings)
    there = sorted(parts.glob("*.npz"), key=_call)
    call = 1 + max(map(_call, there), default=0)
    for path in there:
        for name, made in _made(path).items():
            done[name] = max(made, done.get(name, 0))
    # First the share: another process may have written in between, and would move the others'.
    todo = [path for path in files[rank::world] if not _is_older(path, done.get(path.stem, 0))]
    failed: dict[str, str] = {}
    for ready, slides in _batches(todo, how.max_tiles, failed):
        on_progress(f"embedding {slides[0].name}", ready / len(todo))
        found = _embed_or_tell(model, slides, how, failed)
        if found:
            key = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
            rows = np.stack(list(found.values()))
            part = parts / f"{call}-{key}.npz"
            write_embeddings(part, list(found), rows, settings)
            os.utime(part, ns=(start, start))
    if world > 1:
        failed = _meet(failed)
    if rank == 0:
        _join(parts, out, names, settings, failed)
        if out.exists():
            # Of a file that was changed since, what was read may be older.
            os.utime(out, ns=(start, start))
    return failed


def _made(path: Path, settings: dict[str, Any] | None = None) -> dict[str, int]:
    """When the call began that wrote a file, in nanoseconds, by name; none without a file."""
    if not path.exists():
        return {}
    return dict.fromkeys(read_embeddings(path, settings)[0], path.stat().st_mtime_ns)


def _is_older(path: Path, time: int) -> bool:
    """Whether a file was last changed before then; one that cannot be reached is not."""
    return path.exists() and path.stat().st_mtime_ns < time


def _call(part: Path) -> int:
    """Which call a part is of; by their times a clock that goes back would mistake them."""
    call, _, rest = part.stem.partition("-")
    return int(call) if rest and call.isdecimal() else 0


def _open_parts(parts: Path, settings: dict[str, Any]) -> int:
    """Make the folder of parts; the time, in nanoseconds, of the file system that they are on."""
    parts.mkdir(parents=True, exist_ok=True)
    told = parts / "settings.json"
    if told.exists():
        check_settings(parts, read_values(told), settings)
    else:
        write_text(told, json.dumps(settings))
    told.touch()
    return told.stat().st_mtime_ns


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
    let_gloo_rest_at_exit()
    dist.init_process_group("gloo")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failed)
    leave()
    return {name: why for each in everyone for name, why in each.items()}


def _join(
    parts: Path, out: Path, order: Sequence[str], settings: dict[str, Any], failed: Container[str]
) -> None:
    """Put what was there and all parts into ``out``, in the order of names, then the rest.

    What failed is left out, though a file before it had an embedding.
    """
    found: dict[str, Any] = {}
    if out.exists():
        found = dict(zip(*read_embeddings(out, settings), strict=True))
    for path in sorted(parts.glob("*.npz"), key=_call):
        found.update(zip(*read_embeddings(path), strict=True))
    found = {name: row for name, row in found.items() if name not in failed}
    if found:
        names = [name for name in order if name in found]
        names += sorted(found.keys() - set(names))
        write_embeddings(out, names, np.stack([found[name] for name in names]), settings)
    shutil.rmtree(parts)
