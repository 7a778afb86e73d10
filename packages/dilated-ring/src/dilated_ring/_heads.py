"""The strategy "heads": the ranks of a segment trade rows for heads, and back.

A clique's rows go to the ranks that have their heads, with queries, keys and values in one
message; each rank attends whole segments for its heads and sends the results back. That is all-to-
all sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509) on the rows that a branch keeps.
B batch, n rows of this rank, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import Partial
from dilated_core.extending import (
    Rows,
    accumulate_dtype,
    attend_rows,
    attend_rows_backward,
    keep_mask,
    merge_,
)
from dilated_core.interfaces import BufferSource, Clique, KeyRows, SpanAttention, SpanCall
from dilated_ring._attention import Kept, Upstream
from dilated_ring._exchange import Wire, open_wire
from dilated_ring._routes import Problem
from dilated_ring._topology import Ring


class Entry(NamedTuple):
    """Rows of one head of a clique that travel together.

    Attributes:
        clique: its number.
        head: the query head, or the key head.
        first: the first row of the head in a segment.
        rows: the rows in the shard they come from.
    """

    clique: int
    head: int
    first: int
    rows: range


class Group(NamedTuple):
    """Heads that keep the same rows of a clique; their attention is computed at once.

    Attributes:
        heads: (h,) int64, the query heads.
        positions: (m,) int64, the positions of the rows.
        queries: (h, m) int64, their rows among all queries that arrived.
        keys: (h, m) int64, the rows of their keys among all keys that arrived.
    """

    heads: Tensor
    positions: Tensor
    queries: Tensor
    keys: Tensor


def obstacle(problem: Problem) -> str | None:
    """Why heads cannot be traded, or None if they can."""
    found = problem.pattern.spans.cliques(
        problem.length, problem.shard, problem.heads, is_causal=problem.is_causal
    )
    if found is None:
        return "the parts of the pattern that reach other ranks are not rows that see each other"
    for clique in found[1]:
        ranks = clique.segment // problem.shard
        if problem.kv_heads % ranks:
            return f"{problem.kv_heads} key heads cannot be shared by {ranks} ranks"
    return None


class Trade:
    """Which rows of this rank go where, and which arrive: of all cliques at once."""

    def __init__(self, problem: Problem, rank: int) -> None:
        self.problem, self.rank = problem, rank
        found = problem.pattern.spans.cliques(
            problem.length, problem.shard, problem.heads, is_causal=problem.is_causal
        )
        assert found is not None
        self.local: SpanAttention | None = found[0]
        self.cliques: Sequence[Clique] = found[1]
        ranks = range(problem.world_size)
        self.sent = [self._entries(rank, other) for other in ranks]
        self.received = [self._entries(other, rank) for other in ranks]
        self._made: dict[torch.device, Indices] = {}

    def _entries(self, source: int, target: int) -> tuple[list[Entry], list[Entry]]:
        """The queries, and the keys, that go from a rank to another one, or stay."""
        problem = self.problem
        queries: list[Entry] = []
        keys: dict[Entry, None] = {}
        for number, clique in enumerate(self.cliques):
            size = clique.segment // problem.shard
            if source // size != target // size:
                continue
            segment = source // size * clique.segment
            each = problem.heads // size
            group = problem.heads // problem.kv_heads
            place = target % size
            for head in range(place * each, place * each + each):
                first = clique.first[head]
                if first is not None:
                    rows = _kept(segment + first, clique.step, problem.span(source))
                    queries.append(Entry(number, head, first, rows))
                    keys[Entry(number, head // group, first, rows)] = None
        return queries, list(keys)

    def counts(self, entries: list[tuple[list[Entry], list[Entry]]], kind: int) -> list[int]:
        """Rows for each rank: queries (0) or keys (1)."""
        return [sum(len(entry.rows) for entry in pair[kind]) for pair in entries]

    @cached_property
    def message_rows(self) -> tuple[list[int], list[int]]:
        """Rows of queries, keys and values received from, and sent to, each rank."""
        received, sent = (
            [q + 2 * k for q, k in zip(self.counts(x, 0), self.counts(x, 1), strict=True)]
            for x in (self.received, self.sent)
        )
        return received, sent

    @property
    def vectors(self) -> int:
        """Vectors of head_dim received from other ranks: rows of heads, and results."""
        rows = sum(self.message_rows[0]) - self.message_rows[0][self.rank]
        results = self.counts(self.sent, 0)
        return rows + sum(results) - results[self.rank]

    def on(self, device: torch.device) -> "Indices":
        """The index tensors, made once for each device."""
        if device not in self._made:
            self._made[device] = Indices(self, device)
        return self._made[device]


class Indices:
    """The rows of a trade as tensors on a device."""

    def __init__(self, trade: Trade, device: torch.device) -> None:
        self.trade, self.device = trade, device
        self.sent_queries = self._rows(trade.sent, 0)
        self.sent_keys = self._rows(trade.sent, 1)
        self.order_sent = self._order(trade.sent)
        self.order_received = self._order(trade.received)
        self.cliques = [self._of_clique(0, number) for number in range(len(trade.cliques))]
        self.key_cliques = [self._of_clique(1, number) for number in range(len(trade.cliques))]
        self.groups = list(self._groups())

    def _rows(
        self, pairs: list[tuple[list[Entry], list[Entry]]], kind: int
    ) -> tuple[Tensor, Tensor]:
        """Row and head of each row that is sent."""
        entries = [entry for pair in pairs for entry in pair[kind]]
        row = [torch.tensor(entry.rows, dtype=torch.int64) for entry in entries]
        head = [torch.full((len(entry.rows),), entry.head) for entry in entries]
        return self._cat(row), self._cat(head)

    def _order(self, pairs: list[tuple[list[Entry], list[Entry]]]) -> tuple[Tensor, ...]:
        """Where queries, keys and values are in a message: rank by rank, one kind after another."""
        places: tuple[list[Tensor], ...] = ([], [], [])
        first = 0
        for queries, keys in pairs:
            sizes = [sum(len(entry.rows) for entry in kind) for kind in (queries, keys, keys)]
            for place, size in zip(places, sizes, strict=True):
                place.append(torch.arange(first, first + size))
                first += size
        return tuple(self._cat(place) for place in places)

    def _of_clique(self, kind: int, number: int) -> Tensor:
        """The rows of one clique among all that are sent; no row and head is there twice."""
        mine = [
            torch.full((len(entry.rows),), entry.clique == number)
            for pair in self.trade.sent
            for entry in pair[kind]
        ]
        return self._cat(mine).to(torch.bool).nonzero().squeeze(1)

    def _groups(self) -> Iterator[Group]:
        queries, keys = (self._places(kind) for kind in (0, 1))
        ratio = self.trade.problem.heads // self.trade.problem.kv_heads
        alike: dict[tuple[int, int], list[int]] = {}
        for (number, head, first), place in queries.items():
            if place:
                alike.setdefault((number, first), []).append(head)
        for (number, first), heads in alike.items():
            clique = self.trade.cliques[number]
            start = self.trade.problem.span(self.trade.rank).start
            start = start // clique.segment * clique.segment + first
            rows = [queries[number, head, first] for head in heads]
            positions = range(start, start + len(rows[0]) * clique.step, clique.step)
            read = [keys[number, head // ratio, first] for head in heads]
            columns = heads, list(positions), rows, read
            yield Group(*(torch.tensor(x, device=self.device) for x in columns))

    def _places(self, kind: int) -> dict[tuple[int, int, int], list[int]]:
        """For each head of each clique, its rows among all of a kind that arrived, in order."""
        places: dict[tuple[int, int, int], list[int]] = {}
        arrived = 0
        for pair in self.trade.received:
            for number, head, first, rows in pair[kind]:
                place = places.setdefault((number, head, first), [])
                place += range(arrived, arrived + len(rows))
                arrived += len(rows)
        return places

    def _cat(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return whole.to(self.device)


@dataclass(frozen=True, eq=False)
class HeadsJob:
    """What one call asks of this rank, by trading heads (as `Job`)."""

    call: SpanCall
    ring: Ring
    trade: Trade
    buffers: BufferSource | None
    kind: tuple[str, str]

    def forward(self, query: Tensor, keys: KeyRows) -> tuple[Partial, list[Kept]]:
        """The merged partial of all keys, and what arrived."""
        index = self.trade.on(query.device)
        dtype = accumulate_dtype(query.dtype)
        with open_wire(self, query, keys, "forward") as wire:
            swap = _Swap(wire, self.trade, index)
            arrive = swap.start_rows(query, keys)
            total = self._attend_local(query, keys, dtype)
            rows, padding = arrive()
            out = query.new_empty(len(index.order_received[0]), *_sizes(rows))
            lse = out.new_empty(out.shape[:2], dtype=dtype)
            for group, (q, k, v), how in self._groups(index, rows, padding):
                part = attend_rows(how, q, k, v)
                out[group.queries] = _by_row(part.out.to(out.dtype))
                lse[group.queries] = _by_row(part.lse.unsqueeze(-1)).squeeze(-1)
            wire.call.step = "return of results"
            out, lse = swap.return_queries(out), swap.return_queries(lse)
            row, head = index.sent_queries
            for mine in index.cliques:
                at = (slice(None), row[mine], head[mine])
                there = (slice(None), head[mine], row[mine])
                merged = Partial(total.out[at], total.lse[there])
                merge_(merged, Partial(out[mine].transpose(0, 1), lse[mine].T))
                total.out[at], total.lse[there] = merged
        return total, [Kept(rows, padding)]

    def backward(self, upstream: Upstream, kept: Sequence[Kept]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to this rank's query, key and value, wide."""
        grad_out, grad_lse, query, keys, total = upstream
        dtype = accumulate_dtype(query.dtype)
        index = self.trade.on(query.device)
        ((rows, padding),) = kept
        # What the gradient of a score subtracts; its owner knows it without sending its output.
        delta = (grad_out.to(dtype) * total.out.to(dtype)).sum(-1).transpose(1, 2)
        if grad_lse is not None:
            delta = delta - grad_lse
        with open_wire(self, query, keys, "backward") as wire:
            swap = _Swap(wire, self.trade, index)
            row, head = index.sent_queries
            at = (slice(None), head, row)
            numbers = torch.stack([total.lse[at], delta[at]], -1).transpose(0, 1)
            arrive_grad = swap.start_queries(grad_out[:, row, head].transpose(0, 1))
            arrive_numbers = swap.start_queries(numbers)
            dq, dk, dv = self._local_backward(upstream, dtype)
            grads, numbers = arrive_grad(), arrive_numbers()
            home = wire.leases.empty(tuple(rows.shape), dtype).zero_()
            order = index.order_received
            for group, (q, k, v), how in self._groups(index, rows, padding):
                do, lse, shift = (
                    _by_head(x[group.queries]) for x in (grads, numbers[..., :1], numbers[..., 1:])
                )
                parts = attend_rows_backward(
                    how, do, -shift.squeeze(-1), q, k, v,
                    Partial(torch.zeros_like(do, dtype=dtype), lse.squeeze(-1)),
                )  # fmt: skip
                home[order[0][group.queries]] = _by_row(parts[0]).to(dtype)
                for place, part in zip(order[1:], parts[1:], strict=True):
                    # Query heads of one key head may read the same rows.
                    for j in range(len(group.heads)):
                        home[place[group.keys[j]]] += part[:, j].transpose(0, 1).to(dtype)
            home = swap.return_rows(home)
            q_, k_, v_ = (home[place] for place in index.order_sent)
            for mine in index.cliques:
                dq[:, row[mine], head[mine]] += q_[mine].transpose(0, 1)
            row, head = index.sent_keys
            for mine in index.key_cliques:
                dk[:, row[mine], head[mine]] += k_[mine].transpose(0, 1)
                dv[:, row[mine], head[mine]] += v_[mine].transpose(0, 1)
        return dq, dk, dv

    def _attend_local(self, query: Tensor, keys: KeyRows, dtype: torch.dtype) -> Partial:
        if self.trade.local is not None:
            return self.trade.local.attend_span(self.call, query, keys)
        batch, length, heads, _ = query.shape
        lse = query.new_full((batch, heads, length), -torch.inf, dtype=dtype)
        return Partial(torch.zeros_like(query, dtype=dtype), lse)

    def _local_backward(
        self, upstream: Upstream, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.trade.local is not None:
            return self.trade.local.attend_span_backward(self.call, *upstream)
        key = upstream.keys.key
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (upstream.query, key, key))
        return dq, dk, dv

    def _groups(
        self, index: Indices, rows: Tensor, padding: Tensor | None
    ) -> Iterator[tuple[Group, tuple[Tensor, Tensor, Tensor], Rows]]:
        """Heads to attend at once: their query, key and value (B, h, m, D), and how."""
        for group in index.groups:
            places = group.queries, group.keys, group.keys
            q, k, v = (
                _by_head(rows[order[place]])
                for order, place in zip(index.order_received, places, strict=True)
            )
            mask = None
            if padding is not None:
                mask = padding[group.keys[0]].T.to(torch.bool)
            keep = self._keep(group, q.shape[0]) if self.call.dropout_p else None
            yield (
                group,
                (q, k, v),
                Rows(self.call.scale, self.call.is_causal, mask, keep, self.call.dropout_p),
            )

    def _keep(self, group: Group, batch: int) -> Callable[[range], Tensor]:
        assert self.call.seed is not None
        seed, at = int(self.call.seed), group.positions
        index = torch.arange(batch, device=at.device)[:, None, None, None]

        def keep(rows: range) -> Tensor:
            head = group.heads[:, None, None]
            queries = at[rows.start : rows.stop, None]
            return keep_mask(seed, self.call.dropout_p, index, head, queries, at)

        return keep


class _Swap:
    """The messages of one pass."""

    def __init__(self, wire: Wire, trade: Trade, index: Indices) -> None:
        self._wire, self._trade, self._index = wire, trade, index
        self._queries = trade.counts(trade.received, 0), trade.counts(trade.sent, 0)
        self._keys = trade.counts(trade.received, 1), trade.counts(trade.sent, 1)

    def start_rows(
        self, query: Tensor, keys: KeyRows
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Send queries, keys and values; the function waits for (R, B, D) and the mask of keys."""
        received, sent = self._trade.message_rows
        shape = sum(sent), query.shape[0], query.shape[3]
        message = self._wire.leases.empty(shape, query.dtype)
        row, head = self._index.sent_queries
        order = self._index.order_sent
        message[order[0]] = query[:, row, head].transpose(0, 1)
        row, head = self._index.sent_keys
        message[order[1]] = keys.key[:, row, head].transpose(0, 1)
        message[order[2]] = keys.value[:, row, head].transpose(0, 1)
        rows = self._start(message, received, sent, "trade of rows for heads")
        mask: Callable[[], Tensor | None] = lambda: None  # noqa: E731  # the other is a call
        if keys.padding is not None:
            packed = keys.padding[:, row].T.to(torch.uint8).contiguous()
            mask = self._start(packed, *self._keys, "trade of masks")
        return lambda: (rows(), mask())

    def start_queries(self, rows: Tensor) -> Callable[[], Tensor]:
        """Send something for each query (R, B, ...) to where its head is attended."""
        return self._start(rows.contiguous(), *self._queries, "trade of gradients")

    def return_queries(self, rows: Tensor) -> Tensor:
        """Send something for each query (R, B, ...) back to where it came from."""
        received, sent = self._queries
        return self._start(rows, sent, received, "return of results")()

    def return_rows(self, rows: Tensor) -> Tensor:
        """Send gradients (R, B, D) back to where the rows came from."""
        received, sent = self._trade.message_rows
        return self._start(rows, sent, received, "return of gradients")()

    def _start(
        self, message: Tensor, received: list[int], sent: list[int], step: str
    ) -> Callable[[], Tensor]:
        arrived = message.new_empty(sum(received), *message.shape[1:])
        work = self._wire.swap(arrived, message, received, sent)

        def wait() -> Tensor:
            self._wire.call.step = step
            self._wire.call.wait(work)
            return arrived

        return wait


def _kept(first: int, step: int, span: range) -> range:
    """Rows first, first + step, ... inside a span, as rows of the span."""
    start = first + max(0, -(-(span.start - first) // step)) * step
    return range(min(start, span.stop) - span.start, len(span), step)


def _sizes(rows: Tensor) -> tuple[int, int]:
    return rows.shape[1], rows.shape[2]


def _by_head(rows: Tensor) -> Tensor:
    """(h, m, B, D) to (B, h, m, D)."""
    return rows.permute(2, 0, 1, 3)


def _by_row(heads: Tensor) -> Tensor:
    """(B, h, m, D) to (h, m, B, D)."""
    return heads.permute(1, 2, 0, 3)
