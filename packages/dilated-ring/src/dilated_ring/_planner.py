"""What ring attention costs, before there is a rank to run it on: bytes, memory, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import Branch, DilatedPattern
from dilated_core.extending import accumulate_dtype
from dilated_core.interfaces import AttentionPattern, PackedRows
from dilated_ring._documents import Documents, read_documents
from dilated_ring._loans import Ledger, balance, cannot_lend, find_loans, make_ledger
from dilated_ring._nodes import NodeRoutes
from dilated_ring._routes import Problem, gather_routes, hops, ring_routes, row_counts
from dilated_ring._strategy import Strategy, check_strategy, choose_strategy
from dilated_ring._trade import Trade, make_trade

# Two matrix products in a forward, five in a backward.
_BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives from others.

    Attributes:
        forward: rows of keys and values; with "heads" also queries and results.
        backward: gradients of them; with "ring" also the rows once more.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> shape = {"length": 4096, "world_size": 4, "heads": 4, "head_dim": 64}
        >>> traffic = plan(DilatedPattern.longnet(4096), **shape).traffic
        >>> traffic.total == traffic.forward + traffic.backward
        True
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Bytes of a forward and its backward."""
        return self.forward + self.backward

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.forward + other.forward, self.backward + other.backward)


_NOTHING = Traffic(0, 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        tensors: query, key, value, output and log-sum-exp.
        kept: rows of other ranks that the backward needs.
        forward_messages: the most that messages on their way take in a forward, without `kept`.
        backward_messages: the same in a backward.
        gradients: of query, key and value, wide.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> shape = {"length": 4096, "world_size": 4, "heads": 4, "head_dim": 64}
        >>> plan(DilatedPattern.longnet(4096), **shape).memory.tensors
        2113536
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
        exposed: of communication, what attention to the rank's own keys does not hide. With
            "gather" between nodes, the second of two steps, which starts after that attention.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> shape = {"length": 1 << 20, "world_size": 8, "heads": 12, "head_dim": 64}
        >>> speeds = {"flops_per_second": 4e14, "bytes_per_second": 4e11}
        >>> job = plan(DilatedPattern.longnet(1 << 20), **shape, **speeds)
        >>> 0 < job.forward.compute < 1
        True
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
        branches: the branches of a DilatedPattern, and the bytes that each moves; else none, as
            with "lend", where all branches share the queries that travel.
        traffic: bytes that all rows move.
        across: the part of `traffic` that comes from other nodes.
        memory: bytes that the rank holds.
        balance: pairs of a query and a key that ranks attend, the mean over the largest; None with
            "heads", or where the pattern cannot count them or the ranks are more than 64.
        flops: floating-point operations of this rank's forward; the mean over ranks if not causal,
            unless queries are lent; None, as are the times, of a pattern other than DilatedPattern.
        forward: predicted time of a forward, or None.
        backward: predicted time of a backward, or None.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> shape = {"length": 4096, "world_size": 4, "heads": 4, "head_dim": 64}
        >>> job = plan(DilatedPattern.longnet(4096), **shape)
        >>> job.shard, job.strategy
        (1024, 'ring')
    """

    rank: int
    shard: int
    strategy: Strategy
    reason: str
    branches: tuple[tuple[Branch, Traffic], ...]
    traffic: Traffic
    across: Traffic
    memory: Memory
    balance: float | None
    flops: int | None
    forward: Seconds | None
    backward: Seconds | None

    @property
    def exposed_share(self) -> float | None:
        """Share of the time of forward and backward in which the rank waits for messages."""
        if self.forward is None or self.backward is None:
            return None
        exposed = self.forward.exposed + self.backward.exposed
        return exposed / (self.forward.compute + self.backward.compute + exposed)


def plan(
    pattern: AttentionPattern,
    *,
    length: int,
    world_size: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    is_causal: bool = False,
    strategy: Strategy = "auto",
    rank: int | None = None,
    ranks_per_node: int | None = None,
    bytes_per_second: float = 250e9,
    bytes_per_second_across: float | None = None,
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
        cu_seqlens: 0 and the ends of documents, as in `ring_attention`; batch must then be 1.
        is_causal: whether the keys after each query are hidden.
        strategy: as in `ring_attention`.
        rank: whose costs; the last rank, which has the most where it is causal, when None.
        ranks_per_node: where the ranks are a mesh of nodes; one node when None.
        bytes_per_second: what a rank receives at most, of the ranks of its node.
        bytes_per_second_across: what it receives at most of other nodes; with `ranks_per_node`.
        flops_per_second: of attention on one rank.

    Raises:
        TypeError: pattern is no AttentionPattern.
        ValueError: a size or speed is not positive or does not divide another, strategy names none
            or cannot serve the call, or the pattern does not fit the length, shards or heads.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> pattern = DilatedPattern.longnet(1 << 20)
        >>> job = plan(pattern, length=1 << 20, world_size=8, heads=12, head_dim=64, is_causal=True)
        >>> f"{job.memory.peak / 2**30:.1f} GiB"
        '1.9 GiB'
    """
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"pattern must be an AttentionPattern. Got {type(pattern).__name__}.")
    if (ranks_per_node is None) != (bytes_per_second_across is None):
        raise ValueError(
            "bytes_per_second_across must be given with ranks_per_node. "
            f"Got {bytes_per_second_across} and {ranks_per_node}."
        )
    kv_heads = heads if kv_heads is None else kv_heads
    rank = world_size - 1 if rank is None else rank
    size = world_size if ranks_per_node is None else ranks_per_node
    across_speed = bytes_per_second if bytes_per_second_across is None else bytes_per_second_across
    _check_sizes(
        length=length, world_size=world_size, heads=heads, head_dim=head_dim, kv_heads=kv_heads,
        batch=batch, ranks_per_node=size, bytes_per_second=bytes_per_second,
        bytes_per_second_across=across_speed, flops_per_second=flops_per_second,
    )  # fmt: skip
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}). Got {rank}.")
    check_strategy(strategy)
    shard = length // world_size
    pattern.spans.check(length, shard, heads)
    documents = None
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"batch must be 1 with cu_seqlens. Got {batch}.")
        documents = read_documents(pattern, cu_seqlens, length)
    problem = Problem(documents or pattern, shard, world_size, heads, kv_heads, is_causal)
    choice = choose_strategy(problem, strategy, in_nodes=1 < size < world_size)
    picked = choice.strategy
    costs = _Costs(rank, size, batch, head_dim, dtype.itemsize, accumulate_dtype(dtype).itemsize)
    inside, across = costs.traffic(problem, picked)
    flops: int | None = None
    even = None
    if picked != "heads" and cannot_lend(problem) is None:
        loans = find_loans(problem)
        even = balance(loans.shared if picked == "lend" else loans.alone)
    times: list[Seconds] = []
    branches: list[tuple[Branch, Traffic]] = []
    if isinstance(pattern, DilatedPattern):
        for branch, alone in _by_branch(pattern, problem) if picked != "lend" else ():
            # Segments that divide the shards need nothing from other ranks.
            travels = documents is not None or shard % branch[0]
            parts = costs.traffic(alone, picked) if travels else (_NOTHING, _NOTHING)
            branches.append((branch, parts[0] + parts[1]))
        if picked == "lend":
            flops = batch * 4 * head_dim * find_loans(problem).shared[rank]
        else:
            flops = batch * _flops(pattern, problem, documents, rank, head_dim)
        local = min(flops, batch * pattern.flops(shard, heads, head_dim, is_causal=is_causal))
        passes = (
            (1.0, inside.forward, across.forward, False),
            (_BACKWARD_FLOPS, inside.backward, across.backward, True),
        )
        for factor, near, far, home in passes:
            rate = flops_per_second / factor
            beside, after = costs.steps(
                problem, picked, near / bytes_per_second, far / across_speed, home=home
            )
            times.append(_seconds(flops / rate, local / rate, beside, after))
    return Plan(
        rank, shard, picked, choice.reason, tuple(branches), inside + across, across,
        costs.memory(problem, picked), even, flops, *(times or (None, None)),
    )  # fmt: skip


def _check_sizes(**sizes: float) -> None:
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive. Got {value}.")
    world_size, size = sizes["world_size"], sizes["ranks_per_node"]
    if world_size % size:
        raise ValueError(f"ranks_per_node must divide world_size ({world_size}). Got {size}.")
    for name, part in (("length", "world_size"), ("heads", "kv_heads")):
        if sizes[name] % sizes[part]:
            raise ValueError(
                f"{name} must be a multiple of {part} ({sizes[part]}). Got {sizes[name]}."
            )


class _Moves(NamedTuple):
    """How many packed rows one exchange brings a rank from others, and takes to them, by rank."""

    received: dict[int, int]
    sent: dict[int, int]


@dataclass(frozen=True)
class _Costs:
    """Bytes of what moves to one rank, and of what it holds."""

    rank: int
    node_size: int
    batch: int
    head_dim: int
    item: int
    wide: int

    def pairs(self, rows: int, item: int) -> int:
        """Packed rows of keys with their values, or of both gradients."""
        return rows * self.batch * 2 * self.head_dim * item

    def traffic(self, problem: Problem, strategy: Strategy) -> tuple[Traffic, Traffic]:
        """What the rank receives from others in its node, and from other nodes."""
        if strategy == "heads":
            trade = make_trade(problem, self.rank)
            return self._trade_traffic(trade, near=True), self._trade_traffic(trade, near=False)
        if strategy == "lend":
            ledger = make_ledger(problem, self.rank)
            return self._lend_traffic(ledger, near=True), self._lend_traffic(ledger, near=False)
        if self._in_two_steps(problem, strategy):
            return self._node_traffic(NodeRoutes.of(problem, self.rank, self.node_size))
        # Bytes are the same in one exchange and in many.
        counted = row_counts(problem, self.rank) is not None
        routes = _routes(problem, self.rank, "gather" if counted else strategy)
        return (
            self._route_traffic(routes, strategy, near=True),
            self._route_traffic(routes, strategy, near=False),
        )

    def steps(
        self, problem: Problem, strategy: Strategy, near: float, far: float, *, home: bool
    ) -> tuple[float, float]:
        """Time of messages before, or beside, and after attention to the rank's own keys.

        Args:
            problem: of the call.
            strategy: how rows travel.
            near: time of what comes from the node.
            far: time of what comes from other nodes.
            home: whether gradients travel, and not keys.
        """
        if self._in_two_steps(problem, strategy):
            return (near, far) if home else (far, near)
        # In a trade all links are busy at once; the hops of a ring follow each other.
        return max(near, far) if strategy in ("heads", "lend") else near + far, 0.0

    def memory(self, problem: Problem, strategy: Strategy) -> Memory:
        """What the rank holds."""
        n, heads, kv_heads = problem.shard, problem.heads, problem.kv_heads
        vectors = self.batch * n * self.head_dim
        tensors = vectors * 2 * (heads + kv_heads) * self.item + self.batch * n * heads * self.wide
        gradients = vectors * (heads + 2 * kv_heads) * self.wide
        if strategy == "heads":
            kept, forward, backward = self._trade_memory(make_trade(problem, self.rank))
        elif strategy == "lend":
            kept, forward, backward = self._lend_memory(make_ledger(problem, self.rank))
        elif self._in_two_steps(problem, strategy):
            nodes = NodeRoutes.of(problem, self.rank, self.node_size)
            kept, forward, backward = self._node_memory(nodes)
        else:
            routes = _routes(problem, self.rank, strategy)
            kept, forward, backward = self._route_memory(routes, strategy)
        return Memory(tensors, kept, forward, backward, gradients)

    def _in_two_steps(self, problem: Problem, strategy: Strategy) -> bool:
        """Whether rows go between nodes and then inside them."""
        return strategy == "gather" and 1 < self.node_size < problem.world_size

    def _from(self, other: int, *, near: bool) -> bool:
        """Whether a rank is another one in this node, or is one of another node."""
        same = other // self.node_size == self.rank // self.node_size
        return other != self.rank and same == near

    def _route_traffic(
        self, routes: Sequence[_Moves], strategy: Strategy, *, near: bool
    ) -> Traffic:
        def moved(rows: Mapping[int, int]) -> int:
            return sum(n for other, n in rows.items() if self._from(other, near=near))

        received = sum(moved(route.received) for route in routes)
        sent = sum(moved(route.sent) for route in routes)
        rows, home = self.pairs(received, self.item), self.pairs(sent, self.wide)
        return Traffic(rows, home + (rows if strategy == "ring" else 0))

    def _node_traffic(self, routes: NodeRoutes) -> tuple[Traffic, Traffic]:
        """Rows come from other nodes and then inside; their gradients go the other way."""
        received, sent = (
            sum(rows) - rows[routes.place] for rows in (routes.received_inside, routes.sent_inside)
        )
        return (
            Traffic(self.pairs(received, self.item), self.pairs(sent, self.wide)),
            Traffic(
                self.pairs(routes.rows_arriving, self.item),
                self.pairs(routes.rows_leaving, self.wide),
            ),
        )

    def _trade_traffic(self, trade: Trade, *, near: bool) -> Traffic:
        def moved(rows: list[int]) -> int:
            return sum(count for other, count in enumerate(rows) if self._from(other, near=near))

        vector = self.batch * self.head_dim
        rows = moved(trade.message_rows[0])
        results = moved(trade.counts(trade.sent, 0))
        queries = moved(trade.counts(trade.received, 0))
        home = moved(trade.message_rows[1])
        return Traffic(
            (rows + results) * vector * self.item + results * self.batch * self.wide,
            queries * (vector * self.item + 2 * self.batch * self.wide) + home * vector * self.wide,
        )

    def _lend_traffic(self, ledger: Ledger, *, near: bool) -> Traffic:
        def moved(rows: list[int]) -> int:
            return sum(count for other, count in enumerate(rows) if self._from(other, near=near))

        keys, home = (moved(rows) for rows in ledger.route.splits(len(ledger.sent)))
        number = self.batch * ledger.heads
        vector = number * self.head_dim
        helped, lent = moved(ledger.received), moved(ledger.sent)
        return Traffic(
            self.pairs(keys, self.item) + helped * vector * self.item
            + lent * (vector * self.item + number * self.wide),
            self.pairs(home, self.wide) + lent * vector * self.wide
            + helped * 2 * (vector * self.item + number * self.wide),
        )  # fmt: skip

    def _lend_memory(self, ledger: Ledger) -> tuple[int, int, int]:
        """The same where queries are lent: all of a pass at once."""
        keys, home = ledger.route.rows_received, ledger.route.rows_sent
        helped, lent = sum(ledger.received), sum(ledger.sent)
        number = self.batch * ledger.heads
        query, gradient = (number * self.head_dim * size for size in (self.item, self.wide))
        result = query + number * self.wide
        own = max((rows.packed.count for rows in ledger.helped), default=0)
        own_keys = self.pairs(own, self.item)
        return (
            self.pairs(keys, self.item) + helped * query,
            self.pairs(home, self.item) + lent * query + helped * result
            + max(own_keys, lent * result),
            self.pairs(keys + home, self.wide) + 2 * (helped + lent) * result + helped * gradient
            + max(own_keys + self.pairs(own, self.wide), lent * gradient),
        )  # fmt: skip

    def _node_memory(self, routes: NodeRoutes) -> tuple[int, int, int]:
        """Kept rows, and messages at once in a forward and in a backward."""
        received, sent = sum(routes.received_inside), sum(routes.sent_inside)
        held = routes.rows_leaving + routes.rows_own + routes.rows_arriving
        return (
            self.pairs(received, self.item),
            self.pairs(held + sent, self.item),
            self.pairs(received + sent + held, self.wide),
        )

    def _route_memory(self, routes: list[_Moves], strategy: Strategy) -> tuple[int, int, int]:
        """Kept rows, and messages at once in a forward and in a backward."""
        received = [sum(route.received.values()) for route in routes]
        sent = [sum(route.sent.values()) for route in routes]
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


def _routes(problem: Problem, rank: int, strategy: Strategy) -> list[_Moves]:
    """The exchanges of a rank, made by counting alone where the pattern can be counted."""
    counted = row_counts(problem, rank)
    if counted is None:
        made = (gather_routes if strategy == "gather" else ring_routes)(problem, rank)
        return [
            _Moves(_counts(x.sources, x.received), _counts(x.destinations, x.sent)) for x in made
        ]
    received, sent = counted
    if strategy == "gather":
        return [_Moves(dict(enumerate(received)), dict(enumerate(sent)))]
    size = problem.world_size
    return [
        _Moves({there: received[there]}, {here: sent[here]})
        for there, here in (((rank - hop) % size, (rank + hop) % size) for hop in hops(problem))
    ]


def _counts(ranks: Sequence[int], packed: Sequence[PackedRows]) -> dict[int, int]:
    return {rank: rows.count for rank, rows in zip(ranks, packed, strict=True)}


def _by_branch(pattern: DilatedPattern, problem: Problem) -> Iterator[tuple[Branch, Problem]]:
    """Each branch as a problem of its own, in which all other branches see single rows."""
    for number, branch in enumerate(pattern.branches):
        each = [branch if k == number else Branch(1, 1) for k in range(len(pattern.branches))]
        alone = DilatedPattern(
            *zip(*each, strict=True),
            head_offsets=pattern.head_offsets,
            head_groups=pattern.head_groups,
        )
        whole = problem.pattern
        ends = whole.ends if isinstance(whole, Documents) else None
        yield branch, replace(problem, pattern=Documents(alone, ends) if ends else alone)


def _flops(
    pattern: DilatedPattern, problem: Problem, documents: Documents | None, rank: int, head_dim: int
) -> int:
    """Of one rank's queries: exact if causal, where they end a shorter sequence; else the mean."""

    def flops(length: int) -> int:
        return pattern.flops(length, problem.heads, head_dim, is_causal=problem.is_causal)

    each = documents or Documents(pattern, (0, problem.length))
    if not problem.is_causal:
        return sum(map(flops, each.each)) // problem.world_size
    pieces = [piece.inside for piece in each.pieces(problem.span(rank))]
    return sum(flops(inside.stop) - flops(inside.start) for inside in pieces)


def _seconds(compute: float, local: float, hidden: float, after: float) -> Seconds:
    """Times of a pass, whose messages travel beside attention to own keys, and after it."""
    return Seconds(compute, hidden + after, max(0.0, hidden - local) + after)
