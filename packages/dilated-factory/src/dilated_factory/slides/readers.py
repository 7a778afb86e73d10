"""Features of a slide's tiles, from the files that TRIDENT, CLAM, STAMP and others write."""

# Shapes: N tiles, D width of a tile's features.

import codecs
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_factory.errors import InputError, missing_package
from dilated_factory.interop.checkpoints import load_plain
from dilated_factory.training.embedding_files import DAMAGED_NPZ

ENDINGS = (".h5", ".hdf5", ".pt", ".pth", ".npz")
# The names that projects give to features of tiles.
_FEATURES = ("features", "feats", "embeddings", "tile_embeds", "patch_embeddings")
# A tile's side is this many steps where a file gives it in micrometres only.
STEPS = 256
# STAMP's first files have no attributes: their tiles are this many pixels, or 256 micrometres.
_HISTORIC_TILE = 224


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """Features of a slide's tiles, as a file holds them.

    Shapes: tiles N, width of a feature D.

    Attributes:
        features: (N, D), in the file's dtype.
        coords: (N, 2), the tiles' upper left corners, in the unit of ``tile_size``; None where the
            file has none.
        tile_size: side of a tile, so that coords / tile_size counts tiles; None where the file
            does not tell.
        name: the file's, without folder and ending.
        layout: who writes such files: "TRIDENT", "CLAM", "STAMP", ...
        attributes: what else the file says: numbers and text by name.

    Examples:
        >>> torch.save({"features": torch.zeros(5, 8), "coords": torch.zeros(5, 2)}, "slide.pt")
        >>> slide = read_slide_features("slide.pt")
        >>> slide.name, slide.features.shape
        ('slide', torch.Size([5, 8]))
    """

    features: Tensor
    coords: Tensor | None
    tile_size: float | None
    name: str
    layout: str
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def placed(self, tile_size: float | None = None) -> tuple[Tensor, Tensor, float]:
        """Features, coordinates and tile size for a slide encoder.

        Args:
            tile_size: takes the place of the file's, in the unit of its coordinates.

        Raises:
            InputError: there are no tiles, no coordinates, or no tile size at all; or a feature is
                not finite, as where float16 overflowed.
        """
        size = self.tile_size if tile_size is None else tile_size
        if not len(self.features):
            raise InputError(f"{self.name} has no tiles.")
        if self.coords is None:
            raise InputError(f"{self.name} has no coordinates, which say where its tiles lie.")
        if size is None:
            raise InputError(
                f"{self.name} ({self.layout}) does not say how many pixels of level 0 a tile is "
                "wide: give the tile size."
            )
        finite = self.features.isfinite().all(1)
        if not finite.all():
            raise InputError(
                f"{self.name} must have finite features. Got others in {int((~finite).sum())} of "
                f"{len(finite)} tiles, first in tile {int(finite.int().argmin())}."
            )
        return self.features, self.coords, size


def read_slide_features(path: str | Path) -> SlideFeatures:
    """The features of a slide's tiles in an ``.h5``, ``.pt`` or ``.npz`` file.

    Files of TRIDENT, CLAM, STAMP (all versions), HEST-Bench, slide2vec and GigaPath are known, with
    or without a batch dimension of one. Of a ``.pt`` file no code is run.

    Raises:
        InputError: the file holds no features of tiles, which lists what it holds; or is damaged.
        MissingPackageError: h5py, which reads ``.h5``, is not installed.
        OSError: there is no such file.

    Examples:
        >>> torch.save({"features": torch.zeros(5, 8), "coords": torch.zeros(5, 2)}, "slide.pt")
        >>> read_slide_features("slide.pt").coords.shape
        torch.Size([5, 2])
    """
    path = Path(path)
    with _opened(path) as (arrays, attributes):
        key = _features_key(path, arrays)
        features = _tensor(arrays[key])
        if features.ndim == 3 and len(features) == 1:
            features = features[0]
        if features.ndim == 1 and not len(features):  # no tissue, of an unknown width
            features = features.view(0, 0)
        coords = _tensor(arrays["coords"]) if "coords" in arrays else None
    if features.ndim != 2:
        raise InputError(
            f"{path} must hold features of tiles (N, D). Got {tuple(features.shape)} under {key!r}"
            + (": features of a whole slide." if features.ndim == 1 else ".")
        )
    if coords is not None:
        coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
        coords = coords.view(0, 2) if not coords.numel() else coords
        if coords.shape != (len(features), 2):
            raise InputError(
                f"{path} must hold one coordinate (N, 2) for each of {len(features)} tiles. "
                f"Got {tuple(coords.shape)}."
            )
    layout, (coords, size) = _interpret(key, coords, attributes)
    return SlideFeatures(features, coords, size, path.stem, layout, attributes)


def count_tiles(path: str | Path) -> int:
    """How many tiles a file has features of, without reading them.

    Raises:
        InputError, MissingPackageError, OSError: as `read_slide_features`.
    """
    path = Path(path)
    with _opened(path) as (arrays, _):
        shape = arrays[_features_key(path, arrays)].shape
        return int(shape[1] if len(shape) == 3 and shape[0] == 1 else shape[0])


def slide_files(paths: list[Path]) -> list[Path]:
    """The feature files among paths and, in folders, directly inside; sorted in each folder.

    Raises:
        InputError: a path is missing or has another ending, or there is no file.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix in ENDINGS)
        elif not path.exists():
            raise InputError(f"there is no file {str(path)!r}.")
        elif path.suffix not in ENDINGS:
            raise InputError(f"{str(path)!r} must end in one of {', '.join(ENDINGS)}.")
        else:
            found.append(path)
    if not found:
        raise InputError(
            f"there are no feature files ({', '.join(ENDINGS)}) in {', '.join(map(str, paths))}."
        )
    return found


def named_files(files: Sequence[Path]) -> dict[str, Path]:
    """The feature files by the names of their slides.

    Raises:
        InputError: two files, in folders of their own or of other endings, have one name.
    """
    twice = sorted(name for name, times in Counter(p.stem for p in files).items() if times > 1)
    if twice:
        raise InputError(f"slides must have different names. Got twice: {', '.join(twice[:5])}.")
    return {path.stem: path for path in files}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The arrays of a file by name, and its attributes, those of coordinates before others."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{str(path)!r} must end in one of {', '.join(ENDINGS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    if path.suffix in (".h5", ".hdf5"):
        if find_spec("h5py") is None:
            raise missing_package(f"reading {path.name}", "h5py")
        h5py: Any = import_module("h5py")  # which has no types
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{str(path)!r} is not a whole HDF5 file: {error}.") from None
        with file:
            arrays = {key: item for key, item in file.items() if hasattr(item, "shape")}
            yield arrays, _attributes(file, *arrays.values())
    elif path.suffix == ".npz":
        import numpy as np

        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                content = {key: archive[key] for key in archive.files}
        except DAMAGED_NPZ as error:
            raise InputError(f"{str(path)!r} is not a whole .npz file: {error}.") from None
        yield _split(content)
    else:
        content = _load_tensors(path)
        yield _split(content if isinstance(content, Mapping) else {"features": content})


def _load_tensors(path: Path) -> Any:
    import numpy as np

    numbers = [type(np.dtype(f"float{bits}")) for bits in (16, 32, 64)]
    for mapped in (True, False):  # formats of older versions have no memory map
        try:
            return load_plain(path, _of_numpy, numbers, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            pass
    raise InputError(f"{str(path)!r} holds more than tensors and arrays, or is damaged.")


def _of_numpy(name: str) -> Any:
    """What makes an array of numpy, by its name in a pickle: TRIDENT's file may be one."""
    import numpy as np

    if name == "_codecs.encode":
        return codecs.encode
    if name.startswith("numpy.") and name.endswith("._reconstruct"):
        return np.zeros(0).__reduce__()[0]
    return {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}.get(name)


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and attributes among the entries of a file."""
    arrays = {k: v for k, v in content.items() if hasattr(v, "shape") and len(v.shape)}
    rest = {k: v for k, v in content.items() if k not in arrays}
    return arrays, {str(k): _plain(v) for k, v in rest.items()}


def _attributes(*holders: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for holder in holders:
        found.update({name: _plain(value) for name, value in holder.attrs.items()})
    return found


def _plain(value: Any) -> Any:
    """A number, text or list that JSON knows."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value.decode() if isinstance(value, bytes) else value


def _features_key(path: Path, arrays: Mapping[str, Any]) -> str:
    for key in _FEATURES:
        if key in arrays:
            return key
    held = ", ".join(f"{key} {tuple(array.shape)}" for key, array in list(arrays.items())[:10])
    what = "images of tiles, not features" if "img" in arrays else "no features of tiles"
    what = "coordinates without features" if set(arrays) == {"coords"} else what
    raise InputError(
        f"{str(path)!r} holds {what}: one of {', '.join(_FEATURES)} is needed. "
        f"It holds: {held or 'nothing'}."
    )


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    import numpy as np

    return torch.from_numpy(np.ascontiguousarray(array[...]))


def _interpret(
    key: str, coords: Tensor | None, told: Mapping[str, Any]
) -> tuple[str, tuple[Tensor | None, float | None]]:
    """Whose layout it is; coordinates and tile size in one unit."""
    if key in ("feats", "patch_embeddings"):
        return "STAMP", (None, None) if coords is None else _stamp_places(coords, told)
    if "patch_size_level0" in told:
        return "TRIDENT", (coords, float(told["patch_size_level0"]))
    if "patch_size" in told and "downsample" in told:
        factor = told["downsample"]
        factor = factor[0] if isinstance(factor, list) else factor
        return "CLAM", (coords, float(told["patch_size"]) * float(factor))
    layouts = {"embeddings": "HEST-Bench", "tile_embeds": "GigaPath"}
    size = told.get("tile_size")
    layout = layouts.get(key, "TRIDENT" if "encoder" in told else "CLAM")
    return layout, (coords, None if size is None else float(size))


def _stamp_places(coords: Tensor, told: Mapping[str, Any]) -> tuple[Tensor, float | None]:
    """STAMP's micrometres, in float32, as whole pixels of a tile: a tile at k sizes is at k."""
    size_um, size_px = told.get("tile_size_um", told.get("tile_size")), told.get("tile_size_px")
    if told.get("unit") == "um" and size_um:
        pixels = float(size_px or STEPS)
        return (coords.double() * (pixels / float(size_um))).round().long(), pixels
    stride = _stride(coords)
    if not told and stride is not None and round(stride) == _HISTORIC_TILE:
        return coords.double().round().long(), float(_HISTORIC_TILE)
    return coords, None


def _stride(coords: Tensor) -> float | None:
    """The least distance of neighbours along an axis."""
    steps = [torch.unique(axis.double()).diff() for axis in coords.T]
    steps = [step[step > 1] for step in steps]
    least = [step.min().item() for step in steps if len(step)]
    return min(least) if least else None
