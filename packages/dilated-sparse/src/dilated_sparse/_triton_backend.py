"""The `triton` backend: core's kernels, driven by a layout.

out, lse and the gradients are written once, in one pass each; the same inputs give the same bits.
Plans depend on the layout and on block sizes, are made on the device and kept.
"""

from collections.abc import MutableMapping
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dilated_core.extending import (
    BlockSizes,
    Config,
    Gradients,
    Pair,
    Partial,
    Pass,
    PlanCache,
    Sizes,
    TilePlan,
    Upstream,
    drive,
    drive_backward,
    on_clear,
    remembered,
)
from dilated_sparse._block_plan import build
from dilated_sparse._blocks import Layout
from dilated_sparse._call import BlockCall

# What a row of a tile of that many rows costs, against one of the tallest, about. Only for
# choosing tiles that a block's rows fill.
_ROW_COST = {256: 1.0, 128: 1.0, 64: 1.1, 32: 1.6, 16: 2.5}
# Steps are no narrower for blocks that they do not divide.
_LEAST_COLUMNS = 32
# By the tensor and not by the layout: a traced call hands on the tensors alone, and a layout of
# them is made anew, whose digest would wait for the device. Plans live as long as the tensor.
_plans: MutableMapping[Tensor, PlanCache] = WeakIdKeyDictionary()


@on_clear
def _clear() -> None:
    for plans in _plans.values():
        plans.clear()


class LayoutTiling(NamedTuple):
    """A layout as what drives the kernels."""

    layout: Layout

    def cache(self) -> tuple[PlanCache, object]:
        """The layout's own."""
        plans = _plans.get(self.layout.run_offsets)
        if plans is None:
            plans = _plans[self.layout.run_offsets] = PlanCache()
        return plans, None

    def choose(self, which: Pass, sizes: Sizes, pair: Pair) -> Config:
        """Tiles that the rows of a block fill, and steps that divide its columns.

        Where there are partial blocks, queries take masked steps of two words, and their gradient
        takes short tiles: on an H200 it is faster by a quarter in narrow windows.
        """
        if which != "key" and len(self.layout.table):
            pair = _for_partial_blocks(pair, which == "query")
        return fit(pair, self.layout.block_size)

    def plan(self, sizes: Sizes, by_key: bool, blocks: BlockSizes) -> TilePlan:
        """The plan over query tiles, or over key tiles; made once."""
        grouped = (sizes.heads, sizes.kv_heads) if by_key else sizes.heads
        key = (by_key, grouped, sizes.is_causal, sizes.first_key, blocks)
        plans, _ = self.cache()
        return plans.plan(key, sizes.device, partial(build, self.layout, sizes, by_key, blocks))


@remembered(1024)
def _for_partial_blocks(pair: Pair, only_short: bool) -> Pair:
    tall, short = (config._replace(masked=64) for config in (pair.tall, pair.short))
    return pair._replace(tall=short if only_short else tall, short=short)


@remembered(1024)
def fit(pair: Pair, block_size: int) -> Config:
    """The block sizes for layouts of this block size, from those that are fast for a pass."""
    shapes = {shape.rows: shape for shape in (pair.short, pair.tall)}
    rows = pair.short.rows // 2
    while rows >= 16:
        shapes[rows] = pair.short._replace(
            rows=rows, warps=max(1, pair.short.warps * rows // pair.short.rows)
        )
        rows //= 2

    def cost(shape: Config) -> float:
        return -(-block_size // shape.rows) * shape.rows * _ROW_COST[shape.rows]

    best = min(sorted(shapes.values(), reverse=True), key=cost)
    # A step that does not divide a block leaves a masked one at the end of every run.
    columns = max(block_size & -block_size, min(_LEAST_COLUMNS, block_size), 16)
    return best._replace(columns=min(best.columns, columns))


def forward(call: BlockCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention outside of any operator: out (B, N, H, D) in query's dtype and lse (B, H, N)."""
    return drive(call.scores, LayoutTiling(call.layout), query, key, value)


def backward(call: BlockCall, upstream: Upstream) -> Gradients:
    """Gradients to query, key and value, in their dtype."""
    return drive_backward(call.scores, LayoutTiling(call.layout), upstream)
