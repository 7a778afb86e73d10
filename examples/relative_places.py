"""Slides whose label lies in where tiles are: a slide encoder beside models that know no places.

Makes a cohort of synthetic slides of 500 to 60,000 tiles. Each has two rare kinds of tile, as many
of one as of the other; the label says whether the first kind lies to the left of the second. What a
mean of tiles sees is the same for both labels, and so is what attention over a bag of tiles sees
(ABMIL). Everything that `dilated slides train` does is done here by its parts; the folder it leaves
can be given to the command as well.

    python examples/relative_places.py [--slides 100] [--epochs 10] [--out FOLDER]

It takes minutes on two cores, and needs dilated-factory[slides].
"""

import argparse
import csv
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dilated_factory import SlideEncoderConfig
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.slides.readers import slide_files
from dilated_factory.slides.tasks import read_labels
from dilated_factory.slides.training import SlideTask

WIDTH = 8  # of a tile's features
TILE = 256  # pixels
RARE = 0.05  # share of each rare kind
SMALLEST, LARGEST = 500, 60_000


def make_slide(generator: np.random.Generator, tiles: int, left: bool) -> dict[str, np.ndarray]:
    """Features float16 (N, WIDTH) and coordinates (N, 2) of a slide.

    The rare kinds lie in two bands of the tissue, the first kind in the left one if ``left``.
    """
    across = math.ceil(math.sqrt(tiles))
    cells = np.stack(np.divmod(np.arange(tiles), across), 1)  # x changes slowest
    kinds = np.zeros(tiles, dtype=int)
    rare = round(RARE * tiles)
    sides = cells[:, 0] < cells[:, 0].max() / 2
    for kind, side in ((1, sides if left else ~sides), (2, ~sides if left else sides)):
        kinds[generator.choice(np.flatnonzero(side), rare, replace=False)] = kind
    features = generator.standard_normal((tiles, WIDTH))
    features[kinds > 0] += 6 * np.eye(WIDTH)[kinds[kinds > 0] - 1]
    place = generator.integers(0, 20, 2)  # where the tissue lies on the glass
    return {"features": features.astype(np.float16), "coords": (cells + place) * TILE}


def make_cohort(folder: Path, slides: int, largest: int, seed: int = 0) -> int:
    """Write features and labels of patients with two slides each; say how many tiles there are."""
    generator = np.random.default_rng(seed)
    (folder / "features").mkdir(parents=True)
    rows, total = [], 0
    for index in range(slides):
        label = index // 2 % 2
        # Most are small, so that it does not take long; the first is the largest.
        share = generator.random() ** 8 if index else 1.0
        tiles = round(SMALLEST * (largest / SMALLEST) ** share)
        total += tiles
        content = make_slide(generator, tiles, left=bool(label))
        np.savez(folder / "features" / f"slide{index:03}.npz", **content, tile_size=TILE)
        rows.append([f"slide{index:03}", f"patient{index // 2:03}", label])
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["slide", "patient", "left"], *rows])
    return total


def task(folder: Path, model: str, epochs: int) -> SlideTaskConfig:
    """The same task for a slide encoder and for the baselines."""
    return SlideTaskConfig(
        table=str(folder / "labels.csv"),
        features=(str(folder / "features"),),
        task="binary",
        labels=("left",),
        patient_column="patient",
        model=model,  # type: ignore[arg-type] # one of the three
        encoder=SlideEncoderConfig(
            tile_dim=WIDTH,
            embed_dim=32,
            num_heads=2,
            num_layers=1,
            ffn_dim=64,
            segment_lengths=(256, 4096, 65536),
            dilation_rates=(1, 16, 256),
            global_pool=True,
        ),
        folds=5,
        epochs=epochs,
        batch_size=4,
        learning_rate=3e-3,
        layer_decay=1.0,
        weight_decay=0.01,
        warmup=0.2,
    )


def compare(folder: Path, epochs: int, folds: list[int]) -> dict[str, tuple[float, float, float]]:
    """AUROC of each model on test slides, with its 95 % interval over patients."""
    found = {}
    for model in ("encoder", "mean_pool", "abmil"):
        config = task(folder, model, epochs)
        files = {path.stem: path for path in slide_files([folder / "features"])}
        slides, _ = read_labels(config, list(files))
        chosen = [files[name] for name in slides.names]
        work = SlideTask(config, slides, chosen, torch.device("cpu"))
        start = time.perf_counter()
        scores = work.run(folder / model, folds, lambda what, share: None)["all folds"]["AUROC"]
        found[model] = (scores["value"], *scores["interval"])
        print(
            f"{model:10} AUROC {scores['value']:.3f} "
            f"({scores['interval'][0]:.3f} to {scores['interval'][1]:.3f}), "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return found


def main() -> None:
    """Make the cohort, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--largest", type=int, default=LARGEST, help="tiles of the largest slide")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folds", type=int, default=1, help="how many of the five are tested")
    parser.add_argument("--out", type=Path, default=None, help="folder to keep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cohort" if options.out is None else options.out
        tiles = make_cohort(folder, options.slides, options.largest)
        print(f"{options.slides} slides, {tiles:,} tiles", flush=True)
        compare(folder, options.epochs, list(range(options.folds)))


if __name__ == "__main__":
    main()
