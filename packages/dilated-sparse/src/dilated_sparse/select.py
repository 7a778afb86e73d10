"""Layouts chosen by content: which blocks of keys matter to each block of queries of a sequence.

Both policies look at blocks of keys through the mean of their keys, so their cost is that of
attention to one key per block, and their memory is far below the square of the length. The layout
has the heads of the query, and each batch row its own blocks. It carries no gradient; attention
over it has exact gradients to the rows it shows.

Causal-safe: with is_causal=True the choice for a query depends on nothing after it. It uses the
first query of a block, since a mean would mix later ones in, and only key blocks that end before
that query; the blocks of the queries themselves are always kept.

B batch, H heads, N queries, M keys, D head_dim, b block_size, C key blocks.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import accumulate_dtype, check_call
from dilated_sparse import _checks
from dilated_sparse._blocks import compress
from dilated_sparse._grid import Grid, make_grid, single_blocks
from dilated_sparse._layout import BlockLayout

__all__ = ["BlockSelection", "threshold_blocks", "top_k_blocks"]

_CHUNK_SCORES = 1 << 22


class BlockSelection(NamedTuple):
    """What `threshold_blocks` chose.

    Shapes: batch B, positions N, heads H.

    Attributes:
        layout: the chosen blocks, with H heads.
        dropped_mass: (H, N), or (B, H, N) of a batch of more than one: upper bounds on the share of
            each query's softmax over all keys that falls on keys which the layout hides.

    Examples:
        >>> q, k = torch.randn(2, 1, 128, 4, 16)
        >>> selection = select.threshold_blocks(q, k, 0.9, block_size=32)
        >>> bool((selection.dropped_mass <= 0.1).all())
        True
    """

    layout: BlockLayout
    dropped_mass: Tensor


@torch.no_grad()
def top_k_blocks(
    query: Tensor,
    key: Tensor,
    count: int,
    *,
    is_causal: bool = False,
    share_heads: bool = False,
    block_size: int = 128,
) -> BlockLayout:
    """For each query block, its own blocks and those of the highest pooled scores, `count` in all.

    The score of a block is the mean of its keys times the mean of the queries (the first query if
    causal), as in the block selection of MoBA (arXiv 2502.13189, section 2.2).

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        query: (B, N, H, D).
        key: (B, M, H_kv, D), H a multiple of H_kv.
        count: blocks in a row, fewer where fewer exist.
        is_causal: the layout is for a causal call, whose queries are the last N of the M positions.
        share_heads: the query heads of a key head choose the same blocks, by the sum of their
            shares, as in NSA (arXiv 2502.11089, section 3.3.2).
        block_size: tokens on a side of a block.

    Raises:
        TypeError: an argument has the wrong type, or query and key differ in dtype.
        ValueError: the batch is empty, heads or lengths do not fit each other, or a number is out
            of range.

    Examples:
        >>> q, k = torch.randn(2, 1, 128, 4, 16)
        >>> layout = select.top_k_blocks(q, k, 2, is_causal=True, block_size=32)
        >>> layout.density() < 0.5
        True
    """
    if len(each := _batch_rows(query, key)) > 1:
        choose = partial(
            top_k_blocks, count=count, is_causal=is_causal, share_heads=share_heads,
            block_size=block_size,
        )  # fmt: skip
        return BlockLayout.stack([choose(*row) for row in each])
    pooled = _Pooled(query, key, block_size, is_causal, None, share_heads=share_heads)
    _checks.integer("count", count)
    chosen = []
    for rows in pooled.chunks():
        scores = pooled.together(pooled.scores(rows, pooled.scale if share_heads else 1.0))
        own = pooled.own(rows).expand_as(scores)
        scores = scores.masked_fill(own, math.inf)
        best = scores.topk(min(count, scores.shape[-1]), -1)
        picked = torch.zeros_like(own, memory_format=torch.contiguous_format)
        picked.scatter_(-1, best.indices, best.values > -math.inf)
        chosen.append(_places(pooled, rows, picked | own))
    return _layout(pooled, chosen)


@torch.no_grad()
def threshold_blocks(
    query: Tensor,
    key: Tensor,
    tau: float,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    share_heads: bool = False,
    block_size: int = 128,
) -> BlockSelection:
    """For each query block, the fewest blocks whose estimated mass reaches the share tau.

    The estimated mass of a block is its number of keys times exp(pooled score), with the pooled
    score of `top_k_blocks`; the query block's own blocks are always kept.

    The bound on the dropped mass holds for every query q, whatever the estimate: a key k of a
    hidden block with mean m and radius r = max |k − m| scores at most q·m + |q| r, and the keys of
    a kept block weigh, by Jensen's inequality, at least as much as if all were m.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        query: (B, N, H, D).
        key: (B, M, H_kv, D), H a multiple of H_kv.
        tau: the share to reach, in (0, 1].
        is_causal: the layout is for a causal call, whose queries are the last N of the M positions.
        share_heads: the query heads of a key head choose the same blocks, by the sum of their
            shares, as in NSA (arXiv 2502.11089, section 3.3.2).
        scale: factor on the scores in the attention; 1 / sqrt(D) when None.
        block_size: tokens on a side of a block.

    Raises:
        TypeError: an argument has the wrong type, or query and key differ in dtype.
        ValueError: the batch is empty, heads or lengths do not fit each other, or a number is out
            of range.

    Examples:
        >>> q, k = torch.randn(2, 1, 128, 4, 16)
        >>> selection = select.threshold_blocks(q, k, 0.9, is_causal=True, block_size=32)
        >>> 0 < selection.layout.density() <= 1
        True
    """
    if len(each := _batch_rows(query, key)) > 1:
        choose = partial(
            threshold_blocks, tau=tau, is_causal=is_causal, scale=scale, share_heads=share_heads,
            block_size=block_size,
        )  # fmt: skip
        chosen_, bounds_ = zip(*(choose(*row) for row in each), strict=True)
        return BlockSelection(BlockLayout.stack(chosen_), torch.stack(bounds_))
    pooled = _Pooled(query, key, block_size, is_causal, scale, share_heads=share_heads)
    _checks.share("tau", tau)
    chosen, bounds = [], []
    for rows in pooled.chunks():
        scores = pooled.together(pooled.scores(rows, pooled.scale) + pooled.counts.log())
        own = pooled.own(rows).expand_as(scores)
        kept = _smallest_set(scores, own, tau)
        chosen.append(_places(pooled, rows, kept))
        bounds.append(_bound(pooled, rows, kept))
    empty = query.new_zeros(query.shape[2], 0, dtype=accumulate_dtype(query.dtype))
    return BlockSelection(_layout(pooled, chosen), torch.cat(bounds, 1) if bounds else empty)


def _batch_rows(query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    check_call(query, key, key, enable_gqa=True)
    if not len(query):
        raise ValueError("query must have a batch of at least 1. Got 0.")
    return list(zip(query.split(1), key.split(1), strict=True))


def _smallest_set(log_mass: Tensor, own: Tensor, tau: float) -> Tensor:
    """Own blocks, and of the others the heaviest until the share tau is reached."""
    order = log_mass.masked_fill(own, math.inf).argsort(-1, descending=True)
    shares = log_mass.softmax(-1).nan_to_num(0.0).gather(-1, order)
    before = shares.cumsum(-1) - shares
    kept = torch.zeros_like(own, memory_format=torch.contiguous_format)
    kept.scatter_(-1, order, (before < tau) & (log_mass.gather(-1, order) > -math.inf))
    return kept | own


def _bound(pooled: "_Pooled", rows: range, kept: Tensor) -> Tensor:
    """(H, n): the bound for each query of these block rows."""
    b, scale = pooled.grid.block_size, pooled.scale
    span = slice(rows.start * b, min(rows.stop * b, pooled.grid.length))
    q = pooled.query[:, span]
    kept = kept.repeat_interleave(b, 1)[:, : q.shape[1]]
    mean = q @ pooled.means.transpose(1, 2) * scale + pooled.counts.log()
    reach = q.norm(dim=-1, keepdim=True) * pooled.radius[:, None] * abs(scale)
    first, last = pooled.first_key, pooled.first_key + pooled.counts - 1
    position = pooled.positions[span, None]
    whole, some = (last <= position, first <= position) if pooled.is_causal else (last >= 0,) * 2
    hidden = (mean + reach).masked_fill(kept | ~some, -math.inf).logsumexp(-1)
    # Of a block that the query sees in part, nothing is surely known but its own key, if there.
    seen = mean.masked_fill(~(kept & whole), -math.inf).logsumexp(-1)
    if pooled.is_causal:
        own_key = pooled.key[:, pooled.positions[span]]
        itself = (q * own_key).sum(-1) * scale
        counted = (kept & whole & (first <= position) & (last >= position)).any(-1)
        seen = torch.where(counted, seen, torch.logaddexp(seen, itself))
    return torch.sigmoid(hidden - seen).nan_to_num(0.0)


class _Pooled:
    """A sequence and the means of its key blocks.

    Attributes:
        query: (H, N, D).
        key: (H, M, D).
        means: (H, C, D).
        radius: (H, C), largest distance of a block's key from their mean.
        counts: (C,), keys in each block.
        alike: how many query heads choose together.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        block_size: int,
        is_causal: bool,
        scale: float | None,
        *,
        share_heads: bool,
    ) -> None:
        asked = check_call(query, key, key, is_causal=is_causal, scale=scale, enable_gqa=True)
        self.is_causal, self.scale = asked.is_causal, asked.scale
        dtype, device = accumulate_dtype(query.dtype), query.device
        self.grid = make_grid(query.shape[1], key.shape[1], block_size, device)
        self.query = query[0].to(dtype).transpose(0, 1)
        repeat = query.shape[2] // key.shape[2]
        self.alike = repeat if _checks.boolean("share_heads", share_heads) else 1
        self.key = key[0].to(dtype).transpose(0, 1).repeat_interleave(repeat, 0)
        self.first_key = torch.arange(self.grid.columns, device=device) * block_size
        self.counts = (self.grid.key_length - self.first_key).clamp(max=block_size).to(dtype)
        start = key.shape[1] - query.shape[1] if is_causal else 0
        self.positions = torch.arange(query.shape[1], device=device) + start
        block = torch.arange(key.shape[1], device=device) // block_size
        shape = (self.key.shape[0], self.grid.columns, self.key.shape[2])
        sums = self.key.new_zeros(shape).index_add_(1, block, self.key)
        self.means = sums / self.counts[:, None]
        distance = (self.key - self.means[:, block]).norm(dim=-1)
        self.radius = self.key.new_zeros(shape[:2]).scatter_reduce_(
            1, block.expand_as(distance), distance, "amax"
        )

    def chunks(self) -> Iterator[range]:
        """Ranges of block rows, small enough for the scores of all their queries."""
        heads, columns, b = self.query.shape[0], self.grid.columns, self.grid.block_size
        size = max(1, _CHUNK_SCORES // max(1, heads * columns * b))
        for start in range(0, self.grid.rows, size):
            yield range(start, min(start + size, self.grid.rows))

    def scores(self, rows: range, scale: float = 1.0) -> Tensor:
        """(H, rows, C): pooled scores times scale; -inf where a causal choice must not look."""
        b = self.grid.block_size
        first = torch.arange(rows.start, rows.stop, device=self.query.device) * b
        if self.is_causal:
            scores = self.query[:, first] @ self.means.transpose(1, 2) * scale
            later = self.first_key + self.counts > self.positions[first, None]
            return scores.masked_fill(later, -math.inf)
        span = self.query[:, rows.start * b : rows.stop * b]
        sizes = (self.grid.length - first).clamp(max=b)
        block = torch.repeat_interleave(torch.arange(len(rows), device=first.device), sizes)
        pooled = span.new_zeros(span.shape[0], len(rows), span.shape[2])
        pooled = pooled.index_add_(1, block, span) / sizes[:, None]
        return pooled @ self.means.transpose(1, 2) * scale

    def together(self, scores: Tensor) -> Tensor:
        """(H, rows, C): of heads that choose together, the logarithm of the sum of their shares."""
        if self.alike == 1:
            return scores
        shares: Tensor = scores.log_softmax(-1).unflatten(0, (-1, self.alike)).logsumexp(1)
        return shares.nan_to_num(-math.inf, neginf=-math.inf).repeat_interleave(self.alike, 0)

    def own(self, rows: range) -> Tensor:
        """(rows, C): the key blocks at the positions of the queries."""
        b = self.grid.block_size
        first = torch.arange(rows.start, rows.stop, device=self.query.device) * b
        start = self.positions[first, None]
        stop = self.positions[(first + b).clamp(max=self.grid.length) - 1, None]
        return (self.first_key <= stop) & (self.first_key + self.counts > start)


def _places(pooled: _Pooled, rows: range, chosen: Tensor) -> Tensor:
    """Chosen blocks (H, rows, C) as numbers that sort by head, row and column."""
    head, row, column = chosen.nonzero().unbind(1)
    grid: Grid = pooled.grid
    return (head * grid.rows + row + rows.start) * grid.columns + column


def _layout(pooled: _Pooled, places: list[Tensor]) -> BlockLayout:
    grid = pooled.grid
    every = torch.cat([*places, grid.arange(0)]).sort().values
    row = torch.div(every, max(1, grid.columns), rounding_mode="floor")
    runs = single_blocks(grid, row, every - row * grid.columns)
    return compress(BlockLayout, grid, runs, pooled.query.shape[0])
