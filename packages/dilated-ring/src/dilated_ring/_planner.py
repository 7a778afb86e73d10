"""What ring attention costs, before there is a rank to run it on: bytes, memory, time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dilated_core import Branch, DilatedPattern
from dilated_core.extending import accumulate_dtype
from dilated_ring._heads import Trade
from dilated_ring._routes import Problem, Route, gather_routes, ring_routes
from dilated_ring._strategy import Strategy, check_strategy, choose_strategy

# Two matrix products in a forward, five in a backward.
_BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives from others.

    Attributes:
        forward: rows of keys and values; with "heads" also queries and results.
        backward: gradients of them; with "ring" also the rows once more.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Bytes of a forward and its backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        tensors: query, key, value, output and log-sum-exp.
        kept: rows of other ranks that the backward needs.
        forward_messages: the most that messages on their way take in a forward, without `kept`.
        backward_messages: the same in a backward.
        gradients: of query, key and value, wide.
    """

    tensors: int
    kept: int
    forward_messages: int
    backward_messages: int
    gradients: int

    @property
    def peak(self) -> int:
        """The most at once."""
        backward = self.backward_messages + self.gradients
        return self.tensors + self.kept + max(self.forward_messages, backward)


@dataclass(frozen=True)
class Seconds:
    """Predicted time of one pass on one rank.

    Attributes:
        compute: of attention.
        communication: of the messages.
        exposed: of communication, what attention to the rank's own keys does not hide.
    """

    compute: float
    communication: float
    exposed: float


@dataclass(frozen=True)
class Plan:
    """What one call costs one rank.

    Attributes:
        rank: the rank.
        shard: rows of each rank.
        strategy: how rows travel.
        reason: why.
        branches: the pattern's branches, and the bytes that each moves.
        traffic: bytes that all of them move.
        memory: bytes that the rank holds.
        flops: floating-point operations of this rank's forward; the mean over ranks if not causal.
        forward: predicted time of a forward.
        backward: predicted time of a backward.
    """

    rank: int
    shard: int
    strategy: Strategy
    reason: str
    branches: tuple[tuple[Branch, Traffic], ...]
    traffic: Traffic
    memory: Memory
    flops: int
    forward: Seconds
    backward: Seconds

    @property
    def exposed_share(self) -> float:
        """Share of the time of forward and backward in which the rank waits for messages."""
        exposed = self.forward.exposed + self.backward.exposed
        return exposed / (self.forward.compute + self.backward.compute + exposed)


def plan(
    pattern: DilatedPattern,
    *,
    length: int,
    world_size: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    is_causal: bool = False,
    strategy: str = "auto",
    rank: int | None = None,
    bytes_per_second: float = 250e9,
    flops_per_second: float = 300e12,
) -> Plan:
    """What `ring_attention` of a sequence costs one of its ranks.

    Args:
        pattern: which keys a query sees.
        length: positions N of the whole sequence, a multiple of world_size.
        world_size: ranks P.
        heads: query heads H.
        head_dim: width D of a head.
        kv_heads: key heads; heads when None.
        batch: sequences B.
        dtype: of query, key and value.
        is_causal: whether the keys after each query are hidden.
        strategy: as in `ring_attention`.
        rank: whose costs; the last rank, which has the most where it is causal, when None.
        bytes_per_second: what a rank receives at most.
        flops_per_second: of attention on one rank.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
    kv_heads = heads if kv_heads is None else kv_heads
    rank = world_size - 1 if rank is None else rank
    sizes = {
        "length": length, "world_size": world_size, "heads": heads, "head_dim": head_dim,
        "kv_heads": kv_heads, "batch": batch, "bytes_per_second": bytes_per_second,
        "flops_per_second": flops_per_second,
    }  # fmt: skip
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name} must be positive. Got {size}.")
    if length % world_size:
        raise ValueError(f"length must be a multiple of world_size ({world_size}). Got {length}.")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads ({kv_heads}). Got {heads}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}). Got {rank}.")
    check_strategy(strategy)
    shard = length // world_size
    problem = Problem(pattern, shard, world_size, heads, kv_heads, is_causal)
    choice = choose_strategy(problem)
    picked, reason = choice.strategy, choice.reason
    if strategy != "auto":
        picked, reason = strategy, "it was asked for"  # type: ignore[assignment]  # checked above
    costs = _Costs(batch, head_dim, dtype.itemsize, accumulate_dtype(dtype).itemsize)
    branches = tuple(
        # Segments that divide the shards need nothing from other ranks.
        (branch, costs.traffic(alone, rank, picked) if shard % branch[0] else Traffic(0, 0))
        for branch, alone in _by_branch(problem)
    )
    traffic = Traffic(
        sum(found.forward for _, found in branches), sum(found.backward for _, found in branches)
    )
    flops = batch * _flops(problem, rank, head_dim)
    local = min(flops, batch * pattern.flops(shard, heads, head_dim, is_causal=is_causal))
    times = (
        _seconds(
            factor * flops / flops_per_second,
            factor * local / flops_per_second,
            received / bytes_per_second,
        )
        for factor, received in ((1.0, traffic.forward), (_BACKWARD_FLOPS, traffic.backward))
    )
    memory = costs.memory(problem, rank, picked)
    return Plan(rank, shard, picked, reason, branches, traffic, memory, flops, *times)


@dataclass(frozen=True)
class _Costs:
    """Bytes of what moves and of what is held."""

    batch: int
    head_dim: int
    item: int
    wide: int

    def pairs(self, rows: int, item: int) -> int:
        """Packed rows of keys with their values, or of both gradients."""
        return rows * self.batch * 2 * self.head_dim * item

    def traffic(self, problem: Problem, rank: int, strategy: Strategy) -> Traffic:
        """What one rank receives."""
        if strategy == "heads":
            return self._trade_traffic(Trade(problem, rank))
        routes = _routes(problem, rank, strategy)
        rows = self.pairs(sum(route.rows_received for route in routes), self.item)
        home = self.pairs(sum(route.rows_sent for route in routes), self.wide)
        return Traffic(rows, home + (rows if strategy == "ring" else 0))

    def _trade_traffic(self, trade: Trade) -> Traffic:
        vector = self.batch * self.head_dim
        moved = _from_others(trade, trade.message_rows[0])
        results = _from_others(trade, trade.counts(trade.sent, 0))
        queries = _from_others(trade, trade.counts(trade.received, 0))
        home = _from_others(trade, trade.message_rows[1])
        return Traffic(
            (moved + results) * vector * self.item + results * self.batch * self.wide,
            queries * (vector * self.item + 2 * self.batch * self.wide) + home * vector * self.wide,
        )

    def memory(self, problem: Problem, rank: int, strategy: Strategy) -> Memory:
        """What one rank holds."""
        n, heads, kv_heads = problem.shard, problem.heads, problem.kv_heads
        vectors = self.batch * n * self.head_dim
        tensors = vectors * 2 * (heads + kv_heads) * self.item + self.batch * n * heads * self.wide
        gradients = vectors * (heads + 2 * kv_heads) * self.wide
        if strategy == "heads":
            kept, forward, backward = self._trade_memory(Trade(problem, rank))
        else:
            kept, forward, backward = self._route_memory(_routes(problem, rank, strategy), strategy)
        return Memory(tensors, kept, forward, backward, gradients)

    def _route_memory(self, routes: tuple[Route, ...], strategy: Strategy) -> tuple[int, int, int]:
        """Kept rows, and messages at once in a forward and in a backward."""
        received = [route.rows_received for route in routes]
        sent = [route.rows_sent for route in routes]
        if strategy == "gather":
            home = self.pairs(sum(received) + sum(sent), self.wide)
            return self.pairs(sum(received), self.item), self.pairs(sum(sent), self.item), home
        # While one round is attended, the rows of the next and the gradients of the last travel.
        rounds = range(len(routes))
        there = [self.pairs(received[i] + sent[i], self.item) for i in rounds] + [0]
        back = [0] + [self.pairs(received[i] + sent[i], self.wide) for i in rounds]
        at_once = [self.pairs(received[i], self.item) + there[i + 1] for i in rounds]
        forward = max(there[0], *at_once) if routes else 0
        backward = max((at_once[i] + max(back[i], back[i + 1]) for i in rounds), default=0)
        return 0, forward, max(there[0], backward)

    def _trade_memory(self, trade: Trade) -> tuple[int, int, int]:
        """The same where rows are traded for heads: all of a pass at once."""
        vector = self.batch * self.head_dim
        received, sent = (sum(rows) for rows in trade.message_rows)
        results = sum(trade.counts(trade.received, 0)) + sum(trade.counts(trade.sent, 0))
        forward = (sent + results) * vector * self.item + results * self.batch * self.wide
        backward = (received + sent) * vector * self.wide + results * (
            vector * self.item + 2 * self.batch * self.wide
        )
        return received * vector * self.item, forward, backward


def _from_others(trade: Trade, rows: list[int]) -> int:
    return sum(rows) - rows[trade.rank]


def _routes(problem: Problem, rank: int, strategy: Strategy) -> tuple[Route, ...]:
    return (gather_routes if strategy == "gather" else ring_routes)(problem, rank)


def _by_branch(problem: Problem) -> Iterator[tuple[Branch, Problem]]:
    """Each branch as a problem of its own, in which all other branches see single rows."""
    pattern = problem.pattern
    assert isinstance(pattern, DilatedPattern)
    for number, branch in enumerate(pattern.branches):
        each = [branch if k == number else Branch(1, 1) for k in range(len(pattern.branches))]
        alone = DilatedPattern(
            *zip(*each, strict=True),
            head_offsets=pattern.head_offsets,
            head_groups=pattern.head_groups,
        )
        yield branch, Problem(
            alone, problem.shard, problem.world_size, problem.heads, problem.kv_heads,
            problem.is_causal,
        )  # fmt: skip


def _flops(problem: Problem, rank: int, head_dim: int) -> int:
    """Of one rank's queries: exact if causal, where they end a shorter sequence; else the mean."""
    pattern = problem.pattern
    assert isinstance(pattern, DilatedPattern)
    heads, n = problem.heads, problem.shard
    if not problem.is_causal:
        return pattern.flops(problem.length, heads, head_dim) // problem.world_size
    before, until = (
        pattern.flops(k * n, heads, head_dim, is_causal=True) for k in (rank, rank + 1)
    )
    return until - before


def _seconds(compute: float, local: float, communication: float) -> Seconds:
    return Seconds(compute, communication, max(0.0, communication - local))
