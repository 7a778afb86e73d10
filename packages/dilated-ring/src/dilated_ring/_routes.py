"""Which rows go where: made alike on all ranks from what the ranks agree on.

n rows of a shard, P ranks. Rank p has the rows from p * n up to (p + 1) * n.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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

    def sources(self, rank: int) -> set[int]:
        """The other ranks some of whose rows a rank may see."""
        if not self.shard:
            return set()
        visible = self.pattern.spans.visible_keys(
            self.span(rank), self.length, is_causal=self.is_causal
        )
        ranks = (range(keys.start // self.shard, -(-keys.stop // self.shard)) for keys in visible)
        return {source for found in ranks for source in found} - {rank}


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
    hops = _hops(problem)
    return (_route(problem, rank, hops),) if hops else ()


@remembered(64)
def ring_routes(problem: Problem, rank: int) -> tuple[Route, ...]:
    """One exchange for each distance between ranks, nearest first, but for those no rank needs."""
    return tuple(_route(problem, rank, [hop]) for hop in _hops(problem))


def received_rows(problem: Problem, rank: int) -> int:
    """How many packed rows a rank receives in all."""
    queries = problem.span(rank)
    return sum(problem.rows(queries, source).count for source in problem.sources(rank))


def _hops(problem: Problem) -> list[int]:
    """The distances (destination - source) modulo P over which some rank needs rows."""
    size = problem.world_size
    found = {(rank - source) % size for rank in range(size) for source in problem.sources(rank)}
    return sorted(found)


def _route(problem: Problem, rank: int, hops: Iterable[int]) -> Route:
    size = problem.world_size
    hops = list(hops)
    needed = problem.sources(rank)
    sources = sorted({(rank - hop) % size for hop in hops} & needed)
    candidates = sorted({(rank + hop) % size for hop in hops})
    destinations = [other for other in candidates if rank in problem.sources(other)]
    queries = problem.span(rank)
    return Route(
        tuple(sources),
        tuple(problem.rows(queries, source) for source in sources),
        tuple(destinations),
        tuple(problem.rows(problem.span(other), rank) for other in destinations),
    )
