"""What drives the kernels: a schedule, which picks block sizes and makes the plans for them."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dilated_core._triton._plan import BlockSizes, PlanCache, TilePlan

Pass = Literal["forward", "query", "key"]


class Config(NamedTuple):
    """Rows of a tile, columns of a step, warps of a program and stages of its pipeline.

    Masked steps may take fewer columns, `masked`, because masks need registers. `registers` bounds
    those of a thread, so that more programs run at once; None leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    masked: int = 32
    registers: int | None = None

    @property
    def blocks(self) -> BlockSizes:
        """What a plan needs of it."""
        return BlockSizes(self.rows, self.columns, min(self.columns, self.masked))


class Pair(NamedTuple):
    """Tall tiles are faster; short ones waste less where a tile does not fit what it serves.

    For a pattern short tiles are chosen when causal, and where they have less than `gain` of the
    work.
    """

    tall: Config
    short: Config
    gain: float = 1.0


class Sizes(NamedTuple):
    """What a plan may depend on, beside its schedule and its block sizes.

    `first_key` is the position of the first key, `first_query` that of the first query: when causal
    the queries are the last positions, else both start together.
    """

    length: int
    key_length: int
    heads: int
    kv_heads: int
    first_query: int
    first_key: int
    is_causal: bool
    device: torch.device


class Tiling(Protocol):
    """Which keys each query sees, as plans for the kernels."""

    def cache(self) -> tuple[PlanCache, object] | None:
        """Where its plans are kept, and a name that only its own have there; None if nowhere."""

    def choose(self, which: Pass, sizes: Sizes, pair: Pair) -> Config:
        """The block sizes of a pass, from those that are fast for its head_dim and dtype."""

    def plan(self, sizes: Sizes, by_key: bool, blocks: BlockSizes) -> TilePlan:
        """The plan over query tiles, or over key tiles; without a host sync once it is known."""


class HeldTensors(NamedTuple):
    """The rows that a decoding state holds, and where they lie.

    Attributes:
        key, value: (B, R, D), contiguous.
        padding: (B, R) bool, contiguous, True = ignore, or None where none is.
        lengths: (B,) int64, positions seen.
        head_rows: (branches, H) int32, the first slot of the stream that a head reads, or -1.
        head_offsets: (branches, H) int32, the residue of the rows that it keeps.
        sizes: (branches, 2) int32, segment lengths and dilation rates.
        most_slots: slots of the longest stream.
    """

    key: Tensor
    value: Tensor
    padding: Tensor | None
    lengths: Tensor
    head_rows: Tensor
    head_offsets: Tensor
    sizes: Tensor
    most_slots: int
