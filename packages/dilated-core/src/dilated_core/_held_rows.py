"""The rows that a decoding state holds, and attention to them.

Each branch (w, r) has ceil(w / r) slots for every stream, that is, for each offset and each key
head that a query head of this offset reads. A row at position p goes into slot p % w // r of the
streams of offset p % w % r, so where a row lies never depends on how long the context is. One
buffer holds the slots of all streams of all branches, stream after stream, and one row more, to
which rows go that nothing keeps.
B batch, L new rows, H query heads, H_kv key heads, D head_dim, S streams of an offset, R rows.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import _row_attention, _triton
from dilated_core._branches import Branches
from dilated_core._caches import remembered
from dilated_core._call import DilatedCall, Scores
from dilated_core._partial import Partial, accumulate_dtype, merge_
from dilated_core._torch.dense import RowAttention
from dilated_core._torch.engine import attend_wide
from dilated_core._triton import HeldTensors

_KEPT_COUNTS = 256


class Streams(NamedTuple):
    """The streams of one offset of a branch.

    Attributes:
        rows: their slots, stream after stream.
        kv_heads: the key head of each.
        heads: the query heads that read them: `group` for each stream, side by side, where some
            may stand twice.
        group: query heads to a stream.
    """

    rows: range
    kv_heads: slice | Tensor
    heads: slice | Tensor
    group: int


class BranchRows(NamedTuple):
    """Where a branch keeps which rows.

    Attributes:
        segment_length, dilation_rate: of the branch.
        slots: rows of a stream.
        streams: those of each offset that some head has.
        first: (offsets, most streams) int64, the first row of a stream; -1 where there is none.
        kv_heads: (offsets, most streams) int64, the key head of a stream.
    """

    segment_length: int
    dilation_rate: int
    slots: int
    streams: dict[int, Streams]
    first: Tensor
    kv_heads: Tensor


class Places(NamedTuple):
    """Where new rows go, each (B or 1, places) int64.

    Attributes:
        to: the slot, or the last row for those that nothing keeps.
        row: which of the new rows.
        kv_head: its key head.
    """

    to: Tensor
    row: Tensor
    kv_head: Tensor


class RowTable:
    """Where rows go, for a pattern and numbers of heads.

    Attributes:
        pattern: whose streams these are.
        heads, kv_heads: of queries, of keys.
        branches: one for each of the pattern's.
        rows: slots of all streams.
        head_rows: (branches, H) int32, the first row of the stream that a head reads, or -1.
        head_offsets: (branches, H) int32, the offset of a head.
        sizes: (branches, 2) int32, segment length and dilation rate.
    """

    def __init__(self, pattern: Branches, heads: int, kv_heads: int, device: torch.device) -> None:
        self.pattern, self.heads, self.kv_heads = pattern, heads, kv_heads
        self.branches: list[BranchRows] = []
        self._counts: dict[tuple[int, ...], Tensor] = {}
        self._recent: tuple[tuple[int, int], Places] | None = None
        group, self.rows = heads // kv_heads, 0
        head_rows, head_offsets = [], []
        for (w, r), found in zip(pattern.branches, pattern.streams(heads), strict=True):
            slots, streams = -(-w // r), {}
            firsts, offsets = [-1] * heads, [-1] * heads
            table = [[(-1, 0)] * kv_heads for _ in range(min(w, r))]
            for offset, members in found:
                readers: dict[int, list[int]] = {}
                for head in members:
                    readers.setdefault(head // group, []).append(head)
                    firsts[head] = self.rows + (len(readers) - 1) * slots
                    offsets[head] = offset
                for i, kv in enumerate(readers):
                    table[offset][i] = (self.rows + i * slots, kv)
                most = max(map(len, readers.values()))
                every = [h for own in readers.values() for h in own + own[-1:] * (most - len(own))]
                rows = range(self.rows, self.rows + len(readers) * slots)
                streams[offset] = Streams(
                    rows, _index(list(readers), device), _index(every, device), most
                )
                self.rows = rows.stop
            most = max([len(s.rows) // slots for s in streams.values()], default=0)
            both = torch.tensor(table, device=device)[:, :most]
            self.branches.append(BranchRows(w, r, slots, streams, both[..., 0], both[..., 1]))
            head_rows.append(firsts)
            head_offsets.append(offsets)

        def integers(numbers: list[list[int]]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        self.head_rows, self.head_offsets = integers(head_rows), integers(head_offsets)
        self.sizes = integers([list(branch) for branch in pattern.branches])

    def log_counts(self, position: int, dtype: torch.dtype) -> Tensor:
        """(H,): in how many branches each head sees the row of its own position, as logarithm."""
        offsets = tuple([position % b.segment_length % b.dilation_rate for b in self.branches])
        known = self._counts.get(offsets)
        if known is None:
            if len(self._counts) >= _KEPT_COUNTS:
                self._counts.clear()
            at = self.head_offsets.new_tensor(offsets)[:, None]
            known = self._counts[offsets] = (self.head_offsets == at).sum(0).double().log()
        return known.to(dtype)

    def places_after(self, position: int, count: int) -> "Places":
        """`places` where all batch rows are at one position; kept for the next layers."""
        if self._recent is not None and self._recent[0] == (position, count):
            return self._recent[1]
        old = torch.full((1, 1), position, device=self.sizes.device)
        places = self.places(old, old + count, count)
        if not torch.compiler.is_compiling():
            self._recent = (position, count), places
        return places

    def places(self, old: Tensor, new: Tensor, count: int) -> "Places":
        """Where new rows go, of which each batch row has at most `count`.

        Args:
            old: (B, 1) int64, how many positions were seen before.
            new: (B, 1) int64, and after.
            count: the most new rows.
        """
        found = []
        for branch in self.branches:
            w, r = branch.segment_length, branch.dilation_rate
            # Of so many positions no two share a slot.
            at = new - 1 - torch.arange(min(count, w), device=old.device)
            inside = at % w
            kept = (at >= old) & (at - inside == (new - 1) // w * w)
            first = branch.first[inside % r]  # (B, positions, streams)
            there = kept.unsqueeze(-1) & (first >= 0)
            to = torch.where(there, first + (inside // r).unsqueeze(-1), self.rows)
            row = (at - old).clamp_(min=0).unsqueeze(-1).expand(to.shape)
            found.append([x.flatten(1) for x in (to, row, branch.kv_heads[inside % r])])
        return Places(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


@remembered(64)
def row_table(pattern: Branches, heads: int, kv_heads: int, device: torch.device) -> RowTable:
    """The table of a pattern, shared by the layers of a model."""
    with torch.inference_mode(False):
        return RowTable(pattern, heads, kv_heads, device)


class HeldRows:
    """The rows of all streams, (B, R + 1, D), and how many positions each batch row has seen.

    Attributes:
        table: where rows go.
        key, value: the rows.
        padding: (B, R + 1) bool, True = ignore.
        padded: whether any row may be ignored.
        lengths: (B,) int64.
    """

    def __init__(self, pattern: Branches, heads: int, key: Tensor) -> None:
        batch, _, kv_heads, head_dim = key.shape
        self.table = row_table(pattern, heads, kv_heads, key.device)
        shape = (batch, self.table.rows + 1, head_dim)
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            self.key, self.value = (
                torch.zeros(shape, dtype=key.dtype, device=key.device) for _ in "kv"
            )
            self.padding = torch.zeros(shape[:2], dtype=torch.bool, device=key.device)
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=key.device)
        self.padded = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.key, self.value, self.padding, self.lengths

    def check_fits(self, query: Tensor, key: Tensor) -> None:
        """Raise unless new rows are of the shape of those held."""
        if query.shape[2] != self.table.heads:
            raise ValueError(
                f"query must have the cache's {self.table.heads} heads. Got {query.shape[2]}."
            )
        expected = (self.key.shape[0], self.table.kv_heads, self.key.shape[2])
        actual = (key.shape[0], key.shape[2], key.shape[3])
        if actual != expected or key.dtype != self.key.dtype or key.device != self.key.device:
            raise ValueError(
                "key must have the cache's (batch, key heads, head_dim), dtype and device "
                f"{expected}, {self.key.dtype}, {self.key.device}. "
                f"Got {actual}, {key.dtype}, {key.device}."
            )

    def reorder(self, index: Tensor) -> None:
        """Take batch rows; the tensors stay where they are if their number does."""
        with torch.inference_mode(False):
            chosen = [x.index_select(0, index) for x in self.tensors]
        if len(index) == len(self.lengths):
            for mine, new in zip(self.tensors, chosen, strict=True):
                mine.copy_(new)
        else:
            self.key, self.value, self.padding, self.lengths = chosen

    def attend(
        self, batch: slice, position: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attention of new rows, which begin at `position`, to those held and to themselves.

        Args:
            batch: the batch rows that these are.
            position: where each of them is.
            scores: the padding mask is that of the new keys.
            query: (B, L, H, D).
            key: (B, L, H_kv, D), value like it.
            value: see `key`.

        Returns:
            (B, L, H, D), in query's dtype or wider.
        """
        if query.shape[1] == 1:
            total = self._own(position, scores, query, key, value)
        else:
            call = DilatedCall(self.table.pattern, scores)
            total = _attend_new(call, position, query, key, value)
        queries, out = query.transpose(1, 2), total.out.transpose(1, 2)
        for branch, streams, first, stop in self._meetings(position, query.shape[1]):
            w, r, slots = branch[:3]
            held = ((position + first) % w) // r
            if not held:
                continue
            count = len(streams.rows) // slots
            size = (out.shape[0], count, held, self.key.shape[2])
            start = streams.rows.start
            k, v = (_streams_of(x[batch], start, slots, size) for x in (self.key, self.value))
            how = RowAttention(scores.scale, is_causal=False)
            if self.padded:
                how = how._replace(key_mask=self.padding[batch, start : start + held])
            rows = slice(first, stop, r)
            q = _take(queries, streams.heads)[:, :, rows]
            if streams.group > 1:
                q = q.unflatten(1, (count, streams.group)).flatten(2, 3)
            seen = _row_attention.attend(how, q, k, v)
            if streams.group > 1:
                both = (streams.group, len(range(first, stop, r)))
                seen = Partial(*(x.unflatten(2, both).flatten(1, 2) for x in seen))
            at = Partial(
                _take(out, streams.heads)[:, :, rows], _take(total.lse, streams.heads)[:, :, rows]
            )
            merge_(at, seen)
            if isinstance(streams.heads, Tensor):
                out[:, :, rows].index_copy_(1, streams.heads, at.out)
                total.lse[:, :, rows].index_copy_(1, streams.heads, at.lse)
        return total.out

    def _meetings(
        self, position: int, length: int
    ) -> Iterator[tuple[BranchRows, Streams, int, int]]:
        """The streams of which new rows see slots, with the first such row and where they end."""
        for branch in self.table.branches:
            w, r = branch.segment_length, branch.dilation_rate
            inside = position % w
            stop = min(length, w - inside)
            for first in range(min(stop, r)):
                # After the turn of a segment offsets would begin anew, but there is none here.
                streams = branch.streams.get((inside + first) % r)
                if streams is not None:
                    yield branch, streams, first, stop

    def _own(
        self, position: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor
    ) -> Partial:
        """What one new row sees of itself."""
        dtype = accumulate_dtype(query.dtype)
        group = query.shape[2] // key.shape[2]
        q = query.to(dtype)
        k, v = (x.to(dtype) for x in (key, value))
        if group > 1:
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        lse = (q * k).sum(-1) * scores.scale + self.table.log_counts(position, dtype)
        if scores.key_padding_mask is not None:
            lse = lse.masked_fill(scores.key_padding_mask[:, :, None], -math.inf)
        out = v.masked_fill((lse == -math.inf)[..., None], 0.0)
        return Partial(out, lse.transpose(1, 2))

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel of one new row serves these."""
        return _triton.unsupported(self.key, self.key) is None

    def decode(
        self, scores: Scores, real: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Append and attend one new row, wherever each batch row is; arguments as in `attend`."""
        padding = scores.key_padding_mask
        padded = self.padded or padding is not None
        table = self.table
        held = HeldTensors(
            self.key, self.value, self.padding if padded else None, self.lengths, table.head_rows,
            table.head_offsets, table.sizes, max(branch.slots for branch in table.branches),
        )  # fmt: skip
        out = _triton.decode(held, scores.scale, real, query, key, value, padding)
        self.padded = padded
        return out

    def append(
        self, position: int | None, lengths: Tensor | None, key: Tensor, value: Tensor,
        padding: Tensor | None,
    ) -> None:  # fmt: skip
        """Keep those of the new rows that lie in the segment of the last one.

        Where they complete it, no later query sees them; they are for going back.

        Args:
            position: where all batch rows are, if that is known to be one.
            lengths: (B,) int64, how many rows of each are real, or None.
            key: (B, L, H_kv, D), value like it.
            value: see `key`.
            padding: (B, L) bool, True = ignore.
        """
        padded = self.padded or padding is not None
        if padded and padding is None:
            padding = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        if key.shape[1] == 1 and position is not None and lengths is None:
            writes = self._writes_of_one(position, key, value, padding)
        else:
            writes = self._writes(position, lengths, key, value, padding)
        # All that takes memory is done before the first row changes.
        for write in list(writes):
            write()
        self.lengths += key.shape[1] if lengths is None else lengths
        self.padded = padded

    def _writes_of_one(
        self, position: int, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> Iterator[Callable[[], object]]:
        for branch, streams, _, _ in self._meetings(position, 1):
            slot = position % branch.segment_length // branch.dilation_rate
            rows = slice(streams.rows.start + slot, streams.rows.stop, branch.slots)
            for mine, new in ((self.key, key), (self.value, value)):
                yield partial(mine[:, rows].copy_, _take(new[:, 0], streams.kv_heads))
            if padding is not None:
                yield partial(self.padding[:, rows].copy_, padding)

    def _writes(
        self, position: int | None, lengths: Tensor | None, key: Tensor, value: Tensor,
        padding: Tensor | None,
    ) -> Iterator[Callable[[], object]]:  # fmt: skip
        if position is not None and lengths is None:
            places = self.table.places_after(position, key.shape[1])
        else:
            old = self.lengths[:, None]
            new = old + (key.shape[1] if lengths is None else lengths[:, None])
            places = self.table.places(old, new, key.shape[1])
        batch = torch.arange(len(key), device=key.device)[:, None]
        to, row, kv_head = places
        for mine, rows in ((self.key, key), (self.value, value)):
            yield partial(mine.index_put_, (batch, to), rows[batch, row, kv_head])
        if padding is not None:
            ignored = padding[batch, row]
            yield partial(self.padding.index_put_, (batch, to), ignored)


def _attend_new(
    call: DilatedCall, position: int, query: Tensor, key: Tensor, value: Tensor
) -> Partial:
    """Attention of new rows among themselves, which later parts may be merged into."""
    if _triton.unsupported(query, key) is not None:
        return attend_wide(call, query, key, value, start=position)
    part = _triton.attend_span(call, query, key, value, position)
    return part if position == 0 else Partial(part.out.float(), part.lse)


def _streams_of(rows: Tensor, start: int, slots: int, size: tuple[int, ...]) -> Tensor:
    """The first slots of some streams: (B, S, held, D), of rows (B, R, D)."""
    whole, row, unit = rows.stride()
    offset = rows.storage_offset() + start * row
    return rows.as_strided(size, (whole, slots * row, row, unit), offset)


def _take(x: Tensor, heads: slice | Tensor) -> Tensor:
    """Entries along dimension 1: a view where they are evenly spaced."""
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def _index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """An index of evenly spaced numbers as a slice, which gives a view."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, device=device)
