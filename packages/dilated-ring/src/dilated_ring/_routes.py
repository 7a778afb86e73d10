"""Which rows go where: made alike on all ranks from what the ranks agree on.

n rows of a shard, P ranks. Rank p has the rows from p * n up to (p + 1) * n.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dilated_core.extending import remembered
from dilated_core.interfaces import AttentionPattern, PackedRows


@dataclass(frozen=True)
class Problem:
    """What the routes of a call depend on.

    Attributes:
        pattern: which keys each query sees.
        shard: rows of each rank, n.
        world_size: ranks, P.
        heads: query heads H.
        kv_heads: key heads H_kv.
        is_causal: whether the keys after each query are hidden.
    """

    pattern: AttentionPattern
    shard: int
    world_size: int
    heads: int
    kv_heads: int
    is_causal: bool

    @property
    def length(self) -> int:
        """Rows of the whole sequence."""
        return self.shard * self.world_size

    def span(self, first: int, last: int | None = None) -> range:
        """The positions of a rank, or of all from a first to a last one."""
        last = first if last is None else last
        return range(first * self.shard, (last + 1) * self.shard)

    def rows(self, queries: range, source: int) -> PackedRows:
        """The rows of a rank that a span of queries sees."""
        return self.pattern.spans.packed_rows(
            queries, self.span(source), self.heads, self.kv_heads, is_causal=self.is_causal
        )

    def seen(self, rank: int) -> list[range]:
        """The ranks some of whose rows a rank may see, it too."""
        if not self.shard:
            return []
        visible = self.pattern.spans.visible_keys(
            self.span(rank), self.length, is_causal=self.is_causal
        )
        return [range(keys.start // self.shard, -(-keys.stop // self.shard)) for keys in visible]

    def sources(self, rank: int) -> set[int]:
        """The other ranks some of whose rows a rank may see."""
        return {source for found in self.seen(rank) for source in found} - {rank}


@dataclass(frozen=True, eq=False)
class Route:
    """One exchange of packed rows, as one rank takes part in it.

    Attributes:
        sources: the ranks that send to this one, rising.
        received: what each of them sends.
        destinations: the ranks that this one sends to, rising.
        sent: what it sends to each.
    """

    sources: tuple[int, ...]
    received: tuple[PackedRows, ...]
    destinations: tuple[int, ...]
    sent: tuple[PackedRows, ...]

    @property
    def rows_received(self) -> int:
        """How many packed rows arrive."""
        return sum(rows.count for rows in self.received)

    @property
    def rows_sent(self) -> int:
        """How many packed rows leave."""
        return sum(rows.count for rows in self.sent)

    def splits(self, world_size: int) -> tuple[list[int], list[int]]:
        """Rows received from, and sent to, each rank."""
        received, sent = [0] * world_size, [0] * world_size
        for rank, rows in zip(self.sources, self.received, strict=True):
            received[rank] = rows.count
        for rank, rows in zip(self.destinations, self.sent, strict=True):
            sent[rank] = rows.count
        return received, sent


@remembered(64)
def gather_routes(problem: Problem, rank: int) -> tuple[Route, ...]:
    """All rows in one exchange, or none where no rank needs any."""
    found = hops(problem)
    return (_route(problem, rank, found),) if found else ()


@remembered(64)
def ring_routes(problem: Problem, rank: int) -> tuple[Route, ...]:
    """One exchange for each distance between ranks, nearest first, but for those no rank needs."""
    return tuple(_route(problem, rank, [hop]) for hop in hops(problem))


def row_counts(problem: Problem, rank: int) -> tuple[list[int], list[int]] | None:
    """How many packed rows a rank receives from each rank, and how many it sends to each.

    None where the pattern cannot count them without making them.
    """
    count = getattr(problem.pattern.spans, "packed_counts", None)
    if count is None:
        return None
    with unset_fake_temporarily():  # a dry run counts too
        return _counted(count, problem, rank)


def _counted(
    count: Callable[..., Tensor], problem: Problem, rank: int
) -> tuple[list[int], list[int]]:
    starts = torch.arange(problem.world_size) * problem.shard
    spans = (starts, starts + problem.shard)
    own = (spans[0][rank : rank + 1], spans[1][rank : rank + 1])
    found = []
    for queries, keys in ((own, spans), (spans, own)):
        rows = count(queries, keys, problem.heads, problem.kv_heads, is_causal=problem.is_causal)
        rows[rank] = 0
        found.append(rows.tolist())
    return found[0], found[1]


def received_rows(problem: Problem, rank: int) -> int:
    """How many packed rows a rank receives in all."""
    counted = row_counts(problem, rank)
    if counted is not None:
        return sum(counted[0])
    queries = problem.span(rank)
    return sum(problem.rows(queries, source).count for source in problem.sources(rank))


def hops(problem: Problem) -> list[int]:
    """The distances (destination - source) modulo P over which some rank needs rows."""
    size = problem.world_size
    found = bytearray(size)
    for rank in range(size):
        for ranks in problem.seen(rank):
            near, far = rank - ranks.stop + 1, rank - ranks.start
            # Those below 0 are what they are modulo P.
            for low, high in ((max(near, 0), far), (near + size, min(far, -1) + size)):
                if low <= high:
                    found[low : high + 1] = b"\1" * (high + 1 - low)
    return [hop for hop in range(1, size) if found[hop]]


def _route(problem: Problem, rank: int, over: Iterable[int]) -> Route:
    size = problem.world_size
    over = list(over)
    needed = problem.sources(rank)
    sources = sorted({(rank - hop) % size for hop in over} & needed)
    candidates = sorted({(rank + hop) % size for hop in over})
    destinations = [
        other
        for other in candidates
        if other != rank and any(rank in ranks for ranks in problem.seen(other))
    ]
    queries = problem.span(rank)
    return Route(
        tuple(sources),
        tuple(problem.rows(queries, source) for source in sources),
        tuple(destinations),
        tuple(problem.rows(problem.span(other), rank) for other in destinations),
    )
