"""Feature files as TRIDENT, CLAM, STAMP and others write them, and batches of slides."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dilated_factory import SlideEncoder, SlideEncoderConfig, SlideFeatures, read_slide_features
from dilated_factory.errors import InputError, MissingPackageError
from dilated_factory.slides import readers
from dilated_factory.slides.dataset import SlideDataset, TileBatches
from dilated_factory.slides.readers import count_tiles

N, D = 7, 5
FEATURES = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
CELLS = np.stack([np.arange(N) * 3, np.arange(N) % 2 + 11], 1)
CONFIG = SlideEncoderConfig(tile_dim=D, embed_dim=16, num_heads=2, num_layers=1, grid_size=99)


def write(path: Path, datasets: dict[str, Any], attributes: dict[str, dict[str, Any]]) -> Path:
    """An HDF5 file; attributes of "" are the file's. Chunks as the projects choose them."""
    h5py = pytest.importorskip("h5py", reason="h5py, of the extra slides, is not installed")
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            data = np.asarray(data)
            chunks = (1, *data.shape[1:]) if "TRIDENT" in path.stem and len(data) else None
            file.create_dataset(
                name, data=data, chunks=chunks, maxshape=(None, *data.shape[1:]) if chunks else None
            )
        for name, values in attributes.items():
            (file if name == "" else file[name]).attrs.update(values)
    return path


def trident(path: Path, features: Any = FEATURES, size: int = 512) -> Path:
    coords = {
        "patch_size": 256,
        "patch_size_level0": size,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": path.stem,
        "savetodir": "/somewhere",
        "level0_width": 90_000,
        "level0_height": 50_000,
    }
    told = {"features": {"name": path.stem, "savetodir": "/x", "encoder": "None"}, "coords": coords}
    return write(path, {"features": features, "coords": CELLS[: len(features)] * size}, told)


STAMP = {"stamp_version": "2.5.0", "extractor": "uni", "unit": "um", "feat_type": "tile"}


def files(folder: Path) -> dict[str, Path]:
    """A file of each layout, all with the same tiles in the same places."""
    um = CELLS.astype(np.float32) * np.float32(112.1)
    return {
        "TRIDENT": trident(folder / "TRIDENT.h5"),
        "CLAM": write(
            folder / "CLAM.h5",
            {"features": FEATURES, "coords": (CELLS * 256).astype(np.int32)},
            {},
        ),
        "CLAM at another level": write(
            folder / "CLAM2.h5",
            {"features": FEATURES[None], "coords": CELLS[None] * 1013},
            {"coords": {"patch_size": 256, "patch_level": 1, "downsample": (1013 / 256,) * 2}},
        ),
        "STAMP": write(
            folder / "STAMP.h5",
            {"feats": FEATURES.astype(np.float16), "coords": um},
            {"": {**STAMP, "tile_size_um": float(np.float32(112.1)), "tile_size_px": 224}},
        ),
        "STAMP 2": write(
            folder / "STAMP2.h5",
            {"feats": FEATURES.astype(np.float16), "coords": um},
            {"": {"unit": "um", "tile_size": float(np.float32(112.1))}},
        ),
        "STAMP historic": write(
            folder / "STAMP1.h5",
            {"feats": FEATURES.astype(np.float16), "coords": CELLS * 224.0},
            {},
        ),
        "HEST-Bench": write(
            folder / "HEST.h5", {"embeddings": FEATURES, "coords": CELLS * 256}, {}
        ),
    }


LAYOUTS = [
    "TRIDENT", "CLAM", "CLAM at another level", "STAMP", "STAMP 2", "STAMP historic", "HEST-Bench"
]  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_embedding(kind: str, tmp_path: Path) -> None:
    found = read_slide_features(files(tmp_path)[kind])
    assert found.layout == kind.partition(" ")[0]
    half = kind.startswith("STAMP")
    assert found.features.dtype == (torch.float16 if half else torch.float32)
    assert (found.tile_size is None) == (kind in ("CLAM", "HEST-Bench"))
    assert count_tiles(files(tmp_path)[kind]) == N
    json.dumps(found.attributes)

    torch.manual_seed(0)
    model = SlideEncoder(CONFIG).eval()
    features, coords, size = found.placed(256 if found.tile_size is None else None)
    (embedding,) = model(features, coords, tile_size=size)
    (expected,) = model(torch.from_numpy(FEATURES), torch.from_numpy(CELLS), tile_size=1)
    assert (embedding - expected).norm() / expected.norm() < (1e-2 if half else 1e-6)
    elsewhere = model(features, coords, tile_size=size * 1.5)[0]
    assert (elsewhere - expected).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize("kind", ["tensor", "array", "dict", "nested", "npz", "old"])
def test_tensors_and_arrays_are_read_from_files_of_torch_and_numpy(
    kind: str, tmp_path: Path
) -> None:
    tensors = {"features": torch.from_numpy(FEATURES).half(), "coords": torch.from_numpy(CELLS)}
    path = tmp_path / ("slide.npz" if kind == "npz" else "slide.pt")
    if kind == "npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()}, tile_size=512)
    elif kind == "array":
        torch.save(tensors["features"].numpy(), path)
    elif kind == "tensor":
        torch.save(tensors["features"], path)
    elif kind == "old":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        names = {"features": "tile_embeds" if kind == "nested" else "features", "coords": "coords"}
        torch.save({names[key]: value for key, value in tensors.items()}, path)
    found = read_slide_features(path)
    assert torch.equal(found.features, tensors["features"])
    assert found.name == "slide"
    assert found.tile_size == (512 if kind == "npz" else None)
    if kind in ("tensor", "array"):
        assert found.coords is None
        with pytest.raises(InputError, match="slide has no coordinates"):
            found.placed(256)
    else:
        assert found.coords is not None
        assert torch.equal(found.coords, tensors["coords"])
        assert found.placed(7)[2] == 7


def test_a_slide_without_tissue_has_no_tiles(tmp_path: Path) -> None:
    for shape in ((0, D), (0,)):
        path = trident(tmp_path / "TRIDENT.h5", np.zeros(shape, np.float32))
        found = read_slide_features(path)
        assert len(found.features) == 0
        assert count_tiles(path) == 0
        with pytest.raises(InputError, match="TRIDENT has no tiles"):
            found.placed()


def test_a_tile_size_that_a_file_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.h5", {"features": FEATURES, "coords": CELLS * 256}, {})
    with pytest.raises(InputError, match=r"plain \(CLAM\) does not say how many pixels"):
        read_slide_features(path).placed()
    odd = write(tmp_path / "odd.h5", {"feats": FEATURES, "coords": CELLS * 300.0}, {})
    assert read_slide_features(odd).tile_size is None


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        ({"coords": CELLS}, r"holds coordinates without features.*It holds: coords \(7, 2\)"),
        ({"img": np.zeros((2, 3, 3, 3)), "coords": CELLS}, "images of tiles, not features"),
        ({"features": FEATURES[0]}, r"Got \(5,\) under 'features': features of a whole slide"),
        ({"features": FEATURES, "coords": CELLS[:3]}, r"each of 7 tiles. Got \(3, 2\)"),
        ({}, "It holds: nothing"),
    ],
)
def test_what_holds_no_features_of_tiles_is_told_with_what_it_holds(
    datasets: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        read_slide_features(write(tmp_path / "file.h5", datasets, {}))


def test_damaged_foreign_and_missing_files_are_one_clear_error(tmp_path: Path) -> None:
    for name in ("broken.h5", "broken.pt", "broken.npz"):
        if name.endswith("h5"):
            pytest.importorskip("h5py", reason="h5py, of the extra slides, is not installed")
        (tmp_path / name).write_bytes(b"no such thing" * 99)
        with pytest.raises(InputError, match=name):
            read_slide_features(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_slide_features(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"must end in one of .h5"):
        read_slide_features(tmp_path / "slide.svs")


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    for name, content in (("a", Harm()), ("b", {"features": np.array([Harm()], dtype=object)})):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match="holds more than tensors and arrays"):
            read_slide_features(tmp_path / f"{name}.pt")
    assert not (tmp_path / "harm").exists()


def test_a_missing_h5py_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slide.h5").touch()
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="h5py, which is not installed: pip install h5py"):
        read_slide_features(tmp_path / "slide.h5")


def test_a_folder_is_a_dataset_and_batches_bound_its_tiles(tmp_path: Path) -> None:
    lengths = [3, 50, 7, 9, 20, 1, 30, 4]
    for index, length in enumerate(lengths):
        torch.save(
            {"features": torch.randn(length, D), "coords": torch.zeros(length, 2)},
            tmp_path / f"slide{index}.pt",
        )
    (tmp_path / "notes.txt").touch()
    dataset = SlideDataset(tmp_path)
    assert dataset.tile_counts() == lengths
    batches = TileBatches(lengths, 32, shuffle=True, seed=3)
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        some = list(batches)
        assert len(some) == len(batches)
        assert sorted(chain.from_iterable(some)) == list(range(8))
        assert all(sum(lengths[i] for i in batch) <= 32 or len(batch) == 1 for batch in some)
        assert len(some) < 8
        seen.append(some)
    assert seen[0] != seen[1] != seen[2]
    batches.set_epoch(0)
    assert list(batches) == seen[0]
    shares = [list(TileBatches(lengths, 32, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(chain.from_iterable(chain.from_iterable(shares))) == list(range(8))

    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=TileBatches(lengths, 32), collate_fn=list
    )
    for batch in loader:
        assert all(isinstance(slide, SlideFeatures) for slide in batch)
    with pytest.raises(InputError, match=r"max_tiles must be at least 1. Got 0"):
        TileBatches(lengths, 0)
    with pytest.raises(InputError, match="there is no file"):
        SlideDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are no feature files"):
        SlideDataset(tmp_path / "empty")
    with pytest.raises(InputError, match=r"notes.txt' must end in one of"):
        SlideDataset(tmp_path / "notes.txt")
