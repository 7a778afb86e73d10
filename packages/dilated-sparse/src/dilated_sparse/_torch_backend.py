"""The `torch` backend: tiles of dense products on views of the rows, merged by lse.

The keys of a tile are a view where they are one run, else a packed copy as small as the tile. Any
device and dtype; O(nnz) work and O(N) memory.
B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import Partial, accumulate_dtype, keep_mask, merge_
from dilated_sparse import _masks
from dilated_sparse._grid import EMPTY
from dilated_sparse._options import Options
from dilated_sparse._schedule import MAX_SCORES, Tile, schedule


class Heads(NamedTuple):
    """Heads that one product serves: `size` of them, in steps."""

    start: int
    step: int
    size: int
    kv_start: int

    def of(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        """(N, H, ...) to the view (size, rows, ...) of these query heads."""
        stop = self.start + self.step * (self.size - 1) + 1
        return x[rows[0] : rows[1], self.start : stop : self.step].transpose(0, 1)

    def of_keys(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        """(M, H_kv, ...) to the view (size, rows, ...) of their key heads."""
        kept = x[rows[0] : rows[1], self.kv_start : self.kv_start + self.size]
        return kept.transpose(0, 1)


class Place(NamedTuple):
    """One tile of some heads of one sequence of the batch."""

    options: Options
    batch: int
    heads: Heads
    tile: Tile
    covers: "Covers"

    def columns(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """The columns of each run of keys in the tile's scores, and the run."""
        start = 0
        for run in self.tile.runs:
            stop = start + run[1] - run[0]
            yield slice(start, stop), run
            start = stop

    def pack(self, x: Tensor) -> Tensor:
        """(M, H_kv, D) to the rows (heads, m, D) of the tile's keys; a view if they are one run."""
        runs = [self.heads.of_keys(x, run) for run in self.tile.runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs, 1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add (heads, m, D) to the rows of total (M, H_kv, D) that `pack` would take."""
        for columns, run in self.columns():
            view = self.heads.of_keys(total, run)
            view += part[:, columns]

    def hide(self, scores: Tensor) -> None:
        """Set the scores (heads, n, m) of hidden pairs to -inf."""
        for rows, columns, mask in self.tile.holes:
            part = scores[:, rows, columns]
            if mask == EMPTY:
                part.fill_(-math.inf)
            else:
                part += self.covers(mask)[: part.shape[1], : part.shape[2]]
        if self.options.key_padding_mask is not None:
            for columns, run in self.columns():
                padding = self.options.key_padding_mask[self.batch, slice(*run)]
                scores[:, :, columns].masked_fill_(padding, -math.inf)

    def keep_factor(self, scores: Tensor) -> Tensor | None:
        """0 where dropout drops a weight and 1 / (1 - p) where it keeps it, or None without it."""
        options, heads = self.options, self.heads
        if options.dropout_p == 0:
            return None
        assert options.seed is not None
        device = scores.device
        head = torch.arange(heads.size, device=device) * heads.step + heads.start
        query = torch.arange(*self.tile.queries, device=device) + options.query_start
        key = torch.cat([torch.arange(*run, device=device) for run in self.tile.runs])
        batch = torch.tensor(self.batch, device=device)
        keep = keep_mask(
            int(options.seed), options.dropout_p, batch, head[:, None, None], query[:, None], key
        )
        return keep.to(scores.dtype) / (1.0 - options.dropout_p)


class Covers:
    """The masks of partial blocks in the form that adds to scores: 0 where visible, else -inf."""

    # Layouts that repeat their masks have few; the others pay for unpacking.
    _KEPT = 64

    def __init__(self, table: Tensor, query: Tensor) -> None:
        self._table, self._like = table, query
        self._made: dict[int, Tensor] = {}

    def __call__(self, mask: int) -> Tensor:
        if mask not in self._made:
            if len(self._made) == self._KEPT:
                self._made.clear()
            seen = _masks.unpack(self._table[mask : mask + 1])[0].to(self._like.device)
            zeros = self._like.new_zeros(seen.shape)
            self._made[mask] = zeros.masked_fill_(~seen, -math.inf)
        return self._made[mask]


def forward(options: Options, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention outside of any operator: out (B, N, H, D) in query's dtype and lse (B, H, N)."""
    dtype = query.dtype
    query, key, value = _prepare(query, key, value)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = empty_lse(query).fill_(-math.inf)
    for place in _places(options, query, key.shape[2]):
        i, heads, rows = place.batch, place.heads, place.tile.queries
        part = _attend(place, heads.of(query[i], rows), key[i], value[i])
        total = Partial(heads.of(out[i], rows), heads.of(lse[i].transpose(0, 1), rows))
        if place.tile.alone:
            total.out.copy_(part.out)
            total.lse.copy_(part.lse)
        else:
            merge_(total, part)
    return Partial(out.to(dtype), lse)


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
    dtype = query.dtype
    query, key, value, grad_out = _prepare(query, key, value, grad_out)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    # (B, N, H): what the gradient of a score subtracts, and the shift of the softmax, where
    # exp(score - inf) = 0: a row that sees nothing gives and gets no gradient.
    delta = (grad_out * total.out).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.transpose(1, 2)
    shift = total.lse.masked_fill(total.lse == -math.inf, math.inf).transpose(1, 2)
    for place in _places(options, query, key.shape[2]):
        i, heads, rows = place.batch, place.heads, place.tile.queries
        q, do, dq_ = (heads.of(x[i], rows) for x in (query, grad_out, dq))
        delta_, shift_ = (heads.of(x[i], rows).unsqueeze(-1) for x in (delta, shift))
        _accumulate(place, q, do, delta_, shift_, key[i], value[i], (dq_, dk[i], dv[i]))
    dq *= options.scale
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _attend(place: Place, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """The partial of one tile: out (heads, n, D), lse (heads, n)."""
    scores = torch.bmm(query * place.options.scale, place.pack(key).transpose(1, 2))
    place.hide(scores)
    shift = scores.amax(-1, keepdim=True)
    shift.masked_fill_(shift == -math.inf, 0.0)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if (factor := place.keep_factor(weights)) is not None:
        weights *= factor
    out = torch.bmm(weights, place.pack(value))
    # A row that sees nothing has total 0 and out 0.
    out /= total.masked_fill(total == 0, 1.0)
    return Partial(out, (total.log_() + shift).squeeze(-1))


def _accumulate(
    place: Place,
    query: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    shift: Tensor,
    key: Tensor,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add one tile's gradients, taken against the merged lse; that to query lacks the scale."""
    dq, dk, dv = grads
    scaled, grad_out = query * place.options.scale, grad_out.contiguous()
    keys = place.pack(key)
    # Products, then sums: a product that accumulates is run head by head on a CPU.
    weights = torch.bmm(scaled, keys.transpose(1, 2))
    place.hide(weights)
    weights.sub_(shift).exp_()
    grad_scores = torch.bmm(grad_out, place.pack(value).transpose(1, 2))
    kept = weights
    if (factor := place.keep_factor(weights)) is not None:
        kept = weights * factor
        grad_scores *= factor
    grad_scores.sub_(delta).mul_(weights)
    place.add(dv, torch.bmm(kept.transpose(1, 2), grad_out))
    place.add(dk, torch.bmm(grad_scores.transpose(1, 2), scaled))
    dq += torch.bmm(grad_scores, keys)


def _places(options: Options, query: Tensor, kv_heads: int) -> Iterator[Place]:
    batch, _, heads, _ = query.shape
    repeat = heads // kv_heads
    tiled = schedule(options.layout, options.is_causal)
    covers = Covers(tiled.table, query)
    for head, tiles in enumerate(tiled.tiles):
        for tile in tiles:
            scores = (tile.queries[1] - tile.queries[0]) * tile.columns
            size = max(1, MAX_SCORES // scores)
            if options.layout.heads > 1 or heads == 1:
                groups = [Heads(head, 1, 1, head // repeat)]
            else:
                # Query heads that read different key heads share a product.
                groups = [
                    Heads(first * repeat + j, repeat, min(size, kv_heads - first), first)
                    for j in range(repeat)
                    for first in range(0, kv_heads, size)
                ]
            for i in range(batch):
                for group in groups:
                    yield Place(options, i, group, tile, covers)


def _prepare(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Wide enough to accumulate in, with rows of unit stride."""
    return tuple(
        (x if x.stride(-1) == 1 else x.contiguous()).to(accumulate_dtype(x.dtype)) for x in tensors
    )


def empty_lse(query: Tensor) -> Tensor:
    """(B, H, N) for a query (B, N, H, D), uninitialised."""
    batch, length, heads, _ = query.shape
    dtype = accumulate_dtype(query.dtype)
    return torch.empty((batch, heads, length), dtype=dtype, device=query.device)
