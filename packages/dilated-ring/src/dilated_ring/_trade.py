"""Which rows the ranks of a segment trade for heads, and back: pure integers until `Indices`."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import remembered
from dilated_core.interfaces import Clique, SpanAttention
from dilated_ring._routes import Problem


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


class HeadGroup(NamedTuple):
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


@remembered(64)
def make_trade(problem: Problem, rank: int) -> Trade:
    """The trade of a rank, made once."""
    return Trade(problem, rank)


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

    def _groups(self) -> Iterator[HeadGroup]:
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
            yield HeadGroup(*(torch.tensor(x, device=self.device) for x in columns))

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


def _kept(first: int, step: int, span: range) -> range:
    """Rows first, first + step, ... inside a span, as rows of the span."""
    start = first + max(0, -(-(span.start - first) // step)) * step
    return range(min(start, span.stop) - span.start, len(span), step)
