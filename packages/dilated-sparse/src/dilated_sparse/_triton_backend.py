"""The `triton` backend: core's kernels, driven by a layout.

out, lse and the gradients are written once, in one pass each; the same inputs give the same bits.
Plans depend on the layout and on block sizes, are made on the device and kept.
"""

from collections.abc import MutableMapping
from functools import lru_cache, partial
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dilated_core.extending import (
    BlockSizes,
    Config,
    Pair,
    Partial,
    Pass,
    PlanCache,
    Scores,
    Sizes,
    TilePlan,
    Upstream,
    drive,
    drive_backward,
)
from dilated_sparse._block_plan import build
from dilated_sparse._layout import BlockLayout
from dilated_sparse._options import Options

# What a row of a tile of that many rows costs, against one of the tallest, about. Only for
# choosing tiles that a block's rows fill.
_ROW_COST = {256: 1.0, 128: 1.0, 64: 1.1, 32: 1.6, 16: 2.5}
# Steps are no narrower for blocks that they do not divide.
_LEAST_COLUMNS = 32
# The plans of a layout live as long as its tensors, which custom operators hand on as they are.
_plans: MutableMapping[Tensor, PlanCache] = WeakIdKeyDictionary()


class LayoutSchedule(NamedTuple):
    """A layout as what drives the kernels."""

    layout: BlockLayout

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
        plans = _plans.get(self.layout.run_offsets)
        if plans is None:
            plans = _plans[self.layout.run_offsets] = PlanCache()
        return plans.plan(key, sizes.device, partial(build, self.layout, sizes, by_key, blocks))


@lru_cache(maxsize=1024)
def _for_partial_blocks(pair: Pair, only_short: bool) -> Pair:
    tall, short = (config._replace(masked=64) for config in (pair.tall, pair.short))
    return pair._replace(tall=short if only_short else tall, short=short)


@lru_cache(maxsize=1024)
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


def forward(options: Options, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention outside of any operator: out (B, N, H, D) in query's dtype and lse (B, H, N)."""
    return drive(_scores(options), LayoutSchedule(options.layout), query, key, value)


def backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, in their dtype."""
    upstream = Upstream(grad_out, grad_lse, query, key, value, total)
    return drive_backward(_scores(options), LayoutSchedule(options.layout), upstream)


def _scores(options: Options) -> Scores:
    return Scores(
        options.is_causal, options.scale, options.key_padding_mask, options.dropout_p, options.seed
    )
