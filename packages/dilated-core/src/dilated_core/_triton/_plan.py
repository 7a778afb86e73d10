"""Plans: for every tile of rows, the runs of columns that a program walks.

A plan is all that the kernels know about a pattern, so anything that can be said as tiles and
runs can drive them. Rows and columns are numbered by position.

- A tile is (first row, step, rows, full columns, masked steps, sequence, first full run, first
  masked run).
- A full run is (first column, step, columns, log2 weight, member): its columns are a multiple of
  the kernel's column block, and every row of the tile sees all of them. With mask 2 it ends in
  (first row, end of rows), and the rows of the tile in between do.
- A masked run is (first column, step, columns, log2 weight, member, segment, row residue,
  row step): a row sees a column if position // segment is the same for both, the row is congruent
  to the residue modulo the row step and, when causal, the order is right. A masked run of step 0
  is one zero key that has no row.
- With mask 3 a masked run has step 1 and ends in (first word, first row, words per row) instead:
  row r sees its j-th column if bit j % 32 of word first + (r - first row) * words per row + j // 32
  is set and, when causal, the order is right. A step of 64 columns reads two words of each row.
- A member is a query head within those that one program serves.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

TILE_FIELDS, FULL_FIELDS, MASKED_FIELDS = 8, 5, 8
SPARE_RUNS = 2  # at the end of a table: the two that follow a run are read before it ends
ANY_SEGMENT = 2**31 - 1
_CACHED_PLANS = 24


class BlockSizes(NamedTuple):
    """Rows of a tile, columns of a step, and columns of a masked step, which divide those."""

    rows: int
    columns: int
    masked: int


@dataclass(frozen=True)
class TilePlan:
    """Tables on one device; see the module.

    Attributes:
        tiles: (classes, tiles, TILE_FIELDS) int32.
        full: (runs, FULL_FIELDS) int32, with two more fields if `mask` is 2; weights are float32
            bits. SPARE_RUNS more at the end may be read and are not used.
        masked: (runs, MASKED_FIELDS) int32, likewise.
        head_class: (heads,) int32, the class of a query head, or of a key head by key.
        bits: (words,) int32 that masked runs point into if `mask` is 3, else any tensor. The words
            of all rows of a tile may be read, of those that are not in it too.
        largest_step: bounds the step between columns.
        mask: 0 if there are no masked runs, 1 if only their length and causal order hide columns,
            2 if segments or row steps may, 3 if bits may.
        early: how many tiles of each class have so much work that those of all heads start first.
        stream: the stream that built it.
    """

    tiles: Tensor
    full: Tensor
    masked: Tensor
    head_class: Tensor
    bits: Tensor
    largest_step: int
    mask: int
    early: int = 0
    stream: int = 0

    def tensors(self) -> tuple[Tensor, ...]:
        """The tables."""
        return self.tiles, self.full, self.masked, self.head_class, self.bits


class Kept(Protocol):
    """What a cache keeps: tables, and the stream that built them."""

    @property
    def stream(self) -> int:
        """The stream, as `current_stream` gives it."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tables."""


@dataclass
class PlanCache:
    """The most recently used plans, and those that a captured graph reads for ever.

    Once a graph has captured one of its plans, a cache is never freed. `launches` are kernels with
    plans of the cache, for whoever launches them again; a plan that is built clears them, so that
    they keep none alive and each stays in use.
    """

    size: int = _CACHED_PLANS
    recent: OrderedDict[object, Kept] = field(default_factory=OrderedDict)
    captured: dict[object, Kept] = field(default_factory=dict)
    launches: dict[object, Any] = field(default_factory=dict)

    def plan(self, key: object, device: torch.device, build: Callable[[], TilePlan]) -> TilePlan:
        """The plan of this key and device, built where it is missing; for any stream and in graphs.

        Raises:
            RuntimeError: it is missing, and a CUDA graph is being captured.
        """

        def complete() -> TilePlan:
            return replace(build(), stream=current_stream(device))

        found = self.value((key, device), device, complete)
        assert isinstance(found, TilePlan)
        return found

    def value(self, key: object, device: torch.device, build: Callable[[], Kept]) -> Kept:
        """The same for anything that has tables."""
        found = self.recent.get(key) or self.captured.get(key)
        if found is None:
            _forbid_capture(device)
            found = build()
            _finish(device)
            self.recent[key] = found
            self.launches.clear()
            while len(self.recent) > self.size:
                self.recent.popitem(last=False)
        elif key in self.recent:
            self.recent.move_to_end(key)
        self._share(key, found, device)
        return found

    def clear(self) -> None:
        """Forget all but what captured graphs read."""
        self.recent.clear()
        self.launches.clear()

    def _share(self, key: object, found: Kept, device: torch.device) -> None:
        """Keep tables alive for captured graphs and for other streams than their own."""
        if device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            self.captured[key] = found
            _pinned[id(self)] = self
        elif current_stream(device) != found.stream:
            stream = torch.cuda.current_stream(device)
            for table in found.tensors():
                table.record_stream(stream)


_pinned: dict[int, PlanCache] = {}


def _forbid_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention must run once with the same pattern or layout and shapes before a CUDA "
            "graph captures it."
        )


def current_stream(device: torch.device) -> int:
    """The address of the current stream; 0 on the CPU."""
    return raw_stream(device.index) if device.type == "cuda" else 0


def raw_stream(device: int) -> int:
    """The same, which costs the host less than a stream of torch."""
    return torch._C._cuda_getCurrentRawStream(device)


def _finish(device: torch.device) -> None:
    """Other streams may read a cached table at once."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
