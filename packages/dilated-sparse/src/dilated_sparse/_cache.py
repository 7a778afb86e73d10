"""Decoding state of a block layout: the keys and values that later queries can still see.

B batch, L new rows, H query heads, H_kv key heads, D head_dim, S slots, b block_size.
"""

import math
from collections.abc import Callable
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from dilated_core.extending import Scores, accumulate_dtype, check_call, check_lengths, uncompiled
from dilated_sparse import _checks, _masks
from dilated_sparse._attend import attend
from dilated_sparse._grid import FULL
from dilated_sparse._layout import BlockLayout

_BLOCKS_AT_ONCE = 1 << 16


class BlockSparseKVCache:
    """Keys and values that later queries of one block-sparse attention layer can still see.

    A row is held until the last query that sees it is past, so memory goes with what the layout
    still shows: two windows, not the context. It is taken at the first call, for the position at
    which most rows are held. Decoding token by token, in chunks, or a prompt at once all equal the
    full causal forward by `layout.at(length)`. No gradients: use it under torch.no_grad().

    Shapes: batch B.

    Args:
        layout: which keys a query sees.
        length: positions there may be at most; the layout's when None.

    Raises:
        TypeError: layout is no BlockLayout, or length no int.
        ValueError: the layout has not as many queries as keys, differs by batch row, is in an order
            of its own, or cannot go on to `length`.

    Examples:
        >>> layout = layouts.sliding_window(128, 16)
        >>> q, k, v = torch.randn(3, 1, 40, 4, 16)
        >>> cache = BlockSparseKVCache(layout, length=128)
        >>> prompt = cache.attend(q[:, :39], k[:, :39], v[:, :39])
        >>> cache.attend(q[:, 39:], k[:, 39:], v[:, 39:]).shape
        torch.Size([1, 1, 4, 16])
    """

    can_be_captured = False
    _values: Tensor
    _padded: Tensor
    _positions: Tensor

    def __init__(self, layout: BlockLayout, length: int | None = None) -> None:
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout. Got {type(layout).__name__}.")
        if not layout.can_decode:
            raise ValueError(
                "layout must be one for all batch rows, of as many queries as keys, in the order "
                f"of the sequence. Got {layout!r}."
            )
        length = layout.length if length is None else _checks.integer("length", length, low=0)
        self.source, self.layout = layout, layout.at(length).causal()
        self._last = _last_queries(self.layout)
        self._slots = _most_held(self._last)
        self._lengths: list[int] = []
        self._keys: Tensor | None = None

    def __repr__(self) -> str:
        return f"BlockSparseKVCache({self.layout!r}, length={self.length}, nbytes={self.nbytes})"

    @property
    def length(self) -> int:
        """Positions seen so far, of the batch row that has seen most."""
        return max(self._lengths, default=0)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, positions that each batch row has seen; (0,) before the first call."""
        device = None if self._keys is None else self._keys.device
        return torch.tensor(self._lengths, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held: 0 before the first call, then constant."""
        return sum(x.nbytes for x in self._held() or ())

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of the next rows: (count,) int64, or (B, count) where batch rows differ."""
        steps = torch.arange(count, device=device)
        if len(set(self._lengths)) < 2:
            return steps + self.length
        return self.lengths.to(device)[:, None] + steps

    @uncompiled  # what a query sees is read from the layout and from held rows: no graph has it
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Append the next rows and attend them causally to all rows so far.

        Arguments and result are those of `dilated_core.DilatedKVCache.attend`; with ``lengths`` on
        a GPU the host waits.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was; also where
                the rows go on behind the cache's last position.
            RuntimeError: an input requires gradients.
        """
        scores = check_call(
            query, key, value, scale=scale, key_padding_mask=key_padding_mask, enable_gqa=True
        )
        batch, count = query.shape[:2]
        if count != key.shape[1]:
            raise ValueError(f"key must have query's length {count}. Got {key.shape[1]}.")
        if self.layout.heads not in (1, query.shape[2]):
            raise ValueError(
                f"layout must have 1 head or query's {query.shape[2]}. Got {self.layout.heads}."
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise RuntimeError(
                "a BlockSparseKVCache gives no gradients: use torch.no_grad() or inference_mode()."
            )
        counts = [count] * batch
        if lengths is not None:
            check_lengths("lengths", lengths, query.shape[:2], query.device)
            counts = lengths.clamp(0, count).tolist()
        self._check_fits(key)
        before = self._lengths or [0] * batch
        after = [n + more for n, more in zip(before, counts, strict=True)]
        if max(after, default=0) > self.layout.length:
            raise ValueError(
                f"key must end within the cache's {self.layout.length} positions. "
                f"Got an end at {max(after)}."
            )
        is_first = self._keys is None
        if is_first:
            self._take_memory(key)
        try:
            out = self._attend_all(counts, before, scores, query, key, value)
            self._append(before, after, key, value, key_padding_mask)
        except BaseException:
            if is_first:
                self._keys = None
            raise
        self._lengths = after
        return out

    def reorder(self, index: Tensor) -> None:
        """Take batch rows `index` (B',) int64, as beam search does; B' may differ from B."""
        if self._keys is None:
            return
        self._lengths = [self._lengths[i] for i in index.tolist()]
        self._keys, self._values = self._keys[index], self._values[index]
        self._padded, self._positions = self._padded[index], self._positions[index]

    def truncate(self, length: int | Tensor) -> None:
        """Forget the positions from `length` on.

        Args:
            length: one for all batch rows, of which shorter ones stay as they are, or (B,) int64.

        Raises:
            TypeError: `length` is neither an int nor an int64 tensor.
            ValueError: `length` is negative, above the current length, or queries from there on
                see rows that are no longer held.
        """
        if isinstance(length, Tensor):
            check_lengths("length", length, (len(self._lengths), None), length.device)
            given, most = length.tolist(), self._lengths
        else:
            given = [_checks.integer("length", length, low=0)] * max(1, len(self._lengths))
            most = [self.length] * len(given)
        for i, (number, limit) in enumerate(zip(given, most, strict=True)):
            if not 0 <= number <= limit:
                raise ValueError(f"length must be between 0 and {limit}. Got {number}.")
            if self._keys is None or number >= self._lengths[i]:
                continue
            missing = self._last[:number] >= number
            held = self._positions[i]
            missing[held[(held >= 0) & (held < number)]] = False
            if missing.any():
                raise ValueError(
                    "length must leave rows that are held. "
                    f"Got {number}, from where position {int(missing.nonzero()[0])} is seen."
                )
        if self._keys is not None:
            self._lengths = list(map(min, given, self._lengths))
            self._positions.masked_fill_(self._positions >= self.lengths[:, None], -1)

    def reset(self) -> None:
        """Forget everything, and keep the memory for the next sequence of the same shape."""
        self._lengths = [0] * len(self._lengths)
        if self._keys is not None:
            self._positions.fill_(-1)

    def bookmark(self, count: int) -> Callable[[], None]:
        """What brings the cache back to where it is now, for calls over several layers that fail.

        Args:
            count: rows that are appended meanwhile; whatever it is, all that is held is copied.
        """
        lengths, held = self._lengths, self._held()
        kept = None if held is None else [x.clone() for x in held]

        def back() -> None:
            self._lengths = lengths
            if kept is None:
                self._keys = None
            else:
                self._keys, self._values, self._padded, self._positions = kept

        return back

    def _held(self) -> tuple[Tensor, ...] | None:
        if self._keys is None:
            return None
        return self._keys, self._values, self._padded, self._positions

    def _check_fits(self, key: Tensor) -> None:
        if self._keys is None:
            return
        kept, new = ((x.shape[0], *x.shape[2:], x.dtype, x.device) for x in (self._keys, key))
        if kept != new:
            raise ValueError(
                "key must have the batch, heads, head_dim, dtype and device of the rows held "
                f"{kept}. Got {new}."
            )

    def _take_memory(self, key: Tensor) -> None:
        self.layout, device = self.layout.to(key.device), key.device
        self._last = self._last.to(device)
        # One slot more, to which rows go that nothing keeps.
        self._keys = key.new_zeros(len(key), self._slots + 1, *key.shape[2:])
        self._values = torch.zeros_like(self._keys)
        self._padded = torch.zeros(self._keys.shape[:2], dtype=torch.bool, device=device)
        self._positions = torch.full(self._keys.shape[:2], -1, device=device)
        runs = self.layout.runs
        self._starts = runs.row * self.layout.grid.columns + runs.column
        self._stops, self._masks = self._starts + runs.count, runs.mask
        self._table = torch.nn.functional.pad(runs.table, (0, 0, 0, 0, 0, 1))

    def _sees(self, position: int, keys: Tensor) -> Tensor:
        """Which heads (1 or H, ...) of the query at a position see the keys at others (...)."""
        layout, b = self.layout, self.layout.block_size
        head = torch.arange(layout.heads, device=keys.device).reshape(-1, *(1,) * keys.ndim)
        row = head * layout.grid.rows + position // b
        place = row * layout.grid.columns + keys.clamp(min=0) // b
        run = torch.searchsorted(self._starts, place, right=True) - 1
        if not len(self._starts):
            return torch.zeros_like(place, dtype=torch.bool)
        inside = (run >= 0) & (place < self._stops[run.clamp(min=0)])
        mask, inner = self._masks[run.clamp(min=0)], keys.clamp(min=0) % b
        byte = self._table[mask.clamp(min=0), position % b, inner // 8]
        shown: Tensor = (mask == FULL) | ((byte >> (inner % 8)) & 1 == 1)
        return shown & inside & (keys >= 0)

    def _attend(
        self, rows: slice, position: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        assert self._keys is not None
        count, new_padding = query.shape[1], scores.key_padding_mask
        if position and count == 1:
            return self._step(rows, position, scores, query, key, value)
        if position:
            # What is no longer held is not seen: zeros stand for it.
            to = self._positions[rows]
            to = torch.where(to >= 0, to, position + count)
            size = position + count + 1
            batch = torch.arange(len(to), device=to.device)[:, None]
            wide = [x.new_zeros(len(x), size, *x.shape[2:]) for x in (key, value)]
            for x, held, new in zip(wide, (self._keys, self._values), (key, value), strict=True):
                x[batch, to] = held[rows]
                x[:, position:-1] = new
            padding = torch.zeros(len(to), size, dtype=torch.bool, device=to.device)
            padding[batch, to] = self._padded[rows]
            padding[:, position:] = False
            if new_padding is not None:
                padding[:, position:-1] = new_padding
            key, value, new_padding = wide[0][:, :-1], wide[1][:, :-1], padding[:, :-1]
        out = attend(
            self.layout.at(count, position + count), query, key, value, scale=scores.scale,
            key_padding_mask=new_padding, enable_gqa=True,
        )  # fmt: skip
        return cast(Tensor, out)

    def _attend_all(
        self,
        counts: list[int],
        before: list[int],
        scores: Scores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        out, start = torch.zeros_like(query), 0
        # Batch rows side by side that are at one position go together.
        for (position, real), alike in groupby(zip(before, counts, strict=True)):
            rows = slice(start, start + len(list(alike)))
            start = rows.stop
            if real:
                mask = scores.key_padding_mask
                how = (
                    scores if mask is None else scores._replace(key_padding_mask=mask[rows, :real])
                )
                parts = [x[rows, :real] for x in (query, key, value)]
                out[rows, :real] = self._attend(rows, position, how, *parts)
        return out

    def _step(
        self, rows: slice, position: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """One query to the held rows that it sees, and to its own."""
        assert self._keys is not None
        held = self._positions[rows]
        seen = self._sees(position, held)
        some = seen.any(0)
        most = int(some.sum(1).max())
        slot = some.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        index = slot[..., None, None].expand(-1, -1, *key.shape[2:])
        key, value = (
            torch.cat([kept[rows].gather(1, index), new], 1).to(accumulate_dtype(query.dtype))
            for kept, new in ((self._keys, key), (self._values, value))
        )
        own = self._sees(position, torch.full((len(query), 1), position, device=query.device))
        hidden = ~torch.cat([seen.gather(2, slot.expand(len(seen), -1, -1)), own], 2)
        padding = self._padded[rows].gather(1, slot)
        new = scores.key_padding_mask
        new = padding.new_zeros(len(padding), 1) if new is None else new
        hidden = (hidden | torch.cat([padding, new], 1)).transpose(0, 1)
        q = query[:, 0].to(key.dtype).unflatten(1, (key.shape[2], -1))
        weights = torch.einsum("bkrd,bmkd->bkrm", q, key).flatten(1, 2) * scores.scale
        weights = weights.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
        weights = weights.unflatten(1, (key.shape[2], -1))
        out = torch.einsum("bkrm,bmkd->bkrd", weights, value).flatten(1, 2)
        return out[:, None].to(query.dtype)

    def _append(
        self,
        before: list[int],
        after: list[int],
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
    ) -> None:
        assert self._keys is not None
        device, positions = key.device, self._positions
        first, end = (torch.tensor(x, device=device)[:, None] for x in (before, after))
        new = first + torch.arange(key.shape[1], device=device)
        # Nothing of the cache changes before all that may fail is done.
        positions = torch.where(self._last[positions.clamp(min=0)] < end, -1, positions)
        last = self._last[new.clamp(max=len(self._last) - 1)]
        wanted = (new < end) & (last >= end)
        free = (positions[:, :-1] >= 0).to(torch.int8).argsort(dim=1, stable=True)
        free = torch.nn.functional.pad(free, (0, 1), value=self._slots)
        rank = (wanted.cumsum(1) - 1).clamp(0, self._slots)
        slot = torch.where(wanted, free.gather(1, rank), self._slots)
        padding = torch.zeros_like(wanted) if padding is None else padding
        index = slot[..., None, None].expand_as(key)
        self._keys.scatter_(1, index, key)
        self._values.scatter_(1, index, value)
        self._padded.scatter_(1, slot, padding)
        self._positions.copy_(positions.scatter_(1, slot, new))
        self._positions[:, -1] = -1


def _last_queries(layout: BlockLayout) -> Tensor:
    """(M + 1,) int64: the last query of any head that sees each key, or -1; -1 at the end."""
    b, blocks = layout.block_size, layout.blocks
    rows = max(1, layout.grid.rows)
    step = torch.arange(b, device=layout.device)
    inner = torch.where(_masks.unpack(layout.table), step[:, None], -1).amax(1)
    # One entry more at the end, for full blocks.
    inner = torch.cat([inner, inner.new_full((1, b), b - 1)])
    last = inner.new_full((layout.grid.columns * b + 1,), -1)
    for part in torch.arange(len(blocks.row), device=layout.device).split(_BLOCKS_AT_ONCE):
        row, column, look = blocks.row[part] % rows, blocks.column[part], inner[blocks.mask[part]]
        query = torch.where(look >= 0, row[:, None] * b + look, -1)
        last.scatter_reduce_(0, (column[:, None] * b + step).flatten(), query.flatten(), "amax")
    last = last.clamp(max=layout.length - 1)[: layout.key_length + 1]
    last[-1] = -1
    return last


def _most_held(last: Tensor) -> int:
    """Most rows that any position leaves for later ones: row j from j + 1 to last[j]."""
    position = torch.arange(len(last), device=last.device)
    kept = last > position
    change = torch.zeros(len(last) + 1, dtype=torch.int64, device=last.device)
    change.index_add_(0, position[kept] + 1, torch.ones_like(position[kept]))
    change.index_add_(0, last[kept] + 1, -torch.ones_like(position[kept]))
    return int(change.cumsum(0).max())
