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
    """Where new rows go, each (places,) int64.

    Attributes:
        to: the slot among those of all batch rows, or the last of one for what nothing keeps.
        token: which of the B * L tokens.
        row: which of their rows, of H_kv each.
    """

    to: Tensor
    token: Tensor
    row: Tensor


class Part(NamedTuple):
    """Held rows that one new row sees: the first slots of the streams of an offset.

    Attributes:
        heads, group: of the streams.
        start, slots, streams: where the first begins, how far the next is, how many they are.
        held: rows of each.
        columns: theirs among all that the new row sees.
    """

    heads: slice | Tensor
    group: int
    start: int
    slots: int
    streams: int
    held: int
    columns: slice


class OneRow(NamedTuple):
    """What a new row at a position sees, and where it goes.

    Attributes:
        parts: the held rows.
        width: all of their columns, and the first, which is the row's own.
        to: (places,) int64, its slots.
        kv_heads: (places,) int64, the key head of each.
        log_counts: (H,), in how many branches each head sees this row, as logarithm.
        blind: whether that is none for some.
    """

    parts: list[Part]
    width: int
    to: Tensor
    kv_heads: Tensor
    log_counts: Tensor
    blind: bool


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
        self._recent: tuple[tuple[int, int, int], Places] | None = None
        self._recent_row: tuple[tuple[int, torch.dtype], OneRow] | None = None
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

    def one_row(self, position: int, dtype: torch.dtype) -> OneRow:
        """What a row at a position sees and where it goes; kept for the next layers."""
        kept = None if torch.compiler.is_compiling() else self._recent_row
        if kept is not None and kept[0] == (position, dtype):
            return kept[1]
        parts: list[Part] = []
        width, counts = 1, [0] * self.heads
        places: list[tuple[int, int]] = []
        for branch, streams, _, _ in self.meetings(position, 1):
            slots, slot = branch.slots, position % branch.segment_length // branch.dilation_rate
            start, kv_heads = streams.rows.start, _numbers(streams.kv_heads, self.kv_heads)
            count = len(kv_heads)
            if slot:
                columns = slice(width, width + slot)
                parts.append(Part(streams.heads, streams.group, start, slots, count, slot, columns))
                width = columns.stop
            places += [(start + i * slots + slot, kv) for i, kv in enumerate(kv_heads)]
            for head in set(_numbers(streams.heads, self.heads)):
                counts[head] += 1
        device = self.sizes.device
        to, kv = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        logs = [math.log(count) if count else -math.inf for count in counts]
        log_counts = torch.tensor(logs, dtype=dtype, device=device)
        found = OneRow(parts, width, to, kv, log_counts, not all(counts))
        if not torch.compiler.is_compiling():
            self._recent_row = (position, dtype), found
        return found

    def meetings(
        self, position: int, length: int
    ) -> Iterator[tuple[BranchRows, Streams, int, int]]:
        """The streams of which new rows see slots, with the first such row and where they end."""
        for branch in self.branches:
            w, r = branch.segment_length, branch.dilation_rate
            inside = position % w
            stop = min(length, w - inside)
            for first in range(min(stop, r)):
                # After the turn of a segment offsets would begin anew, but there is none here.
                streams = branch.streams.get((inside + first) % r)
                if streams is not None:
                    yield branch, streams, first, stop

    def places_after(self, position: int, count: int, batch: int) -> "Places":
        """`places` where all batch rows are at one position; kept for the next layers."""
        asked = position, count, batch
        if self._recent is not None and self._recent[0] == asked:
            return self._recent[1]
        old = torch.full((batch, 1), position, device=self.sizes.device)
        places = self.places(old, old + count, count)
        if not torch.compiler.is_compiling():
            self._recent = asked, places
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
        to, row, kv_head = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        before = torch.arange(len(old), device=old.device)[:, None]
        token = before * count + row
        to = before * (self.rows + 1) + to
        return Places(to.flatten(), token.flatten(), (token * self.kv_heads + kv_head).flatten())


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
            return self._attend_row(batch, position, scores, query, key, value)
        call = DilatedCall(self.table.pattern, scores)
        total = _attend_new(call, position, query, key, value)
        queries, out = query.transpose(1, 2), total.out.transpose(1, 2)
        for branch, streams, first, stop in self.table.meetings(position, query.shape[1]):
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

    def _attend_row(
        self, batch: slice, position: int, scores: Scores, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """`attend` of one new row: one softmax over all that it sees, its own key first."""
        dtype = accumulate_dtype(query.dtype)
        plan = self.table.one_row(position, dtype)
        group = query.shape[2] // key.shape[2]
        q, k, v = (x[:, 0].to(dtype) for x in (query, key, value))
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        seen = q.new_full((*q.shape[:2], plan.width), -math.inf)
        own = (q * k).sum(-1) * scores.scale + plan.log_counts
        if scores.key_padding_mask is not None:
            own = own.masked_fill(scores.key_padding_mask, -math.inf)
        seen[:, :, 0] = own
        for part in plan.parts:
            keys = self._rows_of(part, self.key[batch], dtype)
            queries = _take(q, part.heads).unflatten(1, (-1, part.group))
            found = _batched(queries, keys.transpose(2, 3)).mul_(scores.scale)
            if self.padded:
                mask = self.padding[batch, part.start : part.start + part.held]
                found.masked_fill_(mask[:, None, None], -math.inf)
            seen[:, part.heads, part.columns] = found.flatten(1, 2)
        weights = seen.softmax(-1)
        if plan.blind or self.padded or scores.key_padding_mask is not None:
            # A head that sees nothing weighs nothing.
            weights = weights.masked_fill((seen == -math.inf).all(-1, keepdim=True), 0.0)
        out = v.masked_fill((own == -math.inf)[..., None], 0.0) * weights[..., :1]
        for part in plan.parts:
            values = self._rows_of(part, self.value[batch], dtype)
            share = weights[:, part.heads, part.columns]
            found = _batched(share.unflatten(1, (-1, part.group)), values)
            out[:, part.heads] += found.flatten(1, 2)
        return out[:, None]

    def _rows_of(self, part: Part, rows: Tensor, dtype: torch.dtype) -> Tensor:
        size = len(rows), part.streams, part.held, rows.shape[2]
        return _streams_of(rows, part.start, part.slots, size).to(dtype)

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
        plan = self.table.one_row(position, accumulate_dtype(key.dtype))
        to, kv_heads = plan.to, plan.kv_heads
        for mine, new in ((self.key, key), (self.value, value)):
            yield partial(mine.index_copy_, 1, to, new[:, 0].index_select(1, kv_heads))
        if padding is not None:
            yield partial(self.padding.index_copy_, 1, to, padding.expand(-1, len(to)))

    def _writes(
        self, position: int | None, lengths: Tensor | None, key: Tensor, value: Tensor,
        padding: Tensor | None,
    ) -> Iterator[Callable[[], object]]:  # fmt: skip
        if position is not None and lengths is None:
            places = self.table.places_after(position, key.shape[1], len(key))
        else:
            old = self.lengths[:, None]
            new = old + (key.shape[1] if lengths is None else lengths[:, None])
            places = self.table.places(old, new, key.shape[1])
        for mine, new in ((self.key, key), (self.value, value)):
            rows = new.flatten(0, 2).index_select(0, places.row)
            yield partial(mine.view(-1, mine.shape[2]).index_copy_, 0, places.to, rows)
        if padding is not None:
            ignored = padding.flatten().index_select(0, places.token)
            yield partial(self.padding.view(-1).index_copy_, 0, places.to, ignored)


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


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """The product of (B, S, n, k) and (B, S, k, m), without a copy for strides that do not fit."""
    batch, streams = left.shape[:2]
    dim = 0 if 0 < batch < streams else 1
    products = [torch.bmm(*pair) for pair in zip(left.unbind(dim), right.unbind(dim), strict=True)]
    return torch.stack(products, dim) if len(products) > 1 else products[0].unsqueeze(dim)


def _take(x: Tensor, heads: slice | Tensor) -> Tensor:
    """Entries along dimension 1: a view where they are evenly spaced."""
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def _index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """An index of evenly spaced numbers as a slice, which gives a view."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, device=device)


def _numbers(index: slice | Tensor, size: int) -> list[int]:
    """What `_index` was made of."""
    return list(range(size)[index]) if isinstance(index, slice) else index.tolist()
