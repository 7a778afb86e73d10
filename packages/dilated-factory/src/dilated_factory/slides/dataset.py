"""Slides as a torch Dataset, and batches that hold a bounded number of tiles."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset, Sampler

from dilated_factory.errors import InputError
from dilated_factory.slides.readers import (
    SlideFeatures,
    count_tiles,
    read_slide_features,
    slide_files,
)


class SlideDataset(Dataset[SlideFeatures]):
    """The feature files of folders, read when they are asked for.

    Pass `TileBatches` as the ``batch_sampler`` of a DataLoader and `list` as its ``collate_fn``:
    a batch is then a list of slides, which `SlideEncoder.encode` packs.

    Args:
        paths: files, and folders whose files are taken.

    Raises:
        InputError: as `slide_files`.
    """

    def __init__(self, *paths: str | Path) -> None:
        self.files = slide_files([Path(path) for path in paths])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> SlideFeatures:
        return read_slide_features(self.files[index])

    def tile_counts(self) -> list[int]:
        """How many tiles each slide has, without reading them."""
        return [count_tiles(path) for path in self.files]


class TileBatches(Sampler[list[int]]):
    """Batches of indices whose slides have at most ``max_tiles`` tiles together.

    Slides of similar size do not have to stand together, because packed slides have no padding. A
    slide with more tiles than that is a batch of its own.

    Args:
        counts: tiles of each slide.
        max_tiles: in a batch.
        shuffle: another order for each epoch.
        seed: of the orders.
        rank, world_size: take every ``world_size``-th batch.

    Raises:
        InputError: max_tiles is not positive, or rank is not below world_size.
    """

    def __init__(
        self,
        counts: Sequence[int],
        max_tiles: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if max_tiles < 1:
            raise InputError(f"max_tiles must be at least 1. Got {max_tiles}.")
        if not 0 <= rank < world_size:
            raise InputError(f"rank must be in [0, world_size={world_size}). Got {rank}.")
        self.counts, self.max_tiles, self.shuffle, self.seed = counts, max_tiles, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, the same on all ranks."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._mine())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._mine())

    def _mine(self) -> list[list[int]]:
        order = list(range(len(self.counts)))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        batches: list[list[int]] = []
        room = 0
        for index in order:
            if self.counts[index] > room:
                batches.append([])
                room = self.max_tiles
            batches[-1].append(index)
            room -= self.counts[index]
        return batches[self.rank :: self.world_size]
