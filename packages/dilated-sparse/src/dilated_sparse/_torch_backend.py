"""The `torch` backend: tiles of dense products on views of the rows, merged by lse.

The keys of a tile are a view where they are one run, else a packed copy as small as the tile. Any
device and dtype; O(nnz) work and O(N) memory.
B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import Gradients, Partial, Upstream, accumulate_dtype, keep_mask, merge_
from dilated_sparse import _masks
from dilated_sparse._call import BlockCall
from dilated_sparse._grid import EMPTY
from dilated_sparse._schedule import Tile, schedule

# Scores of one product over several heads, for each thread: what its cache holds.
_THREAD_SCORES = 3 << 18
# Scores are in units of ln 2: exp2 is faster than exp.
_LN_2 = math.log(2.0)


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

    def of_keys(self, x: Tensor) -> Tensor:
        """(M, H_kv, ...) to the view (M, size, ...) of their key heads."""
        return x[:, self.kv_start : self.kv_start + self.size]


class Place(NamedTuple):
    """One tile of some heads of one sequence of the batch."""

    call: BlockCall
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

    def pack(self, x: Tensor, space: "Workspace") -> Tensor:
        """(M, H_kv, D) to the rows (heads, m, D) of the tile's keys; a view if they are one run."""
        kept = self.heads.of_keys(x)
        runs = [kept[first:last] for first, last in self.tile.runs]
        if len(runs) > 1:
            # Heads stay together: a key is one piece of memory, here and in `x`.
            runs = [torch.cat(runs, out=space(self.tile.columns, *kept.shape[1:]))]
        return runs[0].transpose(0, 1)

    def add_product(
        self, total: Tensor, a: Tensor, b: Tensor, factor: float, space: "Workspace"
    ) -> None:
        """Add factor * a @ b (heads, m, D) to the rows of total (M, H_kv, D) that `pack` takes."""
        kept = self.heads.of_keys(total)
        # Products, then sums: a product that accumulates is run head by head on a CPU.
        _, size, head_dim = kept.shape
        if len(self.tile.runs) > 1:
            part = space(self.tile.columns, size, head_dim)
        else:  # one sum is not worth a slower product
            part = space(size, self.tile.columns, head_dim).transpose(0, 1)
        torch.bmm(a, b, out=part.transpose(0, 1))
        for columns, (first, last) in self.columns():
            kept[first:last].add_(part[columns], alpha=factor)

    def hide(self, scores: Tensor) -> None:
        """Set the scores (heads, n, m) of hidden pairs to -inf."""
        for rows, columns, mask in self.tile.holes:
            part = scores[:, rows, columns]
            if mask == EMPTY:
                part.fill_(-math.inf)
            else:
                part += self.covers(mask)[: part.shape[1], : part.shape[2]]
        if (padding := self.call.scores.key_padding_mask) is not None:
            for columns, run in self.columns():
                hidden = padding[self.batch, slice(*run)]
                scores[:, :, columns].masked_fill_(hidden, -math.inf)

    def keep_factor(self, scores: Tensor) -> Tensor | None:
        """0 where dropout drops a weight and 1 / (1 - p) where it keeps it, or None without it."""
        asked, heads = self.call.scores, self.heads
        if asked.dropout_p == 0:
            return None
        assert asked.seed is not None
        device = scores.device
        head = torch.arange(heads.size, device=device) * heads.step + heads.start
        if self.call.positions is None:
            query = torch.arange(*self.tile.queries, device=device) + self.call.query_start
            key = torch.cat([torch.arange(*run, device=device) for run in self.tile.runs])
        else:
            queries, keys = self.call.positions
            query = queries[slice(*self.tile.queries)]
            key = torch.cat([keys[slice(*run)] for run in self.tile.runs])
        batch = torch.tensor(self.batch, device=device)
        keep = keep_mask(
            int(asked.seed), asked.dropout_p, batch, head[:, None, None], query[:, None], key
        )
        return keep.to(scores.dtype) / (1.0 - asked.dropout_p)


class Workspace:
    """Memory of a call that every tile writes anew: fresh pages would cost as much as a product."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape, in the place of the one before."""
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


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


def forward(call: BlockCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention outside of any operator: out (B, N, H, D) in query's dtype and lse (B, H, N)."""
    dtype = query.dtype
    query, key, value = _prepare(query, key, value)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = empty_lse(query).fill_(-math.inf)
    spaces = [Workspace(query) for _ in range(4)]
    for place in _places(call, query, key.shape[2]):
        i, heads, rows = place.batch, place.heads, place.tile.queries
        part = _attend(place, heads.of(query[i], rows), key[i], value[i], spaces)
        total = Partial(heads.of(out[i], rows), heads.of(lse[i].transpose(0, 1), rows))
        if place.tile.alone:
            total.out.copy_(part.out)
            total.lse.copy_(part.lse)
        else:
            merge_(total, part)
    return Partial(out.to(dtype), lse)


def backward(call: BlockCall, upstream: Upstream) -> Gradients:
    """Gradients to query, key and value, in their dtype."""
    grad_out, grad_lse, query, key, value, total = upstream
    dtype = query.dtype
    query, key, value, grad_out = _prepare(query, key, value, grad_out)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    # exp(score - inf) = 0: a row that sees nothing gives and gets no gradient.
    shifts = total.lse.masked_fill(total.lse == -math.inf, math.inf).div_(_LN_2).transpose(1, 2)
    rows_grad_lse = None if grad_lse is None else grad_lse.transpose(1, 2)
    spaces = [Workspace(query) for _ in range(6)]
    for place in _places(call, query, key.shape[2]):
        i, heads, rows = place.batch, place.heads, place.tile.queries
        q, do, out, shift = (heads.of(x[i], rows) for x in (query, grad_out, total.out, shifts))
        do = spaces[4](*do.shape).copy_(do)
        delta = (do * out).sum(-1, keepdim=True)
        if rows_grad_lse is not None:
            delta -= heads.of(rows_grad_lse[i], rows).unsqueeze(-1)
        grads = heads.of(dq[i], rows), dk[i], dv[i]
        _accumulate(place, q, do, delta, shift.unsqueeze(-1), key[i], value[i], grads, spaces)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _attend(
    place: Place, query: Tensor, key: Tensor, value: Tensor, spaces: Sequence[Workspace]
) -> Partial:
    """The partial of one tile: out (heads, n, D), lse (heads, n)."""
    square, packed, products, scaled = spaces
    query = torch.mul(query, place.call.scores.scale / _LN_2, out=scaled(*query.shape))
    scores = _product(query, place.pack(key, packed).transpose(1, 2), square)
    place.hide(scores)
    shift = scores.amax(-1, keepdim=True)
    shift.masked_fill_(shift == -math.inf, 0.0)
    weights = scores.sub_(shift).exp2_()
    total = weights.sum(-1, keepdim=True)
    if (factor := place.keep_factor(weights)) is not None:
        weights *= factor
    out = _product(weights, place.pack(value, packed), products)
    # A row that sees nothing has total 0 and out 0.
    out /= total.masked_fill(total == 0, 1.0)
    return Partial(out, (total.log2_() + shift).squeeze(-1) * _LN_2)


def _accumulate(
    place: Place,
    query: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    shift: Tensor,
    key: Tensor,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    spaces: Sequence[Workspace],
) -> None:
    """Add one tile's gradients, taken against the merged lse."""
    dq, dk, dv = grads
    square, grad_square, packed, products, _, scaled = spaces
    query = torch.mul(query, place.call.scores.scale / _LN_2, out=scaled(*query.shape))
    grad_scores = _product(grad_out, place.pack(value, packed).transpose(1, 2), grad_square)
    keys = place.pack(key, packed)
    weights = _product(query, keys.transpose(1, 2), square)
    place.hide(weights)
    weights.sub_(shift).exp2_()
    kept = weights
    if (factor := place.keep_factor(weights)) is not None:
        kept = weights * factor
        grad_scores *= factor
    place.add_product(dv, kept.transpose(1, 2), grad_out, 1.0, products)
    grad_scores.sub_(delta).mul_(weights)
    # `query` has the scale, and the 1 / ln 2 of exp2.
    place.add_product(dk, grad_scores.transpose(1, 2), query, _LN_2, products)
    dq.add_(_product(grad_scores, keys, products), alpha=place.call.scores.scale)


def _product(a: Tensor, b: Tensor, space: Workspace) -> Tensor:
    """The products a[i] @ b[i], in a workspace."""
    return torch.bmm(a, b, out=space(a.shape[0], a.shape[1], b.shape[2]))


def _places(call: BlockCall, query: Tensor, kv_heads: int) -> Iterator[Place]:
    batch, _, heads, _ = query.shape
    repeat = heads // kv_heads
    tiled = schedule(call.layout, call.scores.is_causal)
    covers = Covers(tiled.table, query)
    for head, tiles in enumerate(tiled.tiles):
        for tile in tiles:
            if call.layout.heads > 1 or heads == 1:
                groups = [Heads(head, 1, 1, head // repeat)]
            else:
                # Query heads that read different key heads share a product.
                scores = (tile.queries[1] - tile.queries[0]) * tile.columns
                threads = torch.get_num_threads()
                most = max(1, _THREAD_SCORES * threads // scores)
                # As many heads for each thread, where they are enough.
                most -= most % threads if most > threads else 0
                count = -(-kv_heads // most)
                cuts = [i * kv_heads // count for i in range(count + 1)]
                groups = [
                    Heads(first * repeat + j, repeat, last - first, first)
                    for j in range(repeat)
                    for first, last in pairwise(cuts)
                ]
            for i in range(batch):
                for group in groups:
                    yield Place(call, i, group, tile, covers)


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
